"""The vision towers of CLIP and MetaCLIP 2 of Hugging Face transformers."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from .hf.layout import Layout, Stats, Whole, enter, mean_of_patches

CLIP_STATS: Stats = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def _normed_cls(tower: Any, tokens_BTC: Tensor, num_prefix: int, size_BN: Tensor | None) -> Tensor:
    """CLS after the last norm, which these towers put on it alone."""
    return tower.post_layernorm(tokens_BTC[:, 0])


def _wholes(prefix: str) -> dict[str, Whole]:
    return {
        f"{prefix}ForImageClassification": Whole("vision_model", mean_of_patches, "tokens"),
        f"{prefix}VisionModelWithProjection": Whole(
            "vision_model", _normed_cls, "prefix", ("visual_projection",), classifies=False
        ),
    }


CLIP = Layout(
    package="clip",
    prefix="CLIP",
    tower="CLIPVisionModel",
    wholes=_wholes("CLIP"),
    pool=_normed_cls,
    layers="encoder.layers",
    projection="embeddings.patch_embedding",
    layer="EncoderLayer",
    parts=("self_attn", "mlp"),
    final_norm="",
    norms=("layer_norm1", "layer_norm2"),
    after=((), ()),
    out="out_proj",
    heads="num_heads",
    scale="scale",
    dropout="dropout",
    stats=CLIP_STATS,
    types=("clip_vision_model",),
)
enter(CLIP)
enter(
    replace(
        CLIP,
        package="metaclip_2",
        prefix="MetaClip2",
        tower="MetaClip2VisionModel",
        wholes=_wholes("MetaClip2"),
        types=("metaclip_2_vision_model",),
    )
)
