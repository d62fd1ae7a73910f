"""Tables of results: for the terminal, and as Markdown, CSV, JSON or HTML with the environment that produced them."""

import csv
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import VitrimError

Value = str | int | float | None


@dataclass(frozen=True)
class Column:
    """One column: its key in the rows, its heading, and a format such as ".2f", ".2%" or "" for text."""

    key: str
    heading: str
    form: str = ""

    def show(self, row: Mapping[str, Any]) -> str:
        """The cell as text; missing values are a dash."""
        value = row.get(self.key)
        if value is None:
            return "-"
        if isinstance(value, list | tuple):
            return " ".join(map(str, value))
        return format(value, self.form) if self.form and not isinstance(value, str) else str(value)


@dataclass(frozen=True)
class Table:
    """Rows under headings. `notes` are sentences below the table, `environment` says what produced it."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    notes: Sequence[str] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)

    def cells(self) -> list[list[str]]:
        """All cells as text, row by row."""
        return [[column.show(row) for column in self.columns] for row in self.rows]

    def text(self) -> str:
        """The table for a terminal."""
        from rich.console import Console
        from rich.table import Table as RichTable

        table = RichTable(title=self.title, title_justify="left", header_style="bold", box=None, pad_edge=False)
        for column in self.columns:
            table.add_column(column.heading, justify="right" if column.form else "left", overflow="fold")
        for row in self.cells():
            table.add_row(*row)
        console = Console(file=io.StringIO(), width=Console().width)
        console.print(table)
        for note in self.notes:
            console.print(note, highlight=False)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]

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
        forms = {
            ".md": self.markdown, ".csv": self.csv, ".html": self.html,
            ".json": lambda: json.dumps(self.to_dict(), indent=2) + "\n",
        }  # fmt: skip
        if path.suffix not in forms:
            raise VitrimError(f"{path} should end in {', '.join(forms)}")
        if path.exists() and not overwrite:
            raise VitrimError(f"{path} exists; choose another name or remove it")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(forms[path.suffix](), encoding="utf-8")
