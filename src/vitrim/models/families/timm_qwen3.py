"""Adapter for timm's Qwen3 ViT, the vision tower of Qwen3-VL, Qwen3.5 and Qwen3.8: blocks of `Eva` on a grid."""

from typing import ClassVar

from timm.models.eva import EvaBlock
from timm.models.qwen3_vit import (
    Qwen3VitClassifier,
    Qwen3VitEncoder,
    checkpoint_filter_fn_classifier,
    checkpoint_filter_fn_encoder,
)

from .timm.reduced_towers import ReducedClassifier, ReducedEncoder
from .timm.towers import _TimmTower
from .timm_eva import ReducedEvaBlock
from .timm_vit import Classes


class ReducedQwen3VitEncoder(ReducedEncoder, Qwen3VitEncoder):
    """`Qwen3VitEncoder` with a reduction attached."""


class ReducedQwen3VitClassifier(ReducedClassifier, Qwen3VitClassifier):
    """`Qwen3VitClassifier` with a reduction attached."""


class TimmQwen3(_TimmTower):
    """Vision towers of Qwen3-VL, Qwen3.5 and Qwen3.8, and classifiers on them."""

    name = "timm-qwen3"
    covers = "timm Qwen3 ViT: towers of Qwen3-VL, Qwen3.5, Qwen3.8 with their projector, and classifiers on them"

    _encoder, _classifier = Qwen3VitEncoder, Qwen3VitClassifier
    _filters = checkpoint_filter_fn_encoder, checkpoint_filter_fn_classifier
    _reduced_blocks: ClassVar[Classes] = {EvaBlock: ReducedEvaBlock}
    _reduced_models: ClassVar[Classes] = {
        Qwen3VitEncoder: ReducedQwen3VitEncoder,
        Qwen3VitClassifier: ReducedQwen3VitClassifier,
    }
