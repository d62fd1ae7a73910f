"""Labelled images by index, through timm's readers; scikit-learn's digits are built in."""

from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import IterableDataset

from ..errors import DataError, UnknownNameError
from .quiet import quiet
from .specs import DataSpec

_READERS = ("torch/cifar10", "torch/cifar100", "torch/image_folder", "hfds/OWNER/NAME", "wds/NAME", "tfds/NAME")
_PACKAGES = {
    "torch": "torchvision",
    "hfds": "'vitrim[hf]'",
    "hfids": "'vitrim[hf]'",
    "wds": "'vitrim[wds]'",
    "tfds": "tensorflow-datasets tensorflow",
}
"""What each of timm's readers needs."""


class Images:
    """Labelled images by index, decoded but not transformed; knows the name of each and of its classes."""

    def __init__(self, source: Any, classes: Sequence[str], mode: str = "RGB") -> None:
        self.source, self.classes, self.mode = source, list(classes), mode

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        """Where image `index` comes from."""
        if (reader := getattr(self.source, "reader", None)) is not None:
            return str(reader.filename(index, absolute=True))
        if (samples := getattr(self.source, "samples", None)) is not None:
            return str(samples[index][0])
        return f"image {index}"

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Decode image `index`; `DataError` names the file if that fails."""
        reader = getattr(self.source, "reader", None)
        try:
            if reader is None:
                image, target = self.source[index][:2]
                return image.convert(self.mode), int(target)
            item, target = reader[index][:2]  # timm's own data set would hide an unreadable file behind its neighbour.
            with item, Image.open(item) as image:
                return image.convert(self.mode), int(target)
        except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three for damaged files.
            reason = "it is not an image" if "cannot identify" in str(error) else error
            raise DataError(f"cannot read {self.name(index)}: {reason}") from None


class _Digits:
    """scikit-learn's 1,797 handwritten digits, 8x8: every fifth of each class is for testing."""

    def __init__(self, train: bool) -> None:
        from sklearn.datasets import load_digits

        bunch: Any = load_digits()
        position = np.zeros(len(bunch.target), dtype=int)
        for digit in range(10):
            where = np.flatnonzero(bunch.target == digit)
            position[where] = np.arange(len(where))
        chosen = (position % 5 != 0) if train else (position % 5 == 0)
        self.pixels = (bunch.images[chosen] * (255 / 16)).round().astype(np.uint8)
        self.targets = bunch.target[chosen]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), int(self.targets[index])


class _Gathered:
    """A stream (wds/, tfds/, hfids/) read once, in order, into memory, as PNG.

    With an index its images can be shuffled, held out and varied like all others, and an interrupted run continues
    exactly. What outgrows the memory is better unpacked into folders.
    """

    def __init__(self, stream: Iterable[tuple[Image.Image, int]]) -> None:
        self.items: list[tuple[bytes, int]] = []
        for image, target in stream:
            buffer = BytesIO()
            image.save(buffer, "PNG")
            self.items.append((buffer.getvalue(), int(target)))
        self.classes = [str(number) for number in range(1 + max((target for _, target in self.items), default=-1))]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        pixels, target = self.items[index]
        return Image.open(BytesIO(pixels)), target


def open_images(spec: DataSpec, train: bool) -> Images:
    """The training or test images of a data set.

    Raises:
        DataError: folder missing, split missing, class without images, a reader that is not installed.
    """
    spec.check()
    if spec.name == "digits":
        if (spec.train_split, spec.test_split) not in (("train", None), ("train", "test")):
            raise DataError("digits come with splits of their own; leave data.train_split and data.test_split out")
        return Images(_Digits(train), [str(digit) for digit in range(10)])
    if spec.name == "folder":
        return _open_folder(spec, train)
    return _open_by_reader(spec, train)


def open_both(spec: DataSpec) -> tuple[Images, Images]:
    """The training and the test images of a data set, which must have the same classes."""
    train, test = open_images(spec, True), open_images(spec, False)
    if train.classes != test.classes:
        only = sorted(set(train.classes) ^ set(test.classes))
        raise DataError(f"training and test images have different classes: {', '.join(only[:5])}")
    return train, test


def look_for(spec: DataSpec) -> None:
    """See whether the images are where a recipe says, without listing them; what a reader finds is not known ahead.

    Raises:
        DataError: folder missing, split missing, or no class in it.
    """
    if spec.name == "folder":
        for train in (True, False):
            _split_of(spec, train)


def _split_of(spec: DataSpec, train: bool) -> tuple[Path, list[Path]]:
    """The folder of a split, and those of its classes."""
    if spec.root is None:
        raise DataError("a folder of images needs data.root")
    root = Path(spec.root)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder")
    wanted = [spec.train_split] if train else [spec.test_split] if spec.test_split else ["test", "val", "validation"]
    found = next((root / name for name in wanted if (root / name).is_dir()), None)
    if found is None:
        have = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) or "none"
        raise DataError(f"{root} has no folder {' or '.join(wanted)}; folders there: {have}")
    classes = sorted(p for p in found.iterdir() if p.is_dir())
    if not classes:
        raise DataError(f"{found} has no class folders; expected {found}/CLASS/image.jpg")
    return found, classes


def _open_folder(spec: DataSpec, train: bool) -> Images:
    found, classes = _split_of(spec, train)
    try:
        source = create_dataset("", root=str(found), search_split=False)
    except RuntimeError:
        raise DataError(f"{found} holds no images") from None
    names = source.reader.class_to_idx
    for folder in classes:
        if folder.name not in names:
            raise DataError(f"class folder {folder} holds no images of its own; fill it or remove it")
    if extra := set(names) - {folder.name for folder in classes}:
        raise DataError(f"{found} has images outside CLASS/image.jpg ({min(extra) or 'in no class'}); move them")
    return Images(source, list(names))


def _open_by_reader(spec: DataSpec, train: bool) -> Images:
    kind, slash, _ = spec.name.partition("/")
    kind = kind.lower()  # As timm reads it.
    if not slash or kind not in _PACKAGES:
        raise UnknownNameError("data set", spec.name, ("digits", "folder", *_READERS))
    if kind in ("torch", "wds") and spec.root is None:
        raise DataError(f"{spec.name} needs data.root, the folder to find it in or to download it to")
    split = spec.train_split if train else spec.test_split or "validation"
    try:
        with quiet("timm.data"):
            source = create_dataset(spec.name, root=spec.root, split=split, download=spec.download)
    except ImportError as error:
        raise DataError(f"{spec.name} needs the package {error.name}; pip install {_PACKAGES[kind]}") from None
    except Exception as error:  # Readers fail in many ways; all of them mean that there is nothing to read.
        reason = " ".join(str(error).split()) or type(error).__name__
        hint = "" if spec.download or kind == "wds" else "; --data.download fetches it where the reader can"
        raise DataError(f"cannot open data set {spec.name!r} in {spec.root}: {reason}{hint}") from None
    if isinstance(source, IterableDataset):
        gathered = _Gathered(source)
        return Images(gathered, gathered.classes)
    classes = getattr(source, "classes", None) or getattr(getattr(source, "reader", None), "class_to_idx", None)
    if not classes:
        raise DataError(f"data set {spec.name!r} does not name its classes")
    return Images(source, list(classes))
