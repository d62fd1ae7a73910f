"""Batches of images of several sizes, padded to one length: images of each length are computed by themselves.

Padding is left out, so that no score or reducer ever sees it, and an image gives what it gives alone. What comes out is
padded again. Every length is one pass through the blocks: batches of few different lengths are the fastest. Compiled,
each set of lengths is compiled anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import VitrimError
from ...tokens import TokenState
from .contents import Contents
from .trace import Trace, trace_of

_TRACE = "vitrim_padded_trace"


@dataclass(frozen=True)
class Group:
    """Images of one batch that have the same number of patches.

    rows: their indices in the batch. length: patches of each. tokens: what was computed of them, (b, T, C).
    coordinates: row and column of each patch, (b, N, 2).
    """

    rows: tuple[int, ...]
    length: int
    tokens: Tensor
    coordinates: Tensor

    def part(self, value: Tensor) -> Tensor:
        """Their rows of a tensor (B, N, ...), without padding."""
        return value[list(self.rows), : self.length]


uncompiled = torch.compiler.disable(
    reason="the lengths of the images in a padded batch decide what is computed, so that they are looked at; compile "
    "without fullgraph=True, which compiles the passes of each length"
)
"""Marks functions that read lengths: `torch.compile` leaves them out and goes on behind them."""


@uncompiled
def lengths_of(valid_BN: Tensor) -> list[int]:
    """Patches of each image, from a mask that is true for patches and false for padding.

    Raises:
        VitrimError: an image has none, or padding lies between its patches.
    """
    valid = valid_BN.bool()
    lengths: list[int] = valid.sum(1).tolist()
    if 0 in lengths:
        raise VitrimError(f"the mask leaves no patch of image {lengths.index(0)} of the batch; leave that image out")
    first = torch.arange(valid.shape[1], device=valid.device) < valid.sum(1, keepdim=True)
    if not torch.equal(valid, first):
        raise VitrimError("padding lies between the patches of an image; put the patches first and padding behind them")
    return lengths


def by_length(lengths: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """The rows of a batch by the number of their patches."""
    return {length: tuple(row for row, own in enumerate(lengths) if own == length) for length in sorted(set(lengths))}


def joined(groups: Sequence[Group], values: Sequence[Tensor], fill: float = 0.0) -> Tensor:
    """One value for each group, (b, ...) or (b, M, ...) with an M of its own, as a batch in its original order."""
    if values[0].ndim > 1:
        longest = max(value.shape[1] for value in values)
        values = [
            F.pad(value, (0, 0) * (value.ndim - 2) + (0, longest - value.shape[1]), value=fill) for value in values
        ]
    order = torch.tensor([row for group in groups for row in group.rows], device=values[0].device)
    return torch.cat(list(values)).index_select(0, order.argsort())


def valid_of(groups: Sequence[Group], num_prefix: int) -> Tensor:
    """Which positions of the padded batch hold a patch token and not padding, (B, M)."""
    ones = [group.tokens.new_ones(group.tokens.shape[:2], dtype=torch.bool)[:, num_prefix:] for group in groups]
    return joined(groups, ones)


@dataclass(frozen=True)
class PaddedTrace:
    """What one forward pass has done to a padded batch: the trace of each group.

    num_patches: of an image with its padding. contents: what the padded tokens held; None where that cannot be read.
    """

    groups: tuple[Group, ...]
    traces: tuple[Trace, ...]
    num_patches: int
    contents: Contents | None = None

    @property
    def block(self) -> int:
        """The last block that the tokens have left."""
        return self.traces[0].block

    @property
    def normed(self) -> bool:
        """Whether the tokens have passed the last norm of the model."""
        return self.traces[0].normed

    def state(self, block: int | None = None) -> TokenState:
        """Where the patches are after `block`: padding counts as dropped (-1), slots without a token have size 0."""
        states = [trace.state(block) for trace in self.traces]
        origin = self._padded(joined(self.groups, [state.origin for state in states], fill=-1), -1)
        scores = [state.score for state in states if state.score is not None]
        score = joined(self.groups, scores) if len(scores) == len(states) else None
        size = joined(self.groups, [state.size for state in states])
        return TokenState(origin, size, score, self._coordinates())

    def restored(self, x_BTC: Tensor, norm: nn.Module | None = None) -> Tensor:
        """All input patches in their original order, zero where padding is, (B, P + N, C); see `Trace.restored`."""
        parts = [
            trace.restored(x_BTC[list(group.rows), : group.tokens.shape[1]], norm)
            for group, trace in zip(self.groups, self.traces, strict=True)
        ]
        return self._padded(joined(self.groups, parts), extra=self.traces[0].plan.num_prefix)

    def summary(self) -> "PaddedTrace":
        """The same without what only later computations need, so that nothing large is kept."""
        groups = [replace(group, tokens=group.tokens.new_empty(0)) for group in self.groups]
        return PaddedTrace(tuple(groups), tuple(trace.summary() for trace in self.traces), self.num_patches)

    def _coordinates(self) -> Tensor | None:
        if any(trace.plan.num_patches != group.length for group, trace in zip(self.groups, self.traces, strict=True)):
            return None  # Some were dropped before the first block.
        return self._padded(joined(self.groups, [group.coordinates for group in self.groups]))

    def _padded(self, x_BN: Tensor, fill: float = 0, extra: int = 0) -> Tensor:
        return F.pad(x_BN, (0, 0) * (x_BN.ndim - 2) + (0, self.num_patches + extra - x_BN.shape[1]), value=fill)


def together(groups: Sequence[Group], tokens: Sequence[Tensor], num_patches: int) -> Tensor:
    """The tokens that were computed of each group as one padded batch, which carries the trace if they carry theirs.

    num_patches: of an image with its padding.
    """
    out, traces = joined(groups, tokens), [trace for trace in map(trace_of, tokens) if trace is not None]
    if len(traces) == len(tokens):
        own = tuple(replace(group, tokens=each) for group, each in zip(groups, tokens, strict=True))
        setattr(out, _TRACE, PaddedTrace(own, tuple(traces), num_patches, Contents.of(out)))
    return out


def padded_trace_of(x_BTC: Tensor) -> PaddedTrace | None:
    """The trace of these padded tokens; None if they have none, as after `clone()`."""
    return getattr(x_BTC, _TRACE, None)


def unchanged_padded_trace_of(x_BTC: Tensor) -> PaddedTrace | None:
    """As `padded_trace_of`, but None too if the tokens were written over."""
    trace = padded_trace_of(x_BTC)
    unchanged = trace is None or trace.contents is None or trace.contents.still_in(x_BTC) is not False
    return trace if unchanged else None
