"""Labelled images by index: folders, readers of timm and torchvision, and the digits that are built in."""

import logging
import os
from collections.abc import Iterable, Sequence
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_dataset
from torch.utils.data import IterableDataset

from ..errors import DataError, UnknownNameError
from ..text import message
from .decode import decode, read_image, suffixes
from .digits import BUILT_IN, CLASSES
from .folder import FolderImages, class_folders, natural_key
from .quiet import quiet
from .specs import DataSpec

log = logging.getLogger(__name__)
_READERS = ("torch/cifar10", "torch/cifar100", "torch/image_folder", "hfds/OWNER/NAME", "wds/NAME", "tfds/NAME")
_PACKAGES = {
    "torch": "torchvision",
    "hfds": "'vitrim[hf]'",
    "hfids": "'vitrim[hf]'",
    "wds": "'vitrim[wds]'",
    "tfds": "tensorflow-datasets tensorflow",
}
"""Reader of timm -> what to install for it."""


class Images:
    """Labelled images by index, decoded but not transformed.

    Args:
        source: by index, items that begin with (image, class index), where the image is a path, an open file or a
            Pillow image.
        classes: names of the classes, if they are known.
        mode: Pillow mode of the decoded images, "RGB" or "L".
        notes: lines on what belongs to the data set and is not read.
    """

    def __init__(self, source: Any, classes: Sequence[str] = (), mode: str = "RGB", notes: Sequence[str] = ()) -> None:
        self.source, self.classes, self.mode, self.notes = source, list(classes), mode, list(notes)

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
        """The decoded image `index` and its class.

        Raises:
            DataError: it cannot be read; the message names it.
        """
        # timm's own data set replaces an unreadable image by its neighbour without a word; its reader does not.
        items = getattr(self.source, "reader", None) or self.source
        try:
            item, target = items[index][:2]
        except DataError:
            raise
        except Exception as error:  # Readers decode too, and raise whatever their libraries raise.
            raise DataError(f"cannot read {self.name(index)}: {' '.join(str(error).split())}") from None
        if isinstance(item, str | Path):
            return read_image(item, self.mode), int(target)
        if isinstance(item, Image.Image):
            return decode(item, self.mode, self.name(index)), int(target)
        if not hasattr(item, "read"):
            raise DataError(
                f"{self.name(index)} is of type {type(item).__name__}; give paths, open files or Pillow images, and "
                "leave transforms out of the data set"
            )
        with item:
            return decode(item, self.mode, self.name(index)), int(target)


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


def open_images(spec: DataSpec, train: bool) -> Images:
    """The training or test images of a data set; logs what is in its folders and is not read.

    Raises:
        DataError: folder missing, split missing, class without images, a reader that is not installed.
    """
    spec.check()
    if spec.name in BUILT_IN:
        _check_built_in(spec)
        return Images(BUILT_IN[spec.name](train), CLASSES)
    images = _open_folder(spec, train) if _is_folder(spec) else _open_by_reader(spec, train)
    for note in images.notes:
        _report_once(note)
    return images


@cache
def _report_once(note: str) -> None:
    """Log what is not read, once in a process, and in one of the processes of a run only."""
    if int(os.environ.get("RANK", 0)) == 0:
        log.warning("%s", message(note))


def open_unlabelled(root: str | Path) -> Images:
    """All images in a folder, at any depth, without classes.

    Raises:
        DataError: the folder is missing or holds no images.
    """
    if not os.path.isdir(root):
        raise DataError(f"{root} is not a folder")
    kinds = suffixes()
    found = [str(path) for path in Path(root).rglob("*") if path.suffix.lower() in kinds and path.is_file()]
    if not found:
        raise DataError(f"{root} holds no images ({', '.join(sorted(kinds))})")
    return Images([(path, 0) for path in sorted(found, key=natural_key)])


def open_both(spec: DataSpec) -> tuple[Images, Images]:
    """The training and the test images of a data set.

    Raises:
        DataError: their classes differ; and as `open_images`.
    """
    train, test = open_images(spec, True), open_images(spec, False)
    if train.classes != test.classes:
        only = sorted(set(train.classes) ^ set(test.classes))
        raise DataError(f"training and test images have different classes: {', '.join(only[:5])}")
    return train, test


