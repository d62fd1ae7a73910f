"""Computing in float32 where half precision is too coarse: equal scores, sums over a thousand channels, squares."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def exact_device(device: torch.device) -> torch.device:
    """Where sums in float64 are kept: on the device itself, or on the CPU where it has no float64 (Apple MPS)."""
    return torch.device("cpu") if device.type == "mps" else device


def exact(x: Tensor) -> Tensor:
    """The tensor in float64, without its graph; on the CPU where its device has no float64."""
    return x.detach().to(exact_device(x.device)).double()


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Within this context autocast does not turn matrix products on the device of `x` into half precision."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
