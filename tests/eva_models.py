"""Tiny models of timm's `Eva` family, and the same networks under the names that the slow reference reads."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import timm
import torch
from timm.models.eva import Eva, EvaBlockPostNorm
from torch import Tensor, nn

from references import VIEWS
from vitrim.models import BlockWidths, RemovedBranch, set_widths, widths_of
from vitrim.models.widths.elastic_pairs import query_dim, value_dim

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
    "narrow_values": lambda: narrowed(_named("eva02_tiny_patch14_224", **_WIDE), 40),
}
"""In the zoo: CLS pooled, four registers, half rotation; pooled by attention, interleaved rotation; heads cut."""
MORE: dict[str, Callable[[], nn.Module]] = {
    "eva": lambda: _named("eva_giant_patch14_224"),
    "eva02": lambda: _named("eva02_tiny_patch14_224", **_WIDE),
    "eva02_norms": lambda: _named("eva02_base_patch14_224", **_WIDE),
    "post_norm": lambda: _named("eva02_enormous_patch14_clip_224"),
    "post_norm_rotary": lambda: _plain(**_WIDE, use_post_norm=True, use_rot_pos_emb=True, swiglu_mlp=True),
    "mixed": lambda: _named("vit_small_patch16_rope_mixed_224", **_WIDE),
    "mixed_ape": lambda: _named("vit_small_patch16_rope_mixed_ape_224", **_WIDE),
    "rope_registers": lambda: _named("vit_medium_patch16_rope_reg1_gap_256", **_WIDE),
    "grouped_plain": lambda: _named(
        "vit_base_patch16_sapiens2", embed_dim=48, num_heads=4, num_kv_heads=2, qk_norm=False
    ),
    "grouped": lambda: _named("vit_base_patch16_sapiens2", embed_dim=48, num_heads=4, num_kv_heads=(2, 1, 4)),
    "gated": lambda: _gated(_named("vit_pe_core_tiny_patch16_384", **_WIDE, attn_pool_num_heads=3)),
    "mrope": lambda: _plain(**_WIDE, use_rot_pos_emb=True, rope_type="mrope", rope_mrope_section=(2, 2, 2)),
    "qkv_bias_separate": lambda: _separate(_named("vit_small_patch16_dinov3", **_WIDE, qkv_bias=True)),
    "qk_norm": lambda: _plain(**_WIDE, use_rot_pos_emb=True, qk_norm=True, attn_type="rope", qkv_fused=False),
    "no_prefix": lambda: _plain(**_WIDE, class_token=False, use_rot_pos_emb=True, scale_attn_inner=True),
}


def narrowed(model: Any, hidden: int) -> nn.Module:
    """As it is cut out of a super-network: dims of values, rotary pairs of each head's own, both, and hidden units."""
    (full, *_) = widths_of(model)
    some, fewer = BlockWidths(12, hidden, 5, 8), BlockWidths(12, 17, 3, 4)
    set_widths(model, [some, BlockWidths(12, full.hidden, 7), fewer])
    for module in model.modules():
        if (kept := getattr(module, "kept_pairs", None)) is not None:
            dice = torch.Generator().manual_seed(kept.numel())
            kept.copy_(torch.stack([torch.randperm(6, generator=dice)[: kept.shape[1]] for _ in kept]))
    return model


def _separate(model: Any) -> nn.Module:
    for block in model.blocks:
        block.attn.qkv_bias_separate = True
    return model


def _gated(model: Any) -> nn.Module:
    for block in model.blocks:
        block.attn.gate = nn.Linear(36, 36)
    return model


def turned(table_NE: Tensor, half: bool, place: int, row_D: Tensor, kept: list[int] | None = None) -> Tensor:
    """Pairs of channels as complex numbers, each times that of the unit circle in the table (sines, then cosines).

    The row has the pairs `kept` of those in the table, or all.
    """
    sin, cos = table_NE[place].chunk(2)
    number = len(row_D) // 2
    kept = list(range(number)) if kept is None else kept
    out = row_D.clone()
    for i, pair in enumerate(kept):
        real, imaginary = (i, i + number) if half else (2 * i, 2 * i + 1)
        column = pair if half else 2 * pair
        turned = torch.complex(row_D[real], row_D[imaginary]) * torch.complex(cos[column], sin[column])
        out[real], out[imaginary] = turned.real, turned.imag
    return out


def kept_by_head(attn: Any, heads: int) -> list[list[int] | None]:
    """The rotary pairs that each head of an attention layer kept; None for all."""
    kept = getattr(attn, "kept_pairs", None)
    if kept is None:
        return [None] * heads
    return kept.repeat_interleave(heads // len(kept), 0).tolist()


def in_timm_words(model: Any) -> Any:
    """The same network under the names of the parts of timm's `VisionTransformer`, for the slow reference."""
    table = None
    if model.rope is not None:
        table = model.rope.get_embed(shape=model.patch_embed.grid_size).double()
    return SimpleNamespace(
        patch_embed=model.patch_embed, _pos_embed=lambda x: model._pos_embed(x)[0], norm_pre=model.norm_pre,
        num_prefix_tokens=model.num_prefix_tokens, blocks=blocks_in_timm_words(model.blocks, table),
        norm=model.norm, fc_norm=model.fc_norm, head=model.head, attn_pool=model.attn_pool,
        global_pool=model.global_pool, pool_include_prefix=model.attn_pool is not None,
    )  # fmt: skip


def blocks_in_timm_words(blocks: Any, table: Tensor | None) -> list[Any]:
    """Blocks under the names of the parts of timm's `Block`; `table` (sines, then cosines) rotates their heads."""

    def qkv(attn: Any, x: Tensor) -> Tensor:
        if attn.qkv is None:
            parts = (attn.q_proj, query_dim(attn)), (attn.k_proj, query_dim(attn)), (attn.v_proj, value_dim(attn))
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
            k_norm=attn.k_norm, norm=attn.norm, gate=attn.gate, proj=attn.proj, query_dim=query_dim(attn),
        )  # fmt: skip
        if table is not None:
            own = table[index] if table.ndim == 4 else table.expand(attn.num_heads, *table.shape)
            kept = kept_by_head(attn, attn.num_heads)
            view.turned = lambda head, place, row: turned(own[head], attn.rotate_half, place, row, kept[head])
        return view

    def layer(block: Any, index: int) -> Any:
        same = nn.Identity()
        if isinstance(block, EvaBlockPostNorm):
            norms = {"norm1": same, "norm2": same, "ls1": block.norm1, "ls2": block.norm2}
        else:
            gammas = [getattr(block, name, None) for name in ("gamma_1", "gamma_2")]
            scales = [(lambda x, g=g: x if g is None else g * x) for g in gammas]
            norms = {"norm1": block.norm1, "norm2": block.norm2, "ls1": scales[0], "ls2": scales[1]}
        return SimpleNamespace(attn=heads(block.attn, index), mlp=block.mlp, **norms)

    return [layer(block, index) for index, block in enumerate(blocks)]


VIEWS["timm-eva"] = in_timm_words
