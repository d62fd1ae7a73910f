"""Tiny vision towers of timm that return grids, and what the slow reference reads of them."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import timm
import torch
from timm.layers import RmsNorm, RmsNormFp32
from timm.models.gemma4_vit import Gemma4VitEncoder
from torch import Tensor, nn

from eva_models import blocks_in_timm_words
from references import VIEWS

SMALL = {"img_size": 40, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 4.0}
"""25 patch tokens, an odd number, in 3 blocks."""
_ALL = {"merge_size": 5, "out_features": 10}
"""A projector that takes the whole grid of 5 x 5 patches as one token."""


def _named(name: str, **options: object) -> nn.Module:
    return timm.create_model(name, **{**SMALL, **options})


def _gemma(name: str, **options: object) -> nn.Module:
    sizes = {name: size for name, size in SMALL.items() if name != "mlp_ratio"}
    own = {"head_dim": 12, "num_kv_heads": 1, "intermediate_size": 64, "position_embedding_size": 12}
    model: Any = timm.create_model(name, **{**sizes, **own, "pooling_kernel_size": 5, **options})
    for number, (key, buffer) in enumerate(sorted(model.named_buffers())):
        kind = key.rpartition(".")[2]
        if kind in ("input_min", "output_min", "input_max", "output_max"):
            buffer.fill_((1.5 + 0.01 * number) * (-1 if kind.endswith("min") else 1))
        elif kind.startswith("std_"):
            buffer.copy_(torch.linspace(0.5, 1.5, len(buffer)))
    return model


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
GEMMA4: dict[str, Callable[[], nn.Module]] = {
    "gemma4": lambda: _gemma("gemma4_vit_167m", num_classes=5),
}
"""In the zoo: a classifier, with clamped layers and two heads that share keys and values."""
MORE: dict[str, Callable[[], nn.Module]] = {
    "qwen3_merge": lambda: _named("qwen3_vit_88m_merge", **_ALL, num_classes=5),
    "qwen3_enc": lambda: _named("qwen3_vit_88m_enc", **_ALL),
    "qwen3_avg": lambda: _named("qwen3_vit_88m_enc", global_pool="avg"),
    "qwen3_grid": lambda: _named("qwen3_vit_88m_enc", global_pool=""),
    "qwen3_every_patch": lambda: _named("qwen3_vit_88m", num_classes=5, global_pool=""),
    "gemma4_soft": lambda: _gemma("gemma4_vit_570m", num_classes=5, encoder_pool="soft"),
    "gemma4_enc": lambda: _gemma("gemma4_vit_570m_enc"),
    "gemma4_avg": lambda: _gemma("gemma4_vit_167m_enc", global_pool="avg"),
    "gemma4_all": lambda: _gemma("gemma4_vit_167m_enc", global_pool=""),
    "deepseek": lambda: in_double(_named("deepseek_vit_412m", num_classes=5)),
    "deepseek_align": lambda: in_double(_named("deepseek_vit_412m_align", num_classes=5, out_features=10)),
    "deepseek_avg": lambda: in_double(_named("deepseek_vit_412m_enc", global_pool="avg")),
    "deepseek_pads": lambda: _named("deepseek_vit_412m", num_classes=5, img_size=(36, 38), dynamic_img_pad=True),
}


def in_timm_words(model: Any) -> Any:
    """The same network under the names of the parts of timm's `VisionTransformer`, for the slow reference."""
    tower = getattr(model, "encoder", model)
    if isinstance(tower, Gemma4VitEncoder):
        return _gemma_in_timm_words(model, tower)
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


def _gemma_in_timm_words(model: Any, tower: Any) -> Any:
    soft = tower.global_pool == "soft"
    averages = not soft and model.global_pool == "avg"

    def turned(head: int, place: int, row_D: Tensor) -> Tensor:
        """Each half of a row by its own coordinate: columns first, then rows."""
        halves = []
        for half, at in zip(row_D.chunk(2), (place % 5, place // 5), strict=True):
            real, imaginary = half.chunk(2)
            angle = at * tower.rotary_emb.inv_freq.float()  # As timm has it, whatever the precision of the model.
            out = torch.complex(real, imaginary) * torch.complex(angle.cos().to(row_D), angle.sin().to(row_D))
            halves += [out.real, out.imag]
        return torch.cat(halves)

    def layer(block: Any) -> Any:
        attn = block.attn

        def qkv(x: Tensor) -> Tensor:
            streams = []
            for part, norm in ((attn.q_proj, None), (attn.k_proj, None), (attn.v_proj, attn.v_norm)):
                heads = part(x).unflatten(-1, (-1, attn.head_dim))
                heads = heads if norm is None else norm(heads)
                streams.append(heads.repeat_interleave(attn.num_heads // heads.shape[-2], -2).flatten(-2))
            return torch.cat(streams, -1)

        view = SimpleNamespace(
            qkv=qkv, num_heads=attn.num_heads, head_dim=1, query_dim=attn.head_dim, q_norm=attn.q_norm,
            k_norm=attn.k_norm, norm=nn.Identity(), gate=None, proj=attn.o_proj, turned=turned,
        )  # fmt: skip
        return SimpleNamespace(
            attn=view, norm1=block.norm1, ls1=block.norm2, norm2=block.norm3, mlp=block.mlp, ls2=block.norm4
        )

    def of_all(rows_1NC: Tensor) -> Tensor:
        out = rows_1NC
        if soft:  # One cell of all 5 x 5 patches, averaged in float32.
            out, _ = tower.pooler(rows_1NC, torch.tensor([[[place % 5, place // 5] for place in range(25)]]), None)
            out = out if tower.std_bias is None else (out - tower.std_bias) * tower.std_scale
        if tower is model:
            return out.movedim(-1, 1)
        return model.head(model.norm(out.mean(1)))

    return SimpleNamespace(
        patch_embed=lambda x: x, _pos_embed=lambda x: tower.patch_embed(x)[0], norm_pre=nn.Identity(),
        num_prefix_tokens=0, blocks=[layer(block) for block in tower.blocks], norm=nn.Identity(),
        fc_norm=nn.Identity() if tower is model else model.norm, attn_pool=None, pool_include_prefix=False,
        head=of_all if not averages else nn.Identity() if tower is model else model.head,
        global_pool="avg" if averages else "grid",
    )  # fmt: skip


VIEWS["timm-gemma4"] = in_timm_words
VIEWS["timm-qwen3"] = VIEWS["timm-deepseek"] = in_timm_words
