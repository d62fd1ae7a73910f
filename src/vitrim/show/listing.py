"""What can be named on the command line, in recipes and in Python."""

from collections.abc import Iterable
from dataclasses import fields

from ..distill import LOSSES, TERMS, WEIGHTS
from ..models import ADAPTERS
from ..tokens import CURRICULA, REDUCERS, SCHEDULES, SCORES, Schedule


def listing(kind: str = "all") -> str:
    """The tables of names, each with its first line of documentation."""
    import timm

    tables: dict[str, Iterable[tuple[str, str]]] = {
        "reducers": ((name, _first(c)) for name, c in REDUCERS.items()),
        "scores": ((name, score.summary) for name, score in SCORES.items()),
        "schedules": ((name, _first(c)) for name, c in SCHEDULES.items()),
        "curricula": ((name, _first(c)) for name, c in CURRICULA.items()),
        "terms": ((name, _first(c)) for name, c in TERMS.items()),
        "weights": ((name, _first(c)) for name, c in WEIGHTS.items()),
        "losses": ((name, _first(function)) for name, function in LOSSES.items()),
        "adapters": ((adapter.name, adapter.covers) for adapter in ADAPTERS.values()),
        "models": ((name, "") for name in timm.list_models("vitrim_*")),
    }
    shared = ", ".join(option.name for option in fields(Schedule))
    notes = {
        "schedules": f"  each takes {shared} too: see help(vitrim.tokens.Schedule)",
        "models": "  and every timm model that an adapter covers, by its timm name",
    }
    lines: list[str] = []
    for name, rows in tables.items():
        if kind in (name, "all"):
            lines.append(name)
            lines += [f"  {entry:<22}{text}".rstrip() for entry, text in rows]
            lines += [notes[name]] if name in notes else []
    return "\n".join(lines)


def _first(entry: object) -> str:
    return (entry.__doc__ or "").strip().splitlines()[0]
