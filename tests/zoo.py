"""One tiny instance of every kind of model that an adapter claims to cover, with weights that leave no part idle."""

from collections.abc import Callable

import timm
import torch
from timm.layers import GluMlp, HybridEmbed, SwiGLU
from timm.layers.attention import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import toy_family  # noqa: F401  (enters its family)
from block_models import BLOCKS
from eva_models import EVA
from hf_models import HF
from naflex_models import NAFLEX
from relative_models import BEIT, RELPOS
from tower_models import DEEPSEEK, GEMMA4, QWEN3
from vitrim.models import BlockWidths, adapter_of, build_model, set_widths

SMALL = {"img_size": 40, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
"""25 patch tokens, an odd number, in 3 blocks."""


def _named(name: str, **options: object) -> nn.Module:
    return timm.create_model(name, **{**SMALL, **options})


def _plain(**options: object) -> nn.Module:
    return VisionTransformer(**{**SMALL, **options})


class _GatedAttention(Attention):
    """timm's attention with its output gate on, under the class that the adapter expects."""

    def __new__(cls, *args: object, **options: object) -> Attention:
        return Attention(*args, **{**options, "gated": True})


class _ConvStem(nn.Module):
    """Four times smaller maps of eight channels."""

    def __init__(self) -> None:
        super().__init__()
        self.num_features = 8
        self.conv = nn.Conv2d(3, 8, 3, stride=4, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv(image).relu()


def _narrowed(*widths: tuple[int, int]) -> nn.Module:
    """A network as it is cut out of a super-network: dims per head and hidden units of every block."""
    model = _plain()
    set_widths(model, [BlockWidths(*pair) for pair in widths])
    return model


def _hybrid_embed(img_size: int, patch_size: int, embed_dim: int, **options: object) -> nn.Module:
    return HybridEmbed(_ConvStem(), img_size=img_size, patch_size=2, feature_size=(10, 10), embed_dim=embed_dim)


TIMM: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: _named("vit_tiny_patch16_224"),
    "deit": lambda: _named("deit_tiny_patch16_224"),
    "deit_distilled": lambda: VisionTransformerDistilled(**SMALL),
    "deit3": lambda: _named("deit3_small_patch16_224"),
    "dinov2": lambda: _named("vit_small_patch14_dinov2"),
    "dinov2_registers": lambda: _named("vit_small_patch14_reg4_dinov2"),
    "clip": lambda: _named("vit_base_patch32_clip_quickgelu_224"),
    "siglip": lambda: _named("vit_base_patch16_siglip_224"),
    "gap": lambda: _plain(global_pool="avg", class_token=False),
    "gap_with_cls": lambda: _plain(global_pool="avg", reg_tokens=1),
    "gap_including_prefix": lambda: _plain(global_pool="avg", pool_include_prefix=True, fc_norm=False),
    "avgmax": lambda: _plain(global_pool="avgmax", fc_norm=True),
    "qk_norm": lambda: _plain(qk_norm=True, scale_attn_norm=True, qkv_bias=False),
    "gated": lambda: _plain(attn_layer=_GatedAttention),
    "swiglu": lambda: _plain(mlp_layer=SwiGLU, init_values=0.1),
    "glu": lambda: _plain(mlp_layer=GluMlp),
    "hybrid": lambda: _plain(embed_layer=_hybrid_embed),
    "dynamic_size": lambda: _plain(dynamic_img_size=True),
    "uneven": lambda: _narrowed((3, 17), (8, 40), (5, 96)),
    "removed": lambda: _narrowed((5, 0), (0, 40), (8, 96)),
}


def _toy(*widths: tuple[int, int]) -> nn.Module:
    model = build_model("toy_vit", img_size=40, in_chans=3, width=24, patch=8, num_classes=5)
    if widths:
        set_widths(model, [BlockWidths(*pair) for pair in widths])
    return model


TOY: dict[str, Callable[[], nn.Module]] = {
    "toy": _toy,
    "toy_removed": lambda: _toy((5, 0), (0, 40), (8, 48)),
}
ZOO: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "timm-vit": TIMM,
    "timm-vit-blocks": BLOCKS,
    "timm-eva": EVA,
    "timm-beit": BEIT,
    "timm-relpos": RELPOS,
    "timm-naflex": NAFLEX,
    "timm-qwen3": QWEN3,
    "timm-deepseek": DEEPSEEK,
    "timm-gemma4": GEMMA4,
    "transformers": HF,
    "toy": TOY,
}
"""Adapter name -> models. An adapter without an entry fails the contract suite."""


def build(adapter: str, name: str) -> nn.Module:
    """The model in evaluation mode, every parameter redrawn so that none is zero, one or alike."""
    return redrawn(ZOO[adapter][name]())


def redrawn(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, every parameter redrawn so that none is zero, one or alike."""
    model = model.eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            last = parameter.shape[-1] if parameter.ndim else 1
            fan_in = parameter[0].numel() if parameter.ndim > 1 and parameter.shape[0] > 1 else last
            # Matrices keep the scale of their input; vectors (norms, biases, layer scale) are far from 0 and from 1.
            parameter.copy_(draw / fan_in**0.5 if parameter.ndim > 1 else 0.6 + 0.3 * draw)
    return model


def images(count: int = 3, size: int = 40, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random images (count, 3, size, size)."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def predicted(model: nn.Module, x: Tensor) -> Tensor:
    """What the model gives for images, whatever it is wrapped in."""
    return adapter_of(model).predict(model, x)


MODELS = [(adapter, name) for adapter, models in ZOO.items() for name in models]
