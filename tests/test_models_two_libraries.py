"""Law 12: where timm and transformers hold the same weights, the same reduction keeps the same and gives the same."""

from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

import vitrim
from hf_models import HF, MORE, _made, _plain
from vitrim.elastic import stratify
from vitrim.errors import UnsupportedModelError, VitrimError
from vitrim.models import BlockWidths, adapter_of, set_widths, widths_of
from vitrim.models.input_format import InputFormat
from zoo import images, predicted, redrawn

SMALL = {"img_size": 40, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "mlp_ratio": 2}
TIMM: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: timm.create_model("vit_base_patch16_224", **SMALL, num_classes=5),
    "vit_bare": lambda: timm.create_model("vit_base_patch16_224", **SMALL, num_classes=0),
    "dinov2": lambda: timm.create_model("vit_base_patch14_dinov2", **SMALL),
    "dinov2_registers": lambda: timm.create_model("vit_base_patch14_reg4_dinov2", **SMALL),
    "dinov3": lambda: timm.create_model(
        "vit_small_patch16_dinov3", **{**SMALL, "embed_dim": 36}, num_classes=0, global_pool="token"
    ),
    "clip": lambda: timm.create_model("vit_base_patch32_clip_quickgelu_224", **SMALL, num_classes=0),
    "siglip": lambda: timm.create_model("vit_base_patch16_siglip_224", **SMALL, num_classes=0),
}
TRANSFORMERS: dict[str, Callable[[], nn.Module]] = {
    "vit": HF["hf_vit"],
    "dinov2": lambda: _plain("Dinov2Model", "Dinov2Config", mlp_ratio=2),
    "dinov2_registers": lambda: _plain("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", mlp_ratio=2),
    "dinov3": MORE["dinov3"],
    "clip": MORE["clip_projected"],
    "siglip": lambda: _made("SiglipVisionModel", "SiglipVisionConfig"),
}
REDUCTIONS = ("TopK(norm, fuse=mean) @ KeepRate(0.6, at=(0, 1))", "ToMe() @ ConstantR(4)")
BY_CLS = ("TopK(fuse=sum) @ KeepRate(0.6, at=(0, 1), place=before)",)


def same(model: nn.Module, other: nn.Module) -> None:
    """Assert that both give the same, dense and reduced, and keep the same tokens."""
    x = images(2)
    with torch.no_grad():
        torch.testing.assert_close(predicted(other, x), predicted(model, x), rtol=1e-5, atol=1e-5)
        has_cls = adapter_of(model).geometry(model).has_cls
        for reduction in (*REDUCTIONS, *(BY_CLS if has_cls else ())):
            with vitrim.attach(model, reduction) as one, vitrim.attach(other, reduction) as two:
                torch.testing.assert_close(predicted(other, x), predicted(model, x), rtol=1e-5, atol=1e-5)
                for a, b in zip(one.states, two.states, strict=True):
                    assert torch.equal(a.origin, b.origin)
                assert one.token_counts == two.token_counts
    assert vitrim.cost(model).macs == vitrim.cost(other).macs


@pytest.mark.parametrize("name", TIMM)
def test_law_12_from_timm(name: str) -> None:
    model = redrawn(TIMM[name]())
    other = vitrim.convert(model, "transformers")
    assert adapter_of(other).name == "transformers"
    assert InputFormat.of(other) == InputFormat.of(model)
    same(model, other)
    back = vitrim.convert(other, "timm")
    same(model, back)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_law_12_from_transformers(name: str) -> None:
    model = redrawn(TRANSFORMERS[name]())
    other = vitrim.convert(model, "timm")
    assert adapter_of(other).name in ("timm-vit", "timm-eva")
    same(model, other)


def test_what_the_other_library_does_not_build_is_refused() -> None:
    model = TIMM["vit"]()
    with pytest.raises(VitrimError, match="converted to 'timm' or 'transformers', not to 'onnx'"):
        vitrim.convert(model, "onnx")
    with pytest.raises(UnsupportedModelError, match="cannot be converted to timm"):
        vitrim.convert(model, "timm")
    with vitrim.attach(model, REDUCTIONS[0]), pytest.raises(VitrimError, match="a reduction is attached"):
        vitrim.convert(model, "transformers")
    dino = timm.create_model("vit_base_patch14_dinov2", **SMALL, num_classes=3)
    with pytest.raises(UnsupportedModelError, match=r"remove its classifier first: model.reset_classifier\(0\)"):
        vitrim.convert(dino, "transformers")
    for name in ("dinov2", "vit_bare", "deit", "ijepa"):
        with pytest.raises(UnsupportedModelError, match="timm"):
            vitrim.convert(MORE[name](), "timm")


@pytest.mark.parametrize("name", ["dinov3", "vit"])
def test_models_that_were_cut_unevenly_are_refused(name: str) -> None:
    dims = widths_of(TIMM[name]())[0].head_dim
    uneven = [[BlockWidths(dims, 9), *[BlockWidths(dims, 10)] * 2], [BlockWidths(0, 10)] * 3]
    uneven.append([BlockWidths(dims, 10, 5) if name == "dinov3" else BlockWidths(5, 10)] * 3)
    for each in uneven:
        for made in (TIMM[name](), TRANSFORMERS[name]()):
            set_widths(made, each)
            to = "timm" if adapter_of(made).name == "transformers" else "transformers"
            with pytest.raises(UnsupportedModelError, match=r"were cut.* convert the model before it is cut"):
                vitrim.convert(made, to)


def test_networks_of_every_width_are_the_same_in_both_libraries() -> None:
    model = redrawn(TIMM["dinov3"]()).double()
    other, x = vitrim.convert(model, "transformers"), images(8, dtype=torch.float64)
    options = {"num_images": 8, "width_multiple": 4, "max_saving": 0.7, "rounds": 1, "even": True}
    one, two = (stratify(each, [x], **options, say=lambda _: None) for each in (model, other))
    assert [one.chain.macs_at(at) for at in range(len(one.chain))] == [
        two.chain.macs_at(at) for at in range(len(two.chain))
    ]
    for at in (len(one.chain) // 2, len(one.chain) - 1):
        torch.testing.assert_close(predicted(two.cut(at), x), predicted(one.cut(at), x), rtol=1e-5, atol=1e-5)
