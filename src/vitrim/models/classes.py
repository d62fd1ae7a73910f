"""The names of the classes that a saved model tells apart, in the order of its head."""

from collections.abc import Sequence
from pathlib import Path

from .build import saved_folder
from .store import WEIGHTS, read_description, weights_path


def classes_of(spec: str | Path) -> list[str] | None:
    """The names that were saved with a model: a run folder, a folder written by `save`, or the weights in it.

    None for everything else, and where none were saved.
    """
    path = Path(spec)
    folder = saved_folder(str(path.parent if path.name == WEIGHTS else path))
    return None if folder is None else read_description(weights_path(folder))["extra"].get("classes")


def other_classes(spec: str | Path, classes: Sequence[str]) -> str:
    """Where a saved model knows its classes by other names, or in another order, than these: how, in words.

    Empty where it agrees, and where no names are known.
    """
    known = classes_of(spec)
    if known is None or known == list(classes):
        return ""
    one, other = next(((a, b) for a, b in zip(known, classes, strict=False) if a != b), (known, list(classes)))
    return f"{spec} was trained on class {one} where the images have {other}"
