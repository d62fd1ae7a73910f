"""Weights at another input size: the grid of their positions is known, or the file is refused; never guessed wrong."""

import json

import pytest
import timm
import torch
from timm.layers.pos_embed import resample_abs_pos_embed

import vitrim
from vitrim import cli
from vitrim.errors import CheckpointError, VitrimError
from vitrim.models import open_model
from vitrim.models.files.build import split_spec
from vitrim.train.learner import prepare_model
from vitrim.train.recipe import Recipe
from vitrim.train.specs import ModelSpec
from vitrim.verbs.cutting import _recipe_for

NAME = "vit_tiny_patch16_224"
SIZES = {"depth": 1, "embed_dim": 32, "num_heads": 2, "num_classes": 3}


def made(name=NAME, **args):
    torch.manual_seed(0)
    return timm.create_model(name, **{**SIZES, **args}).eval()


def written(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "w.pth")
    return tmp_path / "w.pth"


def build(checkpoint, name=NAME, **args):
    return vitrim.build_model(name, checkpoint=checkpoint, **{**SIZES, **args})


def resampled(model, old, new, prefix=1):
    return resample_abs_pos_embed(model.pos_embed.detach(), list(new), list(old), prefix)


@pytest.mark.parametrize("name", [NAME, "vitrim_hybrid_vit"])
def test_a_saved_model_knows_its_grid_when_opened_at_another_size(name, tmp_path):
    """8 x 18 patches are 144, which look like 12 x 12."""
    patch = 16 if name == NAME else 2
    model = made(name, img_size=(8 * patch, 18 * patch))
    folder = vitrim.save(model, tmp_path / "m")
    for checkpoint in (folder, folder / "model.safetensors"):
        larger = build(checkpoint, name, img_size=(16 * patch, 36 * patch))
        assert torch.equal(larger.pos_embed, resampled(model, (8, 18), (16, 36)))


def test_a_grid_in_doubt_is_refused_unless_the_size_is_given(tmp_path):
    model = made(img_size=(128, 288))
    path = written(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"12 x 12 or 8 x 18 patches; say the size of the images"):
        build(path, img_size=(256, 576))
    with pytest.raises(CheckpointError, match=r"12 x 12 or 8 x 18 patches; say the size of the images"):
        build(path, img_size=(128, 288))
    larger = build(path, img_size=(256, 576), checkpoint_size=(128, 288))
    assert torch.equal(larger.pos_embed, resampled(model, (8, 18), (16, 36)))
    assert torch.equal(build(path, checkpoint_size=(128, 288)).pos_embed, model.pos_embed)
    with pytest.raises(CheckpointError, match="144 positions do not belong to images of 128 x 128 px"):
        build(path, img_size=(256, 576), checkpoint_size=128)


def test_a_grid_that_is_not_square_is_refused_unless_it_is_the_models_own(tmp_path):
    path = written(model := made(img_size=(32, 96)), tmp_path)
    assert torch.equal(build(path, img_size=(32, 96)).pos_embed, model.pos_embed)
    for size in (224, (64, 96), (64, 192)):
        with pytest.raises(CheckpointError, match="its 12 positions make no square grid"):
            build(path, img_size=size)


DIGITS, HIGH = "vitrim_digits_vit", (8, 18)  # 144 patches.


def high_digits(tmp_path):
    torch.manual_seed(0)
    model = vitrim.build_model(DIGITS, img_size=HIGH)
    return model, written(model, tmp_path)


def test_a_command_takes_the_size_of_the_images_that_weights_were_trained_on(tmp_path, capsys):
    model, path = high_digits(tmp_path)
    out = tmp_path / "table.json"
    words = ["--method", "dense", "--rounds", "1", "--batch_size", "1", "--out", str(out)]
    cli.main(["bench", f"{DIGITS}@{path}@8x18", *words])
    capsys.readouterr()
    assert json.loads(out.read_text())["rows"][0]["macs"] == vitrim.cost(model).macs
    opened = open_model(f"{DIGITS}@{path}@8x18")
    assert torch.equal(opened.pos_embed, model.pos_embed)
    assert torch.equal(open_model(f"{DIGITS}@{path}@8x18", 8).pos_embed, resampled(model, (8, 18), (8, 8)))


def test_a_recipe_takes_the_size_of_the_images_that_weights_were_trained_on(tmp_path):
    model, path = high_digits(tmp_path)
    spec = ModelSpec(name=DIGITS, checkpoint=str(path), checkpoint_size=[*HIGH])
    assert torch.equal(prepare_model(spec, None, 8).pos_embed, resampled(model, (8, 18), (8, 8)))
    recipe = _recipe_for(f"{DIGITS}@{path}@8x18", {"name": "digits"}, None, 3, None, None)
    assert recipe.model == spec
    recipe.check()
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"checkpoint": "w.pth", "checkpoint_size": [16]}, r"must be the height and the width of the images of"),
        ({"checkpoint_size": [16, 36]}, r"must be the height and the width of the images of model\.checkpoint"),
        ({"checkpoint": "w.pth", "checkpoint_size": [0, 36]}, r"it must be 1 or more"),
        ({"args": {"checkpoint_size": [16, 36]}}, r"set model\.checkpoint_size instead"),
    ],
)
def test_sizes_that_belong_to_no_weights_are_refused(options, error):
    with pytest.raises(VitrimError, match=error):
        Recipe.from_dict({"model": options}).check()


