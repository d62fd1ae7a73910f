"""Tables of results: for the terminal, and as Markdown, CSV, JSON or HTML with the environment that produced them."""

import csv
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from ..output import check_file, replacing

_GAP = 2
FORMS = (".md", ".csv", ".html", ".json")
"""Endings of the files that `Table.write` writes."""


@dataclass(frozen=True)
class Column:
    """One column: its key in the rows, its heading, and a format such as ".2f", ".2%" or "" for text."""

    key: str
    heading: str
    form: str = ""

    def show(self, row: Mapping[str, Any], short: bool = False) -> str:
        """The cell as text; missing values are a dash, and of lists only the ends are shown if `short`."""
        value = row.get(self.key)
        if value is None:
            return "-"
        if isinstance(value, list | tuple):
            return f"{value[0]} .. {value[-1]}" if short and len(value) > 2 else " ".join(map(str, value))
        return format(value, self.form) if self.form and not isinstance(value, str) else str(value)


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
        """A table from the JSON file that `write` has written."""
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(**{**data, "columns": [Column(**column) for column in data["columns"]]})

    def cells(self) -> list[list[str]]:
        """All cells as text, row by row."""
        return [[column.show(row) for column in self.columns] for row in self.rows]

    def text(self, width: int | None = None) -> str:
        """The table for a terminal: columns that hold nothing are left out, of lists only the ends are shown.

        A table wider than `width` (characters; by default the terminal's) goes on in further blocks below, each of
        which begins with the columns of text that name its rows.
        """
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text

        console = Console(file=io.StringIO(), width=width or Console().width, markup=False, highlight=False)
        console.print(self.title)
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
            console.print(note)
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in lines)

    def _blocks(self, width: int) -> list[list[Column]]:
        """Columns that fit beside each other, so that no word is broken."""
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
        """Characters for the longest word of a column, or for its longest cell, and for the gap beside it."""
        cells = [column.show(row, short=True) for row in self.rows]
        whole = whole or bool(column.form) or any(isinstance(row.get(column.key), list | tuple) for row in self.rows)
        words = [*column.heading.split(), *(cells if whole else " ".join(cells).split())]
        return max(map(len, words), default=0) + _GAP

    def markdown(self) -> str:
        """The table as Markdown, with notes and environment."""
        rule = ["---:" if column.form else "---" for column in self.columns]
        lines = [[column.heading for column in self.columns], rule, *self.cells()]
        parts = [f"## {self.title}", "\n".join("| " + " | ".join(line) + " |" for line in lines)]
        parts += list(self.notes)
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
        return f"<table><caption>{html.escape(self.title)}</caption><tr>{head}</tr>{body}</table>"

    def write(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the table in the form that the file's suffix names; an existing file is refused unless `overwrite`."""
        path = Path(path)
        check_file(path, FORMS, overwrite=overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = {
            ".md": self.markdown, ".csv": self.csv, ".html": self.html,
            ".json": lambda: json.dumps(self.to_dict(), indent=2) + "\n",
        }  # fmt: skip
        with replacing(path) as part:
            part.write_text(text[path.suffix](), encoding="utf-8")

    def write_all(self, stem: str | Path) -> None:
        """Write `stem.md`, `stem.csv` and `stem.json`, in place of any that exist."""
        for suffix in (".md", ".csv", ".json"):
            self.write(f"{stem}{suffix}", overwrite=True)
