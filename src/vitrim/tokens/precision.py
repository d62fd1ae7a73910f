"""Computing in float32 where half precision is too coarse: equal scores, sums over a thousand channels, squares."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .recording import recording

ROUNDING = 1e-4
"""Largest difference of outputs that rounding in float32 explains, in parts of the largest one (of 1 if smaller)."""


def rounding(expected: Tensor, dtype: torch.dtype = torch.float32) -> float:
    """Largest difference from these outputs that rounding explains, in a model whose weights are of this type."""
    return max(ROUNDING, 4 * torch.finfo(dtype).eps) * max(1.0, float(expected.abs().max()))


def wide(x: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def scaled_product(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """`scale * query @ key^T` of (B, H, Q, D) and (B, H, T, D), (B, H, Q, T) in float32 at least.

    Half precision is added up in float32, as fused attention does it: logits in half precision overflow, and tie. CUDA
    multiplies it as it is, without a copy of all keys in float32.
    """
    with without_autocast(key):
        if not _multiplies_halves(query, key):
            return (wide(query) * scale) @ wide(key).transpose(-2, -1)
        rows, columns = query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)
        return scale * torch.bmm(rows, columns, out_dtype=torch.float32).view(*key.shape[:2], *query.shape[2:3], -1)


def _multiplies_halves(query: Tensor, key: Tensor) -> bool:
    """Whether PyTorch has a product of these two with a result in float32; it has none with gradients."""
    if not key.is_cuda or recording():
        return False
    graph = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    halves = key.dtype in (torch.float16, torch.bfloat16) and query.dtype == key.dtype
    return halves and not graph and query.shape[:2] == key.shape[:2]


def exact_device(device: torch.device) -> torch.device:
    """Where sums in float64 are kept: on the device itself, or on the CPU where it has no float64 (Apple MPS)."""
    return torch.device("cpu") if device.type == "mps" else device


def exact(x: Tensor) -> Tensor:
    """The tensor in float64, without its graph; on the CPU where its device has no float64."""
    return x.detach().to(exact_device(x.device)).double()


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Within this context autocast does not turn matrix products on the device of `x` into half precision."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)
