"""DINOv2 of Hugging Face transformers, with and without registers."""

from dataclasses import replace
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from ...errors import VitrimError
from .hf.backbone import enter_backbone
from .hf.layout import IMAGENET, Layout, Whole, enter, first_token, mean_of_patches, pair


def _cls_and_mean(tower: Any, tokens_BTC: Tensor, num_prefix: int, size_BN: Tensor | None) -> Tensor:
    """CLS, followed by the mean over patches."""
    return torch.cat([tokens_BTC[:, 0], mean_of_patches(tower, tokens_BTC, num_prefix, size_BN)], dim=1)


def _sized(patch: Any, size: Any) -> dict[str, Any]:
    """What the configuration calls images of this size; transformers reads the positions as a square grid."""
    (height, width), (rows, columns) = pair(size), pair(patch)
    count = (height // rows) * (width // columns)
    if isqrt(count) ** 2 != count:
        raise VitrimError(
            f"the positions of DINOv2 make a square, not {height} x {width} px; give position_size=SIDE as well "
            "as img_size"
        )
    return {"image_size": size}


DINOV2 = Layout(
    package="dinov2",
    prefix="Dinov2",
    tower="Dinov2Model",
    wholes={"Dinov2ForImageClassification": Whole("dinov2", _cls_and_mean, "tokens")},
    pool=first_token,
    layers="encoder.layer",
    mlps={"MLP": "MLP", "SwiGLUFFN": "SwiGLUFFN"},
    norms=("norm1", "norm2"),
    after=(("layer_scale1", "drop_path"), ("layer_scale2", "drop_path")),
    any_size=True,
    sized=_sized,
    stats=IMAGENET,
)
REGISTERS = replace(
    DINOV2,
    package="dinov2_with_registers",
    prefix="Dinov2WithRegisters",
    tower="Dinov2WithRegistersModel",
    wholes={"Dinov2WithRegistersForImageClassification": Whole("dinov2_with_registers", _cls_and_mean, "tokens")},
)
for each in (DINOV2, REGISTERS):
    enter(each)
    enter_backbone(each, f"{each.prefix}Backbone", f"{each.prefix}Encoder")
