"""A whole reduction in one line: `TopK(cls_attention) @ KeepRate(0.7, at=(3, 6, 9)) @ Delayed(5)`.

The same text is used on the command line, in recipes, saved models and tables: `parse` reads what `str` writes.
"""

import ast
from dataclasses import dataclass, field
from typing import Literal

from ..errors import ScheduleError, ScoreError
from ..notation import Notation, render
from ..option_types import check_options
from ..text import short
from .curricula import Constant
from .curriculum import CURRICULA, Curriculum
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
    """Which tokens are removed, how many and where, when in training, and in which mode of the model.

    Args:
        reducer: decides which tokens are removed.
        schedule: says how many, at which blocks.
        curriculum: how the schedule grows over training; `Constant()` by default.
        phase: reduce in "train" mode, in "eval" mode, or in "both" (default).
    """

    reducer: Reducer
    schedule: Schedule
    curriculum: Curriculum = field(default_factory=Constant)
    phase: Phase = "both"

    def __post_init__(self) -> None:
        check_options(self, ScheduleError)
        if self.reducer.training_only and self.phase != "train":
            raise ScoreError(
                f"{render(self.reducer)} uses gradients, so it works only in phase 'train', "
                f"not in phase {self.phase!r}; choose another score for evaluation"
            )
        self.curriculum.check(self.schedule)
        object.__setattr__(self, "curriculum", self.curriculum.completed(self.schedule))

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
        """Read `reducer @ schedule` or `reducer @ schedule @ curriculum`; errors list the known names."""
        if not text.strip():
            raise ScheduleError(f"no reduction given; for example {_NOTATION.example}")
        parts = _NOTATION.parse(text)
        kinds = (Reducer, Schedule, Curriculum)
        if not 2 <= len(parts) <= 3 or not all(isinstance(p, k) for p, k in zip(parts, kinds, strict=False)):
            raise ScheduleError(
                f"{short(text, 160)} is not `reducer @ schedule` or `reducer @ schedule @ curriculum`; "
                f"for example {_NOTATION.example}"
            )
        return cls(*parts, phase=phase)
