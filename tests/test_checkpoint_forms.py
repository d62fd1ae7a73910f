"""Checkpoints as people's training scripts write them: nests, prefixes, averaged weights, plain objects around them."""

import argparse
import datetime
import logging
import pathlib
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

import vitrim
from vitrim.errors import CheckpointError
from vitrim.models import open_model
from vitrim.models.files.checkpoints import read_weights

NAME = "vit_tiny_patch16_224"
SIZES = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=5, **SIZES).eval()


def opened(content, tmp_path, **args):
    torch.save(content, tmp_path / "w.pth")
    return vitrim.build_model(NAME, checkpoint=tmp_path / "w.pth", **{**SIZES, **args})


def same(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def shifted(state):
    return {name: value + 1 for name, value in state.items()}


def under(prefix, state, **others):
    return {f"{prefix}{name}": value for name, value in state.items()} | others


@pytest.mark.parametrize(
    "nest",
    ["model_state_dict", "net", "network", "student", "teacher", "weights", "params", "module", "state_dict", "my_net"],
)
def test_weights_under_usual_names(nest, model, tmp_path):
    content = {"epoch": 3, nest: model.state_dict(), "optimizer": {"state": {0: {"step": torch.ones(1)}}}}
    assert same(opened(content, tmp_path), model)
    assert same(opened({nest: {"state_dict": model.state_dict()}}, tmp_path), model)


@pytest.mark.parametrize("prefix", ["model.", "net.", "backbone.", "timm_model.", "module.", "model.backbone.vit."])
@pytest.mark.parametrize("others", [{}, {"criterion.weight": torch.ones(3), "n_averaged": torch.tensor(7)}])
def test_one_prefix_is_removed_and_reported(prefix, others, model, tmp_path, caplog):
    assert same(opened({"state_dict": under(prefix, model.state_dict(), **others)}, tmp_path), model)
    said = " ".join(caplog.messages)
    if others or prefix != "module.":
        assert f"took the weights under {prefix}" in said
        assert ("criterion" in said) == bool(others)


def test_names_of_a_model_that_has_the_prefix_itself_stay(tmp_path):
    """timm's distilled and hybrid models have names such as patch_embed.backbone; nothing of them is a prefix."""
    name = "deit_tiny_distilled_patch16_224"
    model = timm.create_model(name, num_classes=5, **SIZES)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    assert same(vitrim.build_model(name, checkpoint=tmp_path / "w.pth", **SIZES), model)


@pytest.mark.parametrize("nest", ["ema_state_dict", "params_ema", "EMA", "swa_model", "avg_model_state_dict"])
@pytest.mark.parametrize("raw", ["model", "state_dict", "model_state_dict"])
def test_averaged_weights_are_taken_and_reported(nest, raw, model, tmp_path, caplog):
    assert same(opened({raw: shifted(model.state_dict()), nest: model.state_dict()}, tmp_path), model)
    assert f"took the weights under {nest}, not {raw}" in caplog.text


def test_other_weights_next_to_those_that_are_taken_are_reported(model, tmp_path, caplog):
    state = model.state_dict()
    lists = {"shadow_params": list(shifted(state).values())}  # As torch_ema keeps them, without names.
    content = {"model": state, "best": shifted(state), "ema": lists, "ema_optimizer": {"momentum": torch.ones(3)}}
    assert same(opened(content, tmp_path), model)
    assert "took the weights under model, not ema, best" in caplog.text


def test_averaged_weights_next_to_plain_ones_in_one_state_dict(model, tmp_path, caplog):
    state = model.state_dict()
    content = under("model.", shifted(state)) | under("ema.module.", state)
    assert same(opened({"state_dict": content}, tmp_path), model)
    assert "took the weights under ema.module." in caplog.text


def test_the_teacher_of_self_distillation_is_an_average_of_its_student(model, tmp_path, caplog):
    state = model.state_dict()
    assert same(opened({"student": shifted(state), "teacher": state, "epoch": 1}, tmp_path), model)
    assert "took the weights under teacher, not student" in caplog.text
    larger = timm.create_model(NAME, **{**SIZES, "depth": 3}).state_dict()
    assert same(opened({"student": state, "teacher": larger}, tmp_path), model)


def test_two_models_of_equal_right_are_refused(model, tmp_path):
    state = model.state_dict()
    with pytest.raises(CheckpointError, match=r"weights of several models \(left\., right\.\)"):
        opened({"state_dict": under("left.", state) | under("right.", state)}, tmp_path)
    with pytest.raises(CheckpointError, match=r"several state dicts \(left, right\)"):
        opened({"left": state, "right": state}, tmp_path)


def test_plain_objects_next_to_the_weights_are_no_code(model, tmp_path):
    content = {
        "model": OrderedDict(model.state_dict()),
        "args": argparse.Namespace(lr=0.1, out=pathlib.Path("/a/b")),
        "path": pathlib.Path("/a/b"),
        "best": np.float64(0.5),
        "step": np.int64(3),
        "curve": np.ones(3),
        "kind": np.dtype("float32"),
        "when": datetime.datetime(2024, 1, 1),
        "history": defaultdict(list, loss=[0.1, 0.2]),
        "counts": defaultdict(int, seen=3),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "shape": torch.Size([1, 2]),
        "seen": {1, 2},
        ("a", 1): b"bytes",
        "rng": torch.get_rng_state(),
    }
    assert same(opened(content, tmp_path), model)
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(vitrim.build_model(NAME, checkpoint=tmp_path / "old.pth", **SIZES), model)
    torch.save(content, tmp_path / "new.pth", pickle_protocol=5)
    assert same(vitrim.build_model(NAME, checkpoint=tmp_path / "new.pth", **SIZES), model)


def test_a_lightning_checkpoint(model, tmp_path, caplog):
    content = {
        "epoch": 3,
        "global_step": 99,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": under("net.", model.state_dict(), **{"loss.weight": torch.ones(5)}),
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5), "dirpath": "/x"}},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}],
        "hyper_parameters": {"lr": 0.1},
    }
    torch.save(content, tmp_path / "last.ckpt")
    assert same(vitrim.build_model(NAME, checkpoint=tmp_path / "last.ckpt", **SIZES), model)
    assert "took the weights under net., without loss" in caplog.text


