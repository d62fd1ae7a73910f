"""Write figures and headings the way people read them. No torch."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from ..measure.columns import COLUMNS
from ..measure.table import Column

_FRACTIONS = ("accuracy", "top1", "top_1", "top5", "top_5")


def format_cell(column: Column, row: Mapping[str, Any]) -> str:
    """The text of a cell: in the format of its column, else as figures of that name are written."""
    try:
        return column.show(row) if column.form else format_figure(column.key, row.get(column.key))
    except (TypeError, ValueError, OverflowError):  # The format of the column does not fit this value.
        return str(row.get(column.key))


def heading_of(name: str) -> str:
    """A key as a heading; without the unit of the column, since figures are written with their own."""
    heading = COLUMNS[name].heading if name in COLUMNS else "["
    return name.replace("_", " ") if "[" in heading else heading


def format_figure(name: str, value: Any) -> str:
    """A figure by its name: accuracies in percent, MACs and parameters in M or G, times in hours and minutes."""
    name = name.strip().lower().replace(" ", "_")
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return " ".join(format_figure(name, item) for item in value) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{key} {format_figure(str(key), item)}" for key, item in value.items()) or "-"
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
        value += name == "best_epoch"  # Files count epochs from 0, people from 1.
        return f"{value:,}".replace(",", "\u202f") if abs(value) >= 10_000 else str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        return "{} min {:02d} s".format(*divmod(round(seconds), 60))
    return "{} h {:02d} min".format(*divmod(round(seconds / 60), 60))
