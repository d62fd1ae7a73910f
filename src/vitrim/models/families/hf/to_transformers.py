"""A model of timm, built anew in Hugging Face transformers."""

from typing import Any

from torch import nn

from ....errors import UnsupportedModelError
from ...adapter import State
from ...architectures import build_architecture
from ...finding import adapter_of
from .conversion_check import ACTIVATIONS, epsilon, load_weights, weights_of
from .layout import LAYOUTS, pair
from .weight_names import in_transformers_names

_BIASES = {"query_bias": "q", "key_bias": "k", "value_bias": "v"}


def to_transformers(model: Any) -> nn.Module:
    """A new model of transformers with the weights of one of timm; `UnsupportedModelError` where it builds none."""
    adapter = adapter_of(model)
    name = str((getattr(model, "pretrained_cfg", None) or {}).get("architecture", "")) or type(model).__name__
    tower, classes = _tower_like(name), adapter.classifier(model).classes
    layout, rotary = LAYOUTS.get(tower), tower == "DINOv3ViTModel"
    if layout is None or adapter.name != ("timm-eva" if rotary else "timm-vit"):
        raise UnsupportedModelError(f"transformers builds no network like this {name}")
    kind = tower
    if classes:
        kind = {"ViTModel": "ViTForImageClassification", "CLIPVisionModel": "CLIPVisionModelWithProjection"}.get(tower)
        if kind is None:
            raise UnsupportedModelError(
                f"transformers builds no network like this {name}; remove its classifier first: "
                "model.reset_classifier(0)"
            )
    _check_pooling(model, name, tower)
    state = weights_of(model)
    args = _args(model, name, tower, state)
    if classes:
        args["num_classes" if tower == "ViTModel" else "projection_dim"] = classes
    new: Any = build_architecture(kind, args, images=adapter.describe(model).images)
    inside = layout.tower_of(new)
    if getattr(inside, "pooler", None) is not None:
        inside.pooler = None
    first = "" if kind == tower else f"{layout.wholes[kind].tower}."
    load_weights(new, state, in_transformers_names(layout, state, first, new.state_dict()))
    return new


def _tower_like(name: str) -> str:
    if "dinov3" in name:
        return "DINOv3ViTModel"
    if "dinov2" in name:
        return "Dinov2WithRegistersModel" if "reg" in name else "Dinov2Model"
    if "siglip" in name:
        return "SiglipVisionModel"
    if "clip" in name:
        return "CLIPVisionModel"
    return "ViTModel" if name.startswith(("vit_", "deit_")) and "distilled" not in name else ""


def _check_pooling(model: Any, name: str, tower: str) -> None:
    known = ("map", "avg") if tower == "SiglipVisionModel" else ("token",)
    if model.global_pool not in known:
        raise UnsupportedModelError(
            f"this {name} pools its tokens by {model.global_pool!r}, and a {tower} of transformers by {known[0]!r}; if "
            f"you only use its tokens, set model.global_pool = {known[0]!r} first"
        )


def _args(model: Any, name: str, tower: str, state: State) -> dict[str, Any]:
    """The arguments of the tower."""
    form, attn, mlp = adapter_of(model).input_format(model), model.blocks[0].attn, model.blocks[0].mlp
    activation = {value: key for key, value in ACTIVATIONS.items()}.get(_activation(getattr(mlp, "act", None)))
    into, out = (state.get(f"blocks.0.mlp.{layer}.weight") for layer in ("fc1", "fc2"))
    if activation is None or into is None or out is None or len(into) != out.shape[1]:
        raise UnsupportedModelError(f"transformers builds no network with the MLP of this {name}")
    rows, columns = pair(model.patch_embed.patch_size)
    args: dict[str, Any] = {
        "img_size": list(form.size[1:]), "patch_size": rows if rows == columns else [rows, columns],
        "in_chans": form.size[0], "hidden_size": model.embed_dim, "num_hidden_layers": len(model.blocks),
        "num_attention_heads": attn.num_heads, "hidden_act": activation, "layer_norm_eps": epsilon(model),
    }  # fmt: skip
    if tower.startswith("Dinov2"):
        args["mlp_ratio"] = out.shape[1] // model.embed_dim
    else:
        args["intermediate_size"] = out.shape[1]
    if tower in ("Dinov2WithRegistersModel", "DINOv3ViTModel"):
        args["num_register_tokens"] = 0 if getattr(model, "reg_token", None) is None else model.reg_token.shape[1]
    if tower in ("ViTModel", "Dinov2Model", "Dinov2WithRegistersModel"):
        args["qkv_bias"] = attn.qkv.bias is not None
    if tower == "SiglipVisionModel":
        args["vision_use_head"] = model.global_pool == "map"
    if tower == "DINOv3ViTModel":
        for name, row in _BIASES.items():
            places = ("qkv.bias", f"{row}_proj.bias", f"{row}_bias")
            args[name] = any(f"blocks.0.attn.{place}" in state for place in places)
        if temperature := getattr(model.rope, "temperature", None):
            args["rope_theta"] = float(temperature)
    return args


def _activation(act: nn.Module | None) -> str:
    if isinstance(act, nn.GELU):
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    return {"QuickGELU": "quick_gelu", "GELUTanh": "gelu_tanh", "GELU": "gelu"}.get(type(act).__name__, "")
