"""The same network in timm and in Hugging Face transformers: built anew in the other library, with its weights."""

from contextlib import suppress
from typing import Any, Literal

import torch
from torch import nn

from ....errors import UnsupportedModelError, VitrimError
from ...adapter import State
from ...architectures import build_architecture
from ...finding import adapter_of, find_adapter
from ...reduction.attached import attached
from ...widths.block_widths import BlockWidths, widths_of
from .images import library
from .layout import LAYOUTS, Layout, layout_of, pair
from .weight_names import in_timm_names, in_transformers_names

Library = Literal["timm", "transformers"]
_KINDS = {
    "ViTModel": "vit_base_patch16_224",
    "Dinov2Model": "vit_base_patch14_dinov2",
    "Dinov2WithRegistersModel": "vit_base_patch14_reg4_dinov2",
    "DINOv3ViTModel": "vit_base_patch16_dinov3",
    "CLIPVisionModel": "vit_base_patch16_clip_224",
    "SiglipVisionModel": "vit_base_patch16_siglip_224",
}
"""Tower -> the architecture of timm that is built like it."""
_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def convert(model: nn.Module, to: Library) -> nn.Module:
    """A new model of the other library that gives the same: ViT, DINOv2 (registers or not), DINOv3, CLIP, SigLIP.

    Args:
        model: of timm or transformers, without a reduction; it stays as it is. In timm, ViT and CLIP may have a head
            (the classifier, or the projection); the others must have none (`model.reset_classifier(0)`).
        to: "timm" or "transformers".

    Raises:
        UnsupportedModelError: the other library builds no such network, as none whose blocks were cut unevenly.
        VitrimError: a reduction is attached.
    """
    if to not in ("timm", "transformers"):
        raise VitrimError(f"a model is converted to 'timm' or 'transformers', not to {to!r}")
    if attached(model) is not None:
        raise VitrimError("a reduction is attached to this model; call handle.remove(), and attach to the new one")
    find_adapter(model)
    library()
    layout = layout_of(model)
    if (layout is None) == (to == "timm"):
        raise UnsupportedModelError(f"a {type(model).__name__} is no model that can be converted to {to}")
    _refuse_uneven(model)
    new = _to_transformers(model) if layout is None else _to_timm(layout, model)
    return new.to(next(model.parameters())).train(model.training)


def _refuse_uneven(model: nn.Module) -> None:
    adapter, widths = find_adapter(model), set[BlockWidths]()
    with suppress(UnsupportedModelError):  # Blocks of a kind that is never cut.
        widths = set(widths_of(model))
    if not widths:
        return
    block, (first, *more) = adapter.blocks(model)[0], widths
    attn: Any = getattr(block, next(iter(adapter.branches_of(model))))
    heads = getattr(attn, "num_heads", getattr(attn, "num_attention_heads", 0))
    cut = first.value_dim is not None or first.query_dim is not None
    if more or cut or first.head_dim * heads != adapter.info(model).width:
        raise UnsupportedModelError(
            f"the widths of this {type(model).__name__} were cut, and the other library builds no such blocks; convert "
            "the model before it is cut"
        )


def _to_timm(layout: Layout, model: Any) -> nn.Module:
    tower, whole = layout.tower_of(model), layout.whole(model)
    config, name = tower.config, _KINDS.get(layout.tower)
    named = whole is not None and layout.tower in ("ViTModel", "CLIPVisionModel") and whole.reads == "prefix"
    gated = getattr(config, "use_swiglu_ffn", False) or getattr(config, "use_gated_mlp", False)
    if name is None or gated or (whole is not None and not named):
        raise UnsupportedModelError(f"timm builds no network like this {type(model).__name__}")
    if getattr(tower, "pooler", None) is not None:
        raise UnsupportedModelError("timm has no pooling layer like that of this model; set its `pooler` to None")
    head = None if whole is None else getattr(model, whole.heads[0])
    state = _weights(model)
    first = f"{whole.tower}." if whole is not None else ""
    mlp = "down_proj" if layout.tower == "DINOv3ViTModel" else "fc2"
    hidden = state[f"{first}{layout.layers}.0.{layout.parts[1]}.{mlp}.weight"].shape[1]
    args: dict[str, Any] = {
        "img_size": pair(config.image_size), "patch_size": pair(config.patch_size)[0], "in_chans": config.num_channels,
        "embed_dim": config.hidden_size, "depth": config.num_hidden_layers, "num_heads": config.num_attention_heads,
        "mlp_ratio": hidden / config.hidden_size, "act_layer": _ACTIVATIONS.get(config.hidden_act),
        "num_classes": 0 if head is None else head.out_features,
    }  # fmt: skip
    if args["act_layer"] is None or layout.num_prefix(model) > 1 + getattr(config, "num_register_tokens", 0):
        raise UnsupportedModelError(f"timm builds no network like this {type(model).__name__}")
    if layout.tower == "Dinov2WithRegistersModel":
        args["reg_tokens"] = config.num_register_tokens
    if layout.tower == "DINOv3ViTModel":
        biased = config.query_bias or config.value_bias
        args |= {"num_reg_tokens": config.num_register_tokens, "global_pool": "token", "qkv_bias": bool(biased)}
        args["rope_temperature"] = config.rope_theta
        del args["act_layer"]
    elif layout.tower in ("ViTModel", "Dinov2Model", "Dinov2WithRegistersModel"):
        args["qkv_bias"] = bool(config.qkv_bias)
    new: Any = build_architecture(name, args, images=adapter_of(model).describe(model).images)
    _set_eps(new, config.layer_norm_eps)
    own = new.state_dict()
    found = {ours: value for ours, value in in_timm_names(layout, state, first, own) if ours in own}
    if head is not None and head.bias is None:
        found["head.bias"] = torch.zeros(head.out_features)
    _load(new, found)
    return new


