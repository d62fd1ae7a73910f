"""Super-networks behind the recipe: growth, figures, what is kept, resuming, processes, and what is refused."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import processes
import vitrim
from test_train_resume import At, assert_same, outcome
from vitrim.cli import main
from vitrim.elastic.piad import Stratifier
from vitrim.elastic.sampler import draw
from vitrim.errors import RecipeError, VitrimError
from vitrim.train.checkpoint import RunFolder
from vitrim.train.loop import train
from vitrim.train.recipe import Recipe
from vitrim.train.stopping import Stopped
from vitrim.verbs.cutting import _recipe_for

pytestmark = pytest.mark.usefixtures("few_test_digits")

PLAIN = {"name": "vit_tiny_patch16_224", "args": {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 16,
                                                  "patch_size": 4}}  # fmt: skip


def recipe(**changes: Any) -> Recipe:
    data: dict[str, Any] = {
        "model": PLAIN,
        "data": {"workers": 0, "limit": 80, "holdout": 0.2},
        "augment": {"mixup": 0.4, "smoothing": 0.1},
        "optim": {"lr": 1e-3, "ema": 0.5},
        "elastic": {"grow_epochs": 2, "images": 32, "width_multiple": 2},
        "epochs": 3,
        "batch_size": 16,
    }
    for name, value in changes.items():
        data[name] = {**(data.get(name) or {}), **value} if isinstance(value, dict) else value
    return Recipe.from_dict(data)


def test_a_run_leaves_a_super_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    result = train(recipe(), tmp_path / "run")
    lines = RunFolder(tmp_path / "run").metrics
    assert [line["saving"] for line in lines] == pytest.approx([0.4375, 0.875, 0.875], abs=0.05)
    for line in lines:
        parts = [line[f"train_{part}"] for part in ("full", "smallest", "random")]
        assert line["train_loss"] == pytest.approx(sum(parts))
        sizes = [line["val_accuracy"], line["val_accuracy_middle"], line["val_accuracy_smallest"]]
        assert line["val_accuracy_mean"] == pytest.approx(sum(sizes) / 3)
    assert result["best_epoch"] == max((1, 2), key=lambda epoch: (lines[epoch]["val_accuracy_mean"], -epoch))
    net = vitrim.SuperNet.load(tmp_path / "run" / "model")
    assert (net.compensations, len(net.chain)) == (None, result["networks"])
    assert net.chain.macs == result["macs"]
    main(["extract", str(tmp_path / "run"), "--macs", "0.5", "--out", str(tmp_path / "half")])
    half = vitrim.load(tmp_path / "half")
    assert vitrim.cost(half).macs <= 0.5 * result["macs"]
    images = torch.rand(2, 3, 16, 16)
    with net.at(net.chain.largest("macs", 0.5 * net.chain.macs)) as narrow:
        assert torch.allclose(narrow(images), half(images), atol=1e-5)
    capsys.readouterr()
    main(["eval", str(tmp_path / "run"), "--data.workers", "0"])
    assert f"{result['test_accuracy']:.2%}" in capsys.readouterr().out


VARIANTS = {
    "sandwich": {},
    "original, accumulated": {
        "elastic": {"rule": "original", "distill": False}, "optim": {"accumulate": 2}, "data": {"limit": 100}
    },
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_stopped_while_the_chain_grows_and_continued(name: str, tmp_path: Path):
    options = recipe(**VARIANTS[name])
    train(options, tmp_path / "whole")
    for epoch, step in ((0, 2), (1, 2)):
        with pytest.raises(Stopped):
            train(options, tmp_path / "parts", report=At(epoch, step, signal.SIGTERM))
    train(options, tmp_path / "parts")
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "parts"))
    assert draws(tmp_path / "whole") == draws(tmp_path / "parts")
    nets = [vitrim.SuperNet.load(tmp_path / place / "model") for place in ("whole", "parts")]
    assert nets[0].chain == nets[1].chain


def draws(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "draws.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_run_tells_which_networks_each_update_trained(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trained: list[tuple[int, dict[str, int]]] = []

    def losses(self: Stratifier, images: Any, targets: Any, step: int, **options: Any) -> Iterator[Any]:
        trained.append((step, {}))
        for term in original(self, images, targets, step, **options):
            trained[-1][1][term.part] = term.network
            yield term

    original = Stratifier.losses
    monkeypatch.setattr(Stratifier, "losses", losses)
    train(recipe(**VARIANTS[name], seed=3), tmp_path / "run")
    lines, metrics = draws(tmp_path / "run"), RunFolder(tmp_path / "run").metrics
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert [line["networks"] for line in lines] == [line["networks"] for line in metrics]
    assert lines[0]["networks"] < lines[1]["networks"]
    told = {}
    for line in lines:
        first, networks = line["first_update"], line["networks"]
        parts = {part: line[part] for part in line if part not in ("epoch", "networks", "first_update")}
        for number, drawn in enumerate(zip(*parts.values(), strict=True)):
            told[first + number] = dict(zip(parts, drawn, strict=True))
            assert 0 <= min(drawn) <= max(drawn) < networks
    assert told == dict(trained)


KILLED = """
import os, signal, sys
from vitrim.train.loop import train
from vitrim.train.recipe import Recipe

