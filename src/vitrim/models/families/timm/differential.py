"""Differential attention in timm's blocks: the difference of two attention maps for each head.

The first of the two maps chooses the tokens, since a difference may be negative and adds up to no probability.
"""

from typing import Any

from timm.models.vision_transformer import Block, DiffParallelScalingBlock
from torch import Tensor
from torch.nn import functional as F

from ...heads import split_heads
from ...reduction.reduced_block import ReducedBlock
from .parallel import ReducedParallel
from .reduced import after_norms, rows_of_qkv


class ReducedDiffBlock(ReducedBlock, Block):
    """`Block` on differential attention, with a cut."""

    attn: Any

    def project(self, normed_BTC: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        return _pairs(self.attn, rows_of_qkv(self.attn, self.attn.proj.in_features, normed_BTC, first, last), first)

    def _attended(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, normed_BQC: Tensor) -> Tensor:
        """Attention with its output projection."""
        attn = self.attn
        return attn.proj_drop(attn.proj(attn.norm(_differ(attn, query, key, value, bias, self.training))))

    def scored(self, stream_BHTD: Tensor) -> Tensor:
        return stream_BHTD[:, ::2]

    @property
    def head_scale(self) -> float:
        return self.attn.scale

    def norm_tokens(self, x_BTC: Tensor) -> Tensor:
        return self.norm1(x_BTC)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, normed_BQC: Tensor) -> Tensor:
        return self.drop_path1(self.ls1(self._attended(query, key, value, bias, normed_BQC)))

    def attend_whole(self, normed_BTC: Tensor, bias: Tensor | None, table: Any) -> Tensor | None:
        return self.drop_path1(self.ls1(self.attn(normed_BTC, attn_mask=bias))) if self.runs_whole(bias) else None

    def feed_forward(self, x_BTC: Tensor) -> Tensor:
        return x_BTC + self.drop_path2(self.ls2(self.mlp(self.norm2(x_BTC))))


class ReducedDiffParallelScalingBlock(ReducedParallel, DiffParallelScalingBlock):
    """`DiffParallelScalingBlock` with a cut."""

    def project(self, normed_BTC: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        return _pairs(self, self.streams(normed_BTC, first, last), first)

    def mixed(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        return _differ(self, query, key, value, bias, self.training)

    def scored(self, stream_BHTD: Tensor) -> Tensor:
        return stream_BHTD[:, ::2]


def _pairs(part: Any, rows: tuple[Tensor, ...], first: int) -> tuple[Tensor, ...]:
    """Queries and keys in twice as many heads as values: two maps for each head, one after the other."""
    counts = (2 * part.num_heads, 2 * part.num_heads, part.num_heads)[first:]
    return after_norms(part, [split_heads(out, count) for out, count in zip(rows, counts, strict=False)], first)


def _differ(part: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, training: bool) -> Tensor:
    """Differential attention before its output projection, (B, T, C)."""
    second = part._compute_lambda().type_as(query)
    if part.fused_attn:
        dropout = part.attn_drop_p if training else 0.0
        one, two = (
            F.scaled_dot_product_attention(query[:, at::2], key[:, at::2], value, attn_mask=bias, dropout_p=dropout)
            for at in (0, 1)
        )
        out = one - second * two
    else:
        logits = (query * part.scale) @ key.transpose(-2, -1)
        maps = part.attn_drop((logits if bias is None else logits + bias).softmax(dim=-1))
        out = (maps[:, ::2] - second * maps[:, 1::2]) @ value
    out = part.sub_norm(out) * (1 - part.lambda_init)
    return out.transpose(1, 2).flatten(2)
