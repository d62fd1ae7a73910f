"""timm's parallel blocks: attention and MLP of the same tokens, or several attentions and then several MLPs.

Where attention and MLP are computed in parallel from the same tokens, a cut inside the block comes after both: the MLP
of a token that is dropped there is not computed either.
"""

from typing import Any

import torch
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock
from torch import Tensor
from torch.nn import functional as F

from ....errors import VitrimError
from ...heads import split_heads
from ...reduction.exchange import intercepted
from ...reduction.reduced_block import ReducedBlock
from .reduced import after_norms, mix, rows_of_qkv, splits


class ReducedParallel(ReducedBlock):
    """One layer makes the hidden units of the MLP and queries, keys and values."""

    in_norm: Any
    in_proj: Any
    in_split: Any
    mlp_act: Any
    mlp_bias: Any
    mlp_drop: Any
    attn_out_proj: Any
    mlp_out_proj: Any
    out_proj: Any
    ls: Any
    drop_path: Any
    scale: float

    def norm_tokens(self, x_BTC: Tensor) -> Tensor:
        return self.in_norm(x_BTC)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, normed_BQC: Tensor) -> Tensor:
        hidden = self.made(normed_BQC, 0, self.in_split[0])
        hidden = self.mlp_drop(self.mlp_act(hidden if self.mlp_bias is None else hidden + self.mlp_bias))
        mixed = self.mixed(query, key, value, bias)
        if self.out_proj is not None:
            out = self.out_proj(torch.cat([mixed, hidden], dim=-1))
        else:
            out = self.attn_out_proj(mixed) + self.mlp_out_proj(hidden)
        return self.drop_path(self.ls(out))

    def feed_forward(self, x_BTC: Tensor) -> Tensor:
        return x_BTC

    @property
    def head_scale(self) -> float:
        return self.scale

    def mixed(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """Attention before its output projection, (B, T, C)."""
        raise NotImplementedError

    def streams(self, normed_BTC: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        """Streams `first` to `last` (exclusive) of queries, keys and values, each (B, T, C)."""
        hidden, width = self.in_split[:2]
        return self.made(normed_BTC, hidden + first * width, hidden + last * width).chunk(last - first, dim=-1)

    def made(self, normed_BTC: Tensor, first: int, last: int) -> Tensor:
        """These rows of what the first layer of the block gives."""
        layer = self.in_proj
        if not splits(layer):  # Another layer put in its place (LoRA, quantised), or hooks: call it.
            return layer(normed_BTC)[..., first:last]
        bias = layer.bias
        return F.linear(normed_BTC, layer.weight[first:last], None if bias is None else bias[first:last])


class ReducedParallelScalingBlock(ReducedParallel, ParallelScalingBlock):
    """`ParallelScalingBlock` with a cut."""

    def project(self, normed_BTC: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        return _heads(self, self.streams(normed_BTC, first, last), first)

    def mixed(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        if self.fused_attn:
            dropout = self.attn_drop.p if self.training else 0.0
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
        else:
            logits = (query * self.scale) @ key.transpose(-2, -1)
            out = self.attn_drop((logits if bias is None else logits + bias).softmax(dim=-1)) @ value
        return out.transpose(1, 2).flatten(2)


class ReducedParallelThingsBlock(ReducedBlock, ParallelThingsBlock):
    """`ParallelThingsBlock` with a cut: the heads of all its attention layers together choose the tokens."""

    attns: Any
    ffns: Any

    def norm_tokens(self, x_BTC: Tensor) -> Tensor:
        return torch.cat([part.norm(x_BTC) for part in self.attns], dim=-1)

    def project(self, normed_BTC: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        for name, part in self.attns.named_children():
            if by := intercepted(part) or intercepted(part.attn):
                raise VitrimError(
                    f"attns.{name} of block {self.vitrim_index} has {by}, which cannot run: this block computes its "
                    "attention in parts; put hooks on the block or on the layers inside its attention"
                )
        each = [
            streams_of(part.attn, normed, first, last)
            for part, normed in zip(self.attns, normed_BTC.chunk(len(self.attns), dim=-1), strict=True)
        ]
        return tuple(torch.cat(same, dim=1) for same in zip(*each, strict=True))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, normed_BQC: Tensor) -> Tensor:
        count = len(self.attns)
        each = zip(self.attns, *(stream.chunk(count, dim=1) for stream in (query, key, value)),
                   normed_BQC.chunk(count, dim=-1), strict=True)  # fmt: skip
        outs = [part.drop_path(part.ls(mix(part.attn, q, k, v, bias, n, self.training))) for part, q, k, v, n in each]
        return torch.stack(outs).sum(dim=0)

    def feed_forward(self, x_BTC: Tensor) -> Tensor:
        return x_BTC + torch.stack([ffn(x_BTC) for ffn in self.ffns]).sum(dim=0)

    @property
    def head_scale(self) -> float:
        return self.attns[0].attn.scale


def streams_of(attn: Any, normed_BTC: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
    """Streams `first` to `last` (exclusive) of (query, key, value) of timm's `Attention`, each (B, H, T, D)."""
    return _heads(attn, rows_of_qkv(attn, attn.attn_dim, normed_BTC, first, last), first)


def _heads(part: Any, rows: tuple[Tensor, ...], first: int) -> tuple[Tensor, ...]:
    return after_norms(part, [split_heads(out, part.num_heads) for out in rows], first)
