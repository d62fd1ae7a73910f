"""A whole grid of patches, restored after the last block, and the tokens that it was restored from.

Some models hand a grid (B, H, W, C) on to whatever reads it: a projector, or the caller. A head that averages patches
must not average that grid, since it also holds dropped patches as they were when they left; it averages the tokens that
are left, which the grid remembers.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from ...errors import VitrimError
from .contents import Contents
from .forward_pass import UNKNOWN
from .policy import Policy
from .trace import Trace, mark, unchanged_trace_of

_FIELDS = tuple(field.name for field in fields(Trace))


@dataclass(frozen=True, eq=False)
class RestoredTrace(Trace):
    """The trace of a grid. tokens: those that are left (B, M, C), after the last norm."""

    tokens: Tensor | None = None

    def restored(self, x_BTC: Tensor, norm: nn.Module | None = None, num_prefix: int | None = None) -> Tensor:
        """All patches are there already: (B, H, W, C) as (B, H * W, C)."""
        return x_BTC.flatten(1, -2)

    def to(self, device: torch.device) -> Trace:
        moved = super().to(device)
        return replace(moved, tokens=None if self.tokens is None else self.tokens.to(device))


def mark_grid(grid: Tensor, trace: Trace, tokens_BTC: Tensor, *, handed: bool) -> Tensor:
    """Send a grid (B, H, W, C) or (B, N, C) on with its trace and the tokens behind it; `handed`: to the user."""
    known = {name: getattr(trace, name) for name in _FIELDS}
    known |= {"normed": True, "parked": (), "contents": Contents.of(grid) if handed else None}
    mark(grid, RestoredTrace(**known, tokens=tokens_BTC))
    return grid


def trace_behind_grid(policy: Policy, grid: Tensor, training: bool) -> RestoredTrace | None:
    """The trace by which a head averages a grid (B, H, W, C) or (B, N, C); None where its plain mean is right.

    That is where nothing was cut, and where tokens were merged only: every place then holds its common token.

    Raises:
        VitrimError: nothing proves which forward pass the grid comes from.
    """
    trace = unchanged_trace_of(grid, proven=True)
    if isinstance(trace, RestoredTrace):
        return trace if trace.cuts() else None
    plan = policy.plan(grid[0, ..., 0].numel(), training)
    reducer = None if policy.reduction is None else policy.reduction.reducer
    if not plan.cuts or (reducer is not None and reducer.merges and not reducer.extra_tokens):
        return None
    raise VitrimError(UNKNOWN)
