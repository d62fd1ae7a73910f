"""Adapter for timm's DeepSeek ViT, the vision tower of DeepSeek-V4: rotary attention and SwiGLU on a grid."""

from typing import ClassVar

from timm.models.deepseek_vit import (
    DeepseekVitBlock,
    DeepseekVitClassifier,
    DeepseekVitEncoder,
    checkpoint_filter_fn_classifier,
    checkpoint_filter_fn_encoder,
)
from torch import Tensor

from .timm.reduced_towers import ReducedClassifier, ReducedEncoder
from .timm.towers import _TimmTower
from .timm_eva import ReducedRotaryBlock
from .timm_vit import Classes


class ReducedDeepseekVitBlock(ReducedRotaryBlock, DeepseekVitBlock):
    """`DeepseekVitBlock` with a cut."""

    def norm_tokens(self, x_BTC: Tensor) -> Tensor:
        return self.norm1(x_BTC)

    def add(self, attended: Tensor) -> Tensor:
        return self.drop_path1(attended)

    def feed_forward(self, x_BTC: Tensor) -> Tensor:
        return x_BTC + self.drop_path2(self.mlp(self.norm2(x_BTC)))


class ReducedDeepseekVitEncoder(ReducedEncoder, DeepseekVitEncoder):
    """`DeepseekVitEncoder` with a reduction attached."""


class ReducedDeepseekVitClassifier(ReducedClassifier, DeepseekVitClassifier):
    """`DeepseekVitClassifier` with a reduction attached."""


class TimmDeepseek(_TimmTower):
    """Vision towers of DeepSeek-V4 and V4.1, and classifiers on them."""

    name = "timm-deepseek"
    covers = "timm DeepSeek ViT: towers of DeepSeek-V4 and V4.1 with their projector, and classifiers on them"

    _encoder, _classifier = DeepseekVitEncoder, DeepseekVitClassifier
    _filters = checkpoint_filter_fn_encoder, checkpoint_filter_fn_classifier
    _reduced_blocks: ClassVar[Classes] = {DeepseekVitBlock: ReducedDeepseekVitBlock}
    _reduced_models: ClassVar[Classes] = {
        DeepseekVitEncoder: ReducedDeepseekVitEncoder,
        DeepseekVitClassifier: ReducedDeepseekVitClassifier,
    }
