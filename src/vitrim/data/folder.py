"""A folder with one subfolder per class, as a list of image files; what is in it and is not read is counted."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import DataError
from .decode import suffixes


class FolderImages:
    """The image files of ROOT/CLASS/..., at any depth below the folder of their class, in natural order.

    samples: (path, class index) of each image.
    classes: their names in natural order; those of `reference` where they differ from it in case alone.
    notes: lines on what was not read, or read in a way that the user may not expect.

    Args:
        root: the folder; its subfolders are the classes, but those whose names begin with a dot.
        reference: names of the classes of the training images, for a folder of test images.

    Raises:
        DataError: there is no class, or a class without an image.
    """

    def __init__(self, root: Path, reference: Sequence[str] = ()) -> None:
        folders = class_folders(root)
        if not folders:
            raise DataError(f"{root} has no class folders; expected {root}/CLASS/image.jpg")
        names, renamed = _named_as([folder.name for folder in folders], reference)
        pairs = sorted(zip(names, folders, strict=True), key=lambda pair: natural_key(pair[0]))
        self.classes = [name for name, _ in pairs]
        self.samples: list[tuple[str, int]] = []
        left_out, nested = Counter[str](), 0
        for index, (_, folder) in enumerate(pairs):
            own = Counter[str]()
            paths = image_paths(folder, own)
            if not paths:
                found = f" ({_counted(own)})" if own else ""
                raise DataError(f"class folder {folder} holds no images that can be read{found}; fill it or remove it")
            self.samples += [(path, index) for path in paths]
            left_out += own
            nested += sum(os.path.dirname(path) != str(folder) for path in paths)
        outside = sum(not entry.is_dir() and not entry.name.startswith(".") for entry in os.scandir(root))
        self.notes = [f"{root}: {note}" for note in (
            not_read(left_out),
            f"files not read (outside of class folders: {outside})" if outside else "",
            f"images in folders inside of class folders are taken for that class ({nested})" if nested else "",
            f"classes {renamed} are taken for those of the training images, which differ in case" if renamed else "",
        ) if note]  # fmt: skip

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.samples[index]


def image_paths(folder: Path, left_out: Counter[str]) -> list[str]:
    """The image files below a folder, in natural order; what else is there is counted in `left_out`, by reason."""
    paths: list[str] = []
    for entry in _files_below(folder, left_out):
        if reason := _not_read(entry):
            left_out[reason] += 1
        else:
            paths.append(entry.path)
    return sorted(paths, key=natural_key)


def not_read(left_out: Counter[str]) -> str:
    """A line on files that were not read, by reason; empty where there are none."""
    return f"files not read ({_counted(left_out)})" if left_out else ""


def class_folders(root: Path) -> list[Path]:
    """The folders of the classes, in natural order."""
    folders = (path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted(folders, key=lambda path: natural_key(path.name))


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sorts img2 before img10, without regard to case; names that differ in case alone still have a fixed order."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def _files_below(
    folder: Path | str, left_out: Counter[str], above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[os.DirEntry[str]]:
    """All entries below a folder that are not folders; links are followed, but not back to a folder above."""
    status = os.stat(folder)
    identity = status.st_dev, status.st_ino
    if identity in above:
        left_out["links to a folder above"] += 1
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir():
                yield entry
            elif entry.name.startswith("."):
                left_out["hidden folders"] += 1
            else:
                yield from _files_below(entry.path, left_out, above | {identity})


def _not_read(entry: os.DirEntry[str]) -> str:
    """Why a file is not read, empty if it is read."""
    if entry.name.startswith("."):
        return "hidden files"
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix not in suffixes():
        return suffix if suffix.isascii() and suffix.isprintable() and 0 < len(suffix) <= 12 else "other files"
    return "" if entry.is_file() else "broken links, FIFOs, sockets or devices"


def _named_as(names: list[str], reference: Sequence[str]) -> tuple[list[str], str]:
    """These names as the reference spells those that differ in case alone; and the names that were spelt otherwise."""
    spelt = {_folded(name): name for name in reference}
    folded = [_folded(name) for name in names]
    if len(spelt) < len(reference) or len({*folded}) < len(folded):
        return names, ""
    known = [spelt.get(key, name) for name, key in zip(names, folded, strict=True)]
    other = [name for name, own in zip(names, known, strict=True) if name != own]
    return known, ", ".join(other[:5]) + (", ..." if len(other) > 5 else "")


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _counted(left_out: Counter[str]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in left_out.most_common(8))
