"""What one forward pass has done to its tokens so far; it travels with them from block to block."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..tokens import Assignment, Plan, Reducer, TokenState


@dataclass(frozen=True, eq=False)
class Trace:
    """What has been done to the tokens of one forward pass so far. Immutable: each block makes the next one.

    It travels as an attribute of the token tensor itself, so that recomputation under activation checkpointing,
    and several forward passes before one backward, each find the trace that belongs to their tokens.

    size_BN: input tokens behind each patch token, None while every token stands for itself alone.
    score_BN: the scores that the next cut may reuse, None if there are none.
    parked: where tokens come back, the whole sequence as each cut met it; None where merging needs nothing.
    gradients: what the loss listens to by block, see `GradientMemory`; None unless the score reads it.
    """

    plan: Plan
    reducer: Reducer | None
    num_images: int
    assignments: tuple[tuple[int, Assignment], ...] = ()
    size_BN: Tensor | None = None
    score_BN: Tensor | None = None
    parked: tuple[Tensor | None, ...] = ()
    gradients: Mapping[int, Tensor] | None = None

    def then(self, block: int, assignment: Assignment, before_BTC: Tensor | None = None) -> "Trace":
        """The trace after one more cut of the tokens `before_BTC`."""
        size = self.size_BN
        if size is None and assignment.moved_BR is not None:
            size = torch.ones(self.num_images, assignment.num_in, device=assignment.kept_BK.device)
        if size is not None:
            size = assignment.size(size)
        score = None
        if assignment.score_BN is not None and self.reducer is not None and self.reducer.carries_scores:
            score = assignment.carry(assignment.score_BN)
        # The weights of a fused token hold the graph of the whole pass, which must not outlive it.
        assignments = (*self.assignments, (block, assignment.detach()))
        parked = self.parked
        if self.plan.reinstate is not None:
            parked = (*parked, None if assignment.merges else before_BTC)
        return replace(self, assignments=assignments, size_BN=size, score_BN=score, parked=parked)

    def reinstate(self, x_BTC: Tensor) -> tuple[Tensor, "Trace"]:
        """All tokens back in their original order, (B, P + N, C), and the trace from there on."""
        for (_, assignment), before_BTC in zip(reversed(self.assignments), reversed(self.parked), strict=True):
            x_BTC = assignment.undo(x_BTC, before_BTC, self.plan.num_prefix)
        return x_BTC, replace(self, size_BN=None, score_BN=None, parked=())

    def upto(self, block: int) -> "Trace":
        """The trace as it was when the tokens reached `block`."""
        trace = Trace(self.plan, self.reducer, self.num_images, gradients=self.gradients)
        for at, assignment in self.assignments:
            if at < block:
                trace = trace.then(at, assignment)
        if self.plan.reinstate is not None and block > self.plan.reinstate:
            return replace(trace, size_BN=None, score_BN=None, parked=())
        return replace(trace, parked=self.parked[: len(trace.parked)])

    def cuts(self, block: int | None = None) -> list[Assignment]:
        """The cuts whose tokens are not back after `block` (None: at the end)."""
        back = self.plan.reinstate
        if back is not None and (block is None or block >= back):
            return []
        return [assignment for at, assignment in self.assignments if block is None or at <= block]

    def state(self, block: int | None = None) -> TokenState:
        """Where the input tokens are after `block` (None: at the end)."""
        device = self.assignments[0][1].kept_BK.device if self.assignments else None
        return TokenState.start(self.num_images, self.plan.num_patches, device).after(self.cuts(block))

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """log(size) of all tokens, prefix included, as attention mask (B, 1, 1, T); None where attention is plain."""
        if self.size_BN is None or self.reducer is None or not self.reducer.prop_attn:
            return None
        log_size = self.size_BN.to(torch.promote_types(dtype, torch.float32)).log().to(dtype)
        return nn.functional.pad(log_size, (self.plan.num_prefix, 0))[:, None, None, :]
