"""Mistakes that a user can make. Each message is one line that says what to do."""

from collections.abc import Iterable
from difflib import get_close_matches

from .text import message


class VitrimError(ValueError):
    """Base of every mistake that the user can correct; the command line prints its text and exits with 2.

    Names in a message come from files and options, so that control characters in it are escaped and its length is
    bounded.
    """

    def __init__(self, text: object = "") -> None:
        super().__init__(message(text))


class UnknownNameError(VitrimError):
    """A name that is in no table; carries the nearest names that are."""

    def __init__(self, kind: str, name: object, known: Iterable[str]) -> None:
        names = sorted({*known})
        near = get_close_matches(name, names, n=3, cutoff=0.5) if isinstance(name, str) else []
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"
        super().__init__(f"unknown {kind} {name!r}; {hint}")


class DuplicateNameError(VitrimError):
    """A second entry of the same name in a table."""


class ScheduleError(VitrimError):
    """A schedule that cannot be carried out on this model."""


class ScoreError(VitrimError):
    """A score that this model or place cannot supply."""


class UnsupportedModelError(VitrimError):
    """A model that no adapter can change."""


class WidthError(UnsupportedModelError):
    """A part of a model whose width cannot be cut. `fact` says which and why, without the advice."""

    def __init__(self, fact: str) -> None:
        super().__init__(f"{fact}; reduce its tokens instead: vitrim compress --using tokens, or vitrim.attach")
        self.fact = fact


class UncountableError(VitrimError):
    """A module whose MACs cannot be counted without running it on real values."""


class CheckpointError(VitrimError):
    """A file of weights that is missing, unsafe or made for another model."""


class ClassCountError(CheckpointError):
    """Weights of another number of classes. `fact` says it without the advice, which depends on who asked for them."""

    def __init__(self, fact: str, advice: str) -> None:
        super().__init__(f"{fact}; {advice}")
        self.fact = fact


class DataError(VitrimError):
    """Images that are missing, unreadable or of the wrong kind."""


class NoSplitError(DataError):
    """A data set that has no split of that name."""


class RecipeError(VitrimError):
    """A recipe that contradicts itself or the run folder it points to."""


class DivergedError(VitrimError):
    """A training run whose loss or weights are not finite, or a network whose outputs are not."""


class BusyError(VitrimError):
    """A folder that another process is writing to."""


class OutputError(VitrimError):
    """A file that cannot be written."""


class DistillError(VitrimError):
    """Distillation terms, a teacher or a cache that do not fit the student."""
