"""An objective is a weighted sum of terms, written in one line, with weights that may change over training.

`Labels(Linear(0.3, 0.5)) + Logits(Linear(0.7, 0.5), temperature=4) + ClsStages(0.3)`; without `Labels` training needs
no labels. This file holds what all terms have in common; the terms are in `terms.py`, or in your own file: a term, with
the outputs that only it reads, is one file.
"""

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..errors import DistillError
from ..models.outputs import ModelInfo, Output, Outputs, Wanted
from ..notation import Notation, render
from ..option_types import check_options
from ..tables import Table

TERMS: Table[str, type["Term"]] = Table("distillation term")
WEIGHTS: Table[str, type["Weight"]] = Table("weight")


@dataclass(frozen=True)
class Weight:
    """Base of weights that change over training; a plain number is a constant weight."""

    def __init_subclass__(cls) -> None:
        WEIGHTS.enter(cls.__name__, cls)

    def __post_init__(self) -> None:
        check_options(self, DistillError)

    def at(self, progress: float) -> float:
        """The weight when this fraction of training, in [0, 1], has passed."""
        raise NotImplementedError


@dataclass(frozen=True)
class Linear(Weight):
    """A straight line from `start` at the first epoch to `end` at the last."""

    start: float
    end: float

    def at(self, progress: float) -> float:
        """The weight when this fraction of training, in [0, 1], has passed."""
        return self.start + min(max(progress, 0.0), 1.0) * (self.end - self.start)


@dataclass(frozen=True, eq=False)
class Batch:
    """The outputs of both models for one batch, and its labels: (B,) classes or (B, K) probabilities."""

    student: Outputs
    teacher: Outputs
    targets: Tensor | None
    criterion: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Term:
    """Base of all terms. Immutable configuration; modules that must be learned are made by `project`.

    A subclass says which outputs it reads (`of_student`, `of_teacher`) and compares them. The outputs may be those of
    `models/outputs.py` or its own subclasses of `Output`.
    """

    weight: float | Weight = 1.0
    """Its factor in the objective, 0 or more, and not 0 all the time."""

    name: ClassVar[str]
    """The term in metrics and checkpoints, from the name of its class: `ClsStages` is `cls_stages`."""

    def __init_subclass__(cls) -> None:
        cls.name = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
        TERMS.enter(cls.__name__, cls)

    def __post_init__(self) -> None:
        check_options(self, DistillError)
        course = [self.weight_at(moment / 100) for moment in range(101)]
        if min(course) < 0 or max(course) == 0:
            shown = render(self.weight) if isinstance(self.weight, Weight) else self.weight
            raise DistillError(
                f"{type(self).__name__}: the weight must be 0 or more, and not 0 all the time, but it is {shown}; "
                "leave the term out if it is not needed"
            )

    def weight_at(self, progress: float) -> float:
        """The weight when this fraction of training, in [0, 1], has passed."""
        return self.weight.at(progress) if isinstance(self.weight, Weight) else float(self.weight)

    def of_student(self) -> Sequence[Output]:
        """The outputs that it reads of the student."""
        raise NotImplementedError

    def of_teacher(self) -> Sequence[Output]:
        """The outputs that it reads of the teacher; by default the same."""
        return self.of_student()

    def temperatures(self) -> Sequence[float]:
        """Temperatures at which it softens the teacher's logits."""
        return ()

    def check(self, student: nn.Module) -> None:
        """Raise `DistillError` where this student, reduced as it is, would give the term nothing to compare."""

    def project(self, student: ModelInfo, teacher: ModelInfo) -> nn.Module | None:
        """The learned map from student to teacher width, None where there is nothing to learn."""
        return None

    def compare(self, batch: Batch, project: nn.Module | None) -> Tensor:
        """The unweighted term, a scalar, mean over images."""
        raise NotImplementedError


NOTATION = Notation(
    "distillation term or weight",
    (TERMS, WEIGHTS),
    ast.Add,
    DistillError,
    "Logits(0.7, temperature=4) + ClsStages(0.3)",
)


@dataclass(frozen=True)
class Terms:
    """The whole objective: a sum of terms, each at most once."""

    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        names = [term.name for term in self.terms]
        if not names or len(set(names)) < len(names):
            shown = " + ".join(names) or "nothing"
            raise DistillError(f"an objective has one or more terms, each at most once, not {shown}")

    @classmethod
    def parse(cls, text: "str | Sequence[Term] | Terms") -> "Terms":
        """Read `term + term + ...`; errors name what is wrong and what is known."""
        if isinstance(text, Terms):
            return text
        parts = NOTATION.parse(text) if isinstance(text, str) else list(text)
        for part in parts:
            if not isinstance(part, Term):
                raise DistillError(f"{part} is not a distillation term; write, for example, {NOTATION.example}")
        return cls(tuple(parts))

    def __str__(self) -> str:
        return " + ".join(render(term) for term in self.terms)

    def wanted(self, of_teacher: bool) -> Wanted:
        """All outputs that the terms read of the teacher, or of the student."""
        read = [term.of_teacher() if of_teacher else term.of_student() for term in self.terms]
        temperatures = (float(value) for term in self.terms for value in term.temperatures())
        return Wanted(frozenset(output for outputs in read for output in outputs), frozenset(temperatures))
