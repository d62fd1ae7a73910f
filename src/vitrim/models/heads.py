"""Heads of attention as a dimension of their own."""

from torch import Tensor


def split_heads(rows_BTC: Tensor, heads: int = -1, dim: int = -1) -> Tensor:
    """(B, T, heads * dim) as (B, heads, T, dim); one of the two numbers may be left out.

    PyTorch's older ONNX exporter writes the batch size of its example into `unflatten`, and not into this.
    """
    return rows_BTC.reshape(rows_BTC.shape[0], rows_BTC.shape[1], heads, dim).transpose(1, 2)


def every_head(of_groups: Tensor, heads: int, dim: int = 1) -> Tensor:
    """What groups of heads share, along one dimension, repeated for so many heads; of single heads as it is."""
    size = heads // of_groups.shape[dim]
    return of_groups if size == 1 else of_groups.repeat_interleave(size, dim=dim)
