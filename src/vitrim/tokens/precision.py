"""Where half precision is too coarse: scores that would tie, sums over a thousand channels, squares of saliencies."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