def test_texts_of_models_with_an_at_sign(tmp_path):
    with pytest.raises(CheckpointError, match=f"{DIGITS}@ names no weights"):
        _recipe_for(f"{DIGITS}@", {"name": "digits"}, None, 3, None, None)
    with pytest.raises(CheckpointError, match="checkpoint_size is that of the images of a checkpoint"):
        vitrim.build_model(DIGITS, checkpoint_size=8)
    folder = vitrim.save(vitrim.build_model(DIGITS, depth=1), tmp_path / "a@8x8")
    assert _recipe_for(str(folder), {"name": "digits"}, None, 3, None, None).model == ModelSpec(name=str(folder))
    path = tmp_path / "w.pth@8x18"  # A file of that very name.
    path.touch()
    assert split_spec(f"{DIGITS}@{path}") == (DIGITS, str(path), None)


def test_square_grids_are_resampled_to_any_other(tmp_path):
    path = written(model := made(img_size=64), tmp_path)
    assert torch.equal(build(path, img_size=(48, 80)).pos_embed, resampled(model, (4, 4), (3, 5)))


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", NAME])
def test_a_model_takes_the_size_of_its_checkpoint_and_says_so(name, tmp_path, caplog):
    patch = 16 if name == NAME else 14
    model = made(name, img_size=2 * patch, depth=12, embed_dim=384 if name != NAME else 192, num_heads=6)
    spec = f"{name}@{written(model, tmp_path)}"
    opened = open_model(spec)
    size = opened.patch_embed.img_size
    assert size == (2 * patch, 2 * patch)
    assert f"takes images of {2 * patch} x {2 * patch} px" in caplog.text
    assert torch.equal(opened.pos_embed, model.pos_embed)
    assert vitrim.cost(opened).macs < vitrim.cost(timm.create_model(name)).macs / 4
    vitrim.save(opened, tmp_path / "m")
    assert vitrim.load(tmp_path / "m").patch_embed.img_size == size
    kept = vitrim.build_model(name, checkpoint=tmp_path / "w.pth", img_size=4 * patch)
    assert kept.patch_embed.img_size == (4 * patch, 4 * patch)


def test_official_dinov2_weights_of_another_size(tmp_path):
    name = "vit_small_patch14_reg4_dinov2"
    model = made(name, img_size=28)
    state = dict(model.state_dict())
    state["register_tokens"] = state.pop("reg_token")
    state["mask_token"] = torch.zeros(1, 32)
    state["pos_embed"] = torch.cat([torch.zeros(1, 1, 32), state["pos_embed"]], 1)
    torch.save(state, tmp_path / "w.pth")
    assert torch.equal(build(tmp_path / "w.pth", name).pos_embed, model.pos_embed)
    larger = build(tmp_path / "w.pth", name, img_size=56)
    torch.testing.assert_close(larger.pos_embed, resampled(model, (2, 2), (4, 4), 0))


def test_patches_of_another_size_are_refused_unless_asked_for(tmp_path):
    path = written(made(img_size=28, patch_size=14), tmp_path)
    with pytest.raises(CheckpointError, match="patches of 14 px, the model of 16 px; ask for patch_size=14"):
        build(path, img_size=32)
    assert build(path, patch_size=14).patch_embed.img_size == (28, 28)
    assert build(path, patch_size=16, img_size=32).patch_embed.proj.weight.shape[-1] == 16


def test_other_channels_registers_and_depth_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="images of 1 channels, the model of 3; ask for in_chans=1"):
        build(written(made(img_size=32, in_chans=1), tmp_path), img_size=32)
    with pytest.raises(CheckpointError, match="4 register tokens, the model 0; ask for reg_tokens=4"):
        build(written(made(img_size=32, reg_tokens=4), tmp_path), img_size=32)
    with pytest.raises(CheckpointError, match="0 register tokens, the model 4; ask for reg_tokens=0"):
        build(written(made("vit_small_patch14_dinov2", img_size=28), tmp_path), "vit_small_patch14_reg4_dinov2")
    with pytest.raises(CheckpointError, match="12 left over"):
        build(written(made(img_size=32, depth=2), tmp_path), img_size=32)


@pytest.mark.parametrize("shape", [(), (5,), (2, 5, 32), (0,), (1, 1, 5, 32), (1, 0, 32)])
def test_positions_of_odd_shapes_are_refused(shape, tmp_path):
    state = {**made(img_size=32).state_dict(), "pos_embed": torch.ones(shape)}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="positions") as refused:
        build(tmp_path / "w.pth", img_size=32)
    assert "\n" not in str(refused.value)
