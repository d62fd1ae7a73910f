"""One door: whatever reads an image for a model, training, evaluation, a study or a picture, gives the same pixels."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

import vitrim
from vitrim.data.data_sets import open_both
from vitrim.data.decode import read_image
from vitrim.data.specs import AugmentSpec, DataSpec
from vitrim.data.splits import make_splits, plain_stream
from vitrim.errors import UnknownNameError
from vitrim.models.input_format import InputFormat
from vitrim.showing.view import View
from vitrim.study import compare

SIZES = {"patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 2}
CROPS = {"squash": (1.0, 0.8), "border": (1.0, 0.9), "center": (1.0, 0.875)}


def model_of(mode: str, crop_pct: float, **sizes: Any) -> nn.Module:
    overlay = {"crop_mode": mode, "crop_pct": crop_pct, "interpolation": "bicubic", "mean": (0.4, 0.5, 0.6)}
    given = {"img_size": 32, **SIZES, **sizes}
    return timm.create_model("vit_tiny_patch16_224", pretrained_cfg_overlay=overlay, **given)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Wide and tall photographs, some of them turned by their EXIF data, one with 16 bits."""
    for split in ("train", "val"):
        for label in ("a", "b"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for number, size in enumerate(((60, 30), (24, 70), (41, 40))):
                image = Image.radial_gradient("L").resize(size)
                wide = Image.merge("RGB", (image, image.point(lambda v: 255 - v), Image.new("L", size, 40 * number)))
                exif = Image.Exif()
                exif[0x0112] = (1, 6, 8)[number]
                wide.save(folder / f"{number}.jpg", exif=exif)
            Image.linear_gradient("L").convert("I").point(lambda v: v * 257).resize((50, 20)).convert("I;16").save(
                folder / "deep.png"
            )
    return tmp_path / "images"


def reference(model: nn.Module, path: str) -> Tensor:
    """The pixels as timm makes them of an upright image."""
    config = resolve_model_data_config(model) | {"input_size": (3, 32, 32)}
    transform: Any = create_transform(**config, is_training=False)
    return transform(read_image(path, "RGB"))


@pytest.mark.parametrize(("mode", "crop_pct"), [(mode, pct) for mode, pcts in CROPS.items() for pct in pcts])
def test_training_evaluation_study_and_pictures_get_the_same_pixels(mode: str, crop_pct: float, root: Path):
    model = model_of(mode, crop_pct)
    assert InputFormat.of(model).crop_mode == mode
    spec = DataSpec(name="folder", root=str(root), workers=0, holdout=0.5)
    expected = {str(path): reference(model, str(path)) for path in root.rglob("*.*")}
    splits = make_splits(*open_both(spec), model, spec, AugmentSpec(), seed=0)
    assert splits.select is not None
    plain = [plain_stream(model, spec, train) for train in (False, True)]
    for stream in (splits.train, splits.select, splits.test, *plain):
        for pixels, _, index in stream:
            assert torch.equal(pixels, expected[stream.images.name(index)])
    with vitrim.attach(model, "TopK() @ KeepRate(0.5, at=(1,))") as handle:
        shown = {source.name: source.load() for source in View(model, handle).sources(root)}
    assert {name: pixels.shape for name, pixels in shown.items()} == dict.fromkeys(shown, (3, 32, 32))
    for name, pixels in shown.items():
        assert torch.equal(pixels, expected[str(root / name)])
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, given: seen.extend(given[0]))
    compare.evaluate_variants({("m", "dense"): model}, spec, device="cpu")
    for given, (pixels, *_) in zip(seen, plain[0], strict=True):
        assert torch.equal(given, pixels)


def test_the_whole_image_is_in_the_input_of_a_squash_model(root: Path):
    stripes = Image.new("RGB", (90, 30))
    stripes.paste("red", (0, 0, 8, 30))  # A centre crop of 30 by 30 shows neither edge.
    stripes.paste("blue", (82, 0, 90, 30))
    stripes.save(root / "val" / "a" / "edges.png")
    for mode, visible in (("squash", True), ("center", False)):
        model = model_of(mode, 1.0, img_size=30, patch_size=15)
        stream = plain_stream(model, DataSpec(name="folder", root=str(root)))
        names = [Path(stream.images.name(index)).name for index in range(len(stream))]
        pixels = stream[names.index("edges.png")][0]
        assert (float(pixels[0, :, 0].mean()) > float(pixels[0, :, 15].mean()) + 1) == visible
        assert (float(pixels[2, :, -1].mean()) > float(pixels[2, :, 15].mean()) + 1) == visible


@pytest.mark.parametrize("unknown", [{"crop_mode": "centre"}, {"interpolation": "random"}])
def test_names_that_timm_would_take_for_others_are_refused(unknown: dict[str, str]):
    model = timm.create_model("vit_tiny_patch16_224", depth=1, pretrained_cfg_overlay=unknown)
    with pytest.raises(UnknownNameError, match=r"(crop mode|interpolation)"):
        InputFormat.of(model)


@pytest.mark.parametrize("crop", ["none", "pad"])
def test_training_without_random_crops_resizes_as_evaluation_does(crop: str, root: Path):
    model = model_of("center", 0.8)
    spec = DataSpec(name="folder", root=str(root), workers=0, holdout=0.0)
    train_images, test_images = open_both(spec)
    train = make_splits(train_images, test_images, model, spec, AugmentSpec(crop=crop), 0).train  # pyright: ignore[reportArgumentType]
    plain = plain_stream(model, spec, train=True)
    if crop == "none":
        assert all(torch.equal(train[at][0], plain[at][0]) for at in range(len(plain)))
        return
    for at in range(len(plain)):  # Shifted by up to 4 pixels.
        whole, part = torch.nn.functional.pad(plain[at][0], (4, 4, 4, 4), value=float("nan")), train[at][0]
        shifts = [(whole[:, y : y + 32, x : x + 32], y, x) for y in range(9) for x in range(9)]
        assert any(torch.equal(window.nan_to_num(9), torch.where(window.isnan(), 9, part)) for window, *_ in shifts)


def test_statistics_of_three_channels_serve_a_grey_model(root: Path):
    model = model_of("squash", 1.0, in_chans=1)
    stream = plain_stream(model, DataSpec(name="folder", root=str(root)))
    assert stream[0][0].shape == (1, 32, 32)
    with vitrim.attach(model, "TopK() @ KeepRate(0.5, at=(1,))") as handle:
        name = Path(stream.images.name(0)).relative_to(root).as_posix()
        source = next(one for one in View(model, handle).sources(root) if one.name == name)
        assert torch.equal(source.load(), stream[0][0])
