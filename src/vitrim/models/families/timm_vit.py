"""Adapter for timm's `VisionTransformer` and `VisionTransformerDistilled` built on the standard `Block`."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from timm.layers import Attention, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from ...errors import UnsupportedModelError, VitrimError
from ...tokens import Plan, Reducer
from ..adapter import Geometry, State
from ..foreign_macs import counted, macs_of_convolutions, macs_per_row
from ..heads import split_heads
from ..macs import BlockShape, Macs, block_macs
from ..own_code import own_class
from ..reduction.exchange import intercepted
from ..reduction.reduced_block import ReducedBlock
from ..removed_branch import RemovedBranch
from ..small_vits import ConvStem
from ..widths.sublayers import Elastic
from .timm.model import TimmModel
from .timm.reduced import (
    ReducedTimmModel,
    after_norms,
    fixed_size,
    left_by_patch_drop,
    mix,
    pooled_from,
    rows_of_qkv,
    splits,
)
from .timm.weights import fit_weights, trained_size

Classes = dict[type[nn.Module], type[nn.Module]]


class ReducedTimmBlock(ReducedBlock, Block):
    """`Block` with a cut: the block's own norm, projections, layer scale and drop path, on fused attention."""

    def norm_tokens(self, x_BTC: Tensor) -> Tensor:
        return self.norm1(x_BTC)

    def project(self, normed_BTC: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        attn: Any = self.attn
        if isinstance(attn, RemovedBranch):  # Nothing is projected, and nothing attends.
            return (normed_BTC.new_empty(normed_BTC.shape[0], 1, normed_BTC.shape[1], 0),) * (last - first)
        rows = rows_of_qkv(attn, attn.attn_dim, normed_BTC, first, last)
        return after_norms(attn, [split_heads(out, attn.num_heads, attn.head_dim) for out in rows], first)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, normed_BQC: Tensor) -> Tensor:
        attn: Any = self.attn
        if isinstance(attn, RemovedBranch):
            return self.drop_path1(self.ls1(attn(normed_BQC)))
        return self.drop_path1(self.ls1(mix(attn, query, key, value, bias, normed_BQC, self.training)))

    def attend_whole(self, normed_BTC: Tensor, bias: Tensor | None, table: Any) -> Tensor | None:
        if not self.runs_whole(bias):
            return None
        return self.drop_path1(self.ls1(self.attn(normed_BTC, attn_mask=bias)))

    def feed_forward(self, x_BTC: Tensor) -> Tensor:
        return x_BTC + self.drop_path2(self.ls2(self.mlp(self.norm2(x_BTC))))

    @property
    def head_scale(self) -> float:
        attn: Any = self.attn
        return 1.0 if isinstance(attn, RemovedBranch) else attn.head_dim**-0.5

    @property
    def attends(self) -> bool:
        return not isinstance(self.attn, RemovedBranch)


class ReducedVisionTransformer(ReducedTimmModel, VisionTransformer):
    """`VisionTransformer` with a reduction attached."""


class ReducedVisionTransformerDistilled(ReducedTimmModel, VisionTransformerDistilled):
    """`VisionTransformerDistilled` with a reduction attached."""


