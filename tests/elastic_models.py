"""Small models and data that the tests of super-networks share."""

from functools import cache
from typing import Any

import pytest
import timm
import torch
from sklearn.datasets import load_digits
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


def digits() -> tuple[Tensor, Tensor]:
    """Images (1,797, 3, 8, 8) of handwritten digits, scaled to mean 0 and standard deviation 1, and their classes."""
    found = load_digits()
    x = torch.tensor(found.images, dtype=torch.float32)
    x = ((x - x.mean()) / x.std())[:, None].expand(-1, 3, -1, -1)
    return x.contiguous(), torch.tensor(found.target)


@cache
def trained(init_values: float | None = None) -> nn.Module:
    """A ViT that has learnt the first 1,400 digits, with strong decay, so that it has little width to spare."""
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 4, "depth": 3, "embed_dim": 32, "num_heads": 2, "num_classes": 10}
    model = timm.create_model("vit_tiny_patch16_224", **sizes, mlp_ratio=2, init_values=init_values)
    x, y = digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=1.0)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=300)
    for step in range(300):
        rows = torch.randint(1400, (128,), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return model.eval()