def test_names_of_hugging_face_are_refused_in_one_line(tmp_path):
    state = {
        "vit.embeddings.cls_token": torch.ones(1, 1, 32),
        "vit.embeddings.patch_embeddings.projection.weight": torch.ones(32, 3, 16, 16),
        "vit.encoder.layer.0.attention.attention.query.weight": torch.ones(32, 32),
    }
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="names of Hugging Face transformers"):
        vitrim.build_model(NAME, checkpoint=tmp_path / "model.safetensors", **SIZES)


def test_torchvision_weights_under_a_prefix(tmp_path):
    net = TorchvisionViT(
        image_size=32, patch_size=16, num_layers=2, num_heads=2, hidden_dim=128, mlp_dim=64, num_classes=3
    )
    torch.save({"state_dict": under("model.", net.state_dict(), **{"loss.weight": torch.ones(2)})}, tmp_path / "w.ckpt")
    ours, images = vitrim.build_model(tmp_path / "w.ckpt").eval(), torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(ours(images), net.eval()(images))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.complex64, torch.int64])
def test_weights_that_are_not_real_numbers_are_refused(dtype, model, tmp_path):
    state = {**model.state_dict(), "head.weight": model.head.weight.detach().to(dtype)}
    with pytest.raises(CheckpointError, match=r"holds \w+ values for head.weight; convert them"):
        opened(state, tmp_path)
    for good in (torch.float16, torch.bfloat16, torch.float64):
        opened({**state, "head.weight": model.head.weight.detach().to(good)}, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, model, tmp_path):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["norm.bias"][3] = value
    with pytest.raises(CheckpointError, match=r"not finite \(in norm.bias\)"):
        opened(state, tmp_path)
    broken = timm.create_model(NAME, num_classes=5, **SIZES)
    broken.load_state_dict(state)
    vitrim.save(broken, tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"not finite \(in norm.bias\)"):
        vitrim.load(tmp_path / "m")


def test_weights_stay_what_they_were_when_the_file_changes(model, tmp_path):
    path = vitrim.save(model, tmp_path / "m") / "model.safetensors"
    loaded, read = vitrim.load(tmp_path / "m"), read_weights(path)
    path.write_bytes(b"\xff" * path.stat().st_size)
    path.write_bytes(b"")  # Touching mapped memory would end the process.
    assert same(loaded, model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in read.items())


def test_tied_and_odd_tensors_come_as_they_were_saved(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    content = {
        "whole": base, "view": base[1:3, ::2], "turned": base.t(), "scalar": torch.tensor(3.0),
        "empty": torch.ones(0, 4), "short": torch.ones(2, dtype=torch.uint16),
        "eight": torch.ones(2).to(torch.float8_e4m3fn), "parameter": torch.nn.Parameter(torch.ones(2)),
    }  # fmt: skip
    for new in (True, False):
        kept = content if new else {name: value for name, value in content.items() if name not in ("short", "eight")}
        torch.save(kept, tmp_path / "w.pth", _use_new_zipfile_serialization=new)
        read = read_weights(tmp_path / "w.pth")
        assert read.keys() == kept.keys()
        for name, value in kept.items():
            assert read[name].dtype == value.dtype
            assert torch.equal(read[name].float(), value.float())


def test_reports_reach_a_terminal_as_one_line(model, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        opened({"ema": model.state_dict(), "model": model.state_dict()}, tmp_path)
    assert all("\n" not in message and len(message) < 500 for message in caplog.messages)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pth")
    caplog.clear()
    vitrim.build_model(NAME, checkpoint=tmp_path / "w.pth", **SIZES)
    assert not caplog.messages
    assert open_model("vitrim_digits_vit") is not None
