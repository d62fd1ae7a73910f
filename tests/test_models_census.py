"""The page of supported models is what vitrim does, and what it cannot do is refused with the reason."""

import importlib.util
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import vitrim
from vitrim.errors import UnsupportedModelError
from vitrim.models.census import candidates, models_table, names_on, verdict
from vitrim.models.refused import REFUSED
from vitrim.models.shapes_only import shapes_only

PAGE = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
ON_PAGE = names_on(PAGE)
HOMES = dict(candidates())
# The quickest architecture behind each verdict on the page; a verdict without one is tried by its first name.
QUICK = {"deit_tiny_patch16_224", "test_vit", "vit_small_patch16_rope_224", "cait_xxs24_224", "beit_base_patch16_224"}


def _tried() -> list[str]:
    verdicts = dict.fromkeys(ON_PAGE.values())
    return [min((n for n in ON_PAGE if ON_PAGE[n] == row), key=lambda n: (n not in QUICK, n)) for row in verdicts]


needs_this_timm = pytest.mark.skipif(
    f"timm {timm.__version__} builds" not in PAGE, reason="docs/models.md is about another version of timm"
)


@needs_this_timm
def test_the_page_names_all_architectures_of_its_modules_and_counts_them_right() -> None:
    shown = Counter(HOMES[name] for name in ON_PAGE)
    reduced = Counter(HOMES[name] for name, row in ON_PAGE.items() if "attach" in row)
    for module, number in shown.items():
        assert number == sum(home == module for home in HOMES.values()), module
        assert f"| `{module}` | {reduced[module]} | {number} |" in PAGE
    assert f"builds {len(ON_PAGE)} plain ViTs; tokens of {reduced.total()} can be reduced" in PAGE
    assert reduced.total() >= 300


@needs_this_timm
@pytest.mark.parametrize("name", _tried())
def test_the_page_says_of_an_architecture_what_the_census_finds(name: str) -> None:
    found = verdict(name, HOMES[name])
    assert str(found) == ON_PAGE[name]
    assert names_on(models_table({name: found})) == {name: ON_PAGE[name]}
    assert (found.reason or f"`{found.adapter}`") in PAGE


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swin_tiny_patch4_window7_224", r"Swin \(timm\..*SwinTransformer\) cannot be reduced: attention in windows"),
        ("cait_xxs24_224", "CaiT .* cannot be reduced: talking heads"),
        ("levit_128", "LeViT .* cannot be reduced: stages shrink the grid"),
    ],
)
def test_what_cannot_be_reduced_is_refused_with_the_reason(name: str, message: str) -> None:
    with shapes_only():
        model = timm.create_model(name)
    with pytest.raises(UnsupportedModelError, match=message):
        vitrim.attach(model, "ToMe() @ ConstantR(4)")


def test_models_of_transformers_are_refused_with_the_reason_too() -> None:
    from transformers import SwinConfig, SwinForImageClassification

    model = SwinForImageClassification(SwinConfig(image_size=32, embed_dim=8, depths=[1], num_heads=[1], window_size=2))
    with pytest.raises(
        UnsupportedModelError, match=r"SwinForImageClassification.* attention in windows needs the whole"
    ):
        vitrim.attach(model, "ToMe() @ ConstantR(4)")


def test_a_model_of_which_nothing_is_known_is_refused_with_the_adapters_that_exist() -> None:
    with pytest.raises(UnsupportedModelError, match=r"no adapter for torch.*Conv2d; adapters: .*timm-vit"):
        vitrim.attach(nn.Conv2d(1, 1, 1), "ToMe() @ ConstantR(4)")
    # timm's record of a class of one's own that extends Swin names the reason of its base.
    own = type("Mine", (timm.models.swin_transformer.SwinTransformer,), {})
    with (
        torch.device("meta"),
        pytest.raises(UnsupportedModelError, match=r"Mine\) cannot be reduced: attention in win"),
    ):
        vitrim.attach(own(depths=(1,), num_heads=(1,)), "ToMe() @ ConstantR(4)")


def test_every_refused_module_exists_and_every_reason_is_half_a_line() -> None:
    folders = {root: Path(importlib.util.find_spec(root).origin).parent for root in ("timm", "transformers")}
    for module, (name, reason) in REFUSED.items():
        root, *parts = module.split(".")
        path = folders[root].joinpath(*parts)
        assert path.is_dir() or path.with_suffix(".py").is_file(), module
        assert 0 < len(name) < 25, module
        assert 0 < len(reason) < 90, module


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("DPTForDepthEstimation", r"DPT .* cannot be reduced: its own ViT has no adapter; on a backbone"),
        ("DPTForSemanticSegmentation", r"DPT .* cannot be reduced: its own ViT has no adapter; on a backbone"),
        ("BeitForSemanticSegmentation", r"all patches in their places.*a head on a backbone, whose maps stay whole"),
    ],
)
def test_dense_heads_of_transformers_are_refused_with_the_way_to_whole_maps(name: str, message: str) -> None:
    import transformers

    sizes = {"hidden_size": 12, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 12}
    dense = {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [4] * 4, "fusion_hidden_size": 4}
    given = {
        "image_size": 32,
        "patch_size": 8,
        **sizes,
        **(dense if name.startswith("DPT") else {"out_indices": [1, 2, 3, 4]}),
    }
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**given))
    with pytest.raises(UnsupportedModelError, match=message):
        vitrim.attach(model, "ToMe() @ ConstantR(4)")
