"""What can be named on the command line, in recipes and in Python."""

import sys
from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from ..distill import LOSSES, TERMS, WEIGHTS
from ..models import ADAPTERS
from ..notation import render
from ..tables import Table, first_line
from ..text import with_written
from ..tokens import CURRICULA, REDUCERS, SCHEDULES, SCORES, Curriculum, Schedule

METHODS: dict[str, Table[str, Any]] = {
    "reducers": REDUCERS,
    "scores": SCORES,
    "schedules": SCHEDULES,
    "curricula": CURRICULA,
    "terms": TERMS,
    "weights": WEIGHTS,
    "losses": LOSSES,
}
"""The tables of the notation by their heading."""
SHARED = {"schedules": Schedule, "curricula": Curriculum}
"""Classes whose options every entry of a table takes."""


def listing(kind: str = "all") -> str:
    """The tables of names, each with its first line of documentation."""
    import timm

    tables: dict[str, Iterable[tuple[str, str]]] = {
        heading: ((name, _summary(entry)) for name, entry in table.items()) for heading, table in METHODS.items()
    }
    tables["adapters"] = ((name, adapter.covers) for name, adapter in ADAPTERS.items())
    tables["models"] = ((name, "") for name in timm.list_models("vitrim_*"))
    notes = {heading: f"  each also takes {_shared(heading)}" for heading in SHARED}
    notes["models"] = "  and every timm model that an adapter covers, by its timm name"
    lines: list[str] = []
    for name, rows in tables.items():
        if kind in (name, "all"):
            lines.append(name)
            lines += [f"  {entry:<22}{text}".rstrip() for entry, text in rows]
            lines += [notes[name]] if name in notes else []
    return "\n".join(lines)


def methods_table() -> str:
    """The methods of the package in Markdown, with their options and defaults; a user's own are left out."""
    lines: list[str] = []
    for heading, table in METHODS.items():
        lines += [f"### {heading.capitalize()}", "", "| name | options | what it does |", "|---|---|---|"]
        for name, entry in table.items():
            if not table.home(name).startswith("vitrim."):
                continue
            options = _options(entry, SHARED.get(heading))
            summary = _summary(entry).replace("|", "\\|")
            lines.append(f"| `{name}` | `{options}` | {summary} |".replace(" `` |", " |"))
        lines += ["", f"Each also takes `{_shared(heading)}`.", ""] if heading in SHARED else [""]
    return "\n".join(lines)


def with_methods_table(page: str) -> str:
    """The text of a page with the present tables between its marks."""
    return with_written(page, "methods", methods_table())


def _summary(entry: Any) -> str:
    return entry.summary if hasattr(entry, "summary") else first_line(entry)


def _options(entry: Any, base: type | None) -> str:
    """The options of a class as in a call, without those that it shares with its base."""
    if not is_dataclass(entry) or not isinstance(entry, type):
        return ""
    shared = {(option.name, option.default) for option in fields(base)} if base is not None else set()
    return ", ".join(
        option.name if option.default is MISSING else f"{option.name}={_default(option.default)}"
        for option in sorted(fields(entry), key=lambda option: option.kw_only is True)
        if (option.name, option.default) not in shared
    )


def _shared(heading: str) -> str:
    return ", ".join(f"{option.name}={_default(option.default)}" for option in fields(SHARED[heading]))


def _default(value: Any) -> str:
    return render(value) if is_dataclass(value) else repr(value)


if __name__ == "__main__":  # Writes the tables of methods into pages of documentation.
    for name in sys.argv[1:]:
        Path(name).write_text(with_methods_table(Path(name).read_text()))
