"""Tiny timm ViTs on blocks other than the standard one, and the same networks as the slow reference reads them."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import timm
import torch
from timm.layers import DiffAttention
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor, nn
from torch.nn import functional as F

from references import VIEWS

SMALL = {"img_size": 40, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
"""25 patch tokens, an odd number, in 3 blocks."""


def _plain(block: type[nn.Module], **options: object) -> nn.Module:
    return VisionTransformer(**{**SMALL, "block_fn": block, "init_values": 0.1, **options})


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "differential": lambda: timm.create_model("vit_dwee_patch16_reg1_gap_256", **SMALL),
}
MORE: dict[str, Callable[[], nn.Module]] = {
    "differential_norms": lambda: VisionTransformer(**SMALL, attn_layer="diff", qk_norm=True, scale_attn_norm=True),
    "dual_lambda": lambda: VisionTransformer(**SMALL, attn_layer=partial_of(DiffAttention, dual_lambda=True)),
    "post_norm": lambda: timm.create_model("vit_base_patch16_rpn_224", **{**SMALL, "class_token": True}),
    "parallel": lambda: timm.create_model("vit_base_patch16_xp_224", **SMALL),
    "parallel_bias": lambda: _plain(ParallelScalingBlock, qk_norm=True, reg_tokens=2),
    "parallel_fused": lambda: _plain(partial(ParallelScalingBlock, fuse_out_proj=True), qkv_bias=False),
    "parallel_differential": lambda: timm.create_model("vit_dpwee_patch16_reg1_gap_256", **SMALL),
    "parallel_things": lambda: timm.create_model("vit_small_patch16_18x2_224", **SMALL),
}


def partial_of(layer: type[nn.Module], **options: object) -> type[nn.Module]:
    """The layer with other defaults, as a class that makes objects of the layer itself."""

    def new(cls: type, *args: object, **given: object) -> nn.Module:
        return layer(*args, **{**given, **options})

    return type("Made", (layer,), {"__new__": new})


# As timm, which computes this one number in float32.
def _differ(part: Any, first: Tensor, second: Tensor, value: Tensor) -> Tensor:
    if part.dual_lambda:
        one, two = part.lambda_a.exp(), part.lambda_b.exp()
    else:
        one, two = (
            (q @ k).float().exp() for q, k in ((part.lambda_q1, part.lambda_k1), (part.lambda_q2, part.lambda_k2))
        )
    out = (first - (one - two + part.lambda_init) * second) @ value
    return part.sub_norm(out) * (1 - part.lambda_init)


def _attention(attn: Any) -> SimpleNamespace:
    view = SimpleNamespace(
        qkv=attn.qkv, num_heads=attn.num_heads, head_dim=attn.head_dim, q_norm=attn.q_norm, k_norm=attn.k_norm,
        norm=attn.norm, gate=getattr(attn, "gate", None), proj=attn.proj,
    )  # fmt: skip
    if isinstance(attn, DiffAttention):
        view.num_heads, view.differ = 2 * attn.num_heads, partial(_differ, attn)
    return view


def _parallel(block: Any) -> SimpleNamespace:
    """One layer makes everything: hidden units first, then queries, keys and values."""
    hidden, width = block.in_split[:2]
    weight, bias = block.in_proj.weight, block.in_proj.bias

    def qkv(x: Tensor) -> Tensor:
        return F.linear(x, weight[hidden:], None if bias is None else bias[hidden:])

    def mlp(x: Tensor) -> Tensor:
        units = block.mlp_act(F.linear(x, weight[:hidden], block.mlp_bias if bias is None else bias[:hidden]))
        if block.out_proj is None:
            return block.mlp_out_proj(units)
        return F.linear(units, block.out_proj.weight[:, width:])

    def proj(x: Tensor) -> Tensor:
        if block.out_proj is None:
            return block.attn_out_proj(x)
        return F.linear(x, block.out_proj.weight[:, :width], block.out_proj.bias)

    view = SimpleNamespace(
        qkv=qkv, num_heads=block.num_heads, head_dim=block.head_dim, q_norm=block.q_norm, k_norm=block.k_norm,
        norm=nn.Identity(), gate=None, proj=proj, parallel=mlp,
    )  # fmt: skip
    if isinstance(block, DiffParallelScalingBlock):
        view.num_heads, view.differ = 2 * block.num_heads, partial(_differ, block)
    return view


def _layer(block: Any) -> SimpleNamespace:
    same = nn.Identity()
    if isinstance(block, ParallelScalingBlock | DiffParallelScalingBlock):
        parts = {"norm1": block.in_norm, "norm2": same, "ls1": block.ls, "ls2": same}
        return SimpleNamespace(attn=_parallel(block), mlp=torch.zeros_like, **parts)
    if isinstance(block, ParallelThingsBlock):
        attentions = []
        for part in block.attns:
            view = _attention(part.attn)
            view.proj = nn.Sequential(part.attn.proj, part.ls)
            attentions.append((view, part.norm))
        return SimpleNamespace(
            attentions=attentions, mlp=lambda x: sum(ffn(x) for ffn in block.ffns), norm2=same, ls1=same, ls2=same
        )
    if isinstance(block, ResPostBlock):
        parts = {"norm1": same, "norm2": same, "ls1": block.norm1, "ls2": block.norm2}
    else:
        parts = {"norm1": block.norm1, "norm2": block.norm2, "ls1": block.ls1, "ls2": block.ls2}
    return SimpleNamespace(attn=_attention(block.attn), mlp=block.mlp, **parts)


def in_timm_words(model: Any) -> SimpleNamespace:
    """The model with blocks that consist of attention and MLP, as the reference reads them."""
    return SimpleNamespace(
        patch_embed=model.patch_embed, _pos_embed=model._pos_embed, norm_pre=model.norm_pre,
        num_prefix_tokens=model.num_prefix_tokens, blocks=[_layer(block) for block in model.blocks], norm=model.norm,
        fc_norm=model.fc_norm, head=model.head, attn_pool=None, global_pool=model.global_pool,
        pool_include_prefix=model.pool_include_prefix,
    )  # fmt: skip


VIEWS["timm-vit-blocks"] = in_timm_words
