"""Read what runs have left in their folders, and say figures the way people read them. No torch."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..measure.table import Column, Table

_MARKS = ("recipe.yaml", "result.json", "metrics.jsonl", "environment.json", "command.txt")
_INNER = {"checkpoint", "model", "pictures"}
_SEED = re.compile(r"-s\d+$")
_FRACTIONS = ("accuracy", "top1", "top_1", "top5", "top_5")


@dataclass(frozen=True)
class Run:
    """The contents of one run folder; whatever is missing is empty, whatever cannot be read is in `notes`."""

    path: Path
    recipe: str = ""
    command: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()
    result: Mapping[str, Any] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    pictures: Sequence[Path] = ()
    notes: Sequence[str] = ()

    @property
    def empty(self) -> bool:
        """Whether the folder holds nothing that a report could show."""
        return not (self.recipe or self.environment or self.metrics or self.result or self.tables or self.pictures)

    @property
    def figures(self) -> dict[str, Any]:
        """The final figures: the result without its title and tables."""
        return {name: value for name, value in self.result.items() if name not in ("title", "table", "tables")}


def read_run(path: Path) -> Run:
    """Read one folder. Nothing in it is required, and nothing in it can make this fail."""
    notes: list[str] = []
    result, environment = (_json(path / name, notes) for name in ("result.json", "environment.json"))
    metrics: list[dict[str, Any]] = []
    for number, line in enumerate(_text(path / "metrics.jsonl", notes).splitlines(), 1):
        try:
            epoch = json.loads(line)
        except ValueError:
            epoch = None
        if isinstance(epoch, dict):
            metrics.append(epoch)
        elif line.strip():
            notes.append(f"{path / 'metrics.jsonl'}, line {number} cannot be read")
    given = result.get("tables") or result.get("table") or []
    given = given if isinstance(given, list) else [given]
    given += [_json(file, notes) for file in sorted(path.glob("*.json"), reverse=True) if file.name not in _MARKS]
    tables = [table for table in map(make_table, given) if table is not None]
    pictures = sorted(p for folder in (path, path / "pictures") if folder.is_dir() for p in folder.glob("*.png"))
    recipe, command = (_text(path / name, notes) for name in ("recipe.yaml", "command.txt"))
    for table in tables:
        environment = environment or table.environment
    return Run(path, recipe, command.strip(), environment, metrics, result, tables, pictures, notes)


def find_runs(folder: Path) -> list[Path]:
    """Run folders below `folder`, itself left out, sorted by name."""
    found: list[Path] = []
    folders = (p for p in folder.iterdir() if p.is_dir() and not p.is_symlink())
    for path in sorted(p for p in folders if p.name not in _INNER and p.name[0] not in "._"):
        if any((path / name).is_file() for name in _MARKS):
            found.append(path)
        found += find_runs(path)
    return found


def read_folder(folder: Path) -> tuple[Run, list[Run]]:
    """A run, or a study with the runs below it.

    Raises:
        DataError: there is no such folder, or nothing in it to report.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    top, runs = read_run(folder), [read_run(path) for path in find_runs(folder)]
    if top.empty and all(run.empty for run in runs):
        raise DataError(f"{folder} holds nothing to report: no result.json, metrics.jsonl, recipe.yaml or picture")
    return top, [run for run in runs if not run.empty]


def make_table(given: Any) -> Table | None:
    """A table from `{title, columns, rows, notes, environment}`, None where it does not have that form.

    Columns are names or `{key, heading, form}`; rows are lists or mappings by key.
    """
    if not isinstance(given, dict) or not isinstance(given.get("rows"), list):
        return None
    named = list(dict.fromkeys(key for row in given["rows"] if isinstance(row, dict) for key in row))
    columns: list[Column] = []
    for column in given.get("columns") or named:
        known = column if isinstance(column, dict) else {"key": column}
        key = str(known.get("key", ""))
        columns.append(Column(key, str(known.get("heading") or words(key)), str(known.get("form") or "")))
    keys = [column.key for column in columns]
    rows = [
        row if isinstance(row, dict) else dict(zip(keys, row if isinstance(row, list) else [row], strict=False))
        for row in given["rows"]
    ]
    notes = [str(note) for note in given.get("notes") or ()]
    environment = given.get("environment")
    return Table(
        str(given.get("title") or ""), columns, rows, notes, environment if isinstance(environment, dict) else {}
    )


def points(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows for a cost-accuracy plot: `accuracy`, `macs`, `images_per_second` and `method`, by the names in use."""
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
    """Curves by run, those of one row's seeds (`ROW-sSEED`) as their mean over the epochs that all of them have."""
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
    """What all of these agree on, and the mean of every other figure that is a number in all of them."""
    found: dict[str, Any] = {}
    for name, first in epochs[0].items():
        values = [epoch.get(name) for epoch in epochs]
        if all(value == first for value in values):
            found[name] = first
        elif all(type(value) in (int, float) for value in values):
            found[name] = sum(values) / len(values)
    return found


def cell(column: Column, row: Mapping[str, Any]) -> str:
    """The text of a cell: as its column says, else as figures of that name are said."""
    try:
        return column.show(row) if column.form else say(column.key, row.get(column.key))
    except (TypeError, ValueError):  # The form of the column is not one for this value.
        return str(row.get(column.key))


def words(name: str) -> str:
    """A key as a heading."""
    return {"macs": "MACs", "macs_linear_only": "MACs, linear only", "gmacs": "GMACs", "params": "parameters"}.get(
        name, name.replace("_", " ")
    )


def say(name: str, value: Any) -> str:
    """A figure in words, by the name it goes by: accuracies in percent, MACs and parameters in M or G, times in h."""
    name = name.strip().lower().replace(" ", "_")
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return " ".join(say(name, item) for item in value) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{key} {say(str(key), item)}" for key, item in value.items()) or "-"
    if not isinstance(value, int | float):
        return str(value)
    if not isfinite(value):
        return str(value)
    if any(word in name for word in _FRACTIONS) and 0 <= value <= 1:
        return f"{value:.2%}".replace("%", " %")
    if any(word in name for word in ("macs", "params", "flops")) and "ratio" not in name and abs(value) >= 1000:
        scale, unit = (1e9, "G") if abs(value) >= 1e9 else (1e6, "M") if abs(value) >= 1e6 else (1e3, "k")
        return f"{value / scale:.4g} {unit}"
    if name == "seconds" or name.endswith("_seconds"):
        return _duration(value)
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f") if abs(value) >= 10_000 else str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        return "{} min {:02d} s".format(*divmod(round(seconds), 60))
    return "{} h {:02d} min".format(*divmod(round(seconds / 60), 60))


def _text(path: Path, notes: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    except OSError as error:
        notes.append(f"{path} cannot be read ({error.strerror})")
        return ""


def _json(path: Path, notes: list[str]) -> dict[str, Any]:
    text = _text(path, notes)
    try:
        value = json.loads(text) if text else {}
    except ValueError:
        notes.append(f"{path} cannot be read (not JSON)")
        return {}
    return value if isinstance(value, dict) else {"value": value}
