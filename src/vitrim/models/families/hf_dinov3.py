"""DINOv3-ViT of Hugging Face transformers: the rotation of queries and keys follows the tokens that are left."""

from typing import Any

import torch
from torch import Tensor

from .hf.backbone import enter_backbone
from .hf.layout import IMAGENET, Layout, enter, first_token
from .hf.reduced_block import ReducedLayer
from .hf.values import rotated

Table = tuple[Tensor, Tensor]
"""Cosines and sines, each (N, D), or (B, 1, M, D) for the tokens that are left."""


class _ReducedLayer(ReducedLayer):
    rotary_argument = "position_embeddings"

    def rows_of_table(self, table: Table, place_BM: Tensor) -> Table:
        cos, sin = (part[place_BM].unsqueeze(1) for part in table)
        return cos, sin

    def rotate(self, stream_BHTD: Tensor, table: Table) -> Tensor:
        return rotated(self._attention, self.vitrim_layout, stream_BHTD, table)


def _rotated(stream_BHTD: Tensor, table: Table) -> Tensor:
    cos, sin = table
    prefix = stream_BHTD.shape[2] - cos.shape[-2]
    patches: Any = stream_BHTD[:, :, prefix:]
    one, two = patches.chunk(2, dim=-1)
    turned = patches * cos + torch.cat((-two, one), dim=-1) * sin
    return torch.cat([stream_BHTD[:, :, :prefix], turned], dim=2)


DINOV3 = Layout(
    package="dinov3_vit",
    prefix="DINOv3ViT",
    tower="DINOv3ViTModel",
    wholes={},
    pool=first_token,
    layers="model.layer",
    projection="embeddings.patch_embeddings",
    mlps={"MLP": "UpDown", "GatedMLP": "GatedMLP"},
    final_norm="norm",
    norms=("norm1", "norm2"),
    after=(("layer_scale1", "drop_path"), ("layer_scale2", "drop_path")),
    heads="num_heads",
    dropout="dropout",
    any_size=True,
    rotary="position_embeddings",
    rotate=_rotated,
    block=_ReducedLayer,
    stats=IMAGENET,
)
enter(DINOV3)
enter_backbone(DINOV3, "DINOv3ViTBackbone", "DINOv3ViTEncoder")
