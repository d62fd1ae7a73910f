"""Tables of results: for the terminal, and as Markdown, CSV, JSON or HTML with the environment that produced them."""

import csv
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..output import check_file, replacing
from ..text import printable

_GAP = 2
FORMS = (".md", ".csv", ".html", ".json")
"""Endings of the files that `Table.write` writes."""
_FORMAT = re.compile(r"\+?,?(\.\d)?[dfg%]?")


def is_format(text: str) -> bool:
    """Whether a column may have this format: ".2f", "+.2%", ",d" and the like, none of which makes long text."""
    return _FORMAT.fullmatch(text) is not None


@dataclass(frozen=True)
class Column:
    """One column: its key in the rows, its heading, and a format such as ".2f", ".2%" or "" for text.

    A row that also has `KEY_low` and `KEY_high` shows a median with its quartiles: `1.60 [1.55, 1.63]`. The columns
    of vitrim's own tables are defined in `columns.py`.
    """

    key: str
    heading: str
    form: str = ""

    def show(self, row: Mapping[str, Any], short: bool = False) -> str:
        """The cell as printable text; missing values are a dash, and of lists only the ends are shown if `short`."""
        value = row.get(self.key)
        if value is None:
            return "-"
        if isinstance(value, list | tuple):
            texts = [str(entry) for entry in value]
            return printable(f"{texts[0]} .. {texts[-1]}" if short and len(texts) > 2 else " ".join(texts))
        low, high = row.get(f"{self.key}_low"), row.get(f"{self.key}_high")
        if self.form and low is not None and high is not None:
            return f"{value:{self.form}} [{low:{self.form}}, {high:{self.form}}]"
        return printable(format(value, self.form) if self.form and not isinstance(value, str) else value)


@dataclass(frozen=True)
class Table:
    """Rows under headings. `notes` are sentences below the table, `environment` says what produced it."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    notes: Sequence[str] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> "Table":
        """A table from the JSON file that `write` has written.

        Raises:
            CheckpointError: the file is damaged.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            table = cls(**{**data, "columns": [Column(**column) for column in data["columns"]]})
            if not all(is_format(column.form) for column in table.columns):
                raise ValueError("a format that makes text of any length")
            if not all(isinstance(part, list) for part in (table.rows, table.notes)):
                raise ValueError("text in place of a list")
            for show in (table.text, table.markdown, table.csv):
                show()
            return table
        except Exception:  # What cannot be read fails in many ways, and so does what cannot be shown.
            raise CheckpointError(f"{path} is damaged or cut short; remove it and repeat the command") from None

    def cells(self) -> list[list[str]]:
        """All cells as text, row by row."""
        return [[column.show(row) for column in self.columns] for row in self.rows]

    def text(self, width: int | None = None) -> str:
        """The table for a terminal: empty columns are left out, and of lists only the ends are shown.

        A table wider than `width` (characters; by default the terminal's) continues in further blocks below, each of
        which repeats the columns of text that name the rows.
        """
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text

        console = Console(file=io.StringIO(), width=width or Console().width, markup=False, highlight=False)
        console.print(printable(self.title))
        for columns in self._blocks(console.width):
            table = RichTable(box=None, pad_edge=False)
            spare = console.width - sum(map(self._needs, columns))
            for column in columns:
                more = 0 if column.form else min(max(spare, 0), self._needs(column, whole=True) - self._needs(column))
                spare -= more
                align, room = "right" if column.form else "left", self._needs(column) - _GAP + more
                table.add_column(Text(column.heading), justify=align, width=room)
            for row in self.rows:
                table.add_row(*(Text(column.show(row, short=True)) for column in columns))
            console.print(table)
        for note in self.notes:
            console.print(printable(note))
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in lines)

    def _blocks(self, width: int) -> list[list[Column]]:
        """Groups of columns, each of which fits the width without breaking a word."""
        full = [column for column in self.columns if any(row.get(column.key) is not None for row in self.rows)]
        names = list(takewhile(lambda column: not column.form, full[:2]))
        room = width - sum(map(self._needs, names))
        blocks, left = [names], room
        for column in full[len(names) :]:
            needs = self._needs(column)
            if needs > left and blocks[-1] != names:
                blocks.append(names)
                left = room
            blocks[-1] = [*blocks[-1], column]
            left -= needs
        return blocks

    def _needs(self, column: Column, whole: bool = False) -> int:
        """Characters for the longest word of a column, or for its longest cell, and for the gap after it."""
        cells = [column.show(row, short=True) for row in self.rows]
        whole = whole or bool(column.form) or any(isinstance(row.get(column.key), list | tuple) for row in self.rows)
        words = [*column.heading.split(), *(cells if whole else " ".join(cells).split())]
        return max(map(len, words), default=0) + _GAP

    def markdown(self) -> str:
        """The table as Markdown, with notes and environment."""
        rule = ["---:" if column.form else "---" for column in self.columns]
        lines = [[column.heading for column in self.columns], rule, *self.cells()]
        parts = [
            f"## {printable(self.title)}",
            "\n".join("| " + " | ".join(map(_escaped, line)) + " |" for line in lines),
        ]
        parts += map(printable, self.notes)
        if self.environment:
            parts.append("Environment: " + ", ".join(f"{name} {value}" for name, value in self.environment.items()))
        return "\n\n".join(parts) + "\n"

    def csv(self) -> str:
        """The raw values, comma-separated, lists joined by spaces."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([column.key for column in self.columns])
        for row in self.rows:
            values = [row.get(column.key) for column in self.columns]
            writer.writerow([" ".join(map(str, v)) if isinstance(v, list | tuple) else v for v in values])
        return out.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "title": self.title,
            "columns": [{"key": c.key, "heading": c.heading, "form": c.form} for c in self.columns],
            "rows": [dict(row) for row in self.rows],
            "notes": list(self.notes),
            "environment": dict(self.environment),
        }

    def html(self) -> str:
        """The table alone as an HTML element."""
        classes = ['class="number"' if column.form else "" for column in self.columns]
        head = "".join(
            f"<th {c}>{html.escape(column.heading)}</th>" for c, column in zip(classes, self.columns, strict=True)
        )
        body = "".join(
            "<tr>"
            + "".join(f"<td {c}>{html.escape(cell)}</td>" for c, cell in zip(classes, row, strict=True))
            + "</tr>"
            for row in self.cells()
        )
        return f"<table><caption>{html.escape(printable(self.title))}</caption><tr>{head}</tr>{body}</table>"

    def write(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the table in the form that the file's suffix names; an existing file is refused unless `overwrite`.

        Of several processes that write to the same new file at once, one succeeds and the others raise.
        """
        path = Path(path)
        check_file(path, FORMS, overwrite=overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = {
            ".md": self.markdown, ".csv": self.csv, ".html": self.html,
            ".json": lambda: json.dumps(self.to_dict(), indent=2) + "\n",
        }  # fmt: skip
        with replacing(path, overwrite=overwrite) as part:
            part.write_text(text[path.suffix](), encoding="utf-8", errors="backslashreplace")

    def write_all(self, stem: str | Path) -> None:
        """Write `stem.md`, `stem.csv` and `stem.json`, in place of any that exist."""
        for suffix in (".md", ".csv", ".json"):
            self.write(f"{stem}{suffix}", overwrite=True)


def _escaped(cell: str) -> str:
    """A cell of Markdown, in which a bar would begin the next one."""
    return cell.replace("|", "\\|")
