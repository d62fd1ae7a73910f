"""Distillation inside the training loop: objective, teacher, projections, label-free students, resuming, processes."""

import json
import math
import os
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType
from rich.console import Console
from timm.models import save_for_hf
from torch.nn import functional as F

import processes
from vitrim import load, save
from vitrim.data.data_sets import open_both
from vitrim.data.images import Images
from vitrim.data.splits import make_splits
from vitrim.errors import DataError, VitrimError
from vitrim.measure.accelerator import make_accelerator
from vitrim.measure.accuracy import mean_loss
from vitrim.models import attach, attached, build_model
from vitrim.models.files.classes import classes_of
from vitrim.models.input_format import InputFormat
from vitrim.showing.listing import listing
from vitrim.showing.progress import live
from vitrim.train.checkpoint import RunFolder
from vitrim.train.learner import cross_entropy, prepare_learner, prepare_student, prepare_teacher
from vitrim.train.loop import train
from vitrim.train.optimizer import make_optimizer
from vitrim.train.recipe import Recipe
from vitrim.train.specs import ModelSpec
from vitrim.train.stopping import Stopped

pytestmark = pytest.mark.usefixtures("few_test_digits")

SMALL = {"depth": 1, "embed_dim": 24, "num_heads": 2}
SIZES = {"depth": 3, "embed_dim": 24, "num_heads": 2}
SWIN = {"img_size": 64, "depths": (1,), "num_heads": (3,)}
FAKD = "Labels(Linear(0.3, 0.5)) + Logits(Linear(0.7, 0.5), temperature=4) + ClsStages(0.3)"
FEATURES = "Cls(0.5) + Tokens(0.5, loss=cosine)"


def recipe(teacher: str | None, distill: str | None, **changes: Any) -> Recipe:
    data = {
        "model": {"args": SIZES},
        "data": {"workers": 0, "limit": 80, "holdout": 0.2},
        "teacher": teacher and {"name": teacher},
        "distill": distill,
        "epochs": 3,
        "batch_size": 16,
    }
    for name, value in changes.items():
        data[name] = {**(data.get(name) or {}), **value} if isinstance(value, dict) else value
    return Recipe.from_dict(data)


def headless(teacher: str, **changes: Any) -> Recipe:
    reduction = "TopK(fuse=sum) @ KeepRate(0.7, at=[1])"
    return recipe(teacher, FEATURES, model={"args": {**SIZES, "num_classes": 0}}, reduction=reduction, **changes)


def test_smoothed_labels_against_a_plain_sum():
    logits, classes = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 3, 4, 3])
    shares = torch.full((4, 5), 0.1 / 5, dtype=torch.float64)
    shares[range(4), classes] += 0.9
    expected = -(shares * (logits - logits.exp().sum(1, keepdim=True).log())).sum(1).mean()
    assert torch.allclose(cross_entropy(logits, classes, smoothing=0.1), expected)
    assert torch.allclose(cross_entropy(logits, shares, smoothing=0.1), expected)  # Mixed labels are smoothed already.


def test_weights_move_from_the_first_epoch_to_the_last(teacher: str, tmp_path: Path):
    steps: list[Mapping[str, Any]] = []
    note = lambda event, figures: steps.append(figures) if event == "step" else None  # noqa: E731
    result = train(recipe(teacher, FAKD, augment={"mixup": 0.4, "smoothing": 0.1}), tmp_path / "run", report=note)
    lines = RunFolder(tmp_path / "run").metrics
    for line, alpha in zip(lines, (0.7, 0.6, 0.5), strict=True):
        parts = (line["train_labels"], line["train_logits"], line["train_cls_stages"])
        assert all(part > 0 for part in parts)
        assert line["train_loss"] == pytest.approx((1 - alpha) * parts[0] + alpha * parts[1] + 0.3 * parts[2], rel=1e-5)
    expected = {name: lines[-1][f"train_{name}"] for name in ("labels", "logits", "cls_stages")}
    assert steps[-1]["terms"] == pytest.approx(expected)
    assert result["best_epoch"] == max(range(3), key=lambda epoch: (lines[epoch]["val_accuracy"], -epoch))
    assert 0 < result["test_accuracy"] < 1
    kept = load(tmp_path / "run" / "model")
    assert sum(p.numel() for p in kept.parameters()) == result["params"]  # Neither teacher nor projections.


