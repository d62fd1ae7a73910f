"""Adapter for timm's `Eva`: blocks that rotate queries and keys by the place of their token (rotary positions).

The rotation follows the tokens that are left, image by image: a dropped token takes its own away, a merged one keeps
that of its largest member, a fused one that of its best-scored member, and prefix tokens have none. Keys that choose
tokens (`ToMe`) are rotated as attention sees them, so that neighbours tend to merge.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from timm.layers import AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm, checkpoint_filter_fn
from torch import Tensor, nn

from ...errors import UnsupportedModelError
from ..adapter import State
from ..exchange import intercepted
from ..foreign_macs import macs_per_row
from ..heads import split_heads
from ..macs import BlockShape
from ..reduced import ReducedBlock
from .timm_reduced import ReducedTimmModel, mix, rows_of_qkv, splits
from .timm_vit import Classes, TimmViT


class _ReducedEva(ReducedBlock):
    """What both kinds of blocks share: projections, their rotation, and attention."""

    rotary_argument = "rope"
    attn: Any

    def project(self, normed_BTC: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        attn = self.attn
        streams = [split_heads(out, dim=attn.head_dim) for out in _rows(attn, normed_BTC, first, last)]
        norms = (attn.q_norm, attn.k_norm, nn.Identity())[first:last]
        streams = [norm(stream) for norm, stream in zip(norms, streams, strict=True)]
        # Heads of one group read the same keys and values.
        return tuple(
            stream if stream.shape[1] == attn.num_heads
            else stream.repeat_interleave(attn.num_heads // stream.shape[1], dim=1)
            for stream in streams
        )  # fmt: skip

    def rows_of_table(self, table: Tensor, place_BM: Tensor) -> Tensor:
        if table.ndim == 2:  # (N, E), the same for all heads and images.
            return table[place_BM].unsqueeze(1)
        if table.ndim == 3:  # (H, N, E), the same for all images.
            return table[:, place_BM].transpose(0, 1)
        return table.gather(2, place_BM[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[3]))

    def rotate(self, stream_BHTD: Tensor, table: Tensor) -> Tensor:
        prefix = stream_BHTD.shape[2] - table.shape[-2]
        rotated = apply_rot_embed_cat(stream_BHTD[:, :, prefix:], table, half=self.attn.rotate_half)
        return torch.cat([stream_BHTD[:, :, :prefix], rotated], dim=2)

    def add(self, attended: Tensor) -> Tensor:
        """What is added to the residual stream for this output of the attention layer."""
        raise NotImplementedError

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, normed_BQC: Tensor) -> Tensor:
        return self.add(mix(self.attn, query, key, value, bias, normed_BQC, self.training))

    def attend_whole(self, normed_BTC: Tensor, bias: Tensor | None, table: Any) -> Tensor | None:
        if not self.runs_whole(bias):
            return None
        return self.add(self.attn(normed_BTC, rope=table, attn_mask=bias))

    @property
    def head_scale(self) -> float:
        return self.attn.head_dim**-0.5


class ReducedEvaBlock(_ReducedEva, EvaBlock):
    """`EvaBlock` with a cut."""

    def norm_tokens(self, x_BTC: Tensor) -> Tensor:
        return self.norm1(x_BTC)

    def add(self, attended: Tensor) -> Tensor:
        return self.drop_path1(attended if self.gamma_1 is None else self.gamma_1 * attended)

    def feed_forward(self, x_BTC: Tensor) -> Tensor:
        out = self.mlp(self.norm2(x_BTC))
        return x_BTC + self.drop_path2(out if self.gamma_2 is None else self.gamma_2 * out)


class ReducedEvaBlockPostNorm(_ReducedEva, EvaBlockPostNorm):
    """`EvaBlockPostNorm` with a cut: the norms follow attention and MLP."""

    def norm_tokens(self, x_BTC: Tensor) -> Tensor:
        return x_BTC

    def add(self, attended: Tensor) -> Tensor:
        return self.drop_path1(self.norm1(attended))

    def feed_forward(self, x_BTC: Tensor) -> Tensor:
        return x_BTC + self.drop_path2(self.norm2(self.mlp(x_BTC)))


class ReducedEva(ReducedTimmModel, Eva):
    """`Eva` with a reduction attached."""


class TimmEva(TimmViT):
    """EVA, EVA-02, DINOv3, Perception Encoder and all else that timm builds on `Eva`."""

    name = "timm-eva"
    covers = "timm Eva: EVA, EVA-02, DINOv3, Perception Encoder, RoPE-ViT, Sapiens 2, LingBot"
    branches: ClassVar[Mapping[str, str]] = {"attn": "norm1", "mlp": "norm2"}

    _attentions = (EvaAttention, AttentionRope)
    _reduced_blocks: ClassVar[Classes] = {EvaBlock: ReducedEvaBlock, EvaBlockPostNorm: ReducedEvaBlockPostNorm}
    _reduced_models: ClassVar[Classes] = {Eva: ReducedEva}

    def claims(self, model: nn.Module) -> bool:
        return isinstance(model, Eva)

    def check_widths(self, model: Any) -> None:
        if any(isinstance(block, EvaBlockPostNorm) for block in model.blocks):
            raise UnsupportedModelError(
                f"the width of this {type(model).__name__} cannot change: its norms follow attention and MLP, and "
                "would act on what is left of a removed one; reduce its tokens instead"
            )

    def keeps_attention(self, model: Any) -> bool:
        # Without rotary positions too: timm's `EvaAttention` takes no narrower heads.
        return super().keeps_attention(model) or any(isinstance(block, EvaBlock) for block in model.blocks)

    def _convert(self, state: State, model: Any) -> State:
        return checkpoint_filter_fn(state, model)

    def _shape(self, block: Any, width: int) -> BlockShape:
        attn, dims = block.attn, block.attn.num_heads * block.attn.head_dim
        layers = (attn.q_proj, attn.k_proj, attn.v_proj) if attn.qkv is None else (attn.qkv,)
        return BlockShape(
            width=width,
            attn_dim=dims,
            head_dim=attn.head_dim,
            qkv_macs=sum(macs_per_row(layer, width) for layer in layers),
            proj_macs=macs_per_row(attn.proj, dims),
            mlp_macs=macs_per_row(block.mlp, width),
            gate_macs=0 if attn.gate is None else macs_per_row(attn.gate, width),
            whole_qkv=attn.qkv is not None and not splits(attn.qkv),
            query_macs=macs_per_row(attn.q_proj, width) if attn.qkv is None else None,
            whole_attention=intercepted(attn) != "",
        )


def _rows(attn: Any, x_BTC: Tensor, first: int, last: int) -> Sequence[Tensor]:
    """Rows `first` to `last` (exclusive) of (query, key, value), each (B, T, H * D), as the layer itself makes them."""
    if attn.qkv is None:
        return [layer(x_BTC) for layer in (attn.q_proj, attn.k_proj, attn.v_proj)[first:last]]
    return rows_of_qkv(attn, attn.num_heads * attn.head_dim, x_BTC, first, last)
