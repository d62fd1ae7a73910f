"""Heads of attention as a dimension of their own."""

from torch import Tensor


def split_heads(rows_BTC: Tensor, heads: int = -1, dim: int = -1) -> Tensor:
    """(B, T, heads * dim) as (B, heads, T, dim); one of the two numbers may be left out.

    PyTorch's older ONNX exporter writes the batch size of its example into `unflatten`, and not into this.
    """
    return rows_BTC.reshape(rows_BTC.shape[0], rows_BTC.shape[1], heads, dim).transpose(1, 2)
