"""Read what runs have left in their folders. No torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..measure.table import Column, Table, is_format
from .bounded import Note, read_bytes, read_json, read_json_lines, read_text
from .figures import heading_of

_MARKS = ("recipe.yaml", "result.json", "metrics.jsonl", "environment.json", "command.txt")
_INNER = {"checkpoint", "model", "pictures"}
_SEED = re.compile(r"-s\d+$")
_MOST_RUNS, _MOST_LEVELS = 2000, 10
_PNG = b"\x89PNG\r\n\x1a\n"
MOST_PICTURES = 12
"""Of a folder; a report leaves out the others."""


@dataclass(frozen=True)
class Picture:
    """A picture: its name, and its content, empty if it cannot be shown."""

    name: str
    png: bytes


@dataclass(frozen=True)
class Run:
    """The contents of one run folder; what is missing is empty, and `notes` names what cannot be read."""

    path: Path
    recipe: str = ""
    command: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()
    result: Mapping[str, Any] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    more_pictures: int = 0
    notes: Sequence[str] = ()

    @property
    def empty(self) -> bool:
        """Whether the folder holds nothing of a run; pictures alone may be anybody's."""
        return not (self.recipe or self.environment or self.metrics or self.result or self.tables)

    @property
    def figures(self) -> dict[str, Any]:
        """The final figures: the result without its title and tables."""
        return {name: value for name, value in self.result.items() if name not in ("title", "table", "tables")}


def read_run(path: Path) -> Run:
    """Read one folder. Nothing in it is required, and nothing in it can make this fail."""
    notes: list[str] = []
    note = notes.append
    result, environment = (read_json(path / name, note) for name in ("result.json", "environment.json"))
    given = result.get("tables") or result.get("table") or []
    given = given if isinstance(given, list) else [given]
    given += [read_json(file, note) for file in sorted(path.glob("*.json"), reverse=True) if file.name not in _MARKS]
    tables = [table for table in map(make_table, given) if table is not None]
    for table in tables:
        environment = environment or table.environment
    pictures = sorted(file for folder in (path, path / "pictures") for file in folder.glob("*.png"))
    return Run(
        path,
        recipe=read_text(path / "recipe.yaml", note),
        command=read_text(path / "command.txt", note).strip(),
        environment=environment,
        metrics=read_json_lines(path / "metrics.jsonl", note),
        result=result,
        tables=tables,
        pictures=[Picture(file.stem, _png(file, note)) for file in pictures[:MOST_PICTURES]],
        more_pictures=max(0, len(pictures) - MOST_PICTURES),
        notes=notes,
    )


def _png(path: Path, note: Note) -> bytes:
    content = read_bytes(path, note)
    if not content.startswith(_PNG):
        note(f"{path} cannot be shown (not a PNG picture)")
    return content if content.startswith(_PNG) else b""


def find_runs(folder: Path, levels: int = _MOST_LEVELS) -> list[Path]:
    """Run folders below `folder`, without itself, sorted by name; at most so many levels down."""
    found: list[Path] = []
    try:
        inner = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    except OSError:  # A folder that may not be read.
        return found
    for path in sorted(path for path in inner if path.name not in _INNER and path.name[0] not in "._"):
        if any(_is_file(path / name) for name in _MARKS):
            found.append(path)
        if levels > 1:
            found += find_runs(path, levels - 1)
    return found[:_MOST_RUNS]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def read_folder(folder: Path) -> tuple[Run, list[Run]]:
    """A run, or a study with the runs below it.

    Raises:
        DataError: there is no such folder, or nothing in it to report.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    top, runs = read_run(folder), [read_run(path) for path in find_runs(folder)]
    if top.empty and all(run.empty for run in runs):
        raise DataError(
            f"{folder} holds nothing of a run: no result.json, metrics.jsonl, recipe.yaml or table as .json"
        )
    return top, [run for run in runs if not run.empty]


def make_table(given: Any) -> Table | None:
    """A table from `{title, columns, rows, notes, environment}`, None where it does not have that form.

    Columns are names or `{key, heading, form}`; rows are lists or mappings by key. An unusual `form` is left out.
    """
    if not isinstance(given, dict) or not isinstance(given.get("rows"), list):
        return None
    rows = given["rows"]
    named = list(dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row))
    wanted = given.get("columns")
    columns = [_column(column) for column in (wanted if isinstance(wanted, list) and wanted else named)]
    keys = [column.key for column in columns]
    rows = [
        row if isinstance(row, dict) else dict(zip(keys, row if isinstance(row, list) else [row], strict=False))
        for row in rows
    ]
    notes, environment = given.get("notes"), given.get("environment")
    return Table(
        str(given.get("title") or ""),
        columns,
        rows,
        [str(note) for note in (notes if isinstance(notes, list) else filter(None, [notes]))],
        environment if isinstance(environment, dict) else {},
    )


def _column(given: Any) -> Column:
    known = given if isinstance(given, dict) else {"key": given}
    key, form = str(known.get("key", "")), str(known.get("form") or "")
    return Column(key, str(known.get("heading") or heading_of(key)), form if is_format(form) else "")


def points(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows for a cost-accuracy plot: `accuracy`, `macs`, `images_per_second` and `method`, however they are named."""
    aliases = {
        "accuracy": ("accuracy", "test_accuracy"),
        "macs": ("macs",),
        "images_per_second": ("images_per_second",),
        "method": ("curve", "family", "row", "method", "name", "model"),
    }
    found: list[dict[str, Any]] = []
    for row in rows:
        point = {name: next((row[key] for key in keys if row.get(key) is not None), None)
                 for name, keys in aliases.items()}  # fmt: skip
        if point["macs"] is None and isinstance(row.get("gmacs"), int | float):
            point["macs"] = row["gmacs"] * 1e9
        point["dense"] = row.get("dense") or row.get("method") == "dense"
        found.append(point)
    return found


def average_seeds(metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Sequence[Mapping[str, Any]]]:
    """Curves by run; the seeds of a row (`ROW-sSEED`) become one, their mean over the epochs that all of them have."""
    rows: dict[str, list[str]] = {}
    for name in metrics:
        rows.setdefault(_SEED.sub("", name), []).append(name)
    found: dict[str, Sequence[Mapping[str, Any]]] = {}
    for row, names in rows.items():
        if len(names) == 1:
            found[names[0]] = metrics[names[0]]
        else:
            epochs = zip(*(metrics[name] for name in names), strict=False)
            found[f"{row}, mean of {len(names)} seeds"] = [_mean(epoch) for epoch in epochs]
    return found


def _mean(epochs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Values that are equal in all of these, and the mean of every other figure that is a number in all of them."""
    found: dict[str, Any] = {}
    for name, first in epochs[0].items():
        values: list[Any] = [epoch.get(name) for epoch in epochs]
        if all(value == first for value in values):
            found[name] = first
        elif all(type(value) in (int, float) for value in values):
            found[name] = sum(values) / len(values)
    return found
