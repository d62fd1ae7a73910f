"""What reduced ViTs of timm share: attention in parts, pooling that weighs tokens, maps over the whole grid."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.layers.attention import resolve_self_attn_mask
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ....errors import VitrimError
from ...attention_product import attention_product
from ...own_code import replaced
from ...reduction.exchange import intercepted, while_attached
from ...reduction.forward_pass import CHANGED, finish, trace_at_head
from ...reduction.reduced_model import ReducedModel

_LINEAR = None if replaced(nn.Linear) else nn.Linear.forward
"""What linear layers compute, unless somebody has replaced it for all of them."""


def mix(
    attn: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, normed_BQC: Tensor, training: bool,
    is_causal: bool = False,
) -> Tensor:  # fmt: skip
    """The attention of a timm layer from (B, H, T, D) queries, keys and values on: up to its output projection."""
    if attn.fused_attn:
        dropout = attn.attn_drop.p if training else 0.0
        scale = attn.scale if hasattr(attn, "kept_pairs") else None  # That of the full head, of which a part is left.
        out = attention_product(query, key, value, bias, dropout=dropout, is_causal=is_causal, scale=scale)
    else:  # Whoever wants double backward, forward-mode gradients, or attention maps from a hook on attn_drop.
        logits = (query * attn.scale) @ key.transpose(-2, -1)
        mask = resolve_self_attn_mask(query.shape[2], logits, bias, is_causal)
        out = attn.attn_drop((logits if mask is None else logits + mask).softmax(dim=-1)) @ value
    out = out.transpose(1, 2).flatten(2)
    if (norm := getattr(attn, "norm", None)) is not None:
        out = norm(out)
    if (gate := getattr(attn, "gate", None)) is not None:
        out = out * gate(normed_BQC).sigmoid()
    return attn.proj_drop(attn.proj(out))


def splits(qkv: Any) -> bool:
    """Whether queries, keys and values can be computed apart, from slices of the weights of this layer."""
    # A weight that is a subclass of Tensor (quantised, distributed) has no slices that every exporter understands.
    if type(qkv) is not nn.Linear or nn.Linear.forward is not _LINEAR:
        return False
    return not intercepted(qkv) and not is_traceable_wrapper_subclass(qkv.weight)


def rows_of_qkv(
    attn: Any, dims: int | tuple[int, int, int], x_BTC: Tensor, first: int, last: int
) -> tuple[Tensor, ...]:
    """Streams `first` to `last` (exclusive) of queries, keys and values, each (B, T, dims), of a fused layer `qkv`.

    `dims` is one number for all heads of each stream, or one for each of the three.
    """
    each = (dims,) * 3 if isinstance(dims, int) else dims
    part, separate = slice(sum(each[:first]), sum(each[:last])), getattr(attn, "q_bias", None) is not None
    bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias)) if separate else None
    if splits(attn.qkv):
        weight, bias = attn.qkv.weight, bias if separate else attn.qkv.bias
        if last - first < 3:
            weight, bias = weight[part], None if bias is None else bias[part]
        out = F.linear(x_BTC, weight, bias)
    elif separate and not attn.qkv_bias_separate:
        out = F.linear(x_BTC, attn.qkv.weight, bias)[..., part]
    else:  # Another layer put in its place (LoRA, quantised), or hooks: call it, which computes everything.
        out = attn.qkv(x_BTC)[..., part]
        out = out if bias is None else out + bias[part]
    return out.split_with_sizes(each[first:last], dim=-1) if last - first > 1 else (out,)


def after_norms(attn: Any, streams: Sequence[Tensor], first: int) -> tuple[Tensor, ...]:
    """Streams of all heads after the norms of queries and keys that the layer has; values have none.

    `first`: which of (query, key, value) the first of them is.
    """
    norms = [getattr(attn, name, None) for name in ("q_norm", "k_norm")][first:]
    normed = (stream if norm is None else norm(stream) for norm, stream in zip(norms, streams, strict=False))
    return (*normed, *streams[len(norms) :])


class ReducedTimmModel(ReducedModel):
    """What changes outside the blocks: pooling weighs tokens by size, maps are spread over the whole grid."""

    vitrim_free = ("forward", "forward_features")
    vitrim_heads = ("forward_head",)
    attn_pool: Any
    blocks: Any
    norm: Any
    num_prefix_tokens: int
    patch_embed: Any

    def expected_patches(self, images: Any) -> int | None:
        return _num_patches(self, images)

    def grid_of(self, size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the patches of images of (height, width)."""
        return self.patch_embed.dynamic_feat_size(tuple(size))

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
        weighed = self.weighed(x, self.global_pool if pool_type is None else pool_type)
        return super().pool(x, pool_type) if weighed is None else weighed

    def weighed(self, x: Tensor, kind: Any) -> Tensor | None:
        """What the head reads of tokens of which some stand for several; None where each counts the same."""
        if self.vitrim_handle.cls_only and kind not in ("", "token"):
            raise VitrimError(f"cls_only leaves no patch tokens to pool by {kind!r}; attach again without it")
        weighs = self.attn_pool is not None or kind in ("avg", "avgmax", "map")
        trace = trace_at_head(self.vitrim_policy, x) if weighs else None
        if trace is None or trace.size_BN is None:
            return None
        if self.attn_pool is not None:
            bias = trace.bias(x.dtype)
            first = pooled_from(self)
            return self.attn_pool(x[:, first:], attn_mask=None if bias is None else bias[..., first:])
        mean = mean_by_size(x, trace.size_BN, self.num_prefix_tokens, getattr(self, "pool_include_prefix", False))
        if kind == "avg":
            return mean
        first = 0 if getattr(self, "pool_include_prefix", False) else self.num_prefix_tokens
        return 0.5 * (x[:, first:].amax(dim=1) + mean)

    @while_attached
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As timm's; with output_fmt="NCHW" all patches are restored, those that were dropped as they were then."""
        policy, maps = self.vitrim_policy, output_fmt == "NCHW"
        if maps and self.vitrim_handle.cls_only:
            raise VitrimError("cls_only computes no map of patch tokens; attach again without it")
        if maps and left_by_patch_drop(self, 100, _drops_patches(self)) < 100:
            raise VitrimError(
                "patch_drop_rate drops patches in training, so there is no whole map; use output_fmt='NLC' or "
                "model.eval()"
            )
        with self.open_call(x, restorable=maps) as call:
            out = super().forward_intermediates(
                x, indices, return_prefix_tokens, norm, stop_early, "NLC", *args, **kwargs
            )
            final = out.get("image_features") if isinstance(out, dict) else out[0] if isinstance(out, tuple) else None
            if final is not None:
                finish(policy, final, whole=not stop_early)
        trace = call.certain
        if not maps:
            return out
        if trace is None:
            raise VitrimError(CHANGED)
        grid = self.grid_of(x.shape[-2:])
        blocks = sorted(set(feature_take_indices(len(self.blocks), indices)[0]))

        def spread(block: int, tokens: Any) -> Any:
            if isinstance(tokens, tuple):
                return spread(block, tokens[0]), tokens[1]
            whole = trace.left(block).restored(tokens, self.norm if norm else None, num_prefix=0)
            return whole.transpose(1, 2).unflatten(2, grid).contiguous()

        def whole_maps(features: list[Any]) -> list[Any]:
            return [spread(block, tokens) for block, tokens in zip(blocks, features, strict=True)]

        if isinstance(out, dict):
            return {**out, "image_intermediates": whole_maps(out["image_intermediates"])}
        return (out[0], whole_maps(out[1])) if isinstance(out, tuple) else whole_maps(out)


