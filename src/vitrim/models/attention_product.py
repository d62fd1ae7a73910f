"""The products of attention, also where values have other dims than queries and keys."""

import torch
from torch import Tensor
from torch.nn import functional as F


def attention_product(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, *,
    dropout: float = 0.0, is_causal: bool = False, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Fused attention (B, H, T, V) of queries and keys (B, H, T, D) and of values (B, H, T, V).

    PyTorch's fused kernel for CPUs takes one number of dims only; without it, attention takes about three times as
    long. So there the narrower ones are padded with zeros, which changes no result; queries and keys only where a scale
    is given. Exported graphs hold the products as they are.
    """
    options = {"attn_mask": bias, "dropout_p": dropout, "is_causal": is_causal, "scale": scale}
    dims, missing = value.shape[-1], query.shape[-1] - value.shape[-1]
    if missing == 0 or value.device.type != "cpu" or torch.compiler.is_exporting():
        return F.scaled_dot_product_attention(query, key, value, **options)
    if missing > 0:
        return F.scaled_dot_product_attention(query, key, F.pad(value, (0, missing)), **options)[..., :dims]
    if scale is not None:
        query, key = (F.pad(stream, (0, -missing)) for stream in (query, key))
    return F.scaled_dot_product_attention(query, key, value, **options)
