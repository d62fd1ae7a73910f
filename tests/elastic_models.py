"""Small models and data that the tests of super-networks share."""

from typing import Any

import pytest
import timm
import torch
from timm.layers import SwiGLU, SwiGLUPacked
from torch import Tensor, nn

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "qk_norm": {"qk_norm": True},
    "no_bias": {"qkv_bias": False, "proj_bias": False},
    "layer_scale": {"init_values": 0.5, "reg_tokens": 2},
    "swiglu": {"mlp_layer": SwiGLU},
    "packed_swiglu": {"mlp_layer": SwiGLUPacked, "scale_mlp_norm": True},
    "headless": {"num_classes": 0},
    "mean_pooled": {"global_pool": "avg", "class_token": False},
}


def small(dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> nn.Module:
    """A ViT of 3 blocks with every weight and bias at random."""
    torch.manual_seed(seed)
    sizes = {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **sizes | options).to(dtype).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def images(number: int = 8, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random images for `small`."""
    return torch.randn(number, 3, 64, 64, generator=torch.Generator().manual_seed(seed), dtype=dtype)


variants = pytest.mark.parametrize("variant", VARIANTS)
