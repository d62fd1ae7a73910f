"""The images of a data set by its name: the digits that are built in, a folder, or what a reader of timm finds."""

import logging
import os
from collections import Counter
from functools import cache
from pathlib import Path

from ..errors import DataError, NoSplitError
from ..text import message
from .decode import suffixes
from .digits import BUILT_IN, CLASSES
from .folder import FolderImages, class_folders, image_paths, not_read
from .images import Images
from .specs import TEST_SPLITS, DataSpec
from .timm_readers import open_by_reader

log = logging.getLogger(__name__)


def open_images(spec: DataSpec, train: bool) -> Images:
    """The training or test images of a data set; logs what is in its folders and is not read.

    Raises:
        DataError: folder missing, split missing, class without images, a reader that is not installed.
    """
    spec.check()
    if spec.name in BUILT_IN:
        _check_built_in(spec)
        return Images(BUILT_IN[spec.name](train), CLASSES, place=f"{spec.name}, {'train' if train else 'test'}")
    images = _open_folder(spec, train) if _is_folder(spec) else open_by_reader(spec, train)
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
    return Images([(path, 0) for path in all_images(root)], place=str(root))


def all_images(root: str | Path) -> list[str]:
    """The image files below a folder, in natural order; logs what else is there.

    Raises:
        DataError: there are none.
    """
    left_out = Counter[str]()
    if not (found := image_paths(Path(root), left_out)):
        raise DataError(f"{root} holds no images ({', '.join(sorted(suffixes()))})")
    if note := not_read(left_out):
        _report_once(f"{root}: {note}")
    return found


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
    wanted = [spec.train_split] if train else [spec.test_split] if spec.test_split else TEST_SPLITS
    found = next((root / name for name in wanted if os.path.isdir(root / name)), None)
    if found is None:
        have = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())[:20]) or "none"
        raise NoSplitError(f"{root} has no folder {' or '.join(wanted)}; folders there: {have}")
    return found


def _open_folder(spec: DataSpec, train: bool) -> Images:
    reference: list[str] = []
    if not train and os.path.isdir(Path(spec.root or "") / spec.train_split):
        reference = [folder.name for folder in class_folders(_split_of(spec, True))]
    source = FolderImages(folder := _split_of(spec, train), reference)
    return Images(source, source.classes, notes=source.notes, place=str(folder))