def _to_transformers(model: Any) -> nn.Module:
    name = str((getattr(model, "pretrained_cfg", None) or {}).get("architecture", ""))
    tower = _tower_like(name)
    state = _weights(model)
    classes = adapter_of(model).classifier(model).classes
    layout = LAYOUTS.get(tower)
    headless = tower not in ("ViTModel", "CLIPVisionModel")
    if layout is None or (classes and headless) or "blocks.0.mlp.norm.weight" in state:
        raise UnsupportedModelError(
            f"transformers builds no network like this {name or type(model).__name__}"
            + ("; remove its classifier first: model.reset_classifier(0)" if layout is not None and classes else "")
        )
    form, attn = adapter_of(model).input_format(model), model.blocks[0].attn
    width, hidden = model.embed_dim, state["blocks.0.mlp.fc2.weight"].shape[1]
    activation = {value: key for key, value in _ACTIVATIONS.items()}.get(_activation(model.blocks[0].mlp.act))
    if activation is None or state["blocks.0.mlp.fc1.weight"].shape[0] != hidden:
        raise UnsupportedModelError(f"transformers builds no network with the MLP of this {name}")
    args: dict[str, Any] = {
        "img_size": list(form.size[1:]), "in_chans": form.size[0], "hidden_act": activation, "hidden_size": width,
        "patch_size": model.patch_embed.patch_size[0], "num_hidden_layers": len(model.blocks),
        "num_attention_heads": attn.num_heads, "layer_norm_eps": model.blocks[0].norm1.eps,
    }  # fmt: skip
    args |= {"mlp_ratio": hidden // width} if tower.startswith("Dinov2") else {"intermediate_size": hidden}
    registers = 0 if getattr(model, "reg_token", None) is None else model.reg_token.shape[1]
    if tower in ("Dinov2WithRegistersModel", "DINOv3ViTModel"):
        args["num_register_tokens"] = registers
    if tower in ("ViTModel", "Dinov2Model", "Dinov2WithRegistersModel"):
        args["qkv_bias"] = attn.qkv.bias is not None
    if tower == "DINOv3ViTModel":
        args["query_bias"] = args["value_bias"] = getattr(attn, "q_bias", None) is not None
    kind = tower
    if classes:
        kind = "ViTForImageClassification" if tower == "ViTModel" else "CLIPVisionModelWithProjection"
        args["num_classes" if tower == "ViTModel" else "projection_dim"] = classes
    if tower == "CLIPVisionModel" and classes and model.head.bias is not None and model.head.bias.abs().max() > 0:
        raise UnsupportedModelError("the projection of CLIP in transformers has no bias; set that of `head` to zero")
    images = adapter_of(model).describe(model).images
    new: Any = build_architecture(kind, args, images=images)
    tower_of = layout.tower_of(new)
    if getattr(tower_of, "pooler", None) is not None:
        tower_of.pooler = None
    first = "" if kind == tower else f"{layout.wholes[kind].tower}."
    own = new.state_dict()
    found = {theirs: value for theirs, value in in_transformers_names(layout, state, first, own) if theirs in own}
    _load(new, found)
    return new


def _weights(model: nn.Module) -> State:
    return {name: value.detach().cpu() for name, value in model.state_dict().items()}


def _load(new: nn.Module, found: State) -> None:
    """Load what was found, which must be all that the model computes with."""
    left = [name for name, _ in new.named_parameters() if name not in found and not name.endswith("mask_token")]
    if left:
        raise UnsupportedModelError(f"nothing in the model belongs to {left[0]} of a {type(new).__name__}")
    new.load_state_dict({**new.state_dict(), **found})


def _tower_like(name: str) -> str:
    if "dinov3" in name:
        return "DINOv3ViTModel"
    if "dinov2" in name:
        return "Dinov2WithRegistersModel" if "reg" in name else "Dinov2Model"
    if "siglip" in name and "gap" not in name:
        return "SiglipVisionModel"
    if "clip" in name:
        return "CLIPVisionModel"
    return "ViTModel" if name.startswith(("vit_", "deit_")) and "distilled" not in name else ""


def _activation(act: nn.Module) -> str:
    if isinstance(act, nn.GELU):
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    return {"QuickGELU": "quick_gelu", "GELUTanh": "gelu_tanh", "GELU": "gelu"}.get(type(act).__name__, "")


def _set_eps(model: nn.Module, eps: float) -> None:
    """Configurations of transformers say the epsilon of the norms, which timm's architectures fix."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
