"""Tiny vision towers of timm that return grids, and what the slow reference reads of them."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import timm
from timm.layers import RmsNorm, RmsNormFp32
from torch import Tensor, nn

from eva_models import blocks_in_timm_words
from references import VIEWS

SMALL = {"img_size": 40, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 4.0}
"""25 patch tokens, an odd number, in 3 blocks."""
_ALL = {"merge_size": 5, "out_features": 10}
"""A projector that takes the whole grid of 5 x 5 patches as one token."""


def _named(name: str, **options: object) -> nn.Module:
    return timm.create_model(name, **{**SMALL, **options})


def in_double(model: nn.Module) -> nn.Module:
    """The model with norms that keep the precision of their input; DeepSeek's compute in float32 whatever they get."""
    for name, norm in list(model.named_modules()):
        if isinstance(norm, RmsNormFp32):
            precise = RmsNorm(norm.normalized_shape[0], norm.eps, norm.elementwise_affine)
            precise.load_state_dict(norm.state_dict())
            model.set_submodule(name, precise)
    return model


QWEN3: dict[str, Callable[[], nn.Module]] = {
    "qwen3": lambda: _named("qwen3_vit_88m", num_classes=5),
}
"""In the zoo: a classifier, pooled from the tokens that are left."""
DEEPSEEK: dict[str, Callable[[], nn.Module]] = {
    "deepseek_enc": lambda: in_double(_named("deepseek_vit_412m_enc", out_features=10)),
}
"""In the zoo: an encoder with its projector, which pads the grid to 6 x 6."""
MORE: dict[str, Callable[[], nn.Module]] = {
    "qwen3_merge": lambda: _named("qwen3_vit_88m_merge", **_ALL, num_classes=5),
    "qwen3_enc": lambda: _named("qwen3_vit_88m_enc", **_ALL),
    "qwen3_avg": lambda: _named("qwen3_vit_88m_enc", global_pool="avg"),
    "qwen3_grid": lambda: _named("qwen3_vit_88m_enc", global_pool=""),
    "qwen3_every_patch": lambda: _named("qwen3_vit_88m", num_classes=5, global_pool=""),
    "deepseek": lambda: in_double(_named("deepseek_vit_412m", num_classes=5)),
    "deepseek_align": lambda: in_double(_named("deepseek_vit_412m_align", num_classes=5, out_features=10)),
    "deepseek_avg": lambda: in_double(_named("deepseek_vit_412m_enc", global_pool="avg")),
    "deepseek_pads": lambda: _named("deepseek_vit_412m", num_classes=5, img_size=(36, 38), dynamic_img_pad=True),
}


def in_timm_words(model: Any) -> Any:
    """The same network under the names of the parts of timm's `VisionTransformer`, for the slow reference."""
    tower = getattr(model, "encoder", model)
    projector = getattr(tower, "merger", None) or getattr(tower, "aligner", None)
    averages = projector is None and model.global_pool == "avg"

    def of_grid(rows_1NC: Tensor) -> Tensor:
        out = rows_1NC.unflatten(1, (5, 5))
        out = out if projector is None else projector(out)
        if tower is model:  # Channels first, as the port has maps.
            return out.movedim(-1, 1)
        out = out.flatten(1, -2)
        return model.head(model.norm(out.mean(1) if model.global_pool == "avg" else out)).movedim(-1, 1)

    return SimpleNamespace(
        patch_embed=tower.patch_embed, _pos_embed=lambda x: tower._pos_embed(x)[0], norm_pre=nn.Identity(),
        num_prefix_tokens=0, blocks=blocks_in_timm_words(tower.blocks, tower.rope.get_embed(shape=(5, 5)).double()),
        norm=getattr(tower, "norm", nn.Identity()), fc_norm=nn.Identity() if tower is model else model.norm,
        head=of_grid if not averages else nn.Identity() if tower is model else model.head, attn_pool=None,
        global_pool="avg" if averages else "grid", pool_include_prefix=False,
    )  # fmt: skip


VIEWS["timm-qwen3"] = VIEWS["timm-deepseek"] = in_timm_words
