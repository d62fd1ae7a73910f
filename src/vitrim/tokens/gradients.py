"""The squared gradient of every channel at a cut, averaged over the latest training steps, for gradient scores.

The gradient of a batch is not known yet when its tokens are chosen, and a dense pass that computes it costs more than
the cut saves. Known is the gradient of earlier steps at the tokens that were kept by the same cut. Its mean square per
channel, F, is the diagonal of the empirical Fisher information (as in Fisher pruning, arXiv 1801.05787). Removing a
token x changes the loss, to first order, by <dL/dx, x>; the root mean square of that is the square root of
`sum_c F_c x_c^2`. The cost is one pass over a gradient that is computed anyway, and C numbers per cut.
"""

# pyright: reportUnknownMemberType=false
# (torch leaves parts of Tensor.register_hook and torch.compiler.disable untyped.)

from collections.abc import Callable, Mapping
from typing import TypeVar, cast

import torch
from torch import Tensor, distributed

from ..errors import ScoreError
from .precision import wide

MOMENTUM = 0.9
"""Weight of the earlier steps in the average."""
Method = TypeVar("Method", bound=Callable[..., object])


def _outside_of_graphs(method: Method) -> Method:
    """A method that a compiled model calls outside its graph, since hooks cannot be part of a graph."""
    return cast("Method", torch.compiler.disable(method))


class GradientMemory:
    """F of every block that cuts, (C,) with mean 1, and the sums of the backward passes since it was updated."""

    def __init__(self) -> None:
        self._mean: dict[int, Tensor] = {}
        self._fresh: dict[int, Tensor] = {}

    @_outside_of_graphs
    def watch(self, block: int, x_BTC: Tensor, first: int, last: int) -> None:
        """Record the gradient that will reach rows `first` to `last` (exclusive) of these tokens."""
        if not x_BTC.requires_grad:
            raise ScoreError(f"no gradient reaches the cut at block {block}, since no parameter before it is trained")

        def note(gradient_BTC: Tensor) -> None:
            rows = gradient_BTC[:, first:last].detach()
            square_C = wide(rows).square().sum((0, 1))
            self._fresh[block] = square_C if block not in self._fresh else self._fresh[block] + square_C

        x_BTC.register_hook(note)

    @_outside_of_graphs
    def known(self) -> Mapping[int, Tensor]:
        """F by block, from everything recorded; the same in all processes, which must call this together."""
        for block in sorted(self._fresh):
            total_C = self._fresh.pop(block)
            if distributed.is_available() and distributed.is_initialized():
                distributed.all_reduce(total_C)
            old_C = self._mean.get(block, torch.ones_like(total_C)).to(total_C)
            # Only ratios matter, so the scale of the loss does not. A sum that overflowed is not used.
            middle = total_C.mean()
            new_C = total_C / middle
            if block in self._mean:
                new_C = MOMENTUM * old_C + (1 - MOMENTUM) * new_C
            self._mean[block] = torch.where(middle.isfinite() & (middle > 0), new_C, old_C)
        return dict(self._mean)

    def state_dict(self) -> dict[int, Tensor]:
        """What a checkpoint must hold to continue with the same numbers; all processes call this together."""
        return dict(self.known())

    def load_state_dict(self, state_dict: Mapping[int, Tensor]) -> None:
        """Continue from what `state_dict` returned."""
        self._mean, self._fresh = dict(state_dict), {}