def look_for(spec: DataSpec) -> None:
    """Check that the folders of a recipe exist, without listing the images. What readers of timm find is not checked.

    Raises:
        DataError: folder missing, split missing, or no class in it.
    """
    if spec.name in BUILT_IN:
        _check_built_in(spec)
    if _is_folder(spec):
        for train in (True, False):
            if not class_folders(found := _split_of(spec, train)):
                raise DataError(f"{found} has no class folders; expected {found}/CLASS/image.jpg")


def _check_built_in(spec: DataSpec) -> None:
    if spec.root is not None:
        raise DataError(
            f"data.root is {spec.root}, but data.name is {spec.name}, which come with scikit-learn; set data.name, for "
            "example to folder, or leave data.root out"
        )
    if (spec.train_split, spec.test_split) not in (("train", None), ("train", "test")):
        raise DataError(f"{spec.name} come with splits of their own; leave data.train_split and data.test_split out")


def _is_folder(spec: DataSpec) -> bool:
    return spec.name == "folder" or spec.name.lower() in ("torch/image_folder", "torch/folder")


def _split_of(spec: DataSpec, train: bool) -> Path:
    """The folder of a split."""
    if spec.root is None:
        raise DataError(f"{spec.name} needs data.root, the folder that holds {spec.train_split}/CLASS/image.jpg")
    root = Path(spec.root)
    if not os.path.isdir(root):  # Also where no folder can have such a name.
        raise DataError(f"{root} is not a folder")
    wanted = [spec.train_split] if train else [spec.test_split] if spec.test_split else ["test", "val", "validation"]
    found = next((root / name for name in wanted if os.path.isdir(root / name)), None)
    if found is None:
        have = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())[:20]) or "none"
        raise DataError(f"{root} has no folder {' or '.join(wanted)}; folders there: {have}")
    return found


def _open_folder(spec: DataSpec, train: bool) -> Images:
    reference: list[str] = []
    if not train and os.path.isdir(Path(spec.root or "") / spec.train_split):
        reference = [folder.name for folder in class_folders(_split_of(spec, True))]
    source = FolderImages(_split_of(spec, train), reference)
    return Images(source, source.classes, notes=source.notes)


def _open_by_reader(spec: DataSpec, train: bool) -> Images:
    kind, slash, _ = spec.name.partition("/")
    kind = kind.lower()  # As timm reads it.
    if not slash or kind not in _PACKAGES:
        raise UnknownNameError("data set", spec.name, (*BUILT_IN, "folder", *_READERS))
    if kind in ("torch", "wds") and spec.root is None:
        raise DataError(f"{spec.name} needs data.root, the folder that holds it or to download it to")
    split = spec.train_split if train else spec.test_split or "validation"
    mode = "RGB" if kind == "tfds" else ""  # Others then leave the conversion of what they decode to `decode`.
    try:
        with quiet("timm.data"):
            source = create_dataset(spec.name, root=spec.root, split=split, download=spec.download, input_img_mode=mode)
    except ImportError as error:
        raise DataError(f"{spec.name} needs the package {error.name}; pip install {_PACKAGES[kind]}") from None
    except Exception as error:  # Readers fail in many ways; in all of them there is nothing to read.
        reason = " ".join(str(error).split()) or type(error).__name__
        hint = "" if spec.download or kind == "wds" else "; --data.download fetches it where the reader can"
        raise DataError(f"cannot open data set {spec.name!r} in {spec.root}: {reason}{hint}") from None
    if isinstance(source, IterableDataset):
        return _gather(spec.name, source)
    source = through_one_door(source)
    classes = getattr(source, "classes", None) or getattr(getattr(source, "reader", None), "class_to_idx", None)
    if not classes:
        raise DataError(f"data set {spec.name!r} does not name its classes")
    return Images(source, list(classes))


def through_one_door(source: Any) -> Any:
    """The data set of torchvision, with its files decoded as all others are."""
    if hasattr(source, "loader"):
        source.loader = partial(read_image, mode="RGB")
    return source


def _gather(name: str, stream: Any) -> Images:
    gathered = _Gathered(stream)
    promised = getattr(getattr(stream, "reader", None), "num_samples", None)
    lost = promised - len(gathered) if isinstance(promised, int) else 0
    notes = [f"{name}: {lost} of {promised} images could not be read by timm and are left out"] if lost > 0 else []
    return Images(gathered, gathered.classes, notes=notes)
