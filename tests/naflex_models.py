"""Tiny models of timm's `NaFlexVit`, padded batches for them, and what the slow reference reads of them."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import timm
import torch
from timm.models.naflexvit import batch_patchify
from torch import Tensor, nn

from eva_models import in_timm_words as eva_in_timm_words
from references import VIEWS

SMALL = {"img_size": 40, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}


def _named(name: str, **options: object) -> nn.Module:
    return timm.create_model(name, **{**SMALL, **options})


_ROTARY = {"embed_dim": 36, "class_token": True, "global_pool": "token", "pos_embed": "none"}
NAFLEX: dict[str, Callable[[], nn.Module]] = {
    "naflex": lambda: _named("naflexvit_base_patch16_parfac_gap"),
    "naflex_map": lambda: _named("naflexvit_base_patch16_siglip"),
    "naflex_rotary": lambda: _named("naflexvit_base_patch16_map", **_ROTARY, rope_type="dinov3"),
}
MORE: dict[str, Callable[[], nn.Module]] = {
    "naflex_mixed": lambda: _named("naflexvit_base_patch16_map", **_ROTARY, rope_type="mixed"),
    "naflex_learned": lambda: _named("naflexvit_base_patch16_gap"),
    "naflex_sampled": lambda: _named("naflexvit_base_patch16_gap", pos_embed_use_grid_sample=True),
    "naflex_avgmax": lambda: _named("naflexvit_base_patch16_gap", global_pool="avgmax", pool_include_prefix=True),
    "naflex_max": lambda: _named("naflexvit_base_patch16_gap", global_pool="max"),
    "naflex_key_mask": lambda: _named("naflexvit_base_patch16_siglip", use_key_only_attn_mask=True),
    "naflex_gated": lambda: _named("naflexvit_base_patch16_map", **_ROTARY, rope_type="axial", attn_gated=True),
}


def padded(images: Sequence[Tensor], longest: int = 0) -> dict[str, Tensor]:
    """Images (3, H, W) of any sizes as one batch, as timm's collator makes it, with at least `longest` patches."""
    parts = [batch_patchify(image[None], (8, 8)) for image in images]
    longest = max(longest, *(patches.shape[1] for patches, _ in parts))
    batch = {
        "patches": torch.full((len(parts), longest, 192), 7.0, dtype=images[0].dtype),
        "patch_coord": torch.zeros(len(parts), longest, 2, dtype=torch.long),
        "patch_valid": torch.zeros(len(parts), longest, dtype=torch.bool),
    }
    for row, (patches, grid) in enumerate(parts):
        length = patches.shape[1]
        batch["patches"][row, :length] = patches[0]
        batch["patch_coord"][row, :length] = torch.cartesian_prod(*map(torch.arange, grid))
        batch["patch_valid"][row, :length] = True
    return batch


def in_timm_words(model: Any) -> Any:
    """The same network under the names of the parts of timm's `VisionTransformer`, for the slow reference."""
    blocks = model.blocks
    if model.rope is not None:
        own = SimpleNamespace(patch_embed=SimpleNamespace(grid_size=(5, 5)))
        for name in ("rope", "blocks", "norm_pre", "num_prefix_tokens", "norm", "fc_norm", "head", "attn_pool"):
            setattr(own, name, getattr(model, name))
        blocks = eva_in_timm_words(SimpleNamespace(**vars(own), global_pool=model.global_pool)).blocks
    return SimpleNamespace(
        patch_embed=lambda x: x, _pos_embed=lambda x: model.embeds(x)[0], norm_pre=model.norm_pre,
        num_prefix_tokens=model.num_prefix_tokens, blocks=blocks, norm=model.norm, fc_norm=model.fc_norm,
        head=model.head, attn_pool=model.attn_pool, global_pool=model.global_pool,
        pool_include_prefix=model.pool_include_prefix,
    )  # fmt: skip


VIEWS["timm-naflex"] = in_timm_words
