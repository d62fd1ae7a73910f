"""A saved model is loaded for images of another size, whichever library it is of, and never ignores the size."""

from pathlib import Path

import pytest
import timm
import torch

import vitrim
from hf_models import BACKBONES, HF, MORE
from vitrim.errors import UnsupportedModelError, VitrimError
from vitrim.models import adapter_of, load, open_model
from zoo import images, predicted, redrawn

ALL = {**HF, **MORE, **BACKBONES}
SQUARE_ONLY = ("clip", "clip_bare", "clip_projected", "metaclip2", "siglip", "siglip_headless", "hf_siglip")
SIZES = {"depth": 1, "embed_dim": 32, "num_heads": 2, "num_classes": 3}


def resizes_to(model: torch.nn.Module, folder: Path, height: int, width: int) -> None:
    """Assert that the saved model, loaded for this size, is the model that was resized in memory."""
    vitrim.save(model, folder)
    x = images(1, max(height, width))[:, :, :height, :width]
    adapter = adapter_of(model)
    adapter.resize(model, (height, width))
    expected, macs = predicted(model, x), vitrim.cost(model).macs
    loaded = [load(folder, img_size=(height, width)), load(folder, image_size=[height, width])]
    if height == width:
        loaded += [load(folder, img_size=height), open_model(str(folder), height)]
        loaded += [vitrim.build_model(folder, img_size=height)]
    for each in loaded:
        assert adapter_of(each).input_format(each).size[1:] == (height, width)
        assert vitrim.cost(each).macs == macs
        assert torch.equal(predicted(each, x), expected)


@pytest.mark.parametrize("name", ALL)
def test_models_of_transformers_take_the_size_that_they_are_loaded_for(name: str, tmp_path: Path) -> None:
    resizes_to(redrawn(ALL[name]()), tmp_path / "square", 56, 56)
    model = redrawn(ALL[name]())
    if name not in SQUARE_ONLY:
        resizes_to(model, tmp_path / "wide", 48, 64)
        return
    vitrim.save(model, tmp_path / "wide")
    with pytest.raises(UnsupportedModelError, match="takes square images only"):
        load(tmp_path / "wide", img_size=(48, 64))


@pytest.mark.parametrize("name", ["hf_vit", "ijepa", "deit_distilled", "dinov3"])
def test_grids_that_are_not_square_are_resampled_as_they_lie(name: str, tmp_path: Path) -> None:
    """8 x 18 patches are 144, which look like 12 x 12."""
    model = redrawn(ALL[name]())
    adapter_of(model).resize(model, (64, 144))
    resizes_to(redrawn(model), tmp_path / "m", 128, 288)


@pytest.mark.filterwarnings("ignore::UserWarning:timm.layers.interpolate")  # Its resampling of relative positions.
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "beit_base_patch16_224"])
def test_models_of_timm_take_the_size_that_they_are_loaded_for(name: str, tmp_path: Path) -> None:
    side = 14 if "eva" in name else 16
    model = redrawn(timm.create_model(name, img_size=(2 * side, 3 * side), **SIZES).eval())
    resizes_to(model, tmp_path / "m", 4 * side, 4 * side)


def test_a_size_is_given_once_and_makes_sense(tmp_path: Path) -> None:
    vitrim.save(redrawn(HF["hf_vit"]()), tmp_path)
    assert adapter_of(load(tmp_path, img_size=56, image_size=(56, 56))).covers
    with pytest.raises(VitrimError, match="mean the same; give one of them"):
        load(tmp_path, img_size=56, image_size=48)
    for size in (0, -8, True, 5.5, "56", (56,), (56, 0), (1, 2, 3)):
        with pytest.raises(VitrimError, match=r"it must be a side in pixels or \(height, width\)"):
            load(tmp_path, img_size=size)  # pyright: ignore[reportArgumentType]
    with pytest.raises(VitrimError, match="smaller than one patch"):
        load(tmp_path, img_size=5)


def test_positions_of_another_size_than_the_images(tmp_path: Path) -> None:
    """Models that take images of all sizes keep the positions of one, also as a checkpoint."""
    model = redrawn(HF["hf_dinov2"]())
    adapter_of(model).resize(model, 56)
    vitrim.save(model, tmp_path)
    args = {key: value for key, value in adapter_of(model).describe(model).args.items() if "size" not in key}
    other = vitrim.build_model(
        type(model).__name__, checkpoint=tmp_path, img_size=56, patch_size=8, **args, hidden_size=24
    )
    x = images(1, 56)
    torch.testing.assert_close(predicted(other, x), predicted(model, x), atol=0.05, rtol=0.05)
    with pytest.raises(VitrimError, match="leave position_size out"):
        vitrim.build_model("ViTModel", img_size=64, position_size=32)
    with pytest.raises(VitrimError, match="make a square, not 32 x 64 px; give position_size=SIDE"):
        vitrim.build_model("Dinov2Model", img_size=(32, 64), patch_size=16)
