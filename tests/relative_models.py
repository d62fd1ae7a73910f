"""Tiny models with relative positions, and their bias written out for the slow reference: one pair of tokens a time."""

import math
from collections.abc import Callable
from itertools import product
from types import SimpleNamespace
from typing import Any

import timm
import torch
from timm.layers import RelPosMlp
from timm.models.beit import Beit
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos
from torch import Tensor, nn

from references import VIEWS

SMALL = {"img_size": 40, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
"""25 patch tokens, an odd number, in 3 blocks."""


def _beit(**options: object) -> nn.Module:
    return Beit(**{**SMALL, "init_values": 0.1, **options})


def _relpos(**options: object) -> nn.Module:
    return VisionTransformerRelPos(**{**SMALL, "init_values": 0.1, "rel_pos_dim": 8, **options})


BEIT: dict[str, Callable[[], nn.Module]] = {
    "beit": lambda: timm.create_model("beit_base_patch16_224", **SMALL),
}
RELPOS: dict[str, Callable[[], nn.Module]] = {
    "relpos_cls": lambda: timm.create_model("vit_relpos_base_patch16_clsgap_224", **SMALL, global_pool="token"),
}
"""In the zoo: averaged patches with a bias in every block; CLS pooled, with a bias that all blocks share."""
MORE: dict[str, Callable[[], nn.Module]] = {
    "beit_shared": lambda: _beit(use_shared_rel_pos_bias=True, global_pool="token", swiglu_mlp=True),
    "beit_both": lambda: _beit(use_rel_pos_bias=True, use_shared_rel_pos_bias=True, use_abs_pos_emb=False),
    "beit_none": lambda: _beit(qkv_bias=False, init_values=None, scale_mlp=True, use_fc_norm=False),
    "relpos_table": lambda: _relpos(rel_pos_type="bias", class_token=True),
    "relpos_shared": lambda: _relpos(rel_pos_type="mlp", shared_rel_pos=True, fc_norm=True),
    "relpos_swin": lambda: _relpos(rel_pos_type="mlp_swin", qk_norm=True),
    "relpos_post_norm": lambda: timm.create_model("vit_relpos_base_patch32_plus_rpn_256", **SMALL),
}


def _of_mlp(maker: RelPosMlp, grid: tuple[int, int]) -> dict[tuple[int, int], Tensor]:
    """What a small network on the logarithms of both offsets gives the heads, for every pair of offsets."""

    def scaled(offset: int, size: int) -> float:
        if maker.mode == "swin":
            return math.copysign(math.log2(1 + abs(8 * offset / (size - 1))) / 3, offset)
        return math.copysign(math.log(1 + abs(offset)), offset)

    pairs = list(product(range(1 - grid[0], grid[0]), range(1 - grid[1], grid[1])))
    rows = torch.tensor([[scaled(down, grid[0]), scaled(right, grid[1])] for down, right in pairs])
    out = maker.mlp(rows.to(maker.mlp.fc1.weight.dtype))
    return dict(zip(pairs, 16 * out.sigmoid() if maker.mode == "swin" else out, strict=True))


class _Bias:
    """The bias of one block, for one pair of tokens at a time."""

    def __init__(self, maker: Any, grid: tuple[int, int]) -> None:
        self.maker, self.grid = maker, grid
        self.of_mlp = _of_mlp(maker, grid) if isinstance(maker, RelPosMlp) else None

    def __call__(self, query: int | None, key: int | None) -> Tensor:
        """Of all heads, for a query and a key at these places; None: a prefix token."""
        rows, columns = self.grid
        if query is None or key is None:
            if self.of_mlp is not None:
                return torch.zeros(self.maker.num_heads)
            # The last rows of a table: CLS to a patch, a patch to CLS, CLS to itself.
            return self.maker.relative_position_bias_table[-1 if query is key else -3 if query is None else -2]
        down, right = query // columns - key // columns, query % columns - key % columns
        if self.of_mlp is not None:
            return self.of_mlp[down, right]
        return self.maker.relative_position_bias_table[(down + rows - 1) * (2 * columns - 1) + right + columns - 1]


def in_timm_words(model: Any) -> SimpleNamespace:
    """The model under the names of timm's `VisionTransformer`, which the reference reads."""
    grid, beit = model.patch_embed.grid_size, isinstance(model, Beit)
    same = nn.Identity()

    def makers(attn: Any) -> list[Any]:
        if not beit:
            return [maker for maker in (attn.rel_pos or model.shared_rel_pos,) if maker is not None]
        own = None if attn.relative_position_bias_table is None else attn
        return [maker for maker in (own, model.rel_pos_bias) if maker is not None]

    def heads(attn: Any) -> Any:
        def qkv(x: Tensor) -> Tensor:
            if getattr(attn, "q_bias", None) is None:
                return attn.qkv(x)
            return attn.qkv(x) + torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])

        view = SimpleNamespace(
            qkv=qkv, num_heads=attn.num_heads, head_dim=attn.proj.in_features // attn.num_heads,
            q_norm=getattr(attn, "q_norm", same), k_norm=getattr(attn, "k_norm", same), norm=same, gate=None,
            proj=attn.proj,
        )  # fmt: skip
        biases = [_Bias(maker, grid) for maker in makers(attn)]
        if biases:
            view.relative = lambda query, key: sum(bias(query, key) for bias in biases)
        return view

    def layer(block: Any) -> SimpleNamespace:
        if isinstance(block, ResPostRelPosBlock):
            parts = {"norm1": same, "norm2": same, "ls1": block.norm1, "ls2": block.norm2}
        elif beit:
            scales = [(lambda x, g=g: x if g is None else g * x) for g in (block.gamma_1, block.gamma_2)]
            parts = {"norm1": block.norm1, "norm2": block.norm2, "ls1": scales[0], "ls2": scales[1]}
        else:
            parts = {"norm1": block.norm1, "norm2": block.norm2, "ls1": block.ls1, "ls2": block.ls2}
        return SimpleNamespace(attn=heads(block.attn), mlp=block.mlp, **parts)

    def embedded(x: Tensor) -> Tensor:
        if model.cls_token is not None:
            x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], dim=1)
        positions = getattr(model, "pos_embed", None)
        return x if positions is None else x + positions

    return SimpleNamespace(
        patch_embed=model.patch_embed, _pos_embed=embedded, norm_pre=same, num_prefix_tokens=model.num_prefix_tokens,
        blocks=[layer(block) for block in model.blocks], norm=model.norm, fc_norm=model.fc_norm, head=model.head,
        attn_pool=None, global_pool=model.global_pool, pool_include_prefix=False,
    )  # fmt: skip


VIEWS["timm-beit"] = VIEWS["timm-relpos"] = in_timm_words
