"""Adapter for timm's `VisionTransformer` and `VisionTransformerDistilled` built on the standard `Block`."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from timm.layers import Attention, PatchEmbed
from timm.models._features import feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...errors import UnsupportedModelError, VitrimError
from ...tokens import Plan, Reducer
from ..adapter import Geometry, State
from ..exchange import intercepted, while_attached
from ..foreign_macs import counted, macs_per_row
from ..forward_pass import CHANGED, finish, trace_at_head
from ..macs import BlockShape, Macs, block_macs
from ..reduced import ReducedBlock
from ..reduced_model import ReducedModel
from ..removed_branch import RemovedBranch
from ..sublayers import Elastic
from .timm_model import TimmModel
from .timm_weights import fit_weights, trained_size

Classes = dict[type[nn.Module], type[nn.Module]]


class ReducedTimmBlock(ReducedBlock, Block):
    """`Block` with a cut: the block's own norm, projections, layer scale and drop path, on fused attention."""

    def norm_tokens(self, x_BTC: Tensor) -> Tensor:
        return self.norm1(x_BTC)

    def project(self, normed_BTC: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
        attn: Any = self.attn
        if isinstance(attn, RemovedBranch):  # Nothing is projected, and nothing attends.
            return (normed_BTC.new_empty(normed_BTC.shape[0], 1, normed_BTC.shape[1], 0),) * (last - first)
        refuse_hooks(attn, self.vitrim_index)
        part = slice(first * attn.attn_dim, last * attn.attn_dim)
        if splits(attn.qkv):
            bias = attn.qkv.bias
            out = F.linear(normed_BTC, attn.qkv.weight[part], None if bias is None else bias[part])
        else:  # Another layer put in its place (LoRA, quantised), or hooks: call it, which computes everything.
            out = attn.qkv(normed_BTC)[..., part]
        shape = (out.shape[0], out.shape[1], last - first, attn.num_heads, attn.head_dim)
        streams = out.reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
        norms = (attn.q_norm, attn.k_norm, nn.Identity())[first:last]
        return tuple(norm(stream) for norm, stream in zip(norms, streams, strict=True))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, normed_BQC: Tensor) -> Tensor:
        attn: Any = self.attn
        if isinstance(attn, RemovedBranch):
            return self.drop_path1(self.ls1(attn(normed_BQC)))
        return self.drop_path1(self.ls1(mix(attn, query, key, value, bias, normed_BQC, self.training)))

    def feed_forward(self, x_BTC: Tensor) -> Tensor:
        return x_BTC + self.drop_path2(self.ls2(self.mlp(self.norm2(x_BTC))))

    @property
    def head_scale(self) -> float:
        attn: Any = self.attn
        return 1.0 if isinstance(attn, RemovedBranch) else attn.head_dim**-0.5

    @property
    def attends(self) -> bool:
        return not isinstance(self.attn, RemovedBranch)


def mix(
    attn: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, normed_BQC: Tensor, training: bool
) -> Tensor:
    """The attention of a timm layer from (B, H, T, D) queries, keys and values on: up to its output projection."""
    if attn.fused_attn:
        dropout = attn.attn_drop.p if training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
    else:  # Whoever wants double backward, forward-mode gradients, or attention maps from a hook on attn_drop.
        logits = (query * attn.scale) @ key.transpose(-2, -1)
        out = attn.attn_drop((logits if bias is None else logits + bias).softmax(dim=-1)) @ value
    out = attn.norm(out.transpose(1, 2).flatten(2))
    if attn.gate is not None:
        out = out * attn.gate(normed_BQC).sigmoid()
    return attn.proj_drop(attn.proj(out))


def refuse_hooks(attn: nn.Module, block: int) -> None:
    """Raise `VitrimError` if calls of this attention layer as a whole are watched or replaced."""
    if by := intercepted(attn):
        raise VitrimError(
            f"blocks.{block}.attn has {by}, which cannot run here: a block that cuts tokens computes its attention in "
            "parts; put hooks on the block, on attn.qkv or on attn.proj"
        )


