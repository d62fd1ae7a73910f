"""The same network in timm and in Hugging Face transformers: its weights under the names of the other library."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import UnsupportedModelError, VitrimError
from ..adapter import State
from ..architectures import build_architecture
from ..attached import attached
from ..finding import adapter_of, find_adapter
from .hf_config import library
from .hf_layout import LAYOUTS, Layout, layout_of, pair

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
        UnsupportedModelError: the other library builds no such network.
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
    new = _to_transformers(model) if layout is None else _to_timm(layout, model)
    return new.to(next(model.parameters())).train(model.training)


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
    found = {ours: value for ours, value in _in_timm_names(layout, state, first, own) if ours in own}
    if head is not None and head.bias is None:
        found["head.bias"] = torch.zeros(head.out_features)
    _load(new, found)
    return new


def _in_timm_names(layout: Layout, state: State, first: str, own: State) -> Iterator[tuple[str, Tensor]]:
    for theirs, ours in _names(layout, state, first, own):
        if theirs in state:
            value = state[theirs]
            yield ours, value.reshape(own[ours].shape) if ours in own and value.numel() == own[ours].numel() else value
    positions = next((state[first + name] for name in _POSITIONS if first + name in state), None)
    if positions is not None and "pos_embed" in own:
        positions = positions.reshape(1, -1, positions.shape[-1])
        extra = positions.shape[1] - own["pos_embed"].shape[1]
        yield "pos_embed", positions[:, extra:]
        if extra:  # timm has no position for CLS.
            yield "cls_token", state[f"{first}embeddings.cls_token"] + positions[:, :1]
    for block in range(_depth(own)):
        attn = f"{first}{layout.layers}.{block}.{layout.parts[0]}."
        for part in ("weight", "bias"):
            rows = [state.get(f"{attn}{one}_proj.{part}") for one in "qkv"]
            there = next((row for row in rows if row is not None), None)
            if there is not None:
                whole = [torch.zeros_like(there) if row is None else row for row in rows]
                yield f"blocks.{block}.attn.qkv.{part}", torch.cat(whole)
                if part == "bias":
                    for one, row in zip("qkv", whole, strict=True):
                        yield f"blocks.{block}.attn.{one}_bias", row
    if f"{first}head.attention.in_proj_weight" in state:
        for part in ("weight", "bias"):
            query, *others = state[f"{first}head.attention.in_proj_{part}"].chunk(3)
            yield f"attn_pool.q.{part}", query
            yield f"attn_pool.kv.{part}", torch.cat(others)


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
    found = {theirs: value for theirs, value in _in_their_names(layout, state, first, own) if theirs in own}
    _load(new, found)
    return new


def _in_their_names(layout: Layout, state: State, first: str, own: State) -> Iterator[tuple[str, Tensor]]:
    for theirs, ours in _names(layout, own, first, state):
        if ours in state and theirs in own:
            yield theirs, state[ours].reshape(own[theirs].shape)
    for name in _POSITIONS:
        if first + name in own and "pos_embed" in state:
            table, wanted = state["pos_embed"], own[first + name]
            missing = wanted.numel() // table.shape[-1] - table.shape[1]
            table = torch.cat([table.new_zeros(1, missing, table.shape[-1]), table], 1)  # timm has none for CLS.
            yield first + name, table.reshape(wanted.shape)
    for block in range(_depth(state)):
        attn = f"{first}{layout.layers}.{block}.{layout.parts[0]}."
        for part in ("weight", "bias"):
            whole = state.get(f"blocks.{block}.attn.qkv.{part}")
            for at, one in enumerate("qkv"):
                row = state.get(f"blocks.{block}.attn.{one}_bias") if whole is None else whole.chunk(3)[at]
                if row is not None:
                    yield f"{attn}{one}_proj.{part}", row
    if "attn_pool.q.weight" in state:
        for part in ("weight", "bias"):
            query_key_value = torch.cat([state[f"attn_pool.q.{part}"], state[f"attn_pool.kv.{part}"]])
            yield f"{first}head.attention.in_proj_{part}", query_key_value


_SAME = (("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2"))
_POSITIONS = ("embeddings.position_embeddings", "embeddings.position_embedding.weight")


def _names(layout: Layout, theirs: State, first: str, ours: State) -> Iterator[tuple[str, str]]:
    """Names in transformers and in timm of the tensors that are the same in both, up to their shape."""
    yield f"{first}embeddings.cls_token", "cls_token"
    yield f"{first}embeddings.class_embedding", "cls_token"
    yield f"{first}embeddings.register_tokens", "reg_token"
    for part in ("weight", "bias"):
        yield f"{first}{layout.projection}.{part}", f"patch_embed.proj.{part}"
        yield f"{first}{layout.final_norm or 'post_layernorm'}.{part}", f"norm.{part}"
        yield f"{first}pre_layrnorm.{part}", f"norm_pre.{part}"
        yield f"classifier.{part}", f"head.{part}"
        yield f"visual_projection.{part}", f"head.{part}"
        for a, b in (("attention.out_proj", "proj"), ("layernorm", "norm"), *_SAME):
            yield f"{first}head.{a}.{part}", f"attn_pool.{b}.{part}"
    yield f"{first}head.probe", "attn_pool.latent"
    for block in range(_depth(ours)):
        start, mine = f"{first}{layout.layers}.{block}.", f"blocks.{block}."
        attn, mlp = (start + name for name in layout.parts)
        for half in (1, 2):
            yield f"{start}layer_scale{half}.lambda1", f"{mine}ls{half}.gamma"
            yield f"{start}layer_scale{half}.lambda1", f"{mine}gamma_{half}"
        for part in ("weight", "bias"):
            yield f"{start}{layout.norms[0]}.{part}", f"{mine}norm1.{part}"
            yield f"{start}{layout.norms[1]}.{part}", f"{mine}norm2.{part}"
            yield f"{attn}.{layout.out}.{part}", f"{mine}attn.proj.{part}"
            for a, b in (("fc1", "fc1"), ("fc2", "fc2"), ("up_proj", "fc1"), ("down_proj", "fc2")):
                yield f"{mlp}.{a}.{part}", f"{mine}mlp.{b}.{part}"


def _weights(model: nn.Module) -> State:
    return {name: value.detach().cpu() for name, value in model.state_dict().items()}


def _load(new: nn.Module, found: State) -> None:
    """Load what was found, which must be all that the model computes with."""
    left = [name for name, _ in new.named_parameters() if name not in found and not name.endswith("mask_token")]
    if left:
        raise UnsupportedModelError(f"nothing in the model belongs to {left[0]} of a {type(new).__name__}")
    new.load_state_dict({**new.state_dict(), **found})


def _depth(ours: State) -> int:
    return 1 + max(int(name.split(".")[1]) for name in ours if name.startswith("blocks."))


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
