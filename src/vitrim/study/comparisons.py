"""Compare curves with networks that were trained alone and with published figures, and put the result into words."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np


def compare_with_trained_alone(rows: Sequence[dict[str, Any]], trained_on: Collection[str] = ()) -> list[str]:
    """Set `over_alone` in rows between the costs of networks trained alone; returns notes on it.

    Args:
        rows: of the table of a curve. Those without budget are networks trained alone.
        trained_on: rows whose networks start from those of other rows, so that they were trained longer.
    """
    alone = sorted((row["gmacs"], row["accuracy"]) for row in rows if row["budget"] is None)
    for row in rows:
        within = len(alone) > 1 and alone[0][0] <= row["gmacs"] <= alone[-1][0]
        other = float(np.interp(row["gmacs"], [at for at, _ in alone], [of for _, of in alone])) if within else None
        row["over_alone"] = None if other is None or row["budget"] is None else row["accuracy"] - other
    known = [row for row in rows if row["over_alone"] is not None]
    if not known:
        return []
    notes = [
        "Over trained alone: accuracy minus that of networks trained alone, interpolated linearly at the same cost."
    ]
    from_scratch = any(row["budget"] is None and row["row"] not in trained_on for row in rows)
    if longer := dict.fromkeys(row["curve"] for row in known if from_scratch and row["row"] in trained_on):
        notes.append(
            "No equal comparison with networks trained alone, since these started from the weights of another row and "
            f"so were trained longer: {_list(longer)}."
        )
    return [*notes, _where_below(known)]


def published_budgets_note(rows: Iterable[Mapping[str, Any]], linear_only: bool) -> list[str]:
    """A note on published figures whose budgets leave out attention products; empty where none is shown."""
    if not linear_only or all(row["published"] is None or row["budget"] is None for row in rows):
        return []
    return [
        "Budgets of published figures are fractions of the MACs without attention products, so the published networks "
        "differ a little in size from those in the same row."
    ]


def _where_below(rows: Iterable[Mapping[str, Any]]) -> str:
    """The largest budget at which each curve is below networks trained alone, at the precision of the table."""
    largest: dict[str, float | None] = {}
    for row in rows:
        before = largest.setdefault(row["curve"], None)
        if round(row["over_alone"], 4) < 0:
            largest[row["curve"]] = max(row["budget"], before or 0.0)
    below = [f"{name} ({budget:.2f})" for name, budget in largest.items() if budget is not None]
    never = [name for name, budget in largest.items() if budget is None]
    parts = {"below them, with the largest budget at which they are": below, "never below them": never}
    text = "; ".join(f"{what}: {_list(names)}" for what, names in parts.items() if names)
    return f"Compared with networks trained alone, where both are known, curves are {text}."


def _list(names: Iterable[str]) -> str:
    return " | ".join(names)  # Names contain commas.
