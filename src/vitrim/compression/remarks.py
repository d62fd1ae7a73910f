"""Sentences below the lines of a certificate: where it was measured, and what its times do not say."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..text import short_name

if TYPE_CHECKING:
    from .certificate import Line

WIDEST = 1.5
"""How many times its lower end the upper end of an interval of times may be, for it to say anything."""


def images_note(measured: Mapping[str, Any]) -> str:
    """On the images that something was measured on, from their record."""
    kind = {"test": "test images", "train": "images that are not test images"}.get(str(measured.get("split")), "images")
    return short_name(f"Measured on {measured.get('number')} {kind}: {measured.get('place')}.", 400)


def change_note(*, tokens: bool, width: bool, cls_only: bool) -> str:
    """On what the answer is: which parts of the given model were reduced."""
    what = "the number of tokens is reduced" if tokens else "no token is dropped"
    cut = "widths are cut" if width else "no width is cut"
    last = "; the last block computes only CLS" if cls_only else ""
    return f"Change: {what}, {cut}{last}."


def time_notes(lines: Sequence["Line"]) -> list[str]:
    """On the ratio of times among these lines, for whoever would take it for more than it is."""
    notes: list[str] = []
    for line in lines:
        if line.key == "time" and line.interval.high > WIDEST * line.interval.low:
            notes.append("Times varied too much to say how fast the answer is: was the machine busy?")
        if line.key == "time" and line.value > 1:
            notes.append(f"The answer was measured slower than the given model: {line.value:.2f} times its time.")
    return notes
