"""The attention layers of timm's `Eva`: how they make queries, keys and values, also with heads of other widths.

A narrowed layer keeps all names of its parameters; its values have `value_dim` dims per head, its queries and keys
`query_dim`, those of the rotary pairs in `kept_pairs`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from ...heads import every_head, split_heads
from ...widths.elastic_pairs import query_dim, value_dim
from ...widths.elastic_values import ElasticValues
from ...widths.head_rows import Rows
from ...widths.rotary_pairs import columns, dims_of
from .reduced import after_norms, mix, rows_of_qkv


def streams_of(attn: Any, x_BTC: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
    """Streams `first` to `last` (exclusive) of (query, key, value) of all heads, each (B, H, T, dims), after norms."""
    dims = (query_dim(attn), query_dim(attn), value_dim(attn))[first:last]
    rows = zip(_rows(attn, x_BTC, first, last), dims, strict=True)
    streams = after_norms(attn, [split_heads(out, dim=dim) for out, dim in rows], first)
    # Heads of one group read the same keys and values.
    return tuple(every_head(stream, attn.num_heads) for stream in streams)


def rotated(attn: Any, stream_BHTD: Tensor, table: Tensor | None, pairs_Hp: Tensor | None = None) -> Tensor:
    """Queries or keys, prefix tokens first, with the patch tokens rotated by their rows of the table.

    Args:
        attn: the layer.
        stream_BHTD: of all heads.
        table: sines, then cosines, of all dims of a head.
        pairs_Hp: the rotary pairs that the stream has; None: those of the layer.
    """
    if table is None:
        return stream_BHTD
    if pairs_Hp is None and (kept := getattr(attn, "kept_pairs", None)) is not None:
        pairs_Hp = every_head(kept, attn.num_heads, 0)
    if pairs_Hp is not None:
        dims = dims_of(pairs_Hp, attn.head_dim // 2, attn.rotate_half)
        table = torch.cat([columns(part, dims) for part in table.chunk(2, -1)], dim=-1)
    prefix = stream_BHTD.shape[2] - table.shape[-2]
    turned = apply_rot_embed_cat(stream_BHTD[:, :, prefix:], table, half=attn.rotate_half)
    return torch.cat([stream_BHTD[:, :, :prefix], turned], dim=2)


def part_behind(attn: Any) -> str:
    """What stands between the values and the output projection, so that they can neither rotate nor be cut; ""."""
    if getattr(attn, "gate", None) is not None:
        return "gate"
    return "" if isinstance(getattr(attn, "norm", None), nn.Identity | None) else "norm"


class _Narrow(nn.Module):
    """Mixin before an attention layer that was cut."""

    value_dim: int
    query_dim: int
    kept_pairs: Tensor

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """As the layer of timm; `is_causal` is taken for attention over all tokens alone, as timm's blocks give it."""
        query, key, value = streams_of(self, x, 0, 3)
        query, key = (rotated(self, stream, rope) for stream in (query, key))
        return mix(self, query, key, value, attn_mask, x, self.training, is_causal)


class NarrowEvaAttention(_Narrow, EvaAttention):
    """timm's `EvaAttention` with fewer dims per head, of values, of queries and keys, or of both."""


class NarrowAttentionRope(_Narrow, AttentionRope):
    """timm's `AttentionRope` with fewer dims per head, of values, of queries and keys, or of both."""


NARROW = (NarrowEvaAttention, NarrowAttentionRope)


class _Elastic(ElasticValues):
    """Mixin before an attention layer of either kind."""

    qkv: Any
    q_proj: Any
    k_proj: Any
    v_proj: Any
    q_norm: Any
    k_norm: Any
    proj: Any
    attn_drop: Any
    proj_drop: Any
    rotate_half: bool

    @property
    def projections(self) -> tuple[Any, ...]:
        return (self.q_proj, self.k_proj, self.v_proj) if self.qkv is None else (self.qkv,)

    @property
    def half_pairs(self) -> bool:
        return self.rotate_half

    def rows(self, stream: int) -> tuple[Rows, Rows | None]:
        weight, bias = super().rows(stream)
        if getattr(self, "q_bias", None) is None:
            return weight, bias
        return weight, Rows(self, ("q_bias", "k_bias", "v_bias")[stream], 0, weight.heads, weight.dims)

    @property
    def last(self) -> nn.Linear:
        return self.proj

    @property
    def value_heads(self) -> int:
        return getattr(self, "num_kv_heads", self.num_heads)

    @property
    def query_key_norms(self) -> tuple[nn.Module, nn.Module]:
        return self.q_norm, self.k_norm

    @property
    def dropout(self) -> float:
        return self.attn_drop.p

    def queries_and_keys(self, x: Tensor, table: Any) -> tuple[Tensor, Tensor]:
        query, key = (rotated(self, stream, table) for stream in streams_of(self, x, 0, 2))
        return query, key

    def turned(self, stream_BHTD: Tensor, table: Any, pairs_Hp: Tensor | None) -> Tensor:
        return rotated(self, stream_BHTD, table, pairs_Hp)

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        return self.proj_drop(self.mix(x, rope, attn_mask, is_causal))


class ElasticEvaAttention(_Elastic, EvaAttention, replaces=EvaAttention):
    """timm's `EvaAttention` at a variable width."""

    narrow = NarrowEvaAttention


class ElasticAttentionRope(_Elastic, AttentionRope, replaces=AttentionRope):
    """timm's `AttentionRope` at a variable width."""

    narrow = NarrowAttentionRope


class ElasticNarrowEvaAttention(_Elastic, NarrowEvaAttention, replaces=NarrowEvaAttention):
    """The same of a layer that was cut before."""

    narrow = NarrowEvaAttention


class ElasticNarrowAttentionRope(_Elastic, NarrowAttentionRope, replaces=NarrowAttentionRope):
    """The same of a layer that was cut before."""

    narrow = NarrowAttentionRope


def _rows(attn: Any, x_BTC: Tensor, first: int, last: int) -> Sequence[Tensor]:
    """Rows `first` to `last` (exclusive) of (query, key, value), each (B, T, H * dims), as the layer makes them."""
    if attn.qkv is None:
        return [layer(x_BTC) for layer in (attn.q_proj, attn.k_proj, attn.v_proj)[first:last]]
    whole = attn.num_heads * query_dim(attn)
    return rows_of_qkv(attn, (whole, whole, attn.num_heads * value_dim(attn)), x_BTC, first, last)
