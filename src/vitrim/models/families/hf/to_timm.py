"""A model of Hugging Face transformers, built anew in timm."""

import math
from typing import Any

import torch
from torch import nn

from ....errors import UnsupportedModelError
from ...adapter import State
from ...architectures import build_architecture
from ...finding import adapter_of
from .config import image_size
from .conversion_check import ACTIVATIONS, epsilon, load_weights, weights_of
from .layout import Layout, pair
from .sizes import grid
from .weight_names import POSITIONS, in_timm_names

_KINDS = {
    "ViTModel": "vit_base_patch16_224",
    "Dinov2Model": "vit_base_patch14_dinov2",
    "Dinov2WithRegistersModel": "vit_base_patch14_reg4_dinov2",
    "DINOv3ViTModel": "vit_base_patch16_dinov3",
    "CLIPVisionModel": "vit_base_patch16_clip_224",
    "SiglipVisionModel": "vit_base_patch16_siglip_224",
}
"""Tower -> the architecture of timm that is built like it."""


def to_timm(layout: Layout, model: Any) -> nn.Module:
    """A new model of timm with the weights of one of transformers; `UnsupportedModelError` where timm builds none."""
    _refuse_unknown(layout, model)
    tower, whole = layout.tower_of(model), layout.whole(model)
    config, name = tower.config, _KINDS[layout.tower]
    head = None if whole is None else getattr(model, whole.heads[0])
    first = f"{whole.tower}." if whole is not None else ""
    rotary = layout.tower == "DINOv3ViTModel"
    state = weights_of(model)
    hidden = state[f"{first}{layout.layers}.0.{layout.parts[1]}.{'down_proj' if rotary else 'fc2'}.weight"].shape[1]
    args: dict[str, Any] = {
        "img_size": image_size(layout, model), "patch_size": pair(config.patch_size), "in_chans": config.num_channels,
        "embed_dim": config.hidden_size, "depth": config.num_hidden_layers, "num_heads": config.num_attention_heads,
        "mlp_ratio": _ratio(hidden, config.hidden_size), "num_classes": getattr(head, "out_features", 0),
    }  # fmt: skip
    if rotary:
        biased = config.query_bias or config.key_bias or config.value_bias
        args |= {"num_reg_tokens": config.num_register_tokens, "global_pool": "token", "qkv_bias": bool(biased)}
        # Only this one of timm's attention layers has a bias of keys.
        args |= {"rope_temperature": config.rope_theta, **({"attn_type": "rope"} if config.key_bias else {})}
    else:
        args["act_layer"] = ACTIVATIONS[config.hidden_act]
    if layout.tower in ("ViTModel", "Dinov2Model", "Dinov2WithRegistersModel"):
        args["qkv_bias"] = bool(config.qkv_bias)
    if layout.tower == "Dinov2WithRegistersModel":
        args["reg_tokens"] = config.num_register_tokens
    if layout.tower == "SiglipVisionModel" and not tower.use_head:
        name = "vit_base_patch16_siglip_gap_224"
    if layout.any_size and not rotary:
        state |= _positions(layout, model, first)
    new = build_architecture(name, args, images=adapter_of(model).describe(model).images)
    eps = epsilon(model)
    for module in new.modules():  # Which timm's architectures fix.
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
    load_weights(new, state, in_timm_names(layout, state, first, new.state_dict()))
    return new


def _refuse_unknown(layout: Layout, model: Any) -> None:
    tower, whole = layout.tower_of(model), layout.whole(model)
    config, plain = tower.config, layout.tower in ("ViTModel", "CLIPVisionModel")
    gated = getattr(config, "use_swiglu_ffn", False) or getattr(config, "use_gated_mlp", False)
    # timm's rotary blocks have one activation.
    known = ("gelu",) if layout.tower == "DINOv3ViTModel" else ACTIVATIONS
    more_prefix = layout.num_prefix(model) > 1 + getattr(config, "num_register_tokens", 0)
    other_head = whole is not None and not (plain and whole.reads == "prefix")
    if layout.tower not in _KINDS or gated or other_head or config.hidden_act not in known or more_prefix:
        raise UnsupportedModelError(f"timm builds no network like this {type(model).__name__}")
    if getattr(tower, "pooler", None) is not None:
        raise UnsupportedModelError("timm has no pooling layer like that of this model; set its `pooler` to None")


def _ratio(hidden: int, width: int) -> float:
    """What timm multiplies the width by, and then rounds down, to get so many hidden units."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _positions(layout: Layout, model: Any, first: str) -> State:
    """The positions of a tower that takes images of all sizes, resampled by itself for the size of its images."""
    tower, (height, width) = layout.tower_of(model), image_size(layout, model)
    layout.sized(tower.config.patch_size, layout.own_size(tower.config))  # Raises where they make no square.
    rows, columns = grid(layout, model, (height, width))
    table, resample = tower.embeddings.position_embeddings, tower.embeddings.interpolate_pos_encoding
    with torch.no_grad():
        resampled = resample(table.new_empty(1, 1 + rows * columns, table.shape[2]), height, width)
    return {first + POSITIONS[0]: resampled.detach().cpu()}
