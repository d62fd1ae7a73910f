"""What the loop does to weights, learning rates and strengths, against timm's pieces and slow references."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitrim import attach, attached, load, save
from vitrim.data.seeding import seed_everything
from vitrim.data.specs import AugmentSpec
from vitrim.errors import CheckpointError, RecipeError
from vitrim.measure.accelerator import fast_precision
from vitrim.models.adapter import Adapter
from vitrim.models.families.timm.model import TimmModel
from vitrim.tokens import CURRICULA, Curriculum
from vitrim.train import loop
from vitrim.train.checkpoint import RunFolder
from vitrim.train.learner import make_mixup, prepare_student
from vitrim.train.loop import train
from vitrim.train.optimizer import make_optimizer, make_scheduler
from vitrim.train.recipe import Recipe
from vitrim.train.specs import OptimSpec

pytestmark = pytest.mark.usefixtures("few_test_digits")

SIZES = {"depth": 2, "embed_dim": 24, "num_heads": 2}


def recipe(**changes: Any) -> Recipe:
    data = {
        "model": {"args": SIZES},
        "data": {"workers": 0, "limit": 80, "holdout": 0.2},
        "optim": {"lr": 1e-3},
        "epochs": 2,
        "batch_size": 16,
    }
    for name, value in changes.items():
        data[name] = {**data.get(name, {}), **value} if isinstance(value, dict) else value
    return Recipe.from_dict(data)


def state(folder: Path) -> dict[str, Any]:
    found = RunFolder(folder).load_state()
    assert found is not None
    return found


def test_rates_rise_in_a_line_and_fall_along_half_a_cosine():
    spec = OptimSpec(lr=0.1, min_lr=0.001, warmup_epochs=1.5)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=spec.lr)
    scheduler = make_scheduler(optimizer, spec, epochs=5, updates_per_epoch=4)
    for update in range(21):
        scheduler.step_update(update)
        if update < 6:
            expected = 0.001 + (0.1 - 0.001) * update / 6
        else:
            expected = 0.001 + 0.5 * (0.1 - 0.001) * (1 + math.cos(math.pi * (update - 6) / 14))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)


@pytest.mark.parametrize("num", [6, 7])
@pytest.mark.parametrize("spec", [AugmentSpec(mixup=0.8), AugmentSpec(cutmix=1.0), AugmentSpec(cutmix=1.0, mixup=0.2)])
def test_every_image_but_an_odd_one_is_mixed_and_its_labels_with_it(num: int, spec: AugmentSpec):
    seed_everything("step", 3)
    mixed = make_mixup(spec, num)
    assert mixed
    pure = torch.eye(num).view(num, num, 1, 1).expand(-1, -1, 16, 16).contiguous()  # Image i is white in channel i.
    images, shares = mixed(pure, torch.arange(num))
    torch.testing.assert_close(images.mean((2, 3)), shares)
    assert torch.equal(pure[:, :, 0, 0], torch.eye(num))
    assert ((shares > 0).sum(1) == torch.tensor([1] * (num % 2) + [2] * (num - num % 2))).all()


def test_fewer_images_than_a_batch_are_mixed_too(tmp_path: Path):
    lines = []
    for name, mixup in (("plain", 0.0), ("mixed", 0.8)):
        train(recipe(data={"limit": 9, "holdout": 0.0}, epochs=1, augment={"mixup": mixup}), tmp_path / name)
        lines.append(RunFolder(tmp_path / name).metrics[0]["train_loss"])
    assert lines[0] != lines[1]


def test_a_single_update_is_no_reason_to_warn(caplog: pytest.LogCaptureFixture):
    make_scheduler(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), OptimSpec(warmup_epochs=0), 1, 1)
    assert not caplog.records


def test_layer_decay_and_weight_decay():
    model = timm.create_model("vitrim_digits_vit", **SIZES)
    optimizer = make_optimizer(model, OptimSpec(lr=1.0, weight_decay=0.3, layer_decay=0.5))
    make_scheduler(optimizer, OptimSpec(lr=1.0, warmup_epochs=0), 2, 2).step_update(0)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert found[id(model.head.weight)] == (1.0, 0.3)
    assert found[id(model.head.bias)] == (1.0, 0.0)
    assert found[id(model.blocks[1].mlp.fc1.weight)] == pytest.approx((0.5, 0.3))
    assert found[id(model.blocks[0].mlp.fc1.weight)] == pytest.approx((0.25, 0.3))
    assert found[id(model.blocks[0].norm1.weight)][1] == 0.0
    assert found[id(model.cls_token)][1] == 0.0


def test_linear_probe_changes_the_head_alone(tmp_path: Path):
    options = recipe(optim={"freeze": True, "weight_decay": 0.1}, model={"args": {**SIZES, "drop_path_rate": 0.5}})
    train(options, tmp_path / "run")
    loop.seed_everything("weights", 0)
    start = prepare_student(options, [str(digit) for digit in range(10)]).state_dict()
    after = state(tmp_path / "run")["learner"]
    changed = {name for name, value in start.items() if not torch.equal(value, after[f"student.{name}"])}
    assert changed == {"head.weight", "head.bias"}
    assert any("running_mean" in name for name in start)


def test_gradients_are_clipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    norms: list[float] = []
    step = torch.optim.SGD.step

    def noted(self: torch.optim.SGD, *args: Any) -> Any:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    train(recipe(optim={"name": "sgd", "clip": 0.01}, epochs=1), tmp_path / "clipped")
    clipped, norms[:] = [*norms], []
    train(recipe(optim={"name": "sgd", "clip": 0.0}, epochs=1), tmp_path / "free")
    assert len(clipped) == len(norms) == 4
    assert max(clipped) <= 0.0101
    assert min(norms) > 0.02


def test_averaged_weights_are_evaluated_and_kept(tmp_path: Path):
    train(recipe(optim={"ema": 0.5}, data={"holdout": 0.0}), tmp_path / "run")
    found, kept = state(tmp_path / "run"), load(tmp_path / "run" / "model").state_dict()
    assert all(torch.equal(value, found["ema"][name]) for name, value in kept.items())
    assert not torch.equal(kept["head.weight"], found["learner"]["student.head.weight"])


def test_nothing_held_out_keeps_the_last_epoch(tmp_path: Path):
    result = train(recipe(data={"holdout": 0.0}, epochs=3), tmp_path / "run")
    assert (result["best_epoch"], result["val_accuracy"], result["train_images"]) == (2, None, 80)
    assert "val_accuracy" not in RunFolder(tmp_path / "run").metrics[0]


def test_accumulation_equals_one_large_batch(tmp_path: Path):
    plain = {"name": "vit_tiny_patch16_224", "args": {**SIZES, "img_size": 16, "patch_size": 4}}  # No batch norm.
    for name, accumulate in (("one", 1), ("four", 4)):
        train(recipe(model=plain, optim={"accumulate": accumulate}, batch_size=32, data={"limit": 80}), tmp_path / name)
    one, four = (RunFolder(tmp_path / name).metrics for name in ("one", "four"))
    assert [line["train_loss"] for line in one] == pytest.approx([line["train_loss"] for line in four], rel=1e-4)
    assert [line["lr"] for line in one] == [line["lr"] for line in four]


def test_bfloat16_and_recomputation_stay_near_the_plain_run(tmp_path: Path):
    reduction = "ToMe() @ KeepRate(0.6, at=[0, 1])"
    variants = {
        "plain": {},
        "auto": {"optim": {"precision": "auto"}},
        "bf16": {"optim": {"precision": "bf16"}},
        "recompute": {"checkpointing": True},
    }
    losses, precisions = {}, {}
    for name, changes in variants.items():
        train(recipe(reduction=reduction, **changes), tmp_path / name)
        losses[name] = [line["train_loss"] for line in RunFolder(tmp_path / name).metrics]
        precisions[name] = json.loads((tmp_path / name / "environment.json").read_text())["precision"]
    assert precisions == {"plain": "no", "auto": fast_precision(), "bf16": "bf16", "recompute": "no"}
    assert losses["auto"] == losses["plain" if precisions["auto"] == "no" else "bf16"]
    assert losses["recompute"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["bf16"] == pytest.approx(losses["plain"], rel=0.05)
    assert losses["bf16"] != losses["plain"]


def test_compiled_training_equals_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compile_ = nn.Module.compile  # Traced as ever, but without a minute of code generation.
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile_(module, backend="aot_eager"))
    options = {"reduction": "TopK() @ KeepRate(0.5, at=[0])", "epochs": 1, "data": {"limit": 40}}
    for name, compiled in (("eager", False), ("compiled", True)):
        train(recipe(compile=compiled, **options), tmp_path / name)
    eager, compiled = (RunFolder(tmp_path / name).metrics[0]["train_loss"] for name in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, rel=1e-4)


def test_pruning_from_the_fifth_epoch_on(tmp_path: Path):
    """System 1: four dense epochs, then the power law; an epoch before it is never the one that is kept."""
    result = train(
        recipe(reduction="TopK() @ PowerLaw(0.6, 2.0) @ Delayed(4)", epochs=6, data={"limit": 60}), tmp_path / "run"
    )
    lines = RunFolder(tmp_path / "run").metrics
    assert [line["strength"] for line in lines] == [0.0] * 4 + [1.0] * 2
    # depth 2, 64 patches: floor(64 * (1 - 0.6 * 0.25)) = 54, floor(54 * 0.4) = 21, and CLS.
    assert [line["tokens"] for line in lines] == [[65, 65]] * 4 + [[55, 22]] * 2
    assert result["best_epoch"] >= 4
    assert result["tokens"] == [55, 22]


@pytest.fixture
def loosening(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CURRICULA, "_entries", dict(CURRICULA))

    @dataclass(frozen=True)
    class Loosen(Curriculum):
        """Half of the schedule from the second epoch on."""

        def strength(self, epoch: float, history: object = ()) -> float:
            return 1.0 if epoch < 1 else 0.5


@pytest.mark.usefixtures("loosening")
@pytest.mark.parametrize(("curriculum", "kept"), [("Loosen()", {1, 2}), ("Adaptive('entropy', threshold=0.9)", {2})])
def test_the_kept_epoch_has_the_strength_of_the_last_one(curriculum: str, kept: set[int], tmp_path: Path):
    """Not the largest strength: a curriculum may fall, or follow the run."""
    options = recipe(reduction=f"TopK() @ KeepRate(0.5, at=[0]) @ {curriculum}", epochs=3)
    result = train(options, tmp_path / "run")
    last = RunFolder(tmp_path / "run").metrics[-1]
    assert result["best_epoch"] in kept
    assert result["tokens"] == last["tokens"]


def test_a_reduction_in_training_alone_is_refused_where_the_network_is_frozen():
    with pytest.raises(RecipeError, match="does not act; set phase to both"):
        recipe(reduction="TopK() @ KeepRate(0.5, at=[0])", phase="train", optim={"freeze": True}).check()


def test_training_only_reduction_leaves_a_plain_network(tmp_path: Path):
    options = recipe(reduction="TopK() @ KeepRate(0.5, at=[0])", phase="train")
    result = train(options, tmp_path / "run")
    assert RunFolder(tmp_path / "run").metrics[0]["tokens"] == [33, 33]
    assert result["tokens"] == [65, 65]
    kept = load(tmp_path / "run" / "model")
    assert attached(kept) is None
    assert type(kept) is VisionTransformer
    plain = timm.create_model("vitrim_digits_vit", **SIZES).eval()
    plain.load_state_dict(kept.state_dict())
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(kept(images), plain(images))


def test_a_reduction_that_the_weights_bring_has_grown_already(tmp_path: Path):
    model = timm.create_model("vitrim_digits_vit", **SIZES)
    attach(model, "TopK() @ KeepRate(0.5, at=[0]) @ Delayed(30)").set_strength(1)
    save(model, tmp_path / "pruned")
    result = train(recipe(model={"name": str(tmp_path / "pruned"), "args": {}}), tmp_path / "run")
    assert [line["tokens"] for line in RunFolder(tmp_path / "run").metrics] == [[33, 33]] * 2
    assert result["tokens"] == [33, 33]


def test_progressive_drop_in_training_alone(tmp_path: Path):
    """System 3: d(t) of the patches go inside block 0 while training; what is evaluated and kept is the plain ViT."""
    reduction = "TopK() @ Stages({0: 0.65}, place=inside) @ Polynomial(1, 4, final=0.35)"
    options = recipe(
        reduction=reduction, phase="train", epochs=6, optim={"ema": 0.5}, augment={"mixup": 0.8, "cutmix": 1.0}
    )
    result = train(options, tmp_path / "run")
    ratios = [0.35 * min(max((epoch - 1) / 3, 0), 1) ** 2 for epoch in range(6)]
    left = [math.floor(round((1 - ratio) * 64, 9)) + 1 for ratio in ratios]
    assert left == [65, 65, 62, 55, 42, 42]
    assert [line["tokens"] for line in RunFolder(tmp_path / "run").metrics] == [[one, one] for one in left]
    assert result["tokens"] == [65, 65]
    kept = load(tmp_path / "run" / "model")
    plain = timm.create_model("vitrim_digits_vit", **SIZES).eval()
    assert kept.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(kept.state_dict())
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(kept(images), plain(images))


def test_strength_follows_every_step_where_asked(tmp_path: Path):
    curriculum = "Polynomial(0, 2, gamma=1.0, per_step=True)"
    train(recipe(reduction=f"TopK() @ KeepRate(0.5, at=[0]) @ {curriculum}", epochs=2), tmp_path / "run")
    strengths = [line["strength"] for line in RunFolder(tmp_path / "run").metrics]
    assert strengths == pytest.approx([0.75 / 2, 1.75 / 2])  # Four steps an epoch; the last begins at 3/4.


def test_a_network_that_cannot_be_saved_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(TimmModel, "describe", Adapter.describe)
    with pytest.raises(CheckpointError, match=r"was not made by timm\.create_model"):
        train(recipe(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