class TimmViT(TimmModel):
    """ViT, DeiT, DeiT-III, DINOv2, CLIP and SigLIP towers, and hybrids, as timm builds them."""

    name = "timm-vit"
    covers = "timm VisionTransformer on the standard Block: ViT, DeiT, DeiT-III, DINOv2, CLIP, SigLIP, hybrids"
    branches: ClassVar[Mapping[str, str]] = {"attn": "norm1", "mlp": "norm2"}

    _attentions: ClassVar[tuple[type[nn.Module], ...]] = (Attention, RemovedBranch)
    _reduced_blocks: ClassVar[Classes] = {Block: ReducedTimmBlock}
    _reduced_models: ClassVar[Classes] = {
        VisionTransformer: ReducedVisionTransformer,
        VisionTransformerDistilled: ReducedVisionTransformerDistilled,
    }

    def claims(self, model: nn.Module) -> bool:
        return isinstance(model, VisionTransformer)

    def check(self, model: Any) -> None:
        if type(model) not in (*self._reduced_models, *self._reduced_models.values()):
            classes = type(model).__mro__
            base = next((cls for cls in classes if cls in self._reduced_models), classes[1])
            raise UnsupportedModelError(own_class(model, base, self))
        for index, block in enumerate(self.blocks(model)):
            if isinstance(getattr(block, "attn", None), Elastic) or isinstance(getattr(block, "mlp", None), Elastic):
                raise VitrimError("the model runs as a sub-network of a super-network; leave that context first")
            for part, known in self._parts(block):
                if type(part) not in known:
                    raise UnsupportedModelError(
                        f"blocks.{index} holds a {type(part).__name__}, which the {self.name} adapter cannot cut; "
                        f"it covers {self.covers}"
                    )
        if model.global_pool == "prr":
            raise UnsupportedModelError(f"the {self.name} adapter cannot weigh tokens in a head that pools by 'prr'")

    def _parts(self, block: Any) -> Sequence[tuple[Any, tuple[type[nn.Module], ...]]]:
        """The block and its attention, each with the classes that it may have."""
        blocks = (*self._reduced_blocks, *self._reduced_blocks.values())
        return (block, blocks), (getattr(block, "attn", None), self._attentions)

    def geometry(self, model: Any) -> Geometry:
        embed = model.patch_embed
        reads_prefix = getattr(model, "attn_pool", None) is None and model.global_pool == "token"
        height, width = embed.img_size if embed.img_size is not None else (224, 224)
        return Geometry(
            depth=len(model.blocks),
            num_patches=embed.num_patches,
            num_prefix=model.num_prefix_tokens,
            has_cls=model.cls_token is not None,
            head="prefix" if reads_prefix else "tokens",
            input_size=(model.in_chans, height, width),
            fixed_size=fixed_size(model),
            rotary=getattr(model, "rope", None) is not None,
        )

    def patches_entering(self, model: Any, *, training: bool) -> int:
        return left_by_patch_drop(model, model.patch_embed.num_patches, training)

    def reduced_class(self, module: nn.Module) -> type[nn.Module]:
        return {**self._reduced_blocks, **self._reduced_models}[type(module)]

    def trained_size(self, model: Any, state: State, trained_at: tuple[int, int] | None) -> tuple[int, int] | None:
        return trained_size(model, state, trained_at)

    def fit_weights(
        self,
        model: Any,
        state: State,
        trained_at: tuple[int, int] | None = None,
        *,
        resample_patches: bool = False,
    ) -> State:
        return fit_weights(model, state, trained_at, resample_patches, self._convert)

    def _convert(self, state: State, model: Any) -> State:
        return checkpoint_filter_fn(state, model, adapt_layer_scale=True)

    def macs(self, model: Any, plan: Plan, reducer: Reducer | None) -> Macs:
        total = self._patch_macs(model) + self._head_macs(model, plan.token_counts[-1])
        for index, (block, tokens) in enumerate(zip(self.blocks(model), plan.entering, strict=True)):
            prefix_only = plan.prefix_only and index == plan.depth - 1
            cuts = plan.cut(index, "before"), plan.cut(index, "inside")
            total += block_macs(
                self._shape(block, model.embed_dim), tokens, plan.num_prefix, *cuts, prefix_only, reducer
            )
        return total

    def _patch_macs(self, model: Any) -> Macs:
        embed = model.patch_embed
        if type(embed) is PatchEmbed and type(embed.proj) is nn.Conv2d:
            return Macs(embed.num_patches * embed.proj.weight[0].numel() * embed.proj.out_channels)
        size = self.geometry(model).input_size
        if type(embed) is ConvStem and (macs := macs_of_convolutions(embed.proj, *size[1:])) is not None:
            return Macs(macs)
        return counted(embed, (1, *size))

    def _head_macs(self, model: Any, tokens: int) -> Macs:
        pool, rows = getattr(model, "attn_pool", None), 1
        total = Macs()
        if pool is not None:
            read = tokens - pooled_from(model)
            width = pool.num_heads * pool.head_dim
            parts = [(pool.q, pool.latent_dim), (pool.proj, width), (pool.mlp, pool.out_features)]
            latents = pool.latent_len * sum(macs_per_row(part, size) for part, size in parts if part is not None)
            total += Macs(latents + read * macs_per_row(pool.kv, width), 2 * pool.latent_len * read * width)
        elif model.global_pool == "":
            rows = tokens
        heads = [model.head, *([model.head_dist] if hasattr(model, "head_dist") else [])]
        return total + Macs(rows * sum(macs_per_row(head, model.num_features) for head in heads))

    def _shape(self, block: Any, width: int) -> BlockShape:
        attn, mlp = block.attn, macs_per_row(block.mlp, width)
        if isinstance(attn, RemovedBranch):
            return BlockShape(width, 0, 0, 0, 0, mlp)
        return BlockShape(
            width=width,
            attn_dim=attn.attn_dim,
            head_dim=attn.head_dim,
            qkv_macs=macs_per_row(attn.qkv, width),
            proj_macs=macs_per_row(attn.proj, attn.attn_dim),
            mlp_macs=mlp,
            gate_macs=0 if attn.gate is None else macs_per_row(attn.gate, width),
            whole_qkv=not splits(attn.qkv),
            whole_attention=intercepted(attn) != "",
        )