def test_a_network_of_other_classes_learns_from_its_teacher_and_keeps_its_own(tmp_path: Path):
    names = [f"kind {number}" for number in range(7)]
    for folder, seed in (("teacher", 0), ("student", 1)):
        torch.manual_seed(seed)
        network = build_model("vitrim_digits_vit", **SIZES, num_classes=7)
        torch.nn.init.normal_(network.head.weight, std=0.5)
        save(network, tmp_path / folder, classes=names)
    given = {"model": {"name": str(tmp_path / "student")}, "labels": False, "epochs": 2}
    learns = recipe(str(tmp_path / "teacher"), "Logits()", optim={"lr": 1e-3}, augment={"mixup": 0.4}, **given)
    learns.model.args = {}
    result = train(learns, tmp_path / "run")
    lines = RunFolder(tmp_path / "run").metrics
    assert lines[1]["val_loss"] < lines[0]["val_loss"]
    assert not [name for name in {**result, **lines[0]} if "accuracy" in name], "the images are of other classes"
    kept = tmp_path / "run" / "model"
    assert (load(kept).head.out_features, classes_of(kept)) == (7, names)
    with pytest.raises(VitrimError, match="or labels to false"):
        train(replace(learns, labels=True), tmp_path / "labelled")
    for text, message in (("Logits() + Labels()", "leave Labels"), (None, "a teacher needs terms")):
        with pytest.raises(VitrimError, match=message):
            train(replace(learns, distill=text), tmp_path / "refused")
    with pytest.raises(VitrimError, match="a classifier that has learnt nothing"):
        train(replace(learns, teacher=replace(learns.teacher, reset_head=True)), tmp_path / "refused")
    torch.manual_seed(2)
    save(load(tmp_path / "teacher"), tmp_path / "renamed", classes=names[::-1])
    with pytest.raises(VitrimError, match="was trained on class"):
        train(replace(learns, teacher=ModelSpec(str(tmp_path / "renamed"))), tmp_path / "refused")


def test_without_distillation_nothing_but_the_loss_is_told(tmp_path: Path):
    train(recipe(None, None, epochs=1), tmp_path / "plain")
    train(recipe(None, "Labels()", epochs=1), tmp_path / "said")
    plain, said = (RunFolder(tmp_path / name).metrics[0] for name in ("plain", "said"))
    assert "train_labels" not in plain
    assert plain["train_loss"] == said["train_loss"] == said["train_labels"]


def test_projections_learn_at_the_full_rate(teacher: str, tmp_path: Path):
    options = headless(teacher, optim={"layer_decay": 0.5, "weight_decay": 0.3, "warmup_epochs": 0})
    torch.manual_seed(0)
    learner = prepare_learner(options, prepare_student(options, DIGITS))
    optimizer = make_optimizer(learner.student, options.optim, learner.projections)
    rates = {
        id(p): (g["lr"] * g.get("lr_scale", 1), g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]
    }
    for projection in learner.projections.values():
        assert rates[id(projection.weight)] == (options.optim.lr, 0.3)
        assert rates[id(projection.bias)] == (options.optim.lr, 0.0)
    learnt = {id(p) for p in learner.parameters() if p.requires_grad}
    assert learnt == set(rates)
    train(options, tmp_path / "run")
    state = RunFolder(tmp_path / "run").load_state()
    assert state is not None
    found = state["learner"]
    assert {name.split(".")[0] for name in found} == {"student", "projections"}
    assert found["projections.cls.weight"].shape == (36, 24)


