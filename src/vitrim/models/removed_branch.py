"""What takes the place of an attention or MLP branch of width 0."""

import torch
from torch import Tensor, nn


class RemovedBranch(nn.Module):
    """What remains of an attention or MLP branch of width 0: a constant, zero unless it is learnt or set.

    A branch without inputs still has the bias of its output projection, which can hold the mean of what was removed.
    Costs no MACs; the norm before it is removed too, since nothing would read it.
    """

    def __init__(self, dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, rope: Tensor | None = None
    ) -> Tensor:
        """The constant, in the shape of `x` (..., C); masks and places change nothing. TorchScript can compile it."""
        # A copy, since gradient hooks fail on a view of a parameter that was made without gradients.
        return self.bias.to(x.dtype, copy=True).expand_as(x)
