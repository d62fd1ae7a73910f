"""What verbs have in common: the command as typed, and where tables go."""

import os
import sys
from typing import Any, Literal

Device = Literal["auto", "cpu", "cuda"]


def command_line() -> str:
    """The command as the user typed it."""
    import shlex

    return shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])


def check_table(out: str | None) -> None:
    """Refuse a file that `deliver` could not write, before the work."""
    from ..measure.table import FORMS
    from ..output import check_file

    if out is not None:
        check_file(out, FORMS)


def deliver(table: Any, out: str | None) -> None:
    """Print a table, and write it where asked; an existing file is not overwritten."""
    print(table.text())
    if out is not None:
        table.write(out)
        print(f"written to {out}")
