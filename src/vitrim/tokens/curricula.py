"""The curricula: how the strength of a schedule grows over training."""

from dataclasses import dataclass, replace
from itertools import pairwise
from math import cos, pi
from numbers import Real
from typing import Literal

from ..errors import ScheduleError
from ..notation import render
from ..text import short
from .curriculum import ATTENTION_ENTROPY, VAL_LOSS, Curriculum, Figure, History
from .plan import Schedule


@dataclass(frozen=True)
class Constant(Curriculum):
    """The whole schedule from the first step; the default."""

    @property
    def strengths(self) -> tuple[float, ...]:
        return (1.0,)

    def strength(self, epoch: float, history: History = ()) -> float:
        return 1.0


@dataclass(frozen=True)
class Delayed(Curriculum):
    """Dense before one epoch, the whole schedule from it on.

    Args:
        epoch: the first epoch that reduces, 0 or more; epochs count from 0.
    """

    epoch: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epoch < 0:
            raise ScheduleError(f"a curriculum starts at epoch 0 or later, not {self.epoch}")

    @property
    def strengths(self) -> tuple[float, ...]:
        return (0.0, 1.0)

    def strength(self, epoch: float, history: History = ()) -> float:
        return float(epoch >= self.epoch)


@dataclass(frozen=True)
class Polynomial(Curriculum):
    """Progressive token dropping (PTD): the drop ratio rises with a power of the time between two epochs.

    `d(t) = initial + ((t - start) / (end - start))^gamma * (final - initial)`, `initial` before `start`, `final` from
    `end` on. The strength is d(t) / final.

    Args:
        start: the epoch at which the rise begins, 0 or more.
        end: the epoch at which it ends, after `start`.
        final: drop ratio in (0, 1], the same as that of the schedule: 0.35 for `KeepRate(0.65)`, `Stages({0: 0.65})`
            and `PowerLaw(0.35)`. None (default): that of the schedule, whatever it is.
        gamma: the power, above 0; 1 is a straight line, 2 (default) starts slowly.
        initial: drop ratio in [0, final] before `start`; 0 (default) is dense.
    """

    start: float
    end: float
    final: float | None = None
    gamma: float = 2.0
    initial: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_order(self, self.start, self.end)
        if not 0 <= self.initial <= 1 or not (self.final is None or 0 < self.final <= 1):
            raise ScheduleError(f"drop ratios are in [0, 1], not initial={self.initial}, final={self.final}")
        if self.final is not None and self.initial > self.final:
            raise ScheduleError(f"the drop ratio rises, so initial={self.initial} cannot be above final={self.final}")
        if self.gamma <= 0:
            raise ScheduleError(f"gamma is above 0, not {self.gamma}")

    def check(self, schedule: Schedule) -> None:
        drops = schedule.drop_ratio
        if drops is None and (self.final is not None or self.initial > 0):
            given = "final" if self.final is not None else "initial"
            raise ScheduleError(
                f"{render(self)}: {given} is a drop ratio, but {schedule} has no single one; leave `{given}` out"
            )
        if self.final is not None and drops is not None and abs(self.final - drops) > 1e-9:
            raise ScheduleError(
                f"Polynomial ends at drop ratio {self.final}, but {schedule} drops {drops:.4g}; make them agree or "
                "leave `final` out"
            )
        if self.final is None and drops is not None and self.initial > drops:
            raise ScheduleError(
                f"Polynomial starts at drop ratio {self.initial}, but {schedule} drops only {drops:.4g}; "
                "lower `initial`"
            )

    def completed(self, schedule: Schedule) -> "Polynomial":
        # The strength at `initial` depends on how much the schedule drops; from 0, it does not.
        if self.final is not None or self.initial == 0 or schedule.drop_ratio is None:
            return self
        return replace(self, final=round(schedule.drop_ratio, 12))

    def drop_ratio(self, epoch: float) -> float:
        """d(t), between `initial` and `final` (1 where `final` is left out)."""
        if self.final is None and self.initial > 0:
            raise ScheduleError(f"{render(self)}: give `final` too, or combine it with a schedule in a Reduction")
        final = 1.0 if self.final is None else self.final
        return self.initial + _passed(epoch, self.start, self.end) ** self.gamma * (final - self.initial)

    def strength(self, epoch: float, history: History = ()) -> float:
        return self.drop_ratio(epoch) / (self.final or 1.0)


@dataclass(frozen=True)
class CosineWarmup(Curriculum):
    """The keep rate falls from 1 to its final value along half a cosine (EViT, arXiv 2202.07800).

    Args:
        end: the epoch from which the whole schedule acts, after `start`.
        start: the epoch at which the fall begins, 0 (default) or more.
    """

    end: float
    start: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_order(self, self.start, self.end)

    def strength(self, epoch: float, history: History = ()) -> float:
        return 0.5 * (1 - cos(pi * _passed(epoch, self.start, self.end)))


@dataclass(frozen=True)
class Adaptive(Curriculum):
    """Follow the run: reduce more while it goes well, less when it does not.

    Args:
        signal: "slope" (default): every finished epoch raises the strength by `step` if the validation loss
            (`val_loss`) fell by at least the fraction `threshold`, and lowers it by `step` if the loss rose.
            "entropy": the strength is (1 - `attention_entropy`) / `threshold`, where 1 is the entropy of uniform CLS
            attention, so that tokens are dropped only once attention is sharp. Needs a model with a CLS token.
        step: change per epoch of "slope", in (0, 1]; 0.1 by default.
        threshold: above 0; by default 0.01 for "slope" and 0.5 for "entropy".
        start: dense before this epoch; 0 by default.
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
    def reads(self) -> tuple[Figure, ...]:
        return (VAL_LOSS,) if self.signal == "slope" else (ATTENTION_ENTROPY,)

    @property
    def _threshold(self) -> float:
        return self.threshold or 0.0

    def strength(self, epoch: float, history: History = ()) -> float:
        (figure,) = self.reads
        values = [figures[figure.name] for figures in history if figure.name in figures]
        if wrong := [value for value in values if not isinstance(value, Real)]:
            raise ScheduleError(f"{figure.name} in the history is a number, not {short(wrong[0])}")
        if epoch < self.start or not values:
            return 0.0
        if self.signal == "entropy":
            return min(max((1 - values[-1]) / self._threshold, 0.0), 1.0)
        strength = 0.0
        for before, after in pairwise(values):
            fell = (before - after) / max(abs(before), 1e-12)
            if fell >= self._threshold:
                strength = min(1.0, strength + self.step)
            elif fell < 0:
                strength = max(0.0, strength - self.step)
        return strength


def _passed(epoch: float, start: float, end: float) -> float:
    """The fraction of the time from `start` to `end` that has passed, in [0, 1]."""
    return min(max((epoch - start) / (end - start), 0.0), 1.0)


def _check_order(curriculum: Curriculum, start: float, end: float) -> None:
    if not 0 <= start < end:
        name = type(curriculum).__name__
        raise ScheduleError(f"{name} needs 0 <= start < end, not start={start}, end={end}")