class ReducedTimmModel(ReducedModel):
    """What changes outside the blocks: pooling weighs tokens by size, maps are spread over the whole grid."""

    vitrim_free = ("forward", "forward_features")
    attn_pool: Any
    blocks: Any
    num_prefix_tokens: int
    patch_embed: Any

    def expected_patches(self, images: Any) -> int | None:
        return _num_patches(self, images)

    @while_attached
    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        super().set_input_size(*args, **kwargs)
        self.vitrim_handle.refresh()

    @while_attached
    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with self.open_call(x):
            return finish(self.vitrim_policy, super().forward_features(x, *args, **kwargs))

    @while_attached
    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        kind = self.global_pool if pool_type is None else pool_type
        if self.vitrim_handle.cls_only and kind not in ("", "token"):
            raise VitrimError(f"cls_only leaves no patch tokens to pool by {kind!r}; attach again without it")
        weighs = self.attn_pool is not None or kind in ("avg", "avgmax", "map")
        trace = trace_at_head(self.vitrim_policy, x) if weighs else None
        if trace is None or trace.size_BN is None:
            return super().pool(x, pool_type)
        if self.attn_pool is not None:
            bias = trace.bias(x.dtype)
            first = _pooled_from(self)
            return self.attn_pool(x[:, first:], attn_mask=None if bias is None else bias[..., first:])
        size = trace.size_BN.to(torch.promote_types(x.dtype, torch.float32))
        size = F.pad(size, (self.num_prefix_tokens, 0), value=float(getattr(self, "pool_include_prefix", False)))
        mean = (x * (size / size.sum(1, keepdim=True)).to(x.dtype).unsqueeze(2)).sum(1)
        return mean if kind == "avg" else 0.5 * (super().pool(x, "max") + mean)

    @while_attached
    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, *args: Any, output_fmt: str = "NCHW", **kwargs: Any
    ) -> Any:
        """As timm's; with output_fmt="NCHW" each map is spread over the whole grid, zero where a token was dropped."""
        policy, maps = self.vitrim_policy, output_fmt == "NCHW"
        if maps and self.vitrim_handle.cls_only:
            raise VitrimError("cls_only computes no map of patch tokens; attach again without it")
        if maps and _left_by_patch_drop(self, 100, _drops_patches(self)) < 100:
            raise VitrimError(
                "patch_drop_rate drops patches in training, so there is no whole map; use output_fmt='NLC' or "
                "model.eval()"
            )
        with self.open_call(x) as call:
            out = super().forward_intermediates(x, indices, *args, output_fmt="NLC", **kwargs)
            final = out.get("image_features") if isinstance(out, dict) else out[0] if isinstance(out, tuple) else None
            if final is not None:
                finish(policy, final, whole=not kwargs.get("stop_early", False))
        trace = call.certain
        if not maps:
            return out
        if trace is None:
            raise VitrimError(CHANGED)
        grid = self.patch_embed.dynamic_feat_size(tuple(x.shape[-2:]))
        blocks = sorted(set(feature_take_indices(len(self.blocks), indices)[0]))

        def spread(block: int, tokens: Any) -> Any:
            if isinstance(tokens, tuple):
                return spread(block, tokens[0]), tokens[1]
            return trace.state(block).spread(tokens).transpose(1, 2).unflatten(2, grid).contiguous()

        def whole_maps(features: list[Any]) -> list[Any]:
            return [spread(block, tokens) for block, tokens in zip(blocks, features, strict=True)]

        if isinstance(out, dict):
            return {**out, "image_intermediates": whole_maps(out["image_intermediates"])}
        return (out[0], whole_maps(out[1])) if isinstance(out, tuple) else whole_maps(out)


def _num_patches(model: Any, images: Any) -> int | None:
    """Patch tokens that reach the first block of these images; None where that is not known."""
    embed = model.patch_embed
    if _fixed_size(model):
        return _left_by_patch_drop(model, embed.num_patches, _drops_patches(model))
    if getattr(images, "ndim", 0) != 4 or not isinstance(embed, PatchEmbed):
        return None
    rows, columns = embed.dynamic_feat_size(tuple(images.shape[-2:]))
    return _left_by_patch_drop(model, rows * columns, _drops_patches(model))


def _drops_patches(model: Any) -> bool:
    return getattr(model.patch_drop, "training", False)


def _pooled_from(model: Any) -> int:
    """The first token that attention pooling reads. Models without a choice give it all."""
    return 0 if getattr(model, "pool_include_prefix", True) else model.num_prefix_tokens


def _fixed_size(model: Any) -> bool:
    return model.patch_embed.img_size is not None and not model.dynamic_img_size


def _left_by_patch_drop(model: Any, num_patches: int, training: bool) -> int:
    rate = getattr(model.patch_drop, "prob", 0.0) if training else 0.0
    return num_patches if rate == 0 else max(1, int(num_patches * (1 - rate)))


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
            base = next(iter(self._reduced_models)).__name__
            raise UnsupportedModelError(
                f"{type(model).__qualname__} overrides parts of {base} that the {self.name} adapter cannot keep; it "
                f"covers {self.covers}"
            )
        blocks = (*self._reduced_blocks, *self._reduced_blocks.values())
        for index, block in enumerate(model.blocks):
            attn = getattr(block, "attn", None)
            if isinstance(attn, Elastic) or isinstance(getattr(block, "mlp", None), Elastic):
                raise VitrimError("the model runs as a sub-network of a super-network; leave that context first")
            for part, known in ((block, blocks), (attn, self._attentions)):
                if type(part) not in known:
                    raise UnsupportedModelError(
                        f"blocks.{index} holds a {type(part).__name__}, which the {self.name} adapter cannot cut; "
                        f"it covers {self.covers}"
                    )
        if model.global_pool == "prr":
            raise UnsupportedModelError(f"the {self.name} adapter cannot weigh tokens in a head that pools by 'prr'")

    def geometry(self, model: Any) -> Geometry:
        embed = model.patch_embed
        reads_prefix = model.attn_pool is None and model.global_pool == "token"
        height, width = embed.img_size if embed.img_size is not None else (224, 224)
        return Geometry(
            depth=len(model.blocks),
            num_patches=embed.num_patches,
            num_prefix=model.num_prefix_tokens,
            has_cls=model.cls_token is not None,
            head="prefix" if reads_prefix else "tokens",
            input_size=(model.in_chans, height, width),
            fixed_size=_fixed_size(model),
            rotary=getattr(model, "rope", None) is not None,
        )

    def patches_entering(self, model: Any, *, training: bool) -> int:
        return _left_by_patch_drop(model, model.patch_embed.num_patches, training)

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
        for index, (block, tokens) in enumerate(zip(model.blocks, plan.entering, strict=True)):
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
        return counted(embed, (1, *self.geometry(model).input_size))

    def _head_macs(self, model: Any, tokens: int) -> Macs:
        pool, rows = model.attn_pool, 1
        total = Macs()
        if pool is not None:
            read = tokens - _pooled_from(model)
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
        )


def splits(qkv: Any) -> bool:
    """Whether queries, keys and values can be computed apart, from slices of the weights of this layer."""
    # A weight that is a subclass of Tensor (quantised, distributed) has no slices that every exporter understands.
    return type(qkv) is nn.Linear and not intercepted(qkv) and not is_traceable_wrapper_subclass(qkv.weight)
