"""Attention layers of a variable width, for all families: they run on the leading dims of every head.

A family says where the queries, keys and values come from, and what happens around the products.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import WidthError
from ...tokens.precision import exact
from ..macs import Macs
from .attention_heads import AttentionHeads
from .compensation import Compensation
from .slicing import (
    Parts,
    check_linear,
    check_norm,
    cut_linear,
    cut_norm,
    leading_rows,
    narrow_norm,
    store,
    store_linear,
)


class ElasticHeads(AttentionHeads):
    """An attention layer whose queries, keys and values have one width, the leading dims of every head."""

    @property
    def streams(self) -> Parts:
        """The layers that make queries, keys and values, in this order: one of 3 parts, or three of one part."""
        raise NotImplementedError

    def resized(self, width: int) -> None:
        """Take note that the weights now have so many dims per head: set head dimension and scale of the layer."""
        self.head_dim = width

    @property
    def full_width(self) -> int:
        return self.head_dim

    def refuse(self, name: str) -> None:
        for linear, _ in (*self.streams, (self.last, 1)):
            check_linear(linear, name)
        for norm in self.query_key_norms:
            check_norm(norm, f"{name}: the norm of queries and keys")
        if not self.rotates_query_key and getattr(self.query_key_norms[0], "weight", None) is None:
            raise WidthError(
                f"the width of {name} cannot be cut: its norm of queries has no weight to hold the softmax scale"
            )

    def unit_macs(self, tokens: int) -> Macs:
        projected = sum(parts * linear.in_features for linear, parts in self.streams) + self.last.out_features
        return Macs(self.num_heads * tokens * projected, 2 * self.num_heads * tokens**2)

    def unit_params(self) -> int:
        rows = sum(parts * (linear.in_features + (linear.bias is not None)) for linear, parts in self.streams)
        norms = sum(p.numel() // self.head_dim for norm in self.query_key_norms for p in norm.parameters())
        return self.num_heads * (rows + self.last.out_features) + norms

    def mix(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attention and output projection at the present width, (B, N, C)."""
        width, heads = self.vitrim_width, self.num_heads
        if width == 0:
            return self.constant(x)
        made = [leading_rows(linear, x, width, parts * heads) for linear, parts in self.streams]
        qkv = made[0] if len(made) == 1 else torch.cat(made, dim=-1)
        self.tap("streams", qkv)
        query, key, value = qkv.unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4).unbind(0)
        query_norm, key_norm = self.query_key_norms
        mixed = F.scaled_dot_product_attention(
            narrow_norm(query_norm, query),
            narrow_norm(key_norm, key),
            value,
            attn_mask=attn_mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            scale=self.head_dim**-0.5,
        )
        mixed = mixed.transpose(1, 2).flatten(2)
        self.tap("mixed", mixed)
        return self.project(mixed)

    @torch.no_grad()
    def stream_norms(self) -> Tensor:
        rows = [exact(linear.weight).view(parts, self.num_heads, self.head_dim, -1) for linear, parts in self.streams]
        return torch.cat(rows).norm(dim=-1)

    @torch.no_grad()
    def rotate(self, value_Hhh: Tensor, query_key_Hhh: Tensor | None = None) -> None:
        heads, dim = self.num_heads, self.head_dim
        matrices = iter((query_key_Hhh, query_key_Hhh, value_Hhh))
        for linear, parts in self.streams:
            weight = exact(linear.weight).view(parts, heads, dim, -1).clone()
            bias = None if linear.bias is None else exact(linear.bias).view(parts, heads, dim).clone()
            for part in range(parts):
                if (matrix := next(matrices)) is None:
                    continue
                matrix = matrix.to(weight)
                weight[part] = matrix.mT @ weight[part]
                if bias is not None:
                    bias[part] = torch.einsum("hij,hi->hj", matrix, bias[part])
            store(linear.weight, weight.flatten(0, 2))
            if bias is not None and linear.bias is not None:
                store(linear.bias, bias.flatten())
        self.rotate_last(value_Hhh)

    @torch.no_grad()
    def order_query_key(self, order_h: Tensor) -> None:
        stream = 0
        for linear, parts in self.streams:
            for parameter in linear.parameters():
                view = parameter.view(parts, self.num_heads, self.head_dim, -1)
                ordered = slice(0, max(0, min(parts, 2 - stream)))
                view[ordered] = view[ordered][:, :, order_h.to(view.device)]
            stream += parts
        for norm in self.query_key_norms:
            for parameter in norm.parameters():
                parameter.copy_(parameter[order_h.to(parameter.device)])

    def shrink(self, width: int, compensation: Compensation | None = None) -> None:
        heads, dim, last = self.num_heads, self.head_dim, self.last
        projection = self.compensated(width, compensation)
        rotates, (query_norm, key_norm) = self.rotates_query_key, self.query_key_norms
        for linear, parts in self.streams:
            cut_linear(linear, width, parts * heads)
        cut_linear(last, width, heads, dim=1)
        store_linear(last, *projection)
        cut_norm(query_norm, width)
        cut_norm(key_norm, width)
        # A stock layer divides by the root of its own head dimension: correct for that where a factor survives.
        fold = math.sqrt(width / dim)
        with torch.no_grad():
            if rotates:
                for parameter in self.streams[0][0].parameters():
                    parameter[: heads * width] *= fold
            else:
                for parameter in query_norm.parameters():
                    parameter *= fold
        self.resized(width)
        self.vitrim_width = width
