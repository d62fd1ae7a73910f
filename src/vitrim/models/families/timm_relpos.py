"""Adapter for timm's `VisionTransformerRelPos`: relative positions from a table, or from an MLP on log coordinates."""

from typing import Any, ClassVar

from timm.layers import RelPosMlp
from timm.models.vision_transformer_relpos import (
    RelPosAttention,
    RelPosBlock,
    ResPostRelPosBlock,
    VisionTransformerRelPos,
    checkpoint_filter_fn,
)
from torch import Tensor, nn

from ...tokens import Plan, Reducer
from ..adapter import State
from ..foreign_macs import macs_per_row
from ..macs import Macs
from .timm.reduced import ReducedPoolingHead
from .timm.relative import ReducedRelativeBlock, _TimmRelative
from .timm_vit import Classes


class _ReducedRelPos(ReducedRelativeBlock):
    bias_argument = "shared_rel_pos"

    def position_bias(self, shared: Any) -> Tensor | None:
        if self.attn.rel_pos is not None:
            shared = self.attn.rel_pos.get_bias()
        return None if shared is None else shared[0]


class ReducedRelPosBlock(_ReducedRelPos, RelPosBlock):
    """`RelPosBlock` with a cut."""

    def norm_tokens(self, x_BTC: Tensor) -> Tensor:
        return self.norm1(x_BTC)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, normed_BQC: Tensor) -> Tensor:
        return self.drop_path1(self.ls1(self.mixed(query, key, value, bias, normed_BQC)))

    def feed_forward(self, x_BTC: Tensor) -> Tensor:
        return x_BTC + self.drop_path2(self.ls2(self.mlp(self.norm2(x_BTC))))


class ReducedResPostRelPosBlock(_ReducedRelPos, ResPostRelPosBlock):
    """`ResPostRelPosBlock` with a cut: the norms follow attention and MLP."""

    def norm_tokens(self, x_BTC: Tensor) -> Tensor:
        return x_BTC

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, normed_BQC: Tensor) -> Tensor:
        return self.drop_path1(self.norm1(self.mixed(query, key, value, bias, normed_BQC)))

    def feed_forward(self, x_BTC: Tensor) -> Tensor:
        return x_BTC + self.drop_path2(self.norm2(self.mlp(x_BTC)))


class ReducedVisionTransformerRelPos(ReducedPoolingHead, VisionTransformerRelPos):
    """`VisionTransformerRelPos` with a reduction attached."""


class TimmRelPos(_TimmRelative):
    """ViTs with relative positions and no absolute ones."""

    name = "timm-relpos"
    covers = "timm VisionTransformerRelPos: ViT with relative positions"

    _attentions = (RelPosAttention,)
    _reduced_blocks: ClassVar[Classes] = {
        RelPosBlock: ReducedRelPosBlock,
        ResPostRelPosBlock: ReducedResPostRelPosBlock,
    }
    _reduced_models: ClassVar[Classes] = {VisionTransformerRelPos: ReducedVisionTransformerRelPos}

    def claims(self, model: nn.Module) -> bool:
        return isinstance(model, VisionTransformerRelPos)

    def macs(self, model: Any, plan: Plan, reducer: Reducer | None) -> Macs:
        makers = [model.shared_rel_pos, *(block.attn.rel_pos for block in model.blocks)]
        return super().macs(model, plan, reducer) + sum(map(_macs_of_bias, makers), Macs())

    def _convert(self, state: State, model: Any) -> State:
        return checkpoint_filter_fn(state, model)


def _macs_of_bias(maker: Any) -> Macs:
    if not isinstance(maker, RelPosMlp):
        return Macs()
    coordinates: Any = maker.rel_coords_log
    return Macs(coordinates[..., 0].numel() * macs_per_row(maker.mlp, 2))
