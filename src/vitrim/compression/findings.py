"""What a verification found of each statement of a certificate, and whether that statement holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..measure.columns import columns
from ..measure.environment import environment
from ..measure.intervals import Interval
from ..measure.table import Table
from .certificate import Certificate, Line, row_of
from .forms import FORMS
from .images import Pictures
from .remarks import time_notes

ROUNDING = 1e-6
"""A divergence that says nothing: what other sums in float32 make of equal outputs."""
COUNTED = ("macs", "params")
COMPARED = ("divergence", "agreement", "accuracy", "drop")
"""Statements that need the given model with its weights, and images."""
TIMES = ("time", "ms")
"""Statements about the machine as much as about the model: they are judged only where they were asked for."""


@dataclass(frozen=True)
class Finding:
    """A statement of a certificate and what was found here; `here` is None where it could not be measured."""

    line: Line
    here: Line | None
    why: str = ""

    @property
    def is_judged(self) -> bool:
        """Whether the statement can hold or not: the time that another machine takes says nothing about this one."""
        return self.line.asked is not None or self.line.key not in TIMES

    @property
    def verdict(self) -> str:
        """`holds` in words."""
        if self.here is None:
            return f"not measured: {self.why}"
        return {None: "not judged: a time of this machine", True: "yes", False: "NO"}[self.holds]

    @property
    def holds(self) -> bool | None:
        """Whether the statement holds here; None where it was not measured, or is a time that nobody asked for.

        What is counted must be equal. What was asked must be met at the bad end of the interval here. Of anything else
        the two intervals must overlap, or what is found here be better.
        """
        if self.here is None or not self.is_judged:
            return None
        if self.line.key in COUNTED:
            return self.here.value == self.line.value
        if self.line.asked is not None:
            return self.here.worst <= self.line.asked
        there, here = self.line.interval, self.here.interval
        if self.line.key == "divergence":  # Of equal models it is what rounding makes it, in each runtime another.
            there = Interval(there.value, there.low - ROUNDING, there.high + ROUNDING)
        better = here.high < there.low if FORMS[self.line.key].small_is_good else here.low > there.high
        return better or here.overlaps(there)


@dataclass(frozen=True)
class Verified:
    """What `verify` found."""

    certificate: Certificate
    findings: tuple[Finding, ...]
    notes: Sequence[str] = ()

    @property
    def holds(self) -> bool:
        """Whether every statement that was measured and is judged holds here."""
        return all(finding.holds is not False for finding in self.findings)

    def table(self) -> Table:
        """Every statement, what the certificate says, and what was found here."""
        rows: list[dict[str, Any]] = []
        for finding in self.findings:
            there, here = row_of(finding.line), None if finding.here is None else row_of(finding.here)
            rows.append({
                "statement": there["statement"], "certificate": there["found"], "here": here and here["found"],
                "asked": there["asked"], "holds": finding.verdict,
            })  # fmt: skip
        notes = [
            "A statement holds if what is counted is the same, if what was asked is met at the bad end of the interval "
            "here, and otherwise if the intervals overlap or it is better here. Times that nobody asked for are not "
            "judged, since another machine, or a busy one, has others.",
            *time_notes([finding.here for finding in self.findings if finding.here is not None]),
            *self.notes,
        ]
        whole = all(finding.here is not None or finding.line.asked is None for finding in self.findings)
        found = "holds here" if whole else "holds here as far as it was measured"
        title = f"Verified: {self.certificate.asked}, {found if self.holds else 'DOES NOT HOLD here'}"
        return Table(title, _COLUMNS, rows, notes=notes, environment=environment())


_COLUMNS = columns("statement", "certificate", "here", "asked", "holds")


def findings(
    certificate: Certificate, found: Mapping[str, Line], images: Pictures | None, original: nn.Module | None,
    **reasons: str,
) -> tuple[Finding, ...]:  # fmt: skip
    """Each statement of a certificate with what was found here, or with the reason why nothing was.

    Args:
        found: by key.
        images, original: what there was to compare on and with.
        reasons: why a statement was not measured, by key, where the cause is neither images nor models.
    """
    absent = "the given model is not here; name it with --original"
    compared = "no images were given" if images is None else "the images have no classes of the model"
    why = {
        **dict.fromkeys(COMPARED, absent if images is not None and original is None else compared),
        **dict.fromkeys(TIMES, absent),
        **dict.fromkeys(("over_tokens", "over_width"), "only the search had the other answers"),
        **reasons,
    }
    here = ((line, found.get(line.key)) for line in certificate.lines)
    return tuple(Finding(line, one, "" if one is not None else why.get(line.key, "")) for line, one in here)
