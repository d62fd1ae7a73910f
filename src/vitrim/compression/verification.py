"""Measure the statements of a certificate again, here, and say of each one whether it holds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..elastic.chain import hash_of
from ..errors import CheckpointError, VitrimError
from ..heartbeat import heartbeat
from ..measure.columns import columns
from ..measure.cost import cost
from ..measure.environment import environment
from ..measure.intervals import Interval
from ..measure.table import Table
from ..models import attached, load
from ..models.compiling import check_compiler
from ..models.files.description import parse
from ..models.files.rebuild import rebuild
from ..models.foreign_macs import num_parameters
from ..models.shapes_only import shapes_only
from .certificate import Certificate, Line, row_of
from .fidelity import Fidelity
from .forms import FORMS
from .images import Pictures
from .measured_lines import compared_lines, time_lines
from .remarks import time_notes
from .request import device_named
from .timing import sessions

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


def open_certified(folder: str | Path) -> tuple[nn.Module, Certificate]:
    """The model in a folder and its certificate.

    Raises:
        CheckpointError: one of them is missing or damaged, or the certificate is of other weights.
    """
    certificate = Certificate.read(folder)
    model = load(folder)
    if hash_of(model) != certificate.weights:
        raise CheckpointError(
            f"the certificate in {folder} belongs to other weights than those in that folder; run vitrim compress again"
        )
    return model, certificate


def verify(
    folder: str | Path,
    images: Pictures | None = None,
    original: nn.Module | None = None,
    *,
    device: str | torch.device | None = None,
    notes: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> Verified:
    """Measure the statements of the certificate in a folder again.

    Args:
        folder: what `Compressed.save` or `vitrim compress` wrote.
        images: to compare on, none of which the search used, with classes where accuracies are to be compared; None:
            nothing is compared.
        original: the given model. None: one of its description with random weights, which takes the same time.
        device: where to measure; by default as in the certificate, or the CPU where there is none such.
        notes: sentences about the images, for the reader of the table.
        say: called with lines for the user.

    Raises:
        CheckpointError: no certificate, a damaged one, or one of other weights.
        VitrimError: the given model is another one than that of the certificate.
    """
    model, certificate = open_certified(folder)
    if original is not None:
        check_original(original, certificate, folder)
    settings = dict(certificate.settings)
    place = torch.device(settings.get("device", "cpu")) if device is None else device_named(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        say("the certificate was measured on CUDA, which is not available; times are those of the CPU")
        place = torch.device("cpu")
    found: dict[str, Line] = {line.key: line for line in _counted(model, certificate)}
    if images is not None and original is not None:
        say(f"comparing with the given model on {len(images)} images")
        with heartbeat("comparing with the given model", say):
            found |= {line.key: line for line in _compared(model.to(place), original.to(place), images, place)}
    reasons: dict[str, str] = {}
    if settings.get("compile"):
        try:
            check_compiler(place)
        except VitrimError as error:
            reasons = dict.fromkeys(TIMES, f"compiled there, but {error}")
    if not reasons and (whole := described(certificate) if original is None else original) is not None:
        say("measuring the time in fresh rounds")
        with heartbeat("measuring the time", say):
            found |= {line.key: line for line in _timed(whole, model, settings, place)}
    return Verified(certificate, findings(certificate, found, images, original, **reasons), notes)


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
    return tuple(Finding(line, found.get(line.key), why.get(line.key, "")) for line in certificate.lines)


def is_original(model: nn.Module, certificate: Certificate) -> bool:
    """Whether this is the given model of a certificate.

    The weights alone do not say so: a model of which only tokens were removed has those of the given one.
    """
    return attached(model) is None and hash_of(model) == certificate.original


def check_original(original: nn.Module, certificate: Certificate, place: str | Path) -> None:
    """Raise `VitrimError` unless this is the given model of a certificate, which lies in `place`."""
    if not is_original(original, certificate):
        raise VitrimError(f"the certificate in {place} compares with another model than this; give the one compressed")


def described(certificate: Certificate) -> nn.Module | None:
    """A model like the given one with random weights; None where the certificate does not describe it."""
    text = certificate.source.get("description")
    if not isinstance(text, str):
        return None
    record = parse(text, "the certificate")
    with shapes_only():
        size = num_parameters(rebuild(record))
    # Before memory is taken for what may be any size.
    if "params" not in certificate or size != certificate["params"].of:
        raise CheckpointError("the certificate describes another model than the one it compares with; compress again")
    return rebuild(record).eval()


def _counted(model: nn.Module, certificate: Certificate) -> list[Line]:
    found = cost(model)
    return [Line(key, getattr(found, key), asked=certificate[key].asked) for key in COUNTED if key in certificate]


def _compared(model: nn.Module, original: nn.Module, images: Pictures, device: torch.device) -> list[Line]:
    fidelity = Fidelity(original, images, device)
    return compared_lines(fidelity, fidelity.compare(model))


def _timed(original: nn.Module, model: nn.Module, settings: Mapping[str, Any], device: torch.device) -> list[Line]:
    return time_lines(sessions(
        original, model, batch_size=int(settings.get("batch_size", 32)), device=device,
        dtype=str(settings.get("dtype", "float32")), compile=bool(settings.get("compile", False)),
    ))  # fmt: skip
