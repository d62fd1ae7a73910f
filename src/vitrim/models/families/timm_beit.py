"""Adapter for timm's `Beit` (BEiT and BEiT v2): relative position bias in every block, or one that all blocks share."""

from typing import Any, ClassVar

from timm.models.beit import Attention, Beit, Block, checkpoint_filter_fn
from torch import Tensor, nn

from ..adapter import State
from .timm.reduced import ReducedPoolingHead
from .timm.relative import ReducedRelativeBlock, _TimmRelative
from .timm_vit import Classes


class ReducedBeitBlock(ReducedRelativeBlock, Block):
    """`Block` of `Beit` with a cut."""

    bias_argument = "shared_rel_pos_bias"

    def norm_tokens(self, x_BTC: Tensor) -> Tensor:
        return self.norm1(x_BTC)

    def position_bias(self, shared: Any) -> Tensor | None:
        if self.attn.relative_position_bias_table is None:
            return shared
        own = self.attn._get_rel_pos_bias()[0]
        return own if shared is None else own + shared

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, normed_BQC: Tensor) -> Tensor:
        out = self.mixed(query, key, value, bias, normed_BQC)
        return self.drop_path1(out if self.gamma_1 is None else self.gamma_1 * out)

    def feed_forward(self, x_BTC: Tensor) -> Tensor:
        out = self.mlp(self.norm2(x_BTC))
        return x_BTC + self.drop_path2(out if self.gamma_2 is None else self.gamma_2 * out)


class ReducedBeit(ReducedPoolingHead, Beit):
    """`Beit` with a reduction attached."""


class TimmBeit(_TimmRelative):
    """BEiT and BEiT v2."""

    name = "timm-beit"
    covers = "timm Beit: BEiT, BEiT v2"

    _attentions = (Attention,)
    _reduced_blocks: ClassVar[Classes] = {Block: ReducedBeitBlock}
    _reduced_models: ClassVar[Classes] = {Beit: ReducedBeit}

    def claims(self, model: nn.Module) -> bool:
        return isinstance(model, Beit)

    def _convert(self, state: State, model: Any) -> State:
        return checkpoint_filter_fn(state, model)
