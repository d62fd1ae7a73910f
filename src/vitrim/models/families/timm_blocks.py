"""Adapter for the other blocks of timm's `VisionTransformer`: parallel, post-norm, with differential attention."""

from collections.abc import Mapping
from typing import Any, ClassVar

from timm.layers import DiffAttention
from timm.layers.attention import Attention
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor, nn

from ...errors import WidthError
from ..foreign_macs import macs_per_row
from ..macs import BlockShape
from ..reduction.exchange import intercepted
from ..reduction.reduced_block import ReducedBlock
from .timm.differential import ReducedDiffBlock, ReducedDiffParallelScalingBlock
from .timm.parallel import ReducedParallelScalingBlock, ReducedParallelThingsBlock, streams_of
from .timm.reduced import mix, splits
from .timm_vit import Classes, ReducedVisionTransformer, TimmViT


class ReducedResPostBlock(ReducedBlock, ResPostBlock):
    """`ResPostBlock` with a cut: the norms follow attention and MLP."""

    attn: Any

    def norm_tokens(self, x_BTC: Tensor) -> Tensor:
        return x_BTC

    def project(self, normed_BTC: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        return streams_of(self.attn, normed_BTC, first, last)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, normed_BQC: Tensor) -> Tensor:
        return self.drop_path1(self.norm1(mix(self.attn, query, key, value, bias, normed_BQC, self.training)))

    def attend_whole(self, normed_BTC: Tensor, bias: Tensor | None, table: Any) -> Tensor | None:
        return self.drop_path1(self.norm1(self.attn(normed_BTC, attn_mask=bias))) if self.runs_whole(bias) else None

    def feed_forward(self, x_BTC: Tensor) -> Tensor:
        return x_BTC + self.drop_path2(self.norm2(self.mlp(x_BTC)))

    @property
    def head_scale(self) -> float:
        return self.attn.scale


class TimmBlocks(TimmViT):
    """`VisionTransformer` on blocks other than the standard one."""

    name = "timm-vit-blocks"
    covers = "timm VisionTransformer on parallel or post-norm blocks, or with differential attention"
    _reduced_blocks: ClassVar[Classes] = {
        Block: ReducedDiffBlock,
        ResPostBlock: ReducedResPostBlock,
        ParallelScalingBlock: ReducedParallelScalingBlock,
        DiffParallelScalingBlock: ReducedDiffParallelScalingBlock,
        ParallelThingsBlock: ReducedParallelThingsBlock,
    }
    _reduced_models: ClassVar[Classes] = {VisionTransformer: ReducedVisionTransformer}

    def claims(self, model: nn.Module) -> bool:
        first = next(iter(self.blocks(model)), None) if isinstance(model, VisionTransformer) else None
        if isinstance(first, Block):
            return isinstance(first.attn, DiffAttention)
        return isinstance(first, tuple(self._reduced_blocks))

    def branches_of(self, model: Any) -> Mapping[str, str]:
        return self.branches if hasattr(self.blocks(model)[0], "attn") else {}

    def check_widths(self, model: Any) -> None:
        block = type(self.blocks(model)[0])
        kind = "a Block with differential attention" if block is Block else f"a {block.__name__}"
        raise WidthError(f"the width of the blocks of this {type(model).__name__} cannot be cut: each is {kind}")

    def _parts(self, block: Any) -> list[tuple[Any, tuple[type[nn.Module], ...]]]:
        parts: list[tuple[Any, tuple[type[nn.Module], ...]]] = [
            (block, (*self._reduced_blocks, *self._reduced_blocks.values()))
        ]
        if isinstance(block, ParallelThingsBlock):
            return parts + [(part.attn, (Attention,)) for part in block.attns]
        if isinstance(block, Block | ResPostBlock):
            return [*parts, (block.attn, (DiffAttention,) if isinstance(block, Block) else (Attention,))]
        return parts

    def _shape(self, block: Any, width: int) -> BlockShape:
        if isinstance(block, ParallelThingsBlock):
            return _shape_of_things(block, width)
        if isinstance(block, Block | ResPostBlock):
            return _shape(block.attn, width, macs_per_row(block.mlp, width))
        hidden, whole = block.in_split[0], not splits(block.in_proj)
        every = macs_per_row(block.in_proj, width)
        one = every // sum(block.in_split)
        outs = (block.out_proj,) if block.out_proj is not None else (block.attn_out_proj, block.mlp_out_proj)
        sizes = (width + hidden,) if block.out_proj is not None else (width, hidden)
        return BlockShape(
            width=width,
            attn_dim=width // 2 if isinstance(block, DiffParallelScalingBlock) else width,
            head_dim=block.head_dim,
            qkv_macs=every if whole else 3 * width * one,
            # Both halves of the block are computed for the same tokens.
            proj_macs=(every if whole else hidden * one) + sum(map(macs_per_row, outs, sizes)),
            mlp_macs=0,
            whole_qkv=whole,
            mix_macs=_mix_macs(block, width),
        )


def _shape(attn: Any, width: int, mlp_macs: int) -> BlockShape:
    dims = attn.proj.in_features
    gate = getattr(attn, "gate", None)
    return BlockShape(
        width=width,
        attn_dim=dims // 2 if isinstance(attn, DiffAttention) else dims,
        head_dim=attn.head_dim,
        qkv_macs=macs_per_row(attn.qkv, width),
        proj_macs=macs_per_row(attn.proj, dims),
        mlp_macs=mlp_macs,
        gate_macs=0 if gate is None else macs_per_row(gate, width),
        whole_qkv=not splits(attn.qkv),
        whole_attention=intercepted(attn) != "",
        mix_macs=_mix_macs(attn, dims),
    )


def _shape_of_things(block: Any, width: int) -> BlockShape:
    shapes = [_shape(part.attn, width, 0) for part in block.attns]
    return BlockShape(
        width=width,
        attn_dim=sum(shape.attn_dim for shape in shapes),
        head_dim=shapes[0].head_dim,
        qkv_macs=sum(shape.qkv_macs for shape in shapes),
        proj_macs=sum(shape.proj_macs for shape in shapes),
        mlp_macs=sum(macs_per_row(ffn, width) for ffn in block.ffns),
        gate_macs=sum(shape.gate_macs for shape in shapes),
        whole_qkv=any(shape.whole_qkv for shape in shapes),
    )


def _mix_macs(part: Any, dims: int) -> int | None:
    """Of one query and one key in differential attention; fused, each of the two maps is multiplied by the values."""
    if not isinstance(part, DiffAttention | DiffParallelScalingBlock):
        return None
    return (3 if part.fused_attn else 2) * dims
