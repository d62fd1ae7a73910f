"""Opening models of Hugging Face transformers from folders: weights, processor, class names, and what is refused."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vitrim
from calling import call
from hf_models import HF, LABELS, MORE, SMALL
from vitrim.errors import CheckpointError, ClassCountError, UnsupportedModelError, VitrimError
from vitrim.models import adapter_of, build_model, has_weights, open_model
from vitrim.models.files.build import check_name, is_architecture
from vitrim.models.files.classes import classes_of
from vitrim.models.input_format import InputFormat
from zoo import images, predicted, redrawn

NAMES = ["ant", "bee", "cat, tabby", "dog", "eel"]


def written(folder: Path, model: nn.Module, **options: Any) -> Path:
    """A folder of a model with its processor."""
    from transformers import ViTImageProcessor

    given = {"size": {"height": 40, "width": 40}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    model.save_pretrained(folder)
    ViTImageProcessor(**{**given, **options}).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = redrawn(HF["hf_vit"]())
    adapter_of(model).name_classes(model, NAMES)
    return written(tmp_path / "hf", model)


def test_a_file_of_weights_names_its_folder_and_a_folder_its_missing_processor(folder: Path) -> None:
    file = folder / "model.safetensors"
    for opens in (lambda: build_model(file), lambda: open_model(f"vit_tiny_patch16_224@{file}")):
        with pytest.raises(
            CheckpointError, match=f"give the folder that holds it as the model: {folder} or hf:{folder}"
        ):
            opens()
    (folder / "preprocessor_config.json").unlink()
    for spec in (str(folder), f"hf:{folder}"):
        with pytest.raises(CheckpointError, match=r"has no preprocessor_config.json.*\.save_pretrained\(FOLDER\)"):
            open_model(spec)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"the folder that holds it, with its config.json"):
        build_model(folder)


def test_a_folder_is_opened_with_its_processor_and_class_names(folder: Path, tmp_path: Path) -> None:
    x = images(2)
    for spec in (str(folder), f"hf:{folder}"):
        model = open_model(spec)
        assert torch.equal(predicted(model, x), predicted(redrawn(HF["hf_vit"]()), x))
        form = InputFormat.of(model)
        assert (form.size, form.mean, form.std) == ((3, 40, 40), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
        assert (form.interpolation, form.crop_pct, form.crop_mode) == ("bilinear", 1.0, "squash")
        assert classes_of(spec) == NAMES
        assert has_weights(spec)
        assert not is_architecture(spec)
        check_name(spec)
    vitrim.attach(model, "ToMe() @ ConstantR(4)")
    vitrim.save(model, tmp_path / "saved")
    back = vitrim.load(tmp_path / "saved")
    assert classes_of(tmp_path / "saved") == NAMES
    assert back.config.id2label[2] == "cat, tabby"
    assert InputFormat.of(back) == form
    assert open_model(str(folder), image_size=56)(images(1, 56)).logits.shape == (1, 5)
    loaded = type(redrawn(HF["hf_vit"]())).from_pretrained(folder)
    assert InputFormat.of(loaded) == form


def test_a_reduced_model_is_written_as_the_model_that_it_is(folder: Path, tmp_path: Path) -> None:
    model = open_model(str(folder))
    with vitrim.attach(model, "ToMe() @ ConstantR(4)"):
        written(tmp_path / "again", model)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["architectures"] == [
        "ViTForImageClassification"
    ]
    x = images(2)
    assert torch.equal(predicted(open_model(str(tmp_path / "again")), x), predicted(model, x))


def test_the_crop_of_a_processor_is_kept(tmp_path: Path) -> None:
    model = redrawn(MORE["clip_bare"]())
    crop = {"size": {"shortest_edge": 50}, "do_center_crop": True, "crop_size": {"height": 40, "width": 40}}
    form = InputFormat.of(open_model(str(written(tmp_path / "a", model, **crop, resample=3))))
    assert (form.interpolation, form.crop_pct, form.crop_mode) == ("bicubic", 0.8, "center")
    dino = redrawn(HF["hf_dinov2"]())
    opened = open_model(str(written(tmp_path / "b", dino, size={"height": 56, "width": 48})))
    assert InputFormat.of(opened).size == (3, 56, 48)
    assert vitrim.cost(opened).token_counts[0] == 3 + 42
    with pytest.raises(CheckpointError, match=r"the processor of .* gives images of \(56, 48\) px, which its"):
        open_model(str(written(tmp_path / "c", model, size={"height": 56, "width": 48})))
    with pytest.raises(CheckpointError, match="does not scale all images to one size"):
        open_model(str(written(tmp_path / "d", model, size={"shortest_edge": 40})))
    with pytest.raises(CheckpointError, match="does not scale all images to one size"):
        open_model(str(written(tmp_path / "e", model, **{**crop, "size": {"longest_edge": 50}})))
    crop = {"size": {"shortest_edge": 53}, "do_center_crop": True, "crop_size": {"height": 40, "width": 40}}
    form = InputFormat.of(open_model(str(written(tmp_path / "f", model, **crop))))
    assert math.floor(40 / form.crop_pct) == 53  # 40 / (40 / 53) is a little less.


def test_a_classifier_for_other_classes(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ClassCountError, match="has 5 classes, not the 3 asked for"):
        build_model(folder, num_classes=3)
    assert predicted(build_model(folder, num_classes=3, reset_head=True), images(1)).shape == (1, 3)
    bare = written(tmp_path / "bare", redrawn(MORE["dinov2_bare"]()))
    model = build_model(bare, num_classes=3)
    assert type(model).__name__ == "Dinov2ForImageClassification"
    assert predicted(model, images(1)).shape == (1, 3)
    assert type(build_model(bare)).__name__ == "Dinov2Model"


def test_folders_that_lack_something_say_what(folder: Path, tmp_path: Path) -> None:
    def without(name: str) -> str:
        path = written(tmp_path / name, redrawn(HF["hf_vit"]()))
        (path / name).unlink()
        return f"hf:{path}"

    for name, said in (
        ("model.safetensors", r"no weights \(model.safetensors\) of"),
        ("preprocessor_config.json", r"has no preprocessor_config.json, which says what images"),
        ("config.json", r"no configuration \(config.json\) of"),
    ):
        with pytest.raises(CheckpointError, match=said) as caught:
            open_model(without(name))
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="nothing at /nowhere/at/all"):
        open_model("hf:/nowhere/at/all")
    with pytest.raises(CheckpointError, match="brings its own weights; leave checkpoint out"):
        build_model(folder, checkpoint=folder / "model.safetensors")
    with pytest.raises(VitrimError, match="brings its own architecture; leave depth out"):
        build_model(folder, depth=3)
    from transformers import ResNetConfig

    ResNetConfig(num_labels=5).save_pretrained(tmp_path / "resnet")
    with pytest.raises(CheckpointError, match="is a model of the type 'resnet'; types that vitrim opens: "):
        open_model(str(tmp_path / "resnet"))
    state = redrawn(HF["hf_vit"]()).state_dict()
    from safetensors.torch import save_file

    save_file({name.replace("vit.layers", "vit.blocks"): value for name, value in state.items()},
              folder / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(CheckpointError, match=r"the weights of .* lack vit.layers.*of a ViTForImageClassification"):
        open_model(str(folder))


def test_a_model_without_its_processor_here_does_not_guess_the_format(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    model = type(redrawn(HF["hf_vit"]())).from_pretrained(folder)
    with pytest.raises(UnsupportedModelError, match="has no processor here; save it there"):
        InputFormat.of(model)


def test_without_the_library_the_command_to_install_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in ("hf:google/vit-base-patch16-224", "ViTForImageClassification"):
        with pytest.raises(VitrimError, match=r"transformers is not installed; run: pip install 'vitrim\[hf\]'"):
            build_model(name)


def test_kinds_of_models_are_built_by_name() -> None:
    given = {name: value for name, value in SMALL.items() if name != "image_size"}
    model = build_model("DeiTForImageClassification", img_size=40, num_classes=LABELS["num_labels"], **given)
    assert predicted(model, images(1)).shape == (1, 5)
    assert InputFormat.of(model).mean == (0.485, 0.456, 0.406)
    with pytest.raises(VitrimError, match="ViTModel does not take depth; it takes"):
        build_model("ViTModel", depth=3)
    with pytest.raises(CheckpointError, match="write hf:NAME, a name on the hub"):
        build_model("ViTModel", pretrained=True)
    with pytest.raises(VitrimError, match="ViTModel cannot be built with"):
        build_model("ViTModel", num_hidden_layers="many")


@pytest.mark.parametrize("method", ["dense", "ToMe() @ ConstantR(4)"])
def test_beit_can_be_trained_after_it_was_evaluated(method: str) -> None:
    """transformers keeps an index of its positions for all models, also one that was made in inference mode."""
    side = {"dense": 48, "ToMe() @ ConstantR(4)": 56}[method]  # Of a size that no other test has made.
    model = vitrim.models.variant(MORE["beit"](), method)
    x = images(2, side, dtype=torch.float32)
    with torch.inference_mode():
        adapter_of(model).predict(model, x)
    adapter_of(model).predict(model.train(), x).sum().backward()
    layer = adapter_of(model).blocks(model)[0]
    assert layer.relative_position_bias.relative_position_bias_table.grad.abs().sum() > 0


@pytest.mark.usefixtures("few_test_digits")
@pytest.mark.parametrize("name", ["hf_vit", "deit_distilled"])
def test_a_folder_is_trained_and_evaluated(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their models return a class of their own in place of logits."""
    model = written(tmp_path / "hf", {**HF, **MORE}[name]())
    words = ("--data.name", "digits", "--data.workers", 0)
    learn = ("--data.limit", 40, "--epochs", 1, "--batch_size", 20, "--seed", 0)
    code, _, err = call(
        capsys, "train", "--model.name", model, "--model.reset_head", *words, *learn, "--out", tmp_path / "run"
    )
    assert code == 0, err
    assert 0 <= json.loads((tmp_path / "run" / "result.json").read_text())["test_accuracy"] <= 1
    code, said, err = call(capsys, "eval", tmp_path / "run", "--method", "dense", "TopK() @ KeepRate(0.5, at=(1,))")
    assert (code, "KeepRate" in said) == (0, True), err


def test_opening_shows_no_bar_of_transformers_and_leaves_its_settings(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import ViTForImageClassification
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        ViTForImageClassification.from_pretrained(folder)
        assert "Loading weights" in capfd.readouterr().err
        open_model(str(folder))
        assert capfd.readouterr().err == ""
        ViTForImageClassification.from_pretrained(folder)
        assert "Loading weights" in capfd.readouterr().err
    finally:
        if not before:
            logging.disable_progress_bar()


def test_models_with_a_text_tower_open_without_remarks_on_its_tokens(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    from transformers.utils.logging import warning_once  # It says each thing once in a process.

    saved = vitrim.save(MORE["siglip2"](), tmp_path / "saved")
    foreign = written(tmp_path / "foreign", MORE["clip"]())
    capfd.readouterr()
    caplog.clear()
    for spec in (saved, foreign):
        warning_once.cache_clear()
        open_model(str(spec))
    found = capfd.readouterr()
    assert (found.out, found.err, caplog.text) == ("", "", "")
