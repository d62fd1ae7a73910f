"""Data sets that timm reads: those of torchvision and Hugging Face, WebDataset shards and TFDS."""

import re
from collections.abc import Iterable
from functools import partial
from io import BytesIO
from typing import Any

from PIL import Image
from timm.data import create_dataset
from torch.utils.data import IterableDataset

from ..errors import DataError, NoSplitError, UnknownNameError
from .decode import decode, read_image
from .digits import BUILT_IN
from .images import Images
from .quiet import quiet
from .specs import TEST_SPLITS, DataSpec

_READERS = ("torch/cifar10", "torch/cifar100", "torch/image_folder", "hfds/OWNER/NAME", "wds/NAME", "tfds/NAME")
_PACKAGES = {
    "torch": "torchvision",
    "hfds": "'vitrim[hf]'",
    "hfids": "'vitrim[hf]'",
    "wds": "'vitrim[wds]'",
    "tfds": "tensorflow-datasets tensorflow",
}
"""Reader of timm -> what to install for it."""
_NO_SPLIT = re.compile(
    r"unknown split|split \S+ not found in info \(dict_keys\(\[[^]]|dataset length is unknown", re.IGNORECASE
)
"""How readers say that there is no such split: hfds and tfds, wds where there are others, hfids."""


class _Gathered:
    """A stream (wds/, tfds/, hfids/) that is read once, in order, and kept in memory as PNG.

    So its images have an index: they are shuffled, held out and augmented like all others, and an interrupted run
    continues exactly. Data sets larger than the memory are better unpacked into folders.
    """

    def __init__(self, stream: Iterable[tuple[Image.Image, int]]) -> None:
        self.items: list[tuple[bytes | DataError, int]] = []
        for image, target in stream:
            try:
                buffer = BytesIO()
                decode(image, "RGB", f"image {len(self.items)}").save(buffer, "PNG", compress_level=1)
                self.items.append((buffer.getvalue(), int(target)))
            except DataError as error:
                self.items.append((error, int(target)))
        self.classes = [str(number) for number in range(1 + max((target for _, target in self.items), default=-1))]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[BytesIO, int]:
        content, target = self.items[index]
        if isinstance(content, DataError):
            raise content
        return BytesIO(content), target


def open_by_reader(spec: DataSpec, train: bool) -> Images:
    """The training or test images of a data set whose name begins with that of a reader.

    Raises:
        NoSplitError: the data set has no such split; where none is named, none whose images have classes.
        DataError: no folder, no such data set, or a package is missing.
        UnknownNameError: no reader has this name.
    """
    kind, slash, _ = spec.name.partition("/")
    kind = kind.lower()  # As timm reads it.
    if not slash or kind not in _PACKAGES:
        raise UnknownNameError("data set", spec.name, (*BUILT_IN, "folder", *_READERS))
    if kind in ("torch", "wds") and spec.root is None:
        raise DataError(f"{spec.name} needs data.root, the folder that holds it or to download it to")
    if train or spec.test_split is not None:
        return _open(spec, kind, spec.train_split if train else spec.test_split or "")
    if kind == "torch":  # Which knows what this means for each of its data sets.
        return _open(spec, kind, "validation")
    fault = ""
    for split in TEST_SPLITS:
        try:
            images = _open(spec, kind, split)
        except NoSplitError as error:
            fault = fault or str(error)
        else:
            if _has_classes(images.source):
                return images
            fault = f"data set {spec.name!r} has no classes in its split {split}"
    raise NoSplitError(f"{fault}; tried {', '.join(TEST_SPLITS)}, and data.test_split names another")


def _open(spec: DataSpec, kind: str, split: str) -> Images:
    mode = "RGB" if kind == "tfds" else ""  # Others then leave the conversion of what they decode to `decode`.
    try:
        with quiet("timm.data"):
            source = create_dataset(spec.name, root=spec.root, split=split, download=spec.download, input_img_mode=mode)
    except ImportError as error:
        raise DataError(f"{spec.name} needs the package {error.name}; pip install {_PACKAGES[kind]}") from None
    except Exception as error:  # Readers fail in many ways; in all of them there is nothing to read.
        reason = " ".join(str(error).split()) or type(error).__name__
        if _NO_SPLIT.search(reason):
            raise NoSplitError(f"data set {spec.name!r} has no split {split}: {reason}") from None
        hint = "" if spec.download or kind == "wds" else "; --data.download fetches it where the reader can"
        raise DataError(f"cannot open data set {spec.name!r} in {spec.root}: {reason}{hint}") from None
    place = f"{spec.name}, {split}"
    if isinstance(source, IterableDataset):
        return _gather(spec.name, source, place)
    source = through_one_door(source)
    classes = getattr(source, "classes", None) or getattr(getattr(source, "reader", None), "class_to_idx", None)
    if not classes:
        raise DataError(f"data set {spec.name!r} does not name its classes")
    return Images(source, list(classes), place=place)


def _has_classes(source: Any) -> bool:
    """Whether the first image has a class, which the test images of competitions have not."""
    gathered = isinstance(source, _Gathered)
    first = next(iter([target for _, target in source.items] if gathered else source.reader.iter_targets()), 0)
    return first is not None and not (isinstance(first, int) and first < 0)


def through_one_door(source: Any) -> Any:
    """The data set of torchvision, with its files decoded as all others are."""
    if hasattr(source, "loader"):
        source.loader = partial(read_image, mode="RGB")
    return source


def _gather(name: str, stream: Any, place: str) -> Images:
    gathered = _Gathered(stream)
    promised = getattr(getattr(stream, "reader", None), "num_samples", None)
    lost = promised - len(gathered) if isinstance(promised, int) else 0
    notes = [f"{name}: {lost} of {promised} images could not be read by timm and are left out"] if lost > 0 else []
    return Images(gathered, gathered.classes, notes=notes, place=place)
