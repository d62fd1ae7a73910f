"""An objective is a weighted sum of terms, written in one line, with weights that may change over training.

`Labels(Linear(0.3, 0.5)) + Logits(Linear(0.7, 0.5), temperature=4) + ClsStages(0.3)`; without `Labels` training needs
no labels. This file holds what all terms have in common; the terms themselves are in `terms.py`.
"""

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..errors import DistillError
from ..kinds import check_options
from ..notation import Notation, render
from .features import Anatomy, Outputs, Wanted

TERMS: dict[str, type["Term"]] = {}
WEIGHTS: dict[str, type["Weight"]] = {}


@dataclass(frozen=True)
class Weight:
    """Base of weights that change over training; a plain number is a constant weight."""

    def __init_subclass__(cls) -> None:
        WEIGHTS[cls.__name__] = cls

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
    """What both models said about one batch, and its labels: (B,) classes or (B, K) probabilities."""

    student: Outputs
    teacher: Outputs
    targets: Tensor | None
    criterion: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Term:
    """Base of all terms. Immutable configuration; what must be learned is made by `project` and kept elsewhere."""

    weight: float | Weight = 1.0

    name: ClassVar[str]
    """The term in metrics and checkpoints, from the name of its class: `ClsStages` is `cls_stages`."""
    reads: ClassVar[tuple[str, ...]]
    """What it reads of the student: names of `Outputs`."""
    asks: ClassVar[tuple[str, ...]]
    """What it reads of the teacher; by default the same."""

    def __init_subclass__(cls) -> None:
        cls.name = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
        if "asks" not in cls.__dict__ and "reads" in cls.__dict__:
            cls.asks = cls.reads
        if not cls.__name__.startswith("_"):  # A shared base, not a term.
            TERMS[cls.__name__] = cls

    def __post_init__(self) -> None:
        check_options(self, DistillError)
        course = [self.weight_at(moment / 100) for moment in range(101)]
        if min(course) < 0 or max(course) == 0:
            shown = render(self.weight) if isinstance(self.weight, Weight) else self.weight
            raise DistillError(
                f"{type(self).__name__}: weight is never below 0 and not 0 for ever, unlike {shown}; "
                "leave a term out that shall not count"
            )

    def weight_at(self, progress: float) -> float:
        """The weight when this fraction of training, in [0, 1], has passed."""
        return self.weight.at(progress) if isinstance(self.weight, Weight) else float(self.weight)

    def wanted(self, of_teacher: bool) -> Wanted:
        """What must be looked at of the teacher, or of the student."""
        names = self.asks if of_teacher else self.reads
        return Wanted(**{name: name in names for name in ("logits", "dist_logits", "cls", "tokens")})

    def check(self, student: nn.Module) -> None:
        """Raise `DistillError` where this student, reduced as it is, would give the term nothing to compare."""

    def project(self, student: Anatomy, teacher: Anatomy) -> nn.Module | None:
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
            raise DistillError(f"an objective holds one or more terms, each once, not {' + '.join(names) or 'nothing'}")

    @classmethod
    def parse(cls, text: "str | Sequence[Term] | Terms") -> "Terms":
        """Read `term + term + ...`; errors name what is wrong and what is known."""
        if isinstance(text, Terms):
            return text
        parts = NOTATION.parse(text) if isinstance(text, str) else list(text)
        for part in parts:
            if not isinstance(part, Term):
                raise DistillError(f"{part} is no distillation term; for example {NOTATION.example}")
        return cls(tuple(parts))

    def __str__(self) -> str:
        return " + ".join(render(term) for term in self.terms)

    def wanted(self, of_teacher: bool) -> Wanted:
        """What all terms together read of the teacher, or of the student."""
        total = Wanted()
        for term in self.terms:
            total |= term.wanted(of_teacher)
        return total
