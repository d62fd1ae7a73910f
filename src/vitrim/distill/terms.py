"""The table of distillation terms: which outputs of the student are compared with which outputs of the teacher.

To add a term, subclass `Term` in this file or in one of your own: say which outputs it reads of both networks, and
compare them. An output that no other term reads can be defined in the same file, see `models/outputs.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import DistillError
from ..models import attached, outputs
from ..models.outputs import ModelInfo, Output, Outputs
from ..notation import render
from ..tokens.precision import wide
from .losses import LOSSES, coarse_kl, distance, mean_where, soft_kl
from .objective import Batch, Term
from .positions import Fused, Origin, group_means


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


@dataclass(frozen=True)
class _Vectors(Term):
    loss: str = "mse"
    normalise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        LOSSES.find(self.loss)

    def project(self, student: ModelInfo, teacher: ModelInfo) -> nn.Module | None:
        """One linear map, also between equal widths."""
        return nn.Linear(student.width, teacher.width)


@dataclass(frozen=True)
class ClsStages(_Vectors):
    """CLS after every stage but the last, L2-normalised, at the same relative depth (PTP-FAKD); mean over boundaries.

    Between equal widths the vectors are compared as they are; otherwise each boundary learns a linear map.

    loss: "mse" (default), "cosine" or "smooth_l1", see `vitrim list`.
    normalise: compare directions only; on by default.
    stages: equal stages of blocks, 2 or more; 3 (default) puts boundaries after blocks L/3-1 and 2L/3-1.
    """

    normalise: bool = True
    stages: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stages < 2:
            raise DistillError(f"ClsStages needs 2 stages or more, not {self.stages}")

    def of_student(self) -> Sequence[Output]:
        """CLS at the boundaries of the stages."""
        return (outputs.Stages(self.stages),)

    def project(self, student: ModelInfo, teacher: ModelInfo) -> nn.Module | None:
        """One linear map per boundary, none between equal widths."""
        if student.width == teacher.width:
            return None
        return nn.ModuleList(nn.Linear(student.width, teacher.width) for _ in range(self.stages - 1))

    def compare(self, batch: Batch, project: nn.Module | None) -> Tensor:
        """Mean over boundaries and images."""
        key = outputs.Stages(self.stages).key
        given = batch.student[key].unbind(1)
        maps = list(project) if isinstance(project, nn.ModuleList) else [nn.Identity() for _ in given]
        each = zip(given, maps, batch.teacher[key].unbind(1), strict=True)
        losses = [distance(one(cls), target, self.loss, self.normalise).mean() for cls, one, target in each]
        return sum(losses[1:], losses[0]) / len(losses)


@dataclass(frozen=True)
class Cls(_Vectors):
    """The final CLS token, mapped to the teacher's width by a learned linear map.

    loss: "mse" (default), "cosine" or "smooth_l1", see `vitrim list`.
    normalise: compare directions only; off by default.
    """

    def of_student(self) -> Sequence[Output]:
        """The final CLS token."""
        return (outputs.Cls(),)

    def compare(self, batch: Batch, project: nn.Module | None) -> Tensor:
        """Mean over images."""
        assert project is not None
        return distance(project(batch.student["cls"]), batch.teacher["cls"], self.loss, self.normalise).mean()


@dataclass(frozen=True)
class _Patches(_Vectors):
    def of_student(self) -> Sequence[Output]:
        """Patch tokens, and the positions that they are made of."""
        return (outputs.Patches(), Origin(), Fused())

    def of_teacher(self) -> Sequence[Output]:
        """Patch tokens."""
        return (outputs.Patches(),)

    def check(self, student: nn.Module) -> None:
        """The last block must compute patch tokens."""
        handle = attached(student)
        if handle is not None and handle.cls_only:
            raise DistillError(
                "the student's last block computes only prefix tokens; attach the reduction with cls_only=False"
            )

    def compare(self, batch: Batch, project: nn.Module | None) -> Tensor:
        """Mean over the tokens that count in each image, then over images."""
        assert project is not None
        tokens_BMC, fused_BM = batch.student["tokens"], batch.student["fused"]
        target, count = group_means(wide(batch.teacher["tokens"]), batch.student["origin"], tokens_BMC.shape[1])
        per_token = distance(project(tokens_BMC), target, self.loss, self.normalise)
        return mean_where(per_token, self._counts(count) & ~fused_BM)

    def _counts(self, members_BM: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Tokens(_Patches):
    """Final patch tokens that are made of one position, mapped to teacher width, against the teacher's token there.

    Dropped, fused and merged tokens are left out; `Merged` compares merged ones.

    loss: "mse" (default), "cosine" or "smooth_l1", see `vitrim list`.
    normalise: compare directions only; off by default.
    """

    def _counts(self, members_BM: Tensor) -> Tensor:
        return members_BM == 1


@dataclass(frozen=True)
class Merged(_Patches):
    """Final patch tokens merged from several positions (ToMe), against the mean of the teacher's tokens there.

    loss: "mse" (default), "cosine" or "smooth_l1", see `vitrim list`.
    normalise: compare directions only; off by default.
    """

    def check(self, student: nn.Module) -> None:
        """Tokens must be merged in training, and stay so to the end."""
        super().check(student)
        handle = attached(student)
        reduction = None if handle is None else handle.reduction
        if handle is None or reduction is None or handle.schedule is None:
            fault = "no token reduction is attached to the student"
        elif not reduction.reducer.merges:
            fault = f"the student's {render(reduction.reducer)} merges none"
        elif not reduction.active(training=True):
            fault = f"the student's reduction acts only in phase {reduction.phase}"
        elif handle.schedule.reinstate is not None:
            fault = f"the student's tokens return before block {handle.schedule.reinstate}"
        else:
            return
        raise DistillError(f"the term Merged compares merged tokens, but {fault}; leave Merged out, or reduce by ToMe")

    def _counts(self, members_BM: Tensor) -> Tensor:
        return members_BM > 1
