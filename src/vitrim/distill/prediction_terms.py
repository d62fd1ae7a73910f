"""Distillation terms on what the student predicts: labels, and the predictions of the teacher.

To add a term, subclass `Term` in a file of your own: say which outputs it reads of both networks, and compare them.
An output that no other term reads can be defined in the same file, see `models/outputs.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import DistillError
from ..models import outputs
from ..models.outputs import Output, Outputs
from ..tokens.precision import wide
from .losses import coarse_kl, soft_kl
from .objective import Batch, Term


@dataclass(frozen=True)
class Labels(Term):
    """The usual loss on labels, of the student's logits, with the criterion of the training."""

    def of_student(self) -> Sequence[Output]:
        """Logits."""
        return (outputs.Logits(),)

    def of_teacher(self) -> Sequence[Output]:
        """Nothing."""
        return ()

    def compare(self, batch: Batch, project: nn.Module | None) -> Tensor:
        """Criterion of the student's logits and the labels."""
        if batch.targets is None:
            raise DistillError("the term Labels needs labels; leave it out to train without them")
        return batch.criterion(wide(batch.student["logits"]), batch.targets)


@dataclass(frozen=True)
class _Predictions(Term):
    temperature: float = 4.0
    hard: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise DistillError(f"temperature must be above 0, not {self.temperature}")

    def of_student(self) -> Sequence[Output]:
        """Logits."""
        return (outputs.Logits(),)

    def of_teacher(self) -> Sequence[Output]:
        """Logits."""
        return (outputs.Logits(),)

    def temperatures(self) -> Sequence[float]:
        """Its temperature; none for hard labels."""
        return () if self.hard else (self.temperature,)

    def _against(self, student_BK: Tensor, teacher: Outputs) -> Tensor:
        classes = student_BK.shape[1]
        if "top" in teacher:
            if self.hard:
                return F.cross_entropy(wide(student_BK), teacher["index"][:, 0].long())
            rest = teacher[f"rest@{self.temperature:g}"]
            return coarse_kl(student_BK, teacher["top"], teacher["index"].long(), rest, self.temperature)
        if teacher["logits"].shape[1] != classes:
            raise DistillError(
                f"teacher logits are of {teacher['logits'].shape[1]} classes, the student's of {classes}"
            )
        if self.hard:
            return F.cross_entropy(wide(student_BK), teacher["logits"].argmax(1))
        return soft_kl(student_BK, teacher["logits"], self.temperature)


@dataclass(frozen=True)
class Logits(_Predictions):
    """Softened predictions: T^2 KL(teacher || student), batch mean (Hinton et al., arXiv 1503.02531).

    temperature: T, above 0; 4 by default.
    hard: cross-entropy with the teacher's top class instead; off by default.
    """

    def compare(self, batch: Batch, project: nn.Module | None) -> Tensor:
        """KL or cross-entropy of the student's logits."""
        return self._against(batch.student["logits"], batch.teacher)


@dataclass(frozen=True)
class DistToken(_Predictions):
    """Predictions of the student's distillation token against the teacher's (DeiT, Touvron et al., arXiv 2012.12877).

    temperature: T of the softened form, above 0; 4 by default.
    hard: cross-entropy with the teacher's top class, as DeiT does by default; False softens as `Logits` does.
    """

    hard: bool = True

    def of_student(self) -> Sequence[Output]:
        """Logits of the distillation token's classifier."""
        return (outputs.DistLogits(),)

    def compare(self, batch: Batch, project: nn.Module | None) -> Tensor:
        """KL or cross-entropy of the distillation classifier's logits."""
        return self._against(batch.student["dist_logits"], batch.teacher)
