"""Tiny models of timm's `Eva` family, and the same networks under the names that the slow reference reads."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import timm
import torch
from timm.models.eva import Eva, EvaBlockPostNorm
from torch import Tensor, nn

from references import VIEWS
from vitrim.models import BlockWidths, RemovedBranch, set_widths
from vitrim.models.elastic_values import value_dim

SMALL = {"img_size": 40, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
"""25 patch tokens, an odd number, in 3 blocks."""
_WIDE = {"embed_dim": 36}
"""Some tables need dims per head that are multiples of 4."""


def _named(name: str, **options: object) -> nn.Module:
    return timm.create_model(name, **{**SMALL, **options})


def _plain(**options: object) -> nn.Module:
    return Eva(**{**SMALL, **options})


EVA: dict[str, Callable[[], nn.Module]] = {
    "dinov3": lambda: _named("vit_small_patch16_dinov3", **_WIDE, global_pool="token"),
    "perception": lambda: _named("vit_pe_core_tiny_patch16_384", **_WIDE, attn_pool_num_heads=3),
    "narrow_values": lambda: _narrowed(_named("eva02_tiny_patch14_224", **_WIDE)),
}
"""In the zoo: CLS pooled, four registers, half rotation; pooled by attention, interleaved rotation; values cut."""
MORE: dict[str, Callable[[], nn.Module]] = {
    "eva": lambda: _named("eva_giant_patch14_224"),
    "eva02": lambda: _named("eva02_tiny_patch14_224", **_WIDE),
    "eva02_norms": lambda: _named("eva02_base_patch14_224", **_WIDE),
    "post_norm": lambda: _named("eva02_enormous_patch14_clip_224"),
    "post_norm_rotary": lambda: _plain(**_WIDE, use_post_norm=True, use_rot_pos_emb=True, swiglu_mlp=True),
    "mixed": lambda: _named("vit_small_patch16_rope_mixed_224", **_WIDE),
    "mixed_ape": lambda: _named("vit_small_patch16_rope_mixed_ape_224", **_WIDE),
    "rope_registers": lambda: _named("vit_medium_patch16_rope_reg1_gap_256", **_WIDE),
    "grouped": lambda: _named("vit_base_patch16_sapiens2", embed_dim=48, num_heads=4, num_kv_heads=(2, 1, 4)),
    "gated": lambda: _gated(_named("vit_pe_core_tiny_patch16_384", **_WIDE, attn_pool_num_heads=3)),
    "mrope": lambda: _plain(**_WIDE, use_rot_pos_emb=True, rope_type="mrope", rope_mrope_section=(2, 2, 2)),
    "qkv_bias_separate": lambda: _separate(_named("vit_small_patch16_dinov3", **_WIDE, qkv_bias=True)),
    "qk_norm": lambda: _plain(**_WIDE, use_rot_pos_emb=True, qk_norm=True, attn_type="rope", qkv_fused=False),
    "no_prefix": lambda: _plain(**_WIDE, class_token=False, use_rot_pos_emb=True, scale_attn_inner=True),
}


def _narrowed(model: nn.Module) -> nn.Module:
    """As it is cut out of a super-network."""
    set_widths(model, [BlockWidths(12, 40, 5), BlockWidths(12, 96), BlockWidths(12, 17, 3)])
    return model


def _separate(model: Any) -> nn.Module:
    for block in model.blocks:
        block.attn.qkv_bias_separate = True
    return model


def _gated(model: Any) -> nn.Module:
    for block in model.blocks:
        block.attn.gate = nn.Linear(36, 36)
    return model


def turned(table_NE: Tensor, half: bool, place: int, row_D: Tensor) -> Tensor:
    """Pairs of channels as complex numbers, each times that of the unit circle in the table (sines, then cosines)."""
    sin, cos = table_NE[place].chunk(2)
    dim = len(row_D)
    pairs = [(i, i + dim // 2) for i in range(dim // 2)] if half else [(i, i + 1) for i in range(0, dim, 2)]
    out = row_D.clone()
    for real, imaginary in pairs:
        turned = torch.complex(row_D[real], row_D[imaginary]) * torch.complex(cos[real], sin[real])
        out[real], out[imaginary] = turned.real, turned.imag
    return out


def in_timm_words(model: Any) -> Any:
    """The same network under the names of the parts of timm's `VisionTransformer`, for the slow reference."""
    table = None
    if model.rope is not None:
        table = model.rope.get_embed(shape=model.patch_embed.grid_size).double()

    def qkv(attn: Any, x: Tensor) -> Tensor:
        if attn.qkv is None:
            parts = (attn.q_proj, attn.head_dim), (attn.k_proj, attn.head_dim), (attn.v_proj, value_dim(attn))
            heads = [part(x).unflatten(-1, (-1, dim)) for part, dim in parts]
            whole = [one.repeat_interleave(attn.num_heads // one.shape[-2], -2).flatten(-2) for one in heads]
            return torch.cat(whole, -1)
        bias = getattr(attn, "q_bias", None)
        return attn.qkv(x) if bias is None else attn.qkv(x) + torch.cat([bias, torch.zeros_like(bias), attn.v_bias])

    def heads(attn: Any, index: int) -> Any:
        if isinstance(attn, RemovedBranch):
            return attn
        view = SimpleNamespace(
            qkv=lambda x: qkv(attn, x), num_heads=attn.num_heads, head_dim=attn.head_dim, q_norm=attn.q_norm,
            k_norm=attn.k_norm, norm=attn.norm, gate=attn.gate, proj=attn.proj,
        )  # fmt: skip
        if table is not None:
            own = table[index] if table.ndim == 4 else table.expand(attn.num_heads, *table.shape)
            view.turned = lambda head, place, row: turned(own[head], attn.rotate_half, place, row)
        return view

    def layer(block: Any, index: int) -> Any:
        same = nn.Identity()
        if isinstance(block, EvaBlockPostNorm):
            norms = {"norm1": same, "norm2": same, "ls1": block.norm1, "ls2": block.norm2}
        else:
            scales = [(lambda x, g=g: x if g is None else g * x) for g in (block.gamma_1, block.gamma_2)]
            norms = {"norm1": block.norm1, "norm2": block.norm2, "ls1": scales[0], "ls2": scales[1]}
        return SimpleNamespace(attn=heads(block.attn, index), mlp=block.mlp, **norms)

    return SimpleNamespace(
        patch_embed=model.patch_embed, _pos_embed=lambda x: model._pos_embed(x)[0], norm_pre=model.norm_pre,
        num_prefix_tokens=model.num_prefix_tokens, blocks=[layer(b, i) for i, b in enumerate(model.blocks)],
        norm=model.norm, fc_norm=model.fc_norm, head=model.head, attn_pool=model.attn_pool,
        global_pool=model.global_pool, pool_include_prefix=model.attn_pool is not None,
    )  # fmt: skip


VIEWS["timm-eva"] = in_timm_words
