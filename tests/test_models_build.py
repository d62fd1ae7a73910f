"""Models by name, from folders and from files of weights; and every file that is not what it should be."""

import os
import pickle
import re

import pytest
import timm
import torch
from safetensors.torch import save_file

import vitrim
from vitrim.errors import CheckpointError, UnknownNameError, VitrimError
from vitrim.models import has_weights, open_model
from vitrim.models.files.build import check_name
from vitrim.models.files.checkpoints import read_weights

NAME = "vit_tiny_patch16_224"
SIZES = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}


def tiny(num_classes=5, **args):
    return timm.create_model(NAME, num_classes=num_classes, **{**SIZES, **args}).eval()


def build(checkpoint, **args):
    return vitrim.build_model(NAME, checkpoint=checkpoint, **{**SIZES, **args}).eval()


class Code:
    """An object whose unpickling would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_by_name():
    assert vitrim.build_model(NAME, num_classes=7, **SIZES).head.out_features == 7
    assert vitrim.build_model(NAME, num_classes=0, **SIZES).num_classes == 0
    assert vitrim.build_model("vitrim_digits_vit", depth=1).num_classes == 10


@pytest.mark.parametrize("name", ["deit_smal_patch16_224", "vit_tiny_patch16_225", "vitrim_digit_vit"])
def test_unknown_name_is_answered_with_the_nearest(name):
    with pytest.raises(UnknownNameError, match=r"did you mean (deit_small|vit_tiny|vitrim_digits)"):
        vitrim.build_model(name)


def test_name_near_nothing_is_answered_with_a_short_list():
    with pytest.raises(UnknownNameError, match="vitrim_digits_vit") as caught:
        vitrim.build_model("zzzzzz")
    assert len(str(caught.value)) < 500


def test_arguments_that_a_model_does_not_take():
    with pytest.raises(VitrimError, match=r"does not take these arguments.*keep_rate"):
        vitrim.build_model(NAME, keep_rate=0.5)
    with pytest.raises(VitrimError, match="smaller than one patch"):
        vitrim.build_model(NAME, img_size=8)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "args": None, "epoch": 3},
        lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
        lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()},
        lambda state: {"model": {name: value + 1 for name, value in state.items()}, "model_ema": state},
    ],
)
def test_usual_nestings(tmp_path, wrap):
    model = tiny()
    torch.save(wrap(model.state_dict()), tmp_path / "weights.pth")
    loaded = build(tmp_path / "weights.pth")
    assert loaded.num_classes == 5
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_safetensors_and_old_pickles(tmp_path):
    model, images = tiny(), torch.randn(2, 3, 32, 32)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    torch.save(model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(build(tmp_path / "weights.safetensors")(images), model(images))
    assert torch.equal(build(tmp_path / "old.pt")(images), model(images))


def test_positions_are_resampled_to_another_image_size(tmp_path):
    torch.save(tiny(img_size=64).state_dict(), tmp_path / "weights.pth")
    assert build(tmp_path / "weights.pth", img_size=48).pos_embed.shape == (1, 10, 32)


def test_weights_without_a_classifier_say_what_to_do(tmp_path):
    state = tiny(5).state_dict()
    torch.save({f"classifier.{name[5:]}" if name.startswith("head.") else name: state[name] for name in state},
               tmp_path / "weights.pth")  # fmt: skip
    with pytest.raises(CheckpointError, match=r"2 missing \(head.weight, head.bias\).* ask for reset_head=True"):
        build(tmp_path / "weights.pth", num_classes=5)
    body = {name: value for name, value in state.items() if not name.startswith("head.")}
    torch.save(body | {"blocks.0.norm1.weight": torch.ones(7)}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="of another shape"):
        build(tmp_path / "weights.pth", num_classes=5)


def test_wrong_number_of_classes(tmp_path):
    model = tiny(5)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"has 5 classes, the model 3; ask for num_classes=5, or reset_head=True"):
        build(tmp_path / "weights.pth", num_classes=3)
    fresh = build(tmp_path / "weights.pth", num_classes=3, reset_head=True)
    assert fresh.head.weight.shape == (3, 32)
    assert torch.equal(fresh.blocks[1].mlp.fc2.weight, model.blocks[1].mlp.fc2.weight)
    same_size = build(tmp_path / "weights.pth", num_classes=5, reset_head=True)
    assert not torch.equal(same_size.head.weight, model.head.weight)
    headless = build(tmp_path / "weights.pth", num_classes=0)
    assert torch.equal(headless(torch.ones(1, 3, 32, 32)), model.forward_head(
        model.forward_features(torch.ones(1, 3, 32, 32)), pre_logits=True))  # fmt: skip


def test_distilled_heads_go_together(tmp_path):
    name, sizes = "deit_tiny_distilled_patch16_224", SIZES
    torch.save(timm.create_model(name, num_classes=5, **sizes).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="has 5 classes, the model 3"):
        vitrim.build_model(name, checkpoint=tmp_path / "weights.pth", num_classes=3, **sizes)
    model = vitrim.build_model(name, checkpoint=tmp_path / "weights.pth", num_classes=3, reset_head=True, **sizes)
    assert model.head.out_features == model.head_dist.out_features == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("norm.weight"), r"1 missing \(norm.weight\)"),
        (lambda s: s.update(extra=torch.zeros(2)), r"1 left over \(extra\)"),
        (lambda s: s.update({"norm.bias": torch.zeros(3)}), r"norm.bias \(3,\) in place of \(32,\)"),
        (lambda s: [s.pop(n) for n in list(s) if "blocks.1" in n], r"12 missing \(.*, \.\.\.\)$"),
        (lambda s: s.update(pos_embed=torch.zeros(1, 8, 32)), "7 positions make no square grid"),
    ],
)
def test_misfits_are_named_in_one_line(tmp_path, change, message):
    state = tiny().state_dict()
    change(state)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=message) as caught:
        build(tmp_path / "weights.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle", "whole model"])
def test_code_is_refused_and_not_run(tmp_path, how):
    path, trap = tmp_path / "weights.pth", tmp_path / "trap"
    if how == "pickle":
        path.write_bytes(pickle.dumps({"a": Code(trap)}))
    elif how == "whole model":
        torch.save(tiny(), path)
    else:
        torch.save({"a": Code(trap)}, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(CheckpointError, match=r"holds code \(.*\), refused; convert it to safetensors"):
        build(path)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pth", b"", "is empty"),
        ("a.safetensors", b"", "is empty"),
        ("a.pth", b"<!DOCTYPE html><html>404</html>", "web page"),
        ("a.safetensors", b"\n<html>404</html>", "web page"),
        ("a.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        ("a.pth", b"just some words in a file", "no file of weights"),
        ("a.safetensors", b"just some words in a file", "no file of weights"),
    ],
)
def test_files_that_are_no_weights(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_weights(tmp_path / name)


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.99])
@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_cut_short(tmp_path, form, fraction):
    path = tmp_path / ("a.safetensors" if form == "safetensors" else "a.pth")
    if form == "safetensors":
        save_file(tiny().state_dict(), path)
    else:
        torch.save(tiny().state_dict(), path, _use_new_zipfile_serialization=form == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(CheckpointError, match=re.escape(str(path))) as caught:
        read_weights(path)
    assert "holds code" not in str(caught.value)


def test_content_that_is_no_state_dict(tmp_path):
    for content in ([torch.zeros(1)], {"a": 1}, {}, {"model": {"a": "b"}}):
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(CheckpointError, match="no state dict"):
            read_weights(tmp_path / "a.pth")


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match="no file of weights at"):
        build(tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match="no file of weights at"):
        vitrim.build_model(tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match="nothing at"):
        vitrim.build_model(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no model at"):
        vitrim.build_model(tmp_path)


def test_a_file_without_architecture_asks_for_one(tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="does not say its architecture"):
        vitrim.build_model(tmp_path / "weights.pth")


def test_own_folder_as_model_and_as_checkpoint(tmp_path):
    model, images = tiny(), torch.randn(2, 3, 32, 32)
    vitrim.save(model, tmp_path / "saved")
    for spec in (tmp_path / "saved", tmp_path / "saved" / "model.safetensors"):
        assert torch.equal(vitrim.build_model(spec)(images), model(images))
    assert torch.equal(build(tmp_path / "saved")(images), model(images))
    with pytest.raises(CheckpointError, match="has 5 classes, not the 3 asked for"):
        vitrim.build_model(tmp_path / "saved", num_classes=3)
    fresh = vitrim.build_model(tmp_path / "saved", num_classes=3, reset_head=True)
    assert fresh.head.out_features == 3
    with pytest.raises(CheckpointError, match="brings its own weights"):
        vitrim.build_model(tmp_path / "saved", checkpoint=tmp_path / "saved")


def test_weights_learnt_with_other_heads(tmp_path):
    vitrim.save(vitrim.build_model(NAME, num_classes=3, **SIZES), tmp_path / "saved")
    heads = vitrim.load(tmp_path / "saved").blocks[0].attn.num_heads
    for checkpoint in (tmp_path / "saved", tmp_path / "saved" / "model.safetensors"):
        with pytest.raises(CheckpointError, match=rf"trained with {heads} .* ask for num_heads={heads}"):
            vitrim.build_model(NAME, checkpoint=checkpoint, **SIZES | {"num_heads": 2 * heads})
        vitrim.build_model(NAME, checkpoint=checkpoint, **SIZES | {"num_heads": heads})


def test_averaged_and_plain_weights_of_the_official_dinov2_form(tmp_path):
    name, sizes = "vit_small_patch14_reg4_dinov2", {"img_size": 28, "depth": 1, "embed_dim": 24, "num_heads": 2}
    model = timm.create_model(name, **sizes).eval()
    state = dict(model.state_dict())
    state["register_tokens"] = state.pop("reg_token")
    state["mask_token"] = torch.zeros(1, 24)
    # The official files hold one position more, for CLS, whose own embedding timm adds to the token.
    state["pos_embed"] = torch.cat([torch.zeros(1, 1, 24), state["pos_embed"]], 1)
    torch.save(state, tmp_path / "dinov2.pth")
    loaded = vitrim.build_model(name, checkpoint=tmp_path / "dinov2.pth", **sizes).eval()
    images = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(loaded(images), model(images))


def test_bare_names_stand_for_random_weights(tmp_path):
    vitrim.save(tiny(), tmp_path / "saved")
    known = (str(tmp_path / "saved"), f"{NAME}@file.pth", f"{NAME}@pretrained", "hf-hub:someone/model")
    assert [has_weights(spec) for spec in (NAME, *known)] == [False, True, True, True, True]


def test_what_timm_saved_is_opened_with_its_weights(tmp_path):
    model = tiny().eval()
    timm.models.save_for_hf(model, tmp_path / "timm")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(open_model(f"local-dir:{tmp_path}/timm").eval()(images), model(images))


def test_sizes_that_do_not_go_together_are_one_line():
    with pytest.raises(VitrimError, match=r"vit_tiny_patch16_224 cannot be built with .*'embed_dim': 50") as caught:
        vitrim.build_model(NAME, embed_dim=50)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "way"),
    [
        ("vit_tiny_patch16_224@w.pth", "checkpoint='w.pth' beside it"),
        ("vit_tiny_patch16_224@/none/w", "checkpoint='/none/w' beside it"),
        ("vit_tiny_patch16_224@w.pth@128x288", r"checkpoint='w.pth', checkpoint_size=\(128, 288\) beside it"),
        ("vit_tiny_patch16_224@pretrained", "pretrained=True beside it"),
        ("ViTModel@w.safetensors", "give ViTModel as the name, and checkpoint='w.safetensors' beside it"),
    ],
)
def test_a_name_with_weights_in_one_text_names_the_way_out(spec: str, way: str) -> None:
    with pytest.raises(CheckpointError, match=f"as commands take them; .*{way}"):
        vitrim.build_model(spec)
    with pytest.raises(CheckpointError, match=f"as commands take them; .*{way}"):
        check_name(spec)  # As a recipe does before anything is read.
