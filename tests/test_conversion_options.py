"""`convert` over the options of both libraries: it gives the same network, or says in one line why there is none."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers.mlp import GluMlp, SwiGLU
from timm.models.vision_transformer import ParallelThingsBlock, ResPostBlock
from torch import nn

import vitrim
from hf_models import _made, _plain
from vitrim.errors import UnsupportedModelError, VitrimError
from vitrim.models import adapter_of
from zoo import predicted, redrawn

TINY = {"img_size": 40, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 2}
Options = Mapping[str, object]
VIT: Sequence[Options] = (
    {}, {"global_pool": "avg"}, {"global_pool": "avg", "fc_norm": False}, {"global_pool": "token", "fc_norm": True},
    {"global_pool": "max"}, {"global_pool": "avgmax"}, {"global_pool": "map"}, {"global_pool": ""},
    {"global_pool": "avg", "class_token": False}, {"qkv_bias": False}, {"qk_norm": True}, {"scale_attn_norm": True},
    {"scale_mlp_norm": True}, {"proj_bias": False}, {"init_values": 0.1}, {"init_values": None}, {"pos_embed": "none"},
    {"no_embed_class": True}, {"no_embed_class": False}, {"reg_tokens": 2}, {"reg_tokens": 0},
    {"reg_tokens": 2, "no_embed_class": True}, {"pre_norm": True}, {"pre_norm": False}, {"final_norm": False},
    {"dynamic_img_size": True}, {"img_size": 44, "dynamic_img_size": True, "dynamic_img_pad": True},
    {"norm_layer": "rmsnorm"}, {"norm_layer": partial(nn.LayerNorm, eps=1e-3)},
    {"norm_layer": partial(nn.LayerNorm, bias=False)}, {"embed_norm_layer": "layernorm"}, {"act_layer": "relu"},
    {"act_layer": "gelu_tanh"}, {"act_layer": "quick_gelu"}, {"attn_layer": "diff"}, {"mlp_layer": SwiGLU},
    {"mlp_layer": GluMlp}, {"block_fn": ResPostBlock}, {"block_fn": ParallelThingsBlock}, {"in_chans": 1},
    {"mlp_ratio": 2.5}, {"patch_size": (8, 4)}, {"img_size": (40, 48)},
)  # fmt: skip
EVA: Sequence[Options] = (
    {}, {"global_pool": "avg"}, {"global_pool": "max"}, {"global_pool": ""}, {"global_pool": "map"},
    {"global_pool": "avg", "use_fc_norm": True}, {"use_fc_norm": True}, {"qkv_bias": True}, {"qkv_fused": False},
    {"qkv_bias": True, "qkv_fused": False}, {"qk_norm": True}, {"swiglu_mlp": True}, {"scale_mlp": True},
    {"swiglu_mlp": True, "swiglu_align_to": 8}, {"scale_attn_inner": True}, {"attn_type": "rope"},
    {"attn_type": "rope", "qkv_bias": True}, {"attn_type": "rope", "qkv_bias": True, "qkv_fused": False},
    {"init_values": None}, {"attn_only_layer_scale": True}, {"class_token": False, "global_pool": "avg"},
    {"num_reg_tokens": 0}, {"num_reg_tokens": 2}, {"use_abs_pos_emb": True}, {"use_rot_pos_emb": False},
    {"rope_type": "cat"}, {"rope_grid_offset": 0.5}, {"rope_grid_indexing": "xy"}, {"rope_temperature": 50.0},
    {"rope_rotate_half": False}, {"use_post_norm": True}, {"use_pre_transformer_norm": True},
    {"use_post_transformer_norm": False}, {"norm_layer": partial(nn.LayerNorm, eps=1e-3)}, {"img_size": (40, 48)},
)  # fmt: skip
HF: Sequence[Options] = (
    {}, *({"hidden_act": act} for act in ("gelu_pytorch_tanh", "quick_gelu", "relu", "gelu_new")),
    {"layer_norm_eps": 1e-3}, {"num_channels": 1}, {"image_size": 48}, {"qkv_bias": False}, {"intermediate_size": 41},
    {"num_labels": 0}, {"layerscale_value": 0.3}, {"use_swiglu_ffn": True}, {"num_register_tokens": 0},
    {"num_register_tokens": 1}, {"vision_use_head": False}, {"query_bias": False}, {"key_bias": True},
    {"value_bias": False}, {"query_bias": False, "value_bias": False, "key_bias": True}, {"proj_bias": False},
    {"mlp_bias": False}, {"use_gated_mlp": True}, {"rope_theta": 50.0}, {"patch_size": [8, 4]},
    {"image_size": [40, 48]},
)  # fmt: skip
"""Of all configurations; each kind takes those that it has."""


def _timm(name: str, **options: Any) -> nn.Module:
    return timm.create_model(name, **{**TINY, "num_classes": 0, **options})


def _dinov3(**options: Any) -> nn.Module:
    return _timm("vit_small_patch16_dinov3", **{"embed_dim": 36, "global_pool": "token", **options})


Make = Callable[..., nn.Module]
TIMM: dict[str, tuple[Make, Sequence[Options]]] = {
    "vit": (partial(_timm, "vit_base_patch16_224", num_classes=5), VIT),
    "vit_bare": (partial(_timm, "vit_base_patch16_224"), VIT),
    "dinov2": (partial(_timm, "vit_base_patch14_dinov2"), VIT),
    "dinov2_registers": (partial(_timm, "vit_base_patch14_reg4_dinov2"), VIT),
    "clip": (partial(_timm, "vit_base_patch32_clip_quickgelu_224"), VIT),
    "clip_projected": (partial(_timm, "vit_base_patch32_clip_quickgelu_224", num_classes=5), VIT),
    "siglip": (partial(_timm, "vit_base_patch16_siglip_224"), VIT),
    "siglip_gap": (partial(_timm, "vit_base_patch16_siglip_gap_224"), VIT),
    "dinov3": (_dinov3, EVA),
}
TRANSFORMERS: dict[str, Make] = {
    "ViTForImageClassification": partial(_made, config="ViTConfig"),
    "Dinov2Model": partial(_plain, config="Dinov2Config", mlp_ratio=2),
    "Dinov2WithRegistersModel": partial(_plain, config="Dinov2WithRegistersConfig", mlp_ratio=2),
    "DINOv3ViTModel": partial(_made, config="DINOv3ViTConfig", hidden_size=36),
    "CLIPVisionModel": partial(_made, config="CLIPVisionConfig"),
    "CLIPVisionModelWithProjection": partial(_made, config="CLIPVisionConfig", projection_dim=7),
    "SiglipVisionModel": partial(_made, config="SiglipVisionConfig"),
}
CONVERTED = {
    "vit": ("qkv_bias", "proj_bias", "dynamic_img_size", "in_chans", "mlp_ratio"),
    "dinov2": ("init_values", "qkv_bias", "proj_bias"),
    "siglip_gap": ("global_pool", "fc_norm", "qkv_bias"),
    "dinov3": ("qkv_bias", "qkv_fused", "attn_type", "num_reg_tokens", "rope_temperature", "init_values"),
    "ViTForImageClassification": ("qkv_bias", "intermediate_size", "num_labels", "patch_size", "image_size"),
    "Dinov2WithRegistersModel": ("num_register_tokens", "layer_norm_eps"),
    "DINOv3ViTModel": ("key_bias", "query_bias", "value_bias", "proj_bias", "mlp_bias", "rope_theta", "patch_size"),
    "SiglipVisionModel": ("vision_use_head", "layer_norm_eps"),
}
"""Options with which some network must be converted, so that refusing all would not pass."""


def _agrees(model: Any, to: Any) -> bool:
    """Whether the model was converted; then it must give the same. Otherwise it must have been refused in one line."""
    redrawn(model)
    if "clip" in getattr(model, "pretrained_cfg", {}).get("architecture", ""):
        nn.init.zeros_(getattr(model.head, "bias", torch.zeros(1)))  # The projection of transformers has none.
    size = adapter_of(model).input_format(model).size
    x = torch.randn(3, *size, generator=torch.Generator().manual_seed(5))
    try:
        other = vitrim.convert(model, to)
    except VitrimError as error:
        message = str(error)
    else:
        message = ""
    if message:
        assert "\n" not in message
        return False
    with torch.no_grad():
        torch.testing.assert_close(predicted(other, x), predicted(model, x), rtol=1e-5, atol=1e-5)
    return True


def _check(make: Callable[[Options], nn.Module], grid: Sequence[Options], to: str, some: Sequence[str]) -> None:
    converted = set[str]()
    for options in grid:
        try:
            model = make(options)
        except (AssertionError, ValueError, TypeError):  # The library itself builds no such network.
            continue
        if _agrees(model, to):
            converted |= {*options, ""}
    assert converted >= {*some, ""}


@pytest.mark.parametrize("name", TIMM)
def test_every_option_of_timm_is_kept_or_refused(name: str) -> None:
    make, grid = TIMM[name]
    _check(lambda options: make(**options), grid, "transformers", CONVERTED.get(name, ()))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_option_of_transformers_is_kept_or_refused(name: str) -> None:
    make = TRANSFORMERS[name]
    known = {*vars(make(name).config), "num_labels"}
    grid = [options for options in HF if known >= {*options}]
    _check(lambda options: make(name, **options), grid, "timm", CONVERTED.get(name, ()))


def test_a_refusal_names_what_has_no_place() -> None:
    vit = TIMM["vit"][0]
    for options, reason in (
        ({"qk_norm": True}, r"blocks\.0\.attn\.q_norm\.weight of this model has no place in ViTForImageClassification"),
        ({"init_values": 0.1}, r"blocks\.0\.ls1\.gamma of this model has no place"),
        ({"global_pool": "avg", "fc_norm": False}, "pools its tokens by 'avg', and a ViTModel of transformers by 'tok"),
        ({"pos_embed": "none"}, r"nothing in the model belongs to vit\.embeddings\.position_embeddings"),
    ):
        with pytest.raises(UnsupportedModelError, match=reason):
            vitrim.convert(redrawn(vit(**options)), "transformers")
    clip: Any = redrawn(TIMM["clip_projected"][0]())
    with pytest.raises(UnsupportedModelError, match=r"head\.bias of this model has no place .*; set it to zero"):
        vitrim.convert(clip, "transformers")
    nn.init.zeros_(clip.head.bias)
    vitrim.convert(clip, "transformers")


def test_networks_with_the_same_weights_that_compute_something_else_are_refused() -> None:
    model = redrawn(_dinov3(rope_grid_offset=0.5))
    with pytest.raises(
        UnsupportedModelError, match=r"DINOv3ViTModel with the weights of this Eva gives tokens that diff"
    ):
        vitrim.convert(model, "transformers")


def test_a_model_that_gives_no_numbers_is_not_compared() -> None:
    model: Any = redrawn(TIMM["vit"][0]())
    nn.init.constant_(model.blocks[0].mlp.fc1.bias, torch.nan)
    with pytest.raises(VitrimError, match="the model gives tokens that are not finite"):
        vitrim.convert(model, "transformers")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_every_precision_are_compared_and_stay_as_they_are(dtype: torch.dtype) -> None:
    for model, to in (
        (_dinov3(qkv_bias=True), "transformers"),
        (TRANSFORMERS["DINOv3ViTModel"]("DINOv3ViTModel"), "timm"),
    ):
        model = redrawn(model).to(dtype).train()
        model.get_submodule("norm").eval()
        other: Any = vitrim.convert(model, to)
        assert {parameter.dtype for parameter in other.parameters()} == {dtype}
        assert {value.dtype for value in model.state_dict().values()} == {dtype}
        assert [each.training for each in (other, model, model.get_submodule("norm"))] == [True, True, False]


@pytest.mark.parametrize("size", [56, (48, 40)])
def test_the_positions_of_dinov2_are_resampled_for_the_size_of_its_images(size: Any) -> None:
    for name in ("Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel"):
        model = TRANSFORMERS[name](name)
        adapter_of(model).resize(model, size)
        assert _agrees(model, "timm"), name
