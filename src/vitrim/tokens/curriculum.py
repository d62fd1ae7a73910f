"""What a curriculum is: how strongly a schedule acts at each moment of training, 0 = dense, 1 = the whole schedule.

A curriculum is a pure function of the epoch (which may be a fraction) and of the history of validation figures, so
that a resumed run takes the same course. To add one, subclass `Curriculum` with `strength`; if it uses validation
figures, name them in `reads`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from numbers import Real
from typing import Any, cast

from ..errors import ScheduleError, VitrimError
from ..option_types import check_options
from ..tables import Table
from ..text import short
from .plan import Schedule
from .scores import Needs

History = Sequence[Mapping[str, float]]
CURRICULA: Table[str, type["Curriculum"]] = Table("curriculum")


@dataclass(frozen=True)
class Figure:
    """A number that is measured on held-out images after every epoch.

    Args:
        name: its key in the history, and in `metrics.jsonl`.
        needs: what the model must supply, in the words of scores: "cls_row" needs a CLS token.
        best: the first value and all later ones of the course that drives a curriculum fastest.
        measure: computes it from the model and held-out images (B, channels, H, W). None for the figures that
            training always has (`val_loss`, and `val_accuracy` where classes are learnt) and for
            `attention_entropy`, which it can measure.
    """

    name: str
    needs: Needs = "nothing"
    best: tuple[float, float] = (1.0, 0.0)
    measure: Callable[[Any, Any], float] | None = None


VAL_LOSS = Figure("val_loss")
ATTENTION_ENTROPY = Figure("attention_entropy", needs="cls_row", best=(0.0, 0.0))


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """Base of all curricula.

    Args:
        per_step: whether the strength may change at every step, instead of only between epochs (default).
    """

    per_step: bool = False

    def __init_subclass__(cls) -> None:
        CURRICULA.enter(cls.__name__, cls)

    def __post_init__(self) -> None:
        check_options(self, ScheduleError)

    def strength(self, epoch: float, history: History = ()) -> float:
        """Strength in [0, 1] at `epoch` (from 0), given one mapping of validation figures per finished epoch."""
        raise NotImplementedError

    @property
    def reads(self) -> tuple[Figure, ...]:
        """The validation figures that `strength` uses; a recipe with any needs held-out images."""
        return ()

    @property
    def strengths(self) -> tuple[float, ...]:
        """Strengths at which a schedule is checked before training begins: by default all of [0, 1], in small steps."""
        return tuple(step / 32 for step in range(33))

    def check(self, schedule: Schedule) -> None:
        """Raise `ScheduleError` if the options contradict the schedule that this curriculum drives."""

    def completed(self, schedule: Schedule) -> "Curriculum":
        """This curriculum with open options filled in from the schedule that it drives."""
        return self

    def acts_within(self, epochs: int) -> bool:
        """Whether the strength is ever above 0 in so many epochs, if the figures take their best course."""
        course = [
            {figure.name: figure.best[0] if epoch == 0 else figure.best[1] for figure in self.reads}
            for epoch in range(epochs - 1)
        ]
        return self.strength(epochs - 1e-6 if self.per_step else epochs - 1, course) > 0


def check_moment(epoch: Any, history: Any) -> None:
    """Raise `VitrimError` unless these are an epoch and one mapping of figures for each finished epoch."""
    if not isinstance(epoch, Real) or not isfinite(epoch) or epoch < 0:
        raise VitrimError(f"epoch is a number, 0 or more, not {short(epoch)}")
    listed = isinstance(cast(object, history), Sequence) and not isinstance(history, str)
    if not listed or not all(isinstance(figures, Mapping) for figures in history):
        raise VitrimError(f"history is a list of one mapping for each finished epoch, not {short(history)}")