def test_a_student_without_head_learns_without_labels(teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    console = Console(file=StringIO(), width=200)
    with live(console) as report:
        result = train(headless(teacher, optim={"ema": 0.5}), tmp_path / "run", report=report)
    shown = " ".join(console.file.getvalue().split())  # pyright: ignore
    lines = RunFolder(tmp_path / "run").metrics
    assert not [name for name in {*result, *lines[0]} if "accuracy" in name]
    losses = [line["val_loss"] for line in lines]
    assert losses == pytest.approx([0.5 * (line["val_cls"] + line["val_tokens"]) for line in lines])
    assert losses[-1] < losses[0]
    told = [f"(cls {line['train_cls']:.3f}, tokens {line['train_tokens']:.3f})" for line in lines]
    assert all(f"{terms} held-out loss {loss:.4f}" in shown for terms, loss in zip(told, losses, strict=True))
    assert "acc" not in shown
    assert (result["best_epoch"], result["val_loss"]) == (losses.index(min(losses)), min(losses))
    kept = load(tmp_path / "run" / "model")
    assert kept.num_classes == 0
    assert kept(torch.rand(2, 1, 8, 8)).shape == (2, 24)
    read = Images.load
    monkeypatch.setattr(Images, "load", lambda *a: (read(*a)[0], 0))
    train(headless(teacher, optim={"ema": 0.5}), tmp_path / "blind")
    assert [line["val_loss"] for line in RunFolder(tmp_path / "blind").metrics] == losses


def test_held_out_loss_is_the_mean_over_single_images(teacher: str):
    options = headless(teacher)
    learner = prepare_learner(options, prepare_student(options, DIGITS)).train()
    splits = make_splits(*open_both(options.data), learner.student, options.data, options.augment, 0)
    assert splits.select is not None
    options = {"terms": ["tokens"], "batch_size": 7, "workers": 0, "accelerator": make_accelerator(cpu=True)}
    found = mean_loss(learner, splits.select, **options)
    assert learner.training
    learner.eval()
    with torch.no_grad():
        single = [learner(splits.select[i][0].unsqueeze(0), progress=1.0) for i in range(len(splits.select))]
    assert len(single) == 16
    assert found["loss"] == pytest.approx(sum(float(one.loss) for one in single) / 16, rel=1e-5)
    assert found["tokens"] == pytest.approx(sum(float(one.terms["tokens"]) for one in single) / 16, rel=1e-5)


@pytest.mark.parametrize(("processes", "batch", "unreadable"), [(2, 12, ()), (3, 4, ()), (2, 4, range(1, 25, 2))])
def test_processes_evaluate_the_objective_in_equally_many_batches(
    teacher: str, monkeypatch: pytest.MonkeyPatch, processes: int, batch: int, unreadable: Sequence[int]
):
    """Each batch gathers the weights of a teacher in shards; a process that has one less would leave others waiting."""
    options = headless(teacher, data={"limit": 100, "holdout": 0.25, "on_corrupt": "skip"})
    learner = prepare_learner(options, prepare_student(options, DIGITS))
    splits = make_splits(*open_both(options.data), learner.student, options.data, options.augment, 0)
    assert splits.select is not None
    assert len(splits.select) == 25
    broken, load_image = {splits.select.indices[place] for place in unreadable}, Images.load

    def load_readable(self: Images, index: int) -> Any:
        if index in broken:
            raise DataError("truncated")
        return load_image(self, index)

    monkeypatch.setattr(Images, "load", load_readable)
    calls, sums = Counter[tuple[int, int]](), dict[tuple[int, int], torch.Tensor]()
    for key in [(0, 1), *((process, processes) for process in range(processes))]:
        share: Any = SimpleNamespace(
            process_index=key[0], num_processes=key[1], device=torch.device("cpu"), autocast=nullcontext,
            reduce=lambda own, key=key: sums.setdefault(key, own).clamp_min(1),
        )  # fmt: skip
        with monkeypatch.context() as patch:
            forward = learner.forward
            patch.setattr(learner, "forward", lambda *a, key=key, **k: calls.update([key]) or forward(*a, **k))  # noqa: B023
            mean_loss(learner, splits.select, terms=["cls"], batch_size=batch, workers=0, accelerator=share)
    alone = sums.pop((0, 1))
    assert alone[0] == 25 - len(broken)
    assert torch.allclose(torch.stack([*sums.values()]).sum(0), alone, rtol=1e-5)
    assert {calls[key] for key in sums} == {math.ceil(25 / (processes * batch))}


@pytest.mark.parametrize("moment", [(0, 2), (1, 3)])
def test_interrupted_distillation_ends_with_the_same_numbers(teacher: str, tmp_path: Path, moment: tuple[int, int]):
    options = headless(teacher, optim={"ema": 0.9}, augment={"mixup": 0.4}, epochs=2)

    def stop(event: str, figures: Mapping[str, Any]) -> None:
        if event == "step" and (figures["epoch"], figures["step"]) == moment:
            os.kill(os.getpid(), signal.SIGTERM)

    whole = train(options, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(options, tmp_path / "parts", report=stop)
    parts = train(options, tmp_path / "parts")
    drop = lambda line: {k: v for k, v in line.items() if "second" not in k}  # noqa: E731
    assert drop(parts) == drop(whole)
    one, two = (list(map(drop, RunFolder(tmp_path / name).metrics)) for name in ("whole", "parts"))
    assert one == two
    kept = [load(tmp_path / name / "model").state_dict() for name in ("whole", "parts")]
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distill": "Logits()", "teacher": {"name": "nowhere/model"}}, "no teacher: nothing at nowhere/model"),
        ({"distill": "Logits()", "teacher": {"name": "deit_tiny_patch16_224"}}, "has learnt nothing"),
        ({"distill": "Logits()"}, "the term Logits needs a teacher"),
        ({"teacher": {"name": "{teacher}"}}, "a teacher needs terms to teach by"),
        ({"distill": "Logit()", "teacher": {"name": "{teacher}"}}, "unknown .*'Logit'; did you mean Logits"),
        (
            {"distill": "Logits()", "teacher": {"name": "{teacher}", "reset_head": True}},
            "teacher.reset_head starts a classifier that has learnt nothing; leave it out, or teach by terms on feat",
        ),
        (
            {"distill": "Logits()", "teacher": {"name": "{teacher}", "args": {"num_classes": 7}}},
            "no teacher: .* has 10 classes, not the 7 asked for; leave num_classes out of teacher.args$",
        ),
        ({"distill": "Logits()", "teacher": {"name": "local-dir:{local}"}}, "local has learnt nothing; set teacher.ch"),
        (
            {
                "distill": "Logits()",
                "teacher": {"name": "local-dir:{local}", "pretrained": True, "args": {"num_classes": 10}},
            },
            "has learnt 7 classes, so a classifier of 10 has learnt nothing; leave num_classes out of teacher.args",
        ),
        (
            {"distill": "Logits()", "teacher": {"name": "local-dir:{local}", "pretrained": True}},
            "has 7 classes, the student 10",
        ),
        ({"distill": "Logits()", "teacher": {"name": "{weights}"}}, "its architecture; give that as the name and this"),
        (
            {"teacher": None, "model": {"name": "{teacher}", "args": {"num_classes": 7}}},
            "has 10 classes, not the 7 asked for; set model.reset_head to start a new classifier$",
        ),
        (
            {"distill": "Logits()", "teacher": {"name": "{teacher}"}, "model": {"args": {"num_classes": 0}}},
            "the term Logits reads logits of the student, but .* has no classifier",
        ),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    teacher: str, tmp_path: Path, options: dict[str, Any], message: str
):
    places = {"{teacher}": teacher, "{local}": str(tmp_path / "local"), "{weights}": str(tmp_path / "w.pth")}
    text = yaml.safe_dump(options)
    for name, place in places.items():
        text = text.replace(name, place)
    if "local" in text:
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=7, **SMALL)
        save_for_hf(model, tmp_path / "local", model_config={"num_classes": 7})
    torch.save({"head.weight": torch.zeros(10, 24)}, tmp_path / "w.pth")
    with pytest.raises(VitrimError, match=message) as caught:
        train(Recipe.from_dict(yaml.safe_load(text)), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


DIGITS = [str(number) for number in range(10)]
TURNED = DIGITS[::-1]
NAMED = {"depth": 3, "embed_dim": 36, "num_heads": 3}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved model of as many classes as there are digits, in another order."""
    model = timm.create_model("vitrim_digits_vit", **NAMED)
    return str(save(model, tmp_path_factory.mktemp("foreign") / "run" / "model", classes=TURNED))


@pytest.mark.parametrize(
    ("distill", "options", "message"),
    [
        (
            "Labels() + Logits()",
            {"teacher": {"name": "{foreign}"}},
            "was trained on class 9 where the images have 0; teach by",
        ),
        (
            "Logits()",
            {"teacher": {"name": "vitrim_digits_vit", "checkpoint": "{foreign}", "args": NAMED}},
            "was trained on class 9 where the images have 0; teach by terms on features",
        ),
        (
            None,
            {"teacher": None, "model": {"name": "{foreign}"}},
            "the images have 0; set model.reset_head to start a new",
        ),
        (
            None,
            {"teacher": None, "model": {"checkpoint": "{foreign}", "args": NAMED}},
            "the images have 0; set model.reset_head to start a new",
        ),
        (
            None,
            {"teacher": {"name": "{foreign}"}, "elastic": {"grow_epochs": 1}},
            "was trained on class 9 where the images have 0; teach by",
        ),
    ],
)
def test_classes_of_another_order_are_refused(
    foreign: str, tmp_path: Path, distill: str | None, options: dict[str, Any], message: str
):
    data = {"data": {"workers": 0, "limit": 40}, "model": {"args": SIZES}, "distill": distill, "epochs": 1} | options
    text = yaml.safe_dump(data).replace("{foreign}", foreign)
    with pytest.raises(VitrimError, match=message) as caught:
        train(Recipe.from_dict(yaml.safe_load(text)), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_classes_count_only_where_they_are_compared(foreign: str, tmp_path: Path):
    assert prepare_learner(headless(foreign), prepare_student(headless(foreign), DIGITS), DIGITS).teacher
    fresh = recipe(None, None, model={"checkpoint": foreign, "args": NAMED, "reset_head": True})
    assert prepare_student(fresh, DIGITS).num_classes == 10
    bare = recipe(None, None, model={"checkpoint": foreign, "args": {**NAMED, "num_classes": 0}})
    assert prepare_student(bare, DIGITS).num_classes == 0
    own = recipe(foreign, "Logits()", model={"name": foreign, "args": {}})
    assert prepare_learner(own, prepare_student(own, TURNED), TURNED).teacher


def test_a_teacher_that_no_term_asks_is_refused(teacher: str, tmp_path: Path):
    with pytest.raises(VitrimError, match=r"no term of Labels\(\) reads the teacher; leave teacher out"):
        train(recipe(teacher, "Labels()"), tmp_path / "run")


def test_the_teacher_sees_its_own_format_and_is_dense(tmp_path: Path):
    student = timm.create_model("vitrim_digits_vit", **SIZES)
    colour = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, **SIZES)
    colour.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    attach(colour, "TopK() @ KeepRate(0.5, at=[0])")
    path = save(colour, tmp_path / "colour")
    teacher = prepare_teacher(ModelSpec(name=str(path)), InputFormat.of(student))
    assert attached(teacher.model) is None
    pixels, form = torch.rand(2, 1, 8, 8), InputFormat.of(student)
    seen = teacher.prepare((pixels - form.mean[0]) / form.std[0])
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    expected = F.interpolate((pixels - mean) / std, (32, 32), mode="bicubic", antialias=True)
    assert torch.allclose(seen, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("eva02_tiny_patch14_224", {**SMALL, "img_size": 28}),
        ("beit_base_patch16_224", {**SMALL, "img_size": 32}),
        ("vit_relpos_small_patch16_224", {**SMALL, "img_size": 32}),
        ("cait_xxs24_224", {**SMALL, "img_size": 32}),
        ("swin_tiny_patch4_window7_224", SWIN),
        ("mixer_s16_224", {"img_size": 32}),  # Without patch_embed.
        ("resnet10t", {}),
    ],
)
def test_teachers_of_all_kinds_get_images_of_their_own_size(name: str, args: dict[str, Any], tmp_path: Path):
    path = save(timm.create_model(name, num_classes=10, in_chans=1, **args), tmp_path / "teacher")
    options = recipe(str(path), "Logits()")
    learner = prepare_learner(options, prepare_student(options, DIGITS), DIGITS)
    size = args.get("img_size", 176)
    assert learner.teacher
    assert learner.teacher.prepare(images := torch.rand(2, 1, 8, 8)).shape == (2, 1, size, size)
    assert learner(images, torch.tensor([0, 1]), progress=0.0).loss.isfinite()


def test_a_checkpoint_says_how_many_classes_its_teacher_has(tmp_path: Path):
    for name, args in (("resnet10t", {}), ("swin_tiny_patch4_window7_224", SWIN)):  # Heads of other names.
        torch.save(timm.create_model(name, num_classes=10, **args).state_dict(), tmp_path / "teacher.pth")
        spec = {"name": name, "checkpoint": str(tmp_path / "teacher.pth"), "args": args}
        options = recipe(name, "Logits()")
        options.teacher = ModelSpec(**spec)
        teacher = prepare_learner(options, prepare_student(options, DIGITS), DIGITS).teacher
        assert teacher
        assert teacher.info.classes == 10


def test_a_student_starts_from_another_run(teacher: str, tmp_path: Path):
    train(headless(teacher, epochs=1), tmp_path / "first")
    spec = {"checkpoint": str(tmp_path / "first" / "model"), "reset_head": True, "args": SIZES}
    student = prepare_student(recipe(None, None, model=spec), DIGITS)
    before, own = load(tmp_path / "first" / "model").state_dict(), student.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in before.items())
    assert own["head.weight"].shape == (10, 24)
    alike = {"checkpoint": teacher, "args": {"depth": 3, "embed_dim": 36, "num_heads": 3}}
    alike = prepare_student(recipe(teacher, "Logits()", model=alike), DIGITS)
    assert all(torch.equal(value, alike.state_dict()[name]) for name, value in load(teacher).state_dict().items())


@pytest.mark.parametrize("terms", [FAKD, FEATURES])
def test_a_compiled_run_has_the_numbers_of_an_eager_one(
    teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terms: str
):
    sizes: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    genuine = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: genuine(function, backend=backend, **options))
    options = {"reduction": "TopK(fuse=sum) @ KeepRate(0.7, at=[1])", "epochs": 2, "data": {"limit": 40, "holdout": 0}}
    for compiled in (False, True):
        assert sizes == []
        train(recipe(teacher, terms, compile=compiled, **options), tmp_path / str(compiled))
    assert max(sizes) > 100  # A whole student.
    one, two = (RunFolder(tmp_path / str(compiled)).metrics for compiled in (False, True))
    assert [line["train_loss"] for line in two] == pytest.approx([line["train_loss"] for line in one], rel=1e-5)


def test_terms_weights_and_losses_are_listed():
    text = listing()
    assert {"Labels", "Logits", "ClsStages", "Tokens", "Merged", "Linear", "cosine", "smooth_l1"} <= set(text.split())


def test_two_processes_distil_as_one_and_share_the_teacher(tmp_path: Path):
    torch.manual_seed(2)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    path = save(timm.create_model("vit_tiny_patch16_224", **{**sizes, "embed_dim": 36}), tmp_path / "teacher")
    model = {"name": "vit_tiny_patch16_224", "args": {**sizes, "num_classes": 0}}
    data = {"workers": 0, "limit": 100, "holdout": 0.25}  # 13 and 12 held-out images: two batches and one.
    options = recipe(
        str(path), FEATURES, model=model, data=data, batch_size=12, epochs=2, optim={"ema": 0.9}, shard_teacher=True
    )
    (tmp_path / "recipe.yaml").write_text(options.to_yaml())
    code = (
        "import os, sys\nfrom vitrim.distill import Teacher\nfrom vitrim.train.loop import train\n"
        "from vitrim.train.recipe import Recipe\n"
        "def noted(self, shard=Teacher.shard):\n"
        "    shard(self)\n"
        "    own, whole = (sum(n) for n in zip(*((p.to_local().numel(), p.numel()) for p in self.parameters())))\n"
        "    with open(f'{sys.argv[2]}.share{os.environ[\"RANK\"]}', 'w') as file:\n"
        "        file.write(str(own / whole))\n"
        "Teacher.shard = noted\n"
        "train(Recipe.read(sys.argv[1]), sys.argv[2])\n"
    )
    words = str(tmp_path / "recipe.yaml")
    alone = processes.start(code, words, str(tmp_path / "one"), CUDA_VISIBLE_DEVICES="").wait()
    ended = {"one": [alone], "two": processes.together(2, code, words, str(tmp_path / "two"))}
    for name, parts in ended.items():
        assert {part.returncode for part in parts} == {0}, parts
        shares = [float(path.read_text()) for path in tmp_path.glob(f"{name}.share*")]
        assert shares == pytest.approx([0.5, 0.5] if name == "two" else [], abs=0.02)
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ended
    )
    for name in ("train_loss", "train_cls", "train_tokens", "val_loss", "val_cls", "val_tokens"):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], rel=2e-4), name


def test_options_that_an_older_file_lacks_have_their_defaults(tmp_path: Path):
    options = recipe(None, None)
    older = options.to_dict()
    del older["distill"], older["teacher"], older["optim"]["ema"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(older))
    assert Recipe.read(tmp_path / "recipe.yaml").differences(options) == []
    changed = Recipe.read(tmp_path / "recipe.yaml").differences(recipe(None, "Labels()"))
    assert changed == ["distill: None -> 'Labels()'"]


def test_a_student_in_shards_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(VitrimError, match=r"FSDP splits the network in training .* set shard_teacher"):
        make_accelerator()
