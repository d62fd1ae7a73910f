"""The names of the classes that a saved model tells apart, in the order of its head."""

from collections.abc import Sequence
from pathlib import Path

from .build import saved_folder, weights_in
from .store import WEIGHTS, read_description, weights_path


def classes_of(spec: str | Path) -> list[str] | None:
    """The names that were saved with a model: a run folder, a folder written by `save`, the weights in it, or NAME@ it.

    None for everything else, and where none were saved.
    """
    path = Path(spec if Path(spec).exists() else weights_in(str(spec)) or spec)
    folder = saved_folder(str(path.parent if path.name == WEIGHTS else path))
    return None if folder is None else read_description(weights_path(folder)).classes


def kept_classes(spec: str | Path) -> dict[str, list[str]]:
    """What `save` is given with a model that is made from this one and has its head: its classes, if they are known."""
    known = classes_of(spec)
    return {} if known is None else {"classes": known}


def other_classes(spec: str | Path, classes: Sequence[str]) -> str:
    """Where a saved model knows its classes by other names, or in another order, than these: how, in words.

    Empty where it agrees, and where no names are known.
    """
    known = classes_of(spec)
    if known is None or known == list(classes):
        return ""
    one, other = next(((a, b) for a, b in zip(known, classes, strict=False) if a != b), (known, list(classes)))
    return f"{spec} was trained on class {one} where the images have {other}"
