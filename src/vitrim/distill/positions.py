"""Which input patches each final token of a student is made of, and the teacher's tokens at those positions.

Shapes: B images, N patches, M patch tokens left, C channels.
"""

from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import DistillError, UnsupportedModelError
from ..models import adapter_of, attached, trace_of
from ..models.outputs import Features, Output
from ..tokens import Assignment, TokenState


@dataclass(frozen=True)
class Origin(Output):
    """The final token that each patch is part of (B, N), -1 where it was dropped."""

    name = "origin"

    def compute(self, features: Features) -> Tensor:
        """From the trace of this forward pass."""
        return _positions(features)[0]


@dataclass(frozen=True)
class Fused(Output):
    """Which final patch tokens are fused (B, M).

    A fused token is not the mean of its members but a sum weighted by scores, so no position is a target for it.
    """

    name = "fused"

    def compute(self, features: Features) -> Tensor:
        """From the trace of this forward pass."""
        return _positions(features)[1]


def _positions(features: Features) -> tuple[Tensor, Tensor]:
    final = features.final_BTC
    num_images, device = final.shape[0], final.device
    trace = trace_of(final)
    if trace is None and attached(features.model) is not None:
        raise DistillError("the final tokens of this student cannot be traced back to the patches; use other terms")
    if trace is None:
        state = TokenState.start(num_images, final.shape[1] - features.info.num_prefix, device)
        return state.origin, torch.zeros_like(state.origin, dtype=torch.bool)
    fused = torch.zeros(num_images, trace.plan.num_patches, dtype=torch.bool, device=device)
    for assignment in trace.cuts():
        fused = _follow(fused, assignment)
    return trace.state().origin.to(device).expand(num_images, -1), fused


def _follow(fused_BN: Tensor, assignment: Assignment) -> Tensor:
    kept = fused_BN.gather(1, assignment.kept_BK)
    if assignment.num_out > kept.shape[1]:
        return torch.nn.functional.pad(kept, (0, assignment.num_out - kept.shape[1]), value=True)
    return kept


_DROPS = (
    "the student drops patches at its input (patch_drop_rate), so its tokens cannot be matched to the teacher's; set "
    "it to 0"
)


def check_keeps_patches(student: nn.Module) -> None:
    """Raise `DistillError` where the student itself drops patches in training."""
    adapter = adapter_of(student)
    with suppress(UnsupportedModelError):  # Its geometry is not known; `group_means` compares what it gives.
        if adapter.patches_entering(student, training=True) != adapter.patches_entering(student, training=False):
            raise DistillError(_DROPS)


def group_means(target_BNC: Tensor, origin_BN: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Mean of the targets of each slot's members, (B, M, C), and the number of members, (B, M).

    A slot with one member gets exactly the target at its own position; a dropped position belongs to no slot.

    Raises:
        DistillError: there are more or fewer targets than positions.
    """
    num_images, num_targets, width = target_BNC.shape
    if origin_BN.shape[1] < num_targets:
        raise DistillError(_DROPS)
    if origin_BN.shape[1] > num_targets:
        raise DistillError(
            f"the teacher gives tokens of {num_targets} patches, and the student reads {origin_BN.shape[1]}, so they "
            "cannot be matched; give a teacher that keeps all patches"
        )
    slot_BN = torch.where(origin_BN < 0, num_slots, origin_BN)  # One more slot takes what was dropped.
    total = target_BNC.new_zeros(num_images, num_slots + 1, width)
    total = total.scatter_add(1, slot_BN.unsqueeze(2).expand(-1, -1, width), target_BNC)[:, :num_slots]
    count = torch.zeros(num_images, num_slots + 1, device=slot_BN.device, dtype=torch.long)
    count = count.scatter_add(1, slot_BN, torch.ones_like(slot_BN))[:, :num_slots]
    return total / count.clamp(min=1).unsqueeze(2), count
