"""What curves are set beside: networks that were trained alone, and figures in print; and what that says in words."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np


def compare_with_trained_alone(rows: Sequence[dict[str, Any]], trained_on: Collection[str] = ()) -> list[str]:
    """Fill in `over_alone` where networks trained alone cost both more and less; returns notes on it.

    Args:
        rows: of the table of a curve. Those without budget are networks trained alone.
        trained_on: rows whose networks start from those of other rows, so that they were trained longer.
    """
    alone = sorted((row["gmacs"], row["accuracy"]) for row in rows if row["budget"] is None)
    for row in rows:
        within = len(alone) > 1 and alone[0][0] <= row["gmacs"] <= alone[-1][0]
        other = float(np.interp(row["gmacs"], *zip(*alone, strict=True))) if within else None
        row["over_alone"] = None if other is None or row["budget"] is None else row["accuracy"] - other
    known = [row for row in rows if row["over_alone"] is not None]
    if not known:
        return []
    notes = [
        "Over trained alone: accuracy less that of networks trained alone, on a straight line between those that cost "
        "a little more and a little less."
    ]
    afresh = any(row["budget"] is None and row["row"] not in trained_on for row in rows)
    if longer := dict.fromkeys(row["curve"] for row in known if afresh and row["row"] in trained_on):
        notes.append(
            "No equal comparison with networks trained alone, since their weights come from another row and were "
            f"trained on: {_list(longer)}."
        )
    return [*notes, _where_below(known)]


def published_budgets_note(rows: Iterable[Mapping[str, Any]], linear_only: bool) -> list[str]:
    """A note on published figures whose budgets leave attention products out, none where no such figure is shown."""
    if not linear_only or all(row["published"] is None or row["budget"] is None for row in rows):
        return []
    return [
        "Published figures are those of networks at these fractions of the MACs without attention products, so that "
        "they are not quite those of the networks beside them."
    ]


def _where_below(rows: Iterable[Mapping[str, Any]]) -> str:
    """From where on each curve falls below networks trained alone, as far as accuracies are shown."""
    largest: dict[str, float | None] = {}
    for row in rows:
        before = largest.setdefault(row["curve"], None)
        if round(row["over_alone"], 4) < 0:
            largest[row["curve"]] = max(row["budget"], before or 0.0)
    below = [f"{name} ({budget:.2f})" for name, budget in largest.items() if budget is not None]
    never = [name for name, budget in largest.items() if budget is None]
    parts = {"below them, with the largest budget at which they are": below, "never below them": never}
    said = "; ".join(f"{what}: {_list(names)}" for what, names in parts.items() if names)
    return f"Beside networks trained alone, where both are known, curves are {said}."


def _list(names: Iterable[str]) -> str:
    return " | ".join(names)  # Names have commas in them.
