"""A whole reduction in one line: `TopK(cls_attention) @ KeepRate(0.7, at=(3, 6, 9)) @ Delayed(5)`.

The same text serves the command line, recipes, saved models and tables: what `str` prints, `parse` reads.
"""

import ast
from dataclasses import dataclass, field
from typing import Literal

from ..errors import ScheduleError, ScoreError
from ..kinds import check_options
from ..notation import Notation, render
from .curricula import CURRICULA, Constant, Curriculum, Polynomial
from .plan import SCHEDULES, Schedule
from .reducers import REDUCERS, Reducer

Phase = Literal["both", "train", "eval"]
_NOTATION = Notation(
    kind="reducer, schedule or curriculum",
    tables=(REDUCERS, SCHEDULES, CURRICULA),
    operator=ast.MatMult,
    error=ScheduleError,
    example="TopK(cls_attention) @ KeepRate(0.7, at=(3, 6, 9))",
)


@dataclass(frozen=True)
class Reduction:
    """Which tokens go (reducer), how many and where (schedule), when in training (curriculum), and in which phase."""

    reducer: Reducer
    schedule: Schedule
    curriculum: Curriculum = field(default_factory=Constant)
    phase: Phase = "both"

    def __post_init__(self) -> None:
        check_options(self, ScheduleError)
        if self.reducer.training_only and self.phase != "train":
            raise ScoreError(
                f"{render(self.reducer)} lives on gradients, so it can act in phase 'train' alone, "
                f"not in phase {self.phase!r}; at test time choose another score"
            )
        if isinstance(self.curriculum, Polynomial) and self.curriculum.final != 1:
            self._check_final(self.curriculum.final)

    def _check_final(self, final: float) -> None:
        drops = self.schedule.drop_ratio
        if drops is None or abs(final - drops) > 1e-9:
            named = "has no one drop ratio" if drops is None else f"drops {drops:.4g}"
            advice = "leave `final` out" if drops is None else "make them agree or leave `final` out"
            raise ScheduleError(f"Polynomial ends at drop ratio {final}, but {self.schedule} {named}; {advice}")

    def active(self, training: bool) -> bool:
        """Whether tokens are reduced in this mode of the model."""
        return self.phase == "both" or (self.phase == "train") == training

    def __str__(self) -> str:
        parts = [render(self.reducer), render(self.schedule)]
        if self.curriculum != Constant():
            parts.append(render(self.curriculum))
        return " @ ".join(parts)

    @classmethod
    def parse(cls, text: str, phase: Phase = "both") -> "Reduction":
        """Read `reducer @ schedule` or `reducer @ schedule @ curriculum`; errors say what is wrong and known."""
        if not text.strip():
            raise ScheduleError(f"no reduction given; for example {_NOTATION.example}")
        parts = _NOTATION.parse(text)
        kinds = (Reducer, Schedule, Curriculum)
        if not 2 <= len(parts) <= 3 or not all(isinstance(p, k) for p, k in zip(parts, kinds, strict=False)):
            raise ScheduleError(
                f"{text!r} is not `reducer @ schedule` or `reducer @ schedule @ curriculum`; "
                f"for example {_NOTATION.example}"
            )
        return cls(*parts, phase=phase)
