"""The table of distillation terms: what of the student is compared with what of the teacher.

To add a term, subclass `Term`: say what it reads of the student and asks of the teacher, and compare.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import DistillError
from ..models import attached
from ..notation import render
from ..tokens.precision import wide
from .features import Anatomy, Outputs, Wanted, group_means
from .losses import coarse_kl, distance, find_loss, mean_where, soft_kl
from .objective import Batch, Term


@dataclass(frozen=True)
class Labels(Term):
    """The usual loss on labels, with the student's logits and the training's own criterion."""

    reads: ClassVar = ("logits",)
    asks: ClassVar = ()

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
            raise DistillError(f"temperature is above 0, not {self.temperature}")

    def wanted(self, of_teacher: bool) -> Wanted:
        """The logits, and the temperature at which they are softened."""
        return replace(super().wanted(of_teacher), temperatures=() if self.hard else (float(self.temperature),))

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

    hard: cross-entropy with the teacher's top class instead.
    """

    reads: ClassVar = ("logits",)

    def compare(self, batch: Batch, project: nn.Module | None) -> Tensor:
        """KL or cross-entropy of the student's logits."""
        return self._against(batch.student["logits"], batch.teacher)


@dataclass(frozen=True)
class DistToken(_Predictions):
    """Predictions of the student's distillation token; hard by default (DeiT, arXiv 2012.12877)."""

    hard: bool = True

    reads: ClassVar = ("dist_logits",)
    asks: ClassVar = ("logits",)

    def compare(self, batch: Batch, project: nn.Module | None) -> Tensor:
        """KL or cross-entropy of the distillation head's logits."""
        return self._against(batch.student["dist_logits"], batch.teacher)


@dataclass(frozen=True)
class _Vectors(Term):
    loss: str = "mse"
    normalise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        find_loss(self.loss)

    def project(self, student: Anatomy, teacher: Anatomy) -> nn.Module | None:
        """One linear map, also between equal widths."""
        return nn.Linear(student.width, teacher.width)


@dataclass(frozen=True)
class ClsStages(_Vectors):
    """CLS after every stage but the last, L2-normalised, at the same relative depth (PTP-FAKD); mean over boundaries.

    stages: equal stages of blocks; 3 puts boundaries after blocks L/3-1 and 2L/3-1.
    Between equal widths the vectors are compared as they are; otherwise each boundary learns a linear map.
    """

    normalise: bool = True
    stages: int = 3

    reads: ClassVar = ("stages",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stages < 2:
            raise DistillError(f"ClsStages needs 2 stages or more, not {self.stages}")

    def wanted(self, of_teacher: bool) -> Wanted:
        """CLS at the boundaries of so many stages."""
        return replace(super().wanted(of_teacher), stages=self.stages)

    def project(self, student: Anatomy, teacher: Anatomy) -> nn.Module | None:
        """One linear map per boundary, none between equal widths."""
        if student.width == teacher.width:
            return None
        return nn.ModuleList(nn.Linear(student.width, teacher.width) for _ in range(self.stages - 1))

    def compare(self, batch: Batch, project: nn.Module | None) -> Tensor:
        """Mean over boundaries and images."""
        given = batch.student["stages"].unbind(1)
        maps = project if project is not None else [nn.Identity() for _ in given]
        each = zip(given, maps, batch.teacher["stages"].unbind(1), strict=True)
        losses = [distance(one(cls), target, self.loss, self.normalise).mean() for cls, one, target in each]
        return sum(losses[1:], losses[0]) / len(losses)


@dataclass(frozen=True)
class Cls(_Vectors):
    """The final CLS token, mapped to teacher width."""

    reads: ClassVar = ("cls",)

    def compare(self, batch: Batch, project: nn.Module | None) -> Tensor:
        """Mean over images."""
        assert project is not None
        return distance(project(batch.student["cls"]), batch.teacher["cls"], self.loss, self.normalise).mean()


@dataclass(frozen=True)
class _Patches(_Vectors):
    reads: ClassVar = ("tokens", "origin", "fused")
    asks: ClassVar = ("tokens",)

    def compare(self, batch: Batch, project: nn.Module | None) -> Tensor:
        """Mean over the tokens concerned in each image, then over images."""
        assert project is not None
        tokens_BMC, fused_BM = batch.student["tokens"], batch.student["fused"]
        target, count = group_means(wide(batch.teacher["tokens"]), batch.student["origin"], tokens_BMC.shape[1])
        per_token = distance(project(tokens_BMC), target, self.loss, self.normalise)
        return mean_where(per_token, self._concerns(count) & ~fused_BM)

    def _concerns(self, count_BM: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Tokens(_Patches):
    """Final patch tokens that still stand for one position, mapped to teacher width, against the teacher's token there.

    Dropped and fused tokens are no targets, nor are merged ones; those are the business of `Merged`.
    """

    def _concerns(self, count_BM: Tensor) -> Tensor:
        return count_BM == 1


@dataclass(frozen=True)
class Merged(_Patches):
    """Final patch tokens merged from several positions (ToMe), against the mean of the teacher's tokens there."""

    def check(self, student: nn.Module) -> None:
        """Tokens must be merged in training, and stay so to the end."""
        handle = attached(student)
        reduction = None if handle is None else handle.reduction
        if handle is None or reduction is None or handle.schedule is None:
            fault = "no token reduction is attached to the student"
        elif not reduction.reducer.merges:
            fault = f"the student's {render(reduction.reducer)} merges none"
        elif not reduction.active(training=True):
            fault = f"the student's reduction acts in phase {reduction.phase} alone"
        elif handle.schedule.reinstate is not None:
            fault = f"the student's come apart before block {handle.schedule.reinstate}"
        else:
            return
        raise DistillError(f"the term Merged compares merged tokens, but {fault}; leave Merged out, or reduce by ToMe")

    def _concerns(self, count_BM: Tensor) -> Tensor:
        return count_BM > 1
