"""Adapter for timm's `Eva`: blocks that rotate queries and keys by the place of their token (rotary positions).

The rotation follows the tokens that are left, image by image: a dropped token takes its own away, a merged one keeps
that of its largest member, a fused one that of its best-scored member, and prefix tokens have none. Keys that choose
tokens (`ToMe`) are rotated as attention sees them, so that neighbours tend to merge.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from timm.layers import AttentionRope
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm, checkpoint_filter_fn
from torch import Tensor, nn

from ...errors import WidthError
from ..adapter import State
from ..foreign_macs import macs_per_row
from ..macs import BlockShape
from ..reduction.exchange import intercepted
from ..reduction.reduced_block import ReducedBlock
from ..removed_branch import RemovedBranch
from ..widths.elastic_pairs import query_dim, value_dim
from .timm.eva_heads import NARROW, part_behind, rotated, streams_of
from .timm.reduced import ReducedTimmModel, mix, splits
from .timm_vit import Classes, TimmViT


class ReducedRotaryBlock(ReducedBlock):
    """What blocks on attention of `Eva` share: projections, their rotation, and attention."""

    rotary_argument = "rope"
    attn: Any

    @property
    def attends(self) -> bool:
        return not isinstance(self.attn, RemovedBranch)

    def project(self, normed_BTC: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        if not self.attends:  # Nothing is projected, and nothing attends.
            return (normed_BTC.new_empty(normed_BTC.shape[0], 1, normed_BTC.shape[1], 0),) * (last - first)
        return streams_of(self.attn, normed_BTC, first, last)

    def rows_of_table(self, table: Tensor, place_BM: Tensor) -> Tensor:
        if table.ndim == 2:  # (N, E), the same for all heads and images.
            return table[place_BM].unsqueeze(1)
        if table.ndim == 3:  # (H, N, E), the same for all images.
            return table[:, place_BM].transpose(0, 1)
        return table.gather(2, place_BM[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[3]))

    def rotate(self, stream_BHTD: Tensor, table: Tensor) -> Tensor:
        return rotated(self.attn, stream_BHTD, table)

    def add(self, attended: Tensor) -> Tensor:
        """What is added to the residual stream for this output of the attention layer."""
        raise NotImplementedError

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, normed_BQC: Tensor) -> Tensor:
        if not self.attends:
            return self.add(self.attn(normed_BQC))
        return self.add(mix(self.attn, query, key, value, bias, normed_BQC, self.training))

    def attend_whole(self, normed_BTC: Tensor, bias: Tensor | None, table: Any) -> Tensor | None:
        if not self.runs_whole(bias):
            return None
        return self.add(self.attn(normed_BTC, rope=table, attn_mask=bias))

    @property
    def head_scale(self) -> float:
        return self.attn.head_dim**-0.5 if self.attends else 1.0


class ReducedEvaBlock(ReducedRotaryBlock, EvaBlock):
    """`EvaBlock` with a cut."""

    def norm_tokens(self, x_BTC: Tensor) -> Tensor:
        return self.norm1(x_BTC)

    def add(self, attended: Tensor) -> Tensor:
        return self.drop_path1(attended if self.gamma_1 is None else self.gamma_1 * attended)

    def feed_forward(self, x_BTC: Tensor) -> Tensor:
        out = self.mlp(self.norm2(x_BTC))
        return x_BTC + self.drop_path2(out if self.gamma_2 is None else self.gamma_2 * out)


class ReducedEvaBlockPostNorm(ReducedRotaryBlock, EvaBlockPostNorm):
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

    _attentions = (EvaAttention, AttentionRope, *NARROW, RemovedBranch)
    _reduced_blocks: ClassVar[Classes] = {EvaBlock: ReducedEvaBlock, EvaBlockPostNorm: ReducedEvaBlockPostNorm}
    _reduced_models: ClassVar[Classes] = {Eva: ReducedEva}

    def claims(self, model: nn.Module) -> bool:
        return isinstance(model, Eva)

    def check_widths(self, model: Any) -> None:
        if any(isinstance(block, EvaBlockPostNorm) for block in self.blocks(model)):
            raise WidthError(
                f"the width of the blocks of this {type(model).__name__} cannot be cut: their norms follow attention "
                "and MLP, and would act on what is left of a removed one"
            )

    def keeps_attention(self, model: Any) -> str:
        attentions = [block.attn for block in self.blocks(model) if isinstance(block, EvaBlock)]
        between = next((part for attn in attentions if (part := part_behind(attn))), "")
        return between and f"its {between} between attention and output projection forbids rotating the values"

    def _convert(self, state: State, model: Any) -> State:
        return checkpoint_filter_fn(state, model)

    def _shape(self, block: Any, width: int) -> BlockShape:
        attn, mlp = block.attn, macs_per_row(block.mlp, width)
        if isinstance(attn, RemovedBranch):
            return BlockShape(width, 0, 0, 0, 0, mlp)
        layers = (attn.q_proj, attn.k_proj, attn.v_proj) if attn.qkv is None else (attn.qkv,)
        made = [macs_per_row(layer, width) for layer in layers]
        queries, values = attn.num_heads * query_dim(attn), attn.num_heads * value_dim(attn)
        query, key = made[:2] if attn.qkv is None else [made[0] * queries // (2 * queries + values)] * 2
        return BlockShape(
            width=width,
            attn_dim=queries,
            head_dim=query_dim(attn),
            qkv_macs=sum(made),
            proj_macs=macs_per_row(attn.proj, values),
            mlp_macs=mlp,
            gate_macs=0 if attn.gate is None else macs_per_row(attn.gate, width),
            whole_qkv=attn.qkv is not None and not splits(attn.qkv),
            query_macs=query,
            key_macs=key,
            value_dims=values,
            whole_attention=intercepted(attn) != "",
        )
