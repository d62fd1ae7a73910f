"""Distillation terms on features: CLS tokens and patch tokens of the student against those of the teacher."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..errors import DistillError
from ..models import attached, outputs
from ..models.outputs import ModelInfo, Output
from ..notation import render
from ..tokens.precision import wide
from .losses import LOSSES, distance, mean_where
from .objective import Batch, Term
from .positions import Fused, Origin, check_keeps_patches, group_means


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
        """The last block must compute patch tokens, and all patches must reach the first one."""
        check_keeps_patches(student)
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
