"""What verbs have in common: the command as typed, and where tables go."""

import sys
from typing import Annotated, Any, Literal

from ..data.specs import DataSpec
from ..errors import RecipeError
from ..options import Range
from ..text import printable
from ..verb_options import Without

Device = Literal["auto", "cpu", "cuda"]
Count = Annotated[int, Range(1, 1_000_000)]
Pixels = Annotated[int, Range(1, 16_384)]
Threads = Annotated[int, Range(1, 1024)]
TRAINING_ONLY = ("train_split", "holdout", "limit")
"""Options of `DataSpec` that do not concern test images."""
TEST_ONLY = ("test_split", "holdout")
"""Options of `DataSpec` that do not concern training images of which none is held out."""
DataOptions = Annotated[dict[str, Any], DataSpec]
"""The options of a `DataSpec` by name: only those that were given, also where a given value is the default."""
TestImages = Annotated[dict[str, Any], DataSpec, Without(TRAINING_ONLY)]
TrainingImages = Annotated[dict[str, Any], DataSpec, Without(TEST_ONLY)]


def command_line() -> str:
    """The command as it can be typed again, however this process was started."""
    import shlex

    return shlex.join(["vitrim", *sys.argv[1:]])


def check_used(verb: str, data: dict[str, Any], unused: tuple[str, ...], images: str) -> None:
    """Raise `RecipeError` for options of images that were given and have no effect on what the verb does."""
    if given := [f"--data.{name}" for name in unused if name in data]:
        raise RecipeError(f"vitrim {verb} reads {images}; {' and '.join(given)} would have no effect: leave it out")


def hide_password(command: str, url: str | None) -> str:
    """A command without the password of a database URL in it, so that it can be kept in a file."""
    if url is None or "@" not in url:
        return command
    before = url.rpartition("@")[0]
    return command.replace(before, before.partition("://")[0] + "://***")


def check_table(out: str | None) -> None:
    """Before the work, refuse a file that `deliver` could not write."""
    from ..measure.table import FORMS
    from ..output import check_file

    if out is not None:
        check_file(out, FORMS)


def say(text: object, error: bool = False) -> None:
    """Print lines in which names may come from outside: what is not printable in them is written as escapes."""
    print(printable(text, "\n"), file=sys.stderr if error else sys.stdout)


def deliver(table: Any, out: str | None) -> None:
    """Print a table, and write it where asked; an existing file is not overwritten."""
    print(table.text())
    if out is not None:
        table.write(out)
        say(f"written to {out}")
