"""The result of a speed measurement: one immutable row per model and batch size, with every round's time kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UnknownNameError
from .columns import columns
from .table import Column, Table


@dataclass(frozen=True)
class Quartiles:
    """Median with first and third quartile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Quartiles":
        """Quartiles of some numbers, linearly interpolated."""
        low, median, high = np.percentile(values, (25, 50, 75))
        return cls(float(median), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class BenchRow:
    """One model at one batch size.

    seconds: of one forward pass, one entry per round. speedup: time of `reference` over own time, per round.
    latency_ms: p50 and p95 over all single calls, at batch 1 only. macs: per image, None where they cannot be counted.
    macs_ratio: MACs of `reference` over own. peak_mib: weights and activations at the peak, on CUDA only.
    """

    name: str
    reference: str
    batch_size: int
    seconds: tuple[float, ...]
    speedup: Quartiles
    latency_ms: tuple[float, float] | None = None
    macs: int | None = None
    macs_ratio: float | None = None
    peak_mib: float | None = None

    @property
    def ms(self) -> Quartiles:
        """Milliseconds of one forward pass."""
        return Quartiles.of([1e3 * second for second in self.seconds])

    @property
    def images_per_second(self) -> float:
        """Batch size over the median time."""
        return 1e3 * self.batch_size / self.ms.median

    def flat(self) -> dict[str, Any]:
        """The row as plain data, one number per key but for the times of all rounds."""
        p50, p95 = self.latency_ms or (None, None)
        return {
            "model": self.name,
            "reference": self.reference,
            "batch_size": self.batch_size,
            **_spread("ms", self.ms),
            "images_per_second": self.images_per_second,
            **_spread("speedup", self.speedup),
            "macs": self.macs,
            "macs_ratio": self.macs_ratio,
            "p50_ms": p50,
            "p95_ms": p95,
            "peak_mib": self.peak_mib,
            "seconds": self.seconds,
        }


_COLUMNS = columns(
    "model", "batch_size", "ms", "images_per_second", "speedup", "macs_ratio", "macs", "p50_ms", "p95_ms", "peak_mib"
)


@dataclass(frozen=True)
class BenchTable(Table):
    """All rows of one measurement with the environment and the settings that produced them."""

    measured: tuple[BenchRow, ...] = ()

    @classmethod
    def of(
        cls, measured: Sequence[BenchRow], environment: Mapping[str, Any], settings: Mapping[str, Any]
    ) -> "BenchTable":
        """The table of these rows; columns that hold nothing are left out."""
        rows = [row.flat() for row in measured]
        notes = (
            "Median [quartiles] over rounds; speedup and MACs ratio are relative to "
            + " and ".join(dict.fromkeys(row.reference for row in measured)) + ".",
            "Settings: " + ", ".join(f"{name} {value}" for name, value in settings.items()),
        )  # fmt: skip
        shown = [column for column in _COLUMNS if any(row[column.key] is not None for row in rows)]
        return cls("Speed", shown, rows, notes, environment, tuple(measured))

    def row(self, name: str, batch_size: int) -> BenchRow:
        """The row of that model at that batch size."""
        known = {f"{row.name} at batch {row.batch_size}": row for row in self.measured}
        wanted = f"{name} at batch {batch_size}"
        if wanted not in known:
            raise UnknownNameError("row", wanted, known)
        return known[wanted]

    def speedup(self, name: str, over: str, batch_size: int) -> Quartiles:
        """How many times faster `name` is than `over`: quartiles of the ratios within each round."""
        own, other = self.row(name, batch_size), self.row(over, batch_size)
        return ratios(other.seconds, own.seconds)

    def csv(self) -> str:
        """All numbers unrounded, quartiles in columns of their own, times of all rounds joined by spaces."""
        return Table(self.title, [Column(key, key) for key in self.rows[0]], self.rows).csv()


def ratios(over: Sequence[float], under: Sequence[float]) -> Quartiles:
    """Quartiles of the ratios of two series, round by round."""
    return Quartiles.of([a / b for a, b in zip(over, under, strict=True)])


def _spread(key: str, value: Quartiles) -> dict[str, float]:
    return {key: value.median, f"{key}_low": value.low, f"{key}_high": value.high}