class ReducedPoolingHead(ReducedTimmModel):
    """The same where the head has no method of its own that pools: it averages the patch tokens itself."""

    global_pool: str

    @while_attached
    def forward_head(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.global_pool == "avg":
            if self.vitrim_handle.cls_only:
                raise VitrimError("cls_only leaves no patch tokens to pool by 'avg'; attach again without it")
            trace = trace_at_head(self.vitrim_policy, x)
            if trace is not None and trace.size_BN is not None:
                mean = mean_by_size(x, trace.size_BN, self.num_prefix_tokens, False)
                x = torch.cat([x[:, : self.num_prefix_tokens], mean.unsqueeze(1)], dim=1)  # The mean of one is itself.
        return super().forward_head(x, *args, **kwargs)


def mean_by_size(x_BTC: Tensor, size_BN: Tensor, num_prefix: int = 0, with_prefix: bool = False) -> Tensor:
    """The mean of tokens by their sizes, (B, C)."""
    size = size_BN.to(torch.promote_types(x_BTC.dtype, torch.float32))
    size = F.pad(size, (num_prefix, 0), value=float(with_prefix))
    return (x_BTC * (size / size.sum(1, keepdim=True)).to(x_BTC.dtype).unsqueeze(2)).sum(1)


def _num_patches(model: Any, images: Any) -> int | None:
    """Patch tokens that reach the first block of these images; None where that is not known."""
    embed = model.patch_embed
    if fixed_size(model):
        return left_by_patch_drop(model, embed.num_patches, _drops_patches(model))
    if getattr(images, "ndim", 0) != 4 or not isinstance(embed, PatchEmbed):
        return None
    rows, columns = embed.dynamic_feat_size(tuple(images.shape[-2:]))
    return left_by_patch_drop(model, rows * columns, _drops_patches(model))


def _drops_patches(model: Any) -> bool:
    return getattr(getattr(model, "patch_drop", None), "training", False)


def pooled_from(model: Any) -> int:
    """The first token that attention pooling reads. Models without a choice give it all."""
    return 0 if getattr(model, "pool_include_prefix", True) else model.num_prefix_tokens


def fixed_size(model: Any) -> bool:
    """Whether all images have one size."""
    return model.patch_embed.img_size is not None and not getattr(model, "dynamic_img_size", False)


def left_by_patch_drop(model: Any, num_patches: int, training: bool) -> int:
    """How many of these patch tokens enter the first block."""
    rate = getattr(getattr(model, "patch_drop", None), "prob", 0.0) if training else 0.0
    return num_patches if rate == 0 else max(1, int(num_patches * (1 - rate)))
