"""How strongly a schedule acts at each moment of training: one number in [0, 1], 0 = dense, 1 = the whole schedule.

A curriculum is a pure function of the epoch (which may be a fraction) and of the history of validation
figures, so that a resumed run follows the same path. To add one, subclass `Curriculum` with `strength`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import cos, pi
from typing import Literal

from ..errors import ScheduleError
from ..kinds import check_options

History = Sequence[Mapping[str, float]]
CURRICULA: dict[str, type["Curriculum"]] = {}


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """Base of all curricula. `per_step` lets the strength change within an epoch, not only between epochs."""

    per_step: bool = False

    def __init_subclass__(cls) -> None:
        CURRICULA[cls.__name__] = cls

    def __post_init__(self) -> None:
        check_options(self, ScheduleError)

    def strength(self, epoch: float, history: History = ()) -> float:
        """Strength in [0, 1] at `epoch` (from 0), given one mapping of validation figures per finished epoch."""
        raise NotImplementedError

    def acts_within(self, epochs: int) -> bool:
        """Whether a training of so many epochs gets to see any of it, on the most favourable course."""
        course = [{"val_loss": float(epoch == 0), "attention_entropy": 0.0} for epoch in range(epochs - 1)]
        return self.strength(epochs - 1e-6 if self.per_step else epochs - 1, course) > 0


@dataclass(frozen=True)
class Constant(Curriculum):
    """The whole schedule from the first step."""

    def strength(self, epoch: float, history: History = ()) -> float:
        return 1.0


@dataclass(frozen=True)
class Delayed(Curriculum):
    """Dense before `epoch`, the whole schedule from it on (epochs count from 0)."""

    epoch: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epoch < 0:
            raise ScheduleError(f"a curriculum starts at epoch 0 or later, not {self.epoch}")

    def strength(self, epoch: float, history: History = ()) -> float:
        return float(epoch >= self.epoch)


@dataclass(frozen=True)
class Polynomial(Curriculum):
    """PTD: drop ratio `initial` before `start`, `final` from `end` on, between them a power of the time passed.

    `d(t) = initial + ((t - start) / (end - start))^gamma * (final - initial)`; `final` is the drop ratio of the
    schedule it drives, so `KeepRate(0.65)`, `Stages({0: 0.65})` and `PowerLaw(0.35)` go with `final=0.35`.
    Left out, it is whatever the schedule drops.
    """

    start: float
    end: float
    final: float = 1.0
    gamma: float = 2.0
    initial: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.start < self.end:
            raise ScheduleError(f"Polynomial needs 0 <= start < end, not start={self.start}, end={self.end}")
        if not 0 <= self.initial <= self.final <= 1 or self.final == 0:
            raise ScheduleError(f"drop ratios rise within [0, 1], not from {self.initial} to {self.final}")
        if self.gamma <= 0:
            raise ScheduleError(f"gamma is above 0, not {self.gamma}")

    def drop_ratio(self, epoch: float) -> float:
        """d(t), between `initial` and `final`."""
        passed = min(max((epoch - self.start) / (self.end - self.start), 0.0), 1.0)
        return self.initial + passed**self.gamma * (self.final - self.initial)

    def strength(self, epoch: float, history: History = ()) -> float:
        return self.drop_ratio(epoch) / self.final


@dataclass(frozen=True)
class CosineWarmup(Curriculum):
    """EViT: the keep rate falls from 1 to its final value along half a cosine, between epochs `start` and `end`."""

    end: float
    start: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.start < self.end:
            raise ScheduleError(f"CosineWarmup needs 0 <= start < end, not start={self.start}, end={self.end}")

    def strength(self, epoch: float, history: History = ()) -> float:
        passed = min(max((epoch - self.start) / (self.end - self.start), 0.0), 1.0)
        return 0.5 * (1 - cos(pi * passed))


@dataclass(frozen=True)
class Adaptive(Curriculum):
    """Follow the run: prune more while it goes well, less when it does not.

    signal="slope": each finished epoch raises the strength by `step` when the validation loss (`val_loss`) fell
    by at least the fraction `threshold`, and lowers it by `step` when the loss rose.
    signal="entropy": strength is how far CLS attention is from uniform (`attention_entropy`, in [0, 1] of the
    largest possible), divided by `threshold`, so that attention must be sharp before tokens go.
    `threshold` defaults to 0.01 for the slope and 0.5 for the entropy.
    """

    signal: Literal["slope", "entropy"] = "slope"
    step: float = 0.1
    threshold: float | None = None
    start: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is None:
            object.__setattr__(self, "threshold", 0.01 if self.signal == "slope" else 0.5)
        if not 0 < self.step <= 1 or self._threshold <= 0:
            raise ScheduleError(
                f"Adaptive needs step in (0, 1] and threshold above 0, not {self.step}, {self.threshold}"
            )

    @property
    def _threshold(self) -> float:
        return self.threshold or 0.0

    def strength(self, epoch: float, history: History = ()) -> float:
        if epoch < self.start:
            return 0.0
        if self.signal == "entropy":
            if not history or "attention_entropy" not in history[-1]:
                return 0.0
            return min(max((1 - history[-1]["attention_entropy"]) / self._threshold, 0.0), 1.0)
        strength = 0.0
        losses = [figures["val_loss"] for figures in history if "val_loss" in figures]
        for before, after in pairwise(losses):
            fell = (before - after) / max(abs(before), 1e-12)
            if fell >= self._threshold:
                strength = min(1.0, strength + self.step)
            elif fell < 0:
                strength = max(0.0, strength - self.step)
        return strength