def kill(event, figures):
    if event == "step" and (figures["epoch"], figures["step"]) == (1, 3):
        os.kill(os.getpid(), signal.SIGKILL)

train(Recipe.read(sys.argv[1]), sys.argv[2], report=kill if len(sys.argv) > 3 else None)
"""


def test_killed_while_the_chain_grows(tmp_path: Path):
    options = recipe()
    train(options, tmp_path / "whole")
    (tmp_path / "recipe.yaml").write_text(options.to_yaml())
    killed = processes.start(KILLED, str(tmp_path / "recipe.yaml"), str(tmp_path / "parts"), "kill").wait()
    assert killed.returncode == -signal.SIGKILL, killed
    train(options, tmp_path / "parts")
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "parts"))
    assert draws(tmp_path / "whole") == draws(tmp_path / "parts")


def test_two_processes_equal_one(tmp_path: Path):
    options = recipe(augment={"mixup": 0.0}, data={"limit": 96}, batch_size=12, epochs=2)
    train(options, tmp_path / "alone")
    (tmp_path / "recipe.yaml").write_text(options.to_yaml())
    ended = processes.together(2, KILLED, str(tmp_path / "recipe.yaml"), str(tmp_path / "both"))
    assert [one.returncode for one in ended] == [0, 0], ended
    assert draws(tmp_path / "alone") == draws(tmp_path / "both")
    alone, both = (RunFolder(tmp_path / name).metrics for name in ("alone", "both"))
    for one, two in zip(alone, both, strict=True):
        assert two["networks"] == one["networks"]
        for key in ("train_loss", "train_smallest", "val_loss", "val_loss_middle", "val_loss_smallest"):
            assert two[key] == pytest.approx(one[key], rel=1e-3)


def test_accumulated_batches_draw_the_same_networks_as_one(tmp_path: Path):
    plain = {"augment": {"mixup": 0.0}, "batch_size": 32, "epochs": 2}
    for name, accumulate in (("one", 1), ("two", 2)):
        train(recipe(optim={"accumulate": accumulate}, **plain), tmp_path / name)
    one, two = (RunFolder(tmp_path / name).metrics for name in ("one", "two"))
    for line, other in zip(one, two, strict=True):
        assert other["train_loss"] == pytest.approx(line["train_loss"], rel=1e-3)
        assert other["networks"] == line["networks"]


def test_a_teacher_teaches_without_labels_a_network_without_classifier(tmp_path: Path):
    model = vitrim.build_model(PLAIN["name"], **PLAIN["args"], num_classes=0)
    vitrim.save(model, tmp_path / "teacher")
    teacher = {"teacher": {"name": str(tmp_path / "teacher")}, "epochs": 2}
    headless = {**PLAIN, "args": {**PLAIN["args"], "num_classes": 0}}
    result = train(recipe(model=headless, **teacher), tmp_path / "run")
    line = RunFolder(tmp_path / "run").metrics[-1]
    sizes = [line["val_full"], line["val_middle"], line["val_smallest"]]
    assert line["val_loss"] == pytest.approx(sum(sizes) / 3)
    assert result["networks"] == len(vitrim.SuperNet.load(tmp_path / "run" / "model").chain)
    with pytest.raises(VitrimError, match="gives 24 numbers, the student 10"):
        train(recipe(**teacher), tmp_path / "unequal")
    with pytest.raises(VitrimError, match=r"learns from a teacher; set teacher\.name"):
        train(recipe(model=headless), tmp_path / "untaught")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"reduction": "TopK() @ KeepRate(0.5, at=[0])"}, "reduce the tokens of what is extracted"),
        ({"distill": "Labels()"}, "distill has terms for one network"),
        ({"optim": {"freeze": True}}, "freeze trains the classifier alone"),
        ({"compile": True}, "compile would compile again"),
        ({"elastic": {"grow_epochs": 4}}, r"elastic\.grow_epochs is 4; it must be 1 to 3 \(epochs\)"),
        ({"elastic": {"max_saving": 1.0}}, "elastic.max_saving is 1.0; it must be more than 0, at most 0.999"),
        ({"elastic": {"rule": "uniform"}}, "never runs the full network"),
        ({"elastic": {"distill": False}, "teacher": {"name": "x"}}, "a teacher needs"),
    ],
)
def test_what_makes_no_sense_is_told_in_one_line(changes: dict[str, Any], line: str, tmp_path: Path):
    with pytest.raises(RecipeError, match=line) as refused:
        train(recipe(**changes), tmp_path / "run")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["piad", "piad-original", "finetune", "finetune-distil"])
def test_recipes_of_system_5_are_sound(name: str):
    path = Path(__file__).parents[1] / "recipes" / "system5" / f"{name}.yaml"
    found = Recipe.read(path)
    found.check()
    assert (found.elastic is not None) == name.startswith("piad")
    assert yaml.safe_load(path.read_text())["augment"]["cutmix"] == 1.0
    assert found.optim.lr == (2.5e-4 if found.elastic else 2.5e-5)


def test_the_original_rule_spares_the_smallest():
    drawn = {draw("original", 5, 0, step)["random"] for step in range(200)}
    assert drawn == {0, 1, 2, 3}


def test_the_command_lays_model_images_and_epochs_over_a_recipe():
    folder = Path(__file__).parents[1] / "recipes" / "system5"
    found = _recipe_for("vit_tiny_patch16_224@w.pth", {"root": "here"}, str(folder / "piad.yaml"), 30, None, None)
    assert found.elastic is not None
    assert (found.epochs, found.elastic.grow_epochs, found.elastic.images) == (30, 5, 1024)
    given = _recipe_for("vit_tiny_patch16_224@w.pth", {}, str(folder / "piad.yaml"), 30, 16, None)
    assert given.elastic is not None
    assert given.elastic.images == 16
    assert (found.model.name, found.model.checkpoint) == ("vit_tiny_patch16_224", "w.pth")
    assert (found.data.name, found.data.root) == ("folder", "here")
    plain = _recipe_for("vit_tiny_patch16_224@pretrained", {"name": "digits"}, None, 3, 64, 4)
    assert plain.elastic is not None
    assert (found.elastic.width_multiple, plain.elastic.width_multiple) == (8, 4)
    assert (plain.epochs, plain.elastic.grow_epochs, plain.elastic.images) == (3, 1, 64)
    assert (plain.model.pretrained, plain.model.checkpoint, plain.optim.lr) == (True, None, 2.5e-4)
    with pytest.raises(RecipeError, match="needs the option elastic"):
        _recipe_for("vit_tiny_patch16_224", {}, str(folder / "finetune.yaml"), 3, 64, None)
