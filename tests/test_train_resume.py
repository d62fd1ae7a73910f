"""An interrupted run ends with the numbers of an uninterrupted one, whatever interrupted it, and loses nothing."""

import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from limits import no_file_above
from vitrim.errors import CheckpointError, OutputError, RecipeError, VitrimError
from vitrim.output import MARK, is_leftover
from vitrim.train import checkpoint, loop, prepared, single_network, stopping
from vitrim.train.checkpoint import RunFolder
from vitrim.train.loop import train
from vitrim.train.recipe import Recipe
from vitrim.train.specs import ModelSpec
from vitrim.train.state import Report
from vitrim.train.stopping import RunAbandoned, Stopped, StopSignals

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.usefixtures("few_test_digits"),
]
TIMINGS = ("seconds", "images_per_second", "train_seconds")


def recipe(**changes: Any) -> Recipe:
    """Three epochs of six batches on digits; options as `group__name`."""
    data: dict[str, Any] = {
        "model": {"args": {"depth": 2, "embed_dim": 24, "num_heads": 2}},
        "data": {"workers": 0, "limit": 120, "holdout": 0.2},
        "optim": {"lr": 3e-3},
        "epochs": 3,
        "batch_size": 16,
    }
    for name, value in changes.items():
        group, _, option = name.rpartition("__")
        (data.setdefault(group, {}) if group else data)[option] = value
    if "args" in data["model"] and "model__args" in changes:
        data["model"]["args"] = {"depth": 2, "embed_dim": 24, "num_heads": 2} | changes["model__args"]
    return Recipe.from_dict(data)


def outcome(folder: Path) -> dict[str, Any]:
    """All that must not depend on interruptions."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figures = [*lines, json.loads((folder / "result.json").read_text())]
    state: Any = torch.load(folder / "checkpoint" / "state.pt", weights_only=True)
    weights = load_file(folder / "model" / "model.safetensors")
    return {
        "figures": [{k: v for k, v in line.items() if k not in TIMINGS} for line in figures],
        "weights": {**weights, **state["learner"], **(state["gradients"] or {}), **(state["ema"] or {})},
    }


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["figures"] == other["figures"]
    assert one["weights"].keys() == other["weights"].keys()
    assert all(torch.equal(value, other["weights"][name]) for name, value in one["weights"].items())


class At:
    """Sends a signal to this process when the run gets to a step."""

    def __init__(self, epoch: int, step: int, number: int) -> None:
        self.place, self.number = (epoch, step), number

    def __call__(self, event: str, figures: Mapping[str, Any]) -> None:
        if event == "step" and (figures["epoch"], figures["step"]) == self.place:
            os.kill(os.getpid(), self.number)


VARIANTS = {
    "workers, delayed": {
        "data__workers": 2,
        "augment__crop": "pad",
        "augment__randaugment": "rand-m5-n1",
        "reduction": "TopK() @ PowerLaw(0.6, 2.0) @ Delayed(1)",
    },
    "ema, mixup, dropout": {
        "optim__ema": 0.8,
        "augment__mixup": 0.4,
        "augment__cutmix": 1.0,
        "augment__smoothing": 0.1,
        "model__args": {"drop_path_rate": 0.2, "proj_drop_rate": 0.2},
        "augment__erasing": 0.5,
    },
    "accumulation, entropy": {
        "optim__accumulate": 4,
        "batch_size": 32,
        "epochs": 4,
        "data__limit": 200,
        "reduction": "TopK() @ KeepRate(0.5, at=[1]) @ Adaptive(signal='entropy', threshold=0.01)",
    },
    "per step": {"reduction": "ToMe() @ KeepRate(0.5, at=[1]) @ Polynomial(0, 2, per_step=True)", "phase": "train"},
    "adaptive": {"reduction": "TopK() @ KeepRate(0.5, at=[1]) @ Adaptive(step=0.5)", "optim__ema": 0.5},
    "gradient": {"reduction": "TopK(gradient) @ KeepRate(0.5, at=[0])", "phase": "train", "checkpointing": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_stopped_by_a_signal_and_continued(name: str, tmp_path: Path):
    options = recipe(**VARIANTS[name])
    train(options, tmp_path / "whole")
    for epoch, step, number in ((0, 6, signal.SIGINT), (1, 2, signal.SIGTERM), (1, 5, signal.SIGINT)):
        with pytest.raises(Stopped, match="repeat the same command to continue") as stopped:
            train(options, tmp_path / "parts", report=At(epoch, step, number))
        assert stopped.value.code == 128 + number
    train(options, tmp_path / "parts")
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "parts"))


class KillSoonAfter:
    """Kills this process and its children in the middle of what follows its nth step."""

    def __init__(self, steps: int, seconds: float) -> None:
        self.left, self.seconds = steps, seconds

    def __call__(self, event: str, figures: Mapping[str, Any]) -> None:
        if event == "step":
            self.left -= 1
            if self.left == 0:
                threading.Timer(self.seconds, os.killpg, (os.getpgid(0), signal.SIGKILL)).start()


def _in_child(
    options: Recipe, folder: Path, kill_at_replace: int | None = None, report: Report | None = None
) -> multiprocessing.Process:
    def work() -> None:
        os.setsid()
        if kill_at_replace is not None:
            replace, left = os.replace, [kill_at_replace]

            def deadly(source: Any, target: Any) -> None:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                replace(source, target)

            os.replace = deadly
        train(options, folder, report=report)

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    return child  # type: ignore[return-value]


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_random_moments(workers: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    options = recipe(data__workers=workers, optim__ema=0.9, epochs=4, data__limit=150)
    train(options, tmp_path / "whole")
    dice = random.Random(workers)
    ends = []
    for _ in range(4):
        kill = KillSoonAfter(dice.randint(1, 12), dice.uniform(0, 0.05))
        child = _in_child(options, tmp_path / "parts", report=kill)
        child.join()
        ends.append(child.exitcode)
    assert -signal.SIGKILL in ends
    assert "Traceback" not in capfd.readouterr().err  # Of readers, which outlive the process for a moment.
    train(options, tmp_path / "parts")
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "parts"))
    assert not list((tmp_path / "parts").rglob(f"{MARK}*"))
    assert {p.name for p in (tmp_path / "parts" / "model").iterdir()} == {"model.safetensors", "vitrim.json"}


def test_killed_while_each_file_is_written(tmp_path: Path):
    options = recipe(epochs=1, data__limit=30)
    train(options, tmp_path / "whole")
    # recipe, command, environment, weights and their description, metrics, state, result
    for number in range(1, 9):
        child = _in_child(options, tmp_path / f"parts{number}", kill_at_replace=number)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        train(options, tmp_path / f"parts{number}")
        assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / f"parts{number}"))
        assert (tmp_path / f"parts{number}" / "environment.json").exists()


@pytest.mark.parametrize("name", ["result.json", "metrics.jsonl"])
def test_figures_cut_short_are_told(name: str, tmp_path: Path):
    train(recipe(epochs=1, data__limit=30), tmp_path / "run")
    (tmp_path / "run" / name).write_text('{"epochs": 1, ')
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(CheckpointError, match=rf"{name} is damaged or cut short; remove it"):
        print(folder.result, folder.metrics)


def test_nan_stops_with_the_last_good_checkpoint(tmp_path: Path):
    options = recipe(optim__lr=1e6, optim__clip=0.0, optim__name="sgd", optim__warmup_epochs=0, epochs=2)
    with pytest.raises(VitrimError, match=r"nothing was saved yet; lower optim\.lr"):
        train(options, tmp_path / "bad")
    assert not RunFolder(tmp_path / "bad").state_path.exists()


def test_nan_in_a_later_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from vitrim.distill import Distiller

    options = recipe()
    with pytest.raises(Stopped):
        train(options, tmp_path / "run", report=At(1, 2, signal.SIGTERM))
    kept = (tmp_path / "run" / "checkpoint" / "state.pt").read_bytes()
    forward = Distiller.forward
    broken = lambda *a, **k: (o := forward(*a, **k))._replace(loss=o.loss * float("nan"))  # noqa: E731
    monkeypatch.setattr(Distiller, "forward", broken)
    with pytest.raises(VitrimError, match=r"the loss is nan at epoch 2, step 3; the last good checkpoint is kept") as e:
        train(options, tmp_path / "run")
    assert "\n" not in str(e.value)
    assert (tmp_path / "run" / "checkpoint" / "state.pt").read_bytes() == kept


@pytest.mark.parametrize("what", ["state", "model"])
def test_full_disk_keeps_the_old_checkpoint(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options = recipe(epochs=2, data__holdout=0.0)
    with pytest.raises(Stopped):
        train(options, tmp_path / "run", report=At(1, 2, signal.SIGTERM))
    kept = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}

    def full(*args: Any, **options: Any) -> None:
        for path in args:
            if isinstance(path, Path) and is_leftover(path.parent):
                path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch if what == "state" else single_network, "save", full)
    with pytest.raises(OutputError, match=r"No space left on device\); the one before is kept; free some") as e:
        train(options, tmp_path / "run")
    assert "\n" not in str(e.value)
    state = RunFolder(tmp_path / "run").state_path
    assert state.read_bytes() == kept[state]
    assert not list((tmp_path / "run").rglob(f"{MARK}*"))
    monkeypatch.undo()
    train(options, tmp_path / "run")
    train(options, tmp_path / "whole")
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "run"))


def test_nothing_is_kept_where_nothing_was_written(tmp_path: Path):
    with no_file_above(10_000), pytest.raises(OutputError) as caught:  # Less than the model.
        train(recipe(epochs=1), tmp_path / "run")
    says = "model.safetensors (File too large); allow larger files (ulimit -f), or choose another folder"
    assert str(caught.value).endswith(says)


def test_folders_of_others_are_refused(tmp_path: Path):
    train(recipe(epochs=1), tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(RecipeError, match=r"another recipe \(optim\.lr: 0\.003 -> 0\.1; epochs: 1 -> 2\)"):
        train(recipe(epochs=2, optim__lr=0.1), tmp_path / "run")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("mine")
    with pytest.raises(RecipeError, match="is not empty and holds no run"):
        train(recipe(), tmp_path / "foreign")
    with pytest.raises(RecipeError, match="is a file"):
        train(recipe(), tmp_path / "foreign" / "thesis.tex")
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    assert [p.name for p in (tmp_path / "foreign").iterdir()] == ["thesis.tex"]


def test_a_finished_run_is_not_repeated(tmp_path: Path):
    events: list[str] = []
    first = train(recipe(epochs=1), tmp_path / "run", report=lambda event, figures: events.append(event))
    assert "step" in events
    assert events[-1] == "done"
    events.clear()
    assert train(recipe(epochs=1), tmp_path / "run", report=lambda event, figures: events.append(event)) == first
    assert events == []


def test_a_checkpoint_with_code_is_refused(tmp_path: Path):
    folder = RunFolder(tmp_path)
    folder.state_path.parent.mkdir()
    torch.save({"epoch": os.system}, folder.state_path)
    with pytest.raises(CheckpointError, match="holds code"):
        folder.load_state()
    folder.state_path.write_bytes(b"half a file")
    with pytest.raises(CheckpointError, match="cannot be read"):
        folder.load_state()


SPELLINGS = {
    "absolute": "{root}",
    "relative": "images",
    "with a slash": "images/",
    "through a link": "link",
    "through a folder": "link/../images/.",
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_the_same_folder_written_otherwise_is_the_same_run(
    spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "link").symlink_to("images")
    written, again = (
        recipe(data__root=root, model__checkpoint=root, teacher={"name": root, "checkpoint": root}, distill="Cls()")
        for root in ("images", spelling.format(root=tmp_path / "images"))
    )
    RunFolder("run").start(written, "", {})
    RunFolder("run").check(again)
    with pytest.raises(RecipeError, match=r"another recipe \(data\.root: 'images' -> 'other'\)"):
        RunFolder("run").check(recipe(**{**vars_of(written), "data__root": "other"}))


def vars_of(options: Recipe) -> dict[str, Any]:
    return {
        "model__checkpoint": options.model.checkpoint,
        "teacher": {"name": "images", "checkpoint": "images"},
        "distill": options.distill,
    }


def test_a_run_goes_on_anywhere_with_the_images_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for place in ("here", "there"):
        (tmp_path / place / "images").mkdir(parents=True)
    run = RunFolder(tmp_path / "run")
    monkeypatch.chdir(tmp_path / "here")
    run.start(recipe(data__root="images", model__checkpoint="images"), "", {})
    assert Recipe.read(tmp_path / "run" / "recipe.yaml").data.root == "images"
    monkeypatch.chdir(tmp_path / "there")
    found = Recipe.read(tmp_path / "run" / "recipe.yaml")
    assert found.data.root == found.model.checkpoint == str(tmp_path / "here" / "images")
    assert found.model.name == recipe().model.name
    run.check(recipe(data__root="../here/images", model__checkpoint="../here/images"))
    run.check(found)
    with pytest.raises(RecipeError, match=r"another recipe .*/there/images'\)"):
        run.check(recipe(data__root="images", model__checkpoint="images"))
    (tmp_path / "here").rename(tmp_path / "elsewhere")  # With its images: they are where they were, seen from there.
    monkeypatch.chdir(tmp_path / "elsewhere")
    run.check(recipe(data__root="images", model__checkpoint="images"))
    run.start(recipe(data__root="images", model__checkpoint="images"), "", {})
    monkeypatch.chdir(tmp_path)
    assert Recipe.read(tmp_path / "run" / "recipe.yaml").data.root == str(tmp_path / "elsewhere" / "images")


def test_the_message_about_another_recipe_says_what_is_in_a_mapping():
    plain, deep = Recipe(model=ModelSpec(args={})), Recipe(model=ModelSpec(args={"depth": 2}))
    assert plain.differences(deep) == ["model.args.depth: None -> 2"]
    assert deep.differences(plain) == ["model.args.depth: 2 -> None"]
    assert plain.differences(Recipe(model=ModelSpec(args={}))) == []


def test_spaces_in_the_notation_make_no_other_run():
    one = recipe(reduction="TopK() @ KeepRate(0.5, at=[1])", distill="Labels(0.5) + Logits(0.5)")
    other = recipe(reduction="TopK()@KeepRate(0.5,at=[1])", distill="Labels(0.5)+Logits(0.5)")
    assert one.differences(other) == []
    other = recipe(reduction="TopK()@KeepRate(0.6,at=[1])", distill="Labels(0.5)+Logits(0.5)")
    assert len(one.differences(other)) == 1


def test_options_without_effect_may_change_in_the_middle_of_a_run(teacher: str, tmp_path: Path):
    dropout = {"model__args": {"drop_path_rate": 0.2, "proj_drop_rate": 0.2}, "augment__views": 2, "epochs": 2}
    distilled = {"teacher": {"name": teacher}, "distill": "Labels(0.5) + Logits(0.5)", **dropout}
    options = recipe(**distilled, cache={"folder": str(tmp_path / "cache")})
    changed = recipe(
        **distilled, cache={"folder": str(tmp_path / "other")}, data__workers=1, data__download=True,
        checkpointing=True, shard_teacher=True,
    )  # fmt: skip
    train(options, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(options, tmp_path / "parts", report=At(0, 2, signal.SIGTERM))
    train(changed, tmp_path / "parts")
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "parts"))


def test_the_recipe_after_a_kill_is_that_of_the_uninterrupted_run(
    teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also where paths in it are relative."""
    monkeypatch.chdir(tmp_path)
    Path("teacher").symlink_to(teacher)
    options = recipe(epochs=1, data__limit=30, teacher={"name": "teacher"}, distill="Logits()")
    train(options, "whole")
    for number in (1, 2, 5):
        child = _in_child(options, Path("parts"), kill_at_replace=number)
        child.join()
        assert child.exitcode == -signal.SIGKILL
    train(options, "parts")
    assert Path("parts/recipe.yaml").read_bytes() == Path("whole/recipe.yaml").read_bytes()
    assert_same(outcome(Path("whole")), outcome(Path("parts")))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("event", ["epoch", "done"])
def test_a_signal_after_the_last_step_is_reported_once_the_run_is_complete(event: str, number: int, tmp_path: Path):
    def signalled(name: str, figures: Mapping[str, Any]) -> None:
        if name == event:
            os.kill(os.getpid(), number)

    options = recipe(epochs=1, data__limit=30)
    with pytest.raises(Stopped, match="at the end of the run") as stopped:
        train(options, tmp_path / "run", report=signalled)
    assert stopped.value.code == 128 + number
    assert train(options, tmp_path / "run") == RunFolder(tmp_path / "run").result


def test_a_signal_is_acknowledged_at_once_and_a_second_ctrl_c_leaves(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def press(*numbers: int) -> None:
        with StopSignals():
            for number in numbers:
                os.kill(os.getpid(), number)

    said = "stopping after this step; press Ctrl-C again to leave without saving\n"
    with pytest.raises(Stopped):
        press(signal.SIGINT, signal.SIGINT, signal.SIGTERM)  # The same press twice: a launcher passes it on.
    assert capfd.readouterr().err == said
    monkeypatch.setattr(stopping, "SAME_PRESS", -1.0)
    with pytest.raises(KeyboardInterrupt):
        press(signal.SIGTERM, signal.SIGINT)
    assert capfd.readouterr().err == said


def test_a_signal_is_not_lost_where_the_run_is_left_to_another_process(tmp_path: Path):
    def leave(event: str, figures: Mapping[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise RunAbandoned

    with pytest.raises(Stopped):
        train(recipe(), tmp_path / "run", report=leave)


def test_handlers_of_other_languages_do_not_break_the_end_of_a_run(monkeypatch: pytest.MonkeyPatch):
    with StopSignals() as signals:
        signals._before = dict.fromkeys(signals._before)  # As Python reports handlers that it did not set.
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("holdout", [0.0, 0.2])
def test_weights_that_are_not_finite_are_never_kept(holdout: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The loss of the last step is that of the weights before it, so it does not show what the step did."""
    options = recipe(epochs=1, data__holdout=holdout, batch_size=120)  # A single step.
    step = torch.optim.AdamW.step

    def broken(self: Any, *args: Any) -> None:
        step(self, *args)
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(float("inf"))

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    with pytest.raises(VitrimError, match=r"^weights are not finite at epoch 1, step 1; nothing was saved yet") as e:
        train(options, tmp_path / "run")
    assert "\n" not in str(e.value)
    folder = RunFolder(tmp_path / "run")
    assert (folder.state_path.exists(), folder.model_path.exists(), folder.result) == (False, False, None)


@pytest.mark.parametrize("more", [{}, {"optim__ema": 0.5}, {"elastic": {"grow_epochs": 1, "images": 16}}])
def test_weights_too_large_to_compute_with_are_never_kept(more: Any, tmp_path: Path):
    """They are finite, and without held-out images no other figure shows what they do."""
    options = recipe(
        epochs=1, data__holdout=0.0, batch_size=120, optim__name="sgd", optim__lr=1e6, optim__clip=0.0,
        optim__warmup_epochs=0.0, **more,
    )  # fmt: skip
    with pytest.raises(VitrimError, match="weights are so large that outputs are not finite at epoch 1, step 1"):
        train(options, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    assert (folder.state_path.exists(), folder.model_path.exists(), folder.result) == (False, False, None)


def test_weights_that_are_not_finite_are_not_kept_on_a_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(event: str, figures: Mapping[str, Any]) -> None:
        if event == "step":
            networks[0].head.weight.data.fill_(float("nan"))
            os.kill(os.getpid(), signal.SIGTERM)

    networks: list[Any] = []
    prepare = prepared.prepare_student
    monkeypatch.setattr(prepared, "prepare_student", lambda *a: networks.append(prepare(*a)) or networks[0])
    with pytest.raises(VitrimError, match="weights are not finite at epoch 1, step 1"):
        train(recipe(), tmp_path / "run", report=broken)
    assert not RunFolder(tmp_path / "run").state_path.exists()


def test_a_run_without_held_out_images_whose_test_loss_is_not_finite_has_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    evaluate = loop.evaluate_all
    infinite = lambda *a, **k: {name: replace(one, loss=math.inf) for name, one in evaluate(*a, **k).items()}  # noqa: E731
    monkeypatch.setattr(loop, "evaluate_all", infinite)
    with pytest.raises(VitrimError, match=r"^the loss on the test images is inf; lower optim\.lr"):
        train(recipe(epochs=1, data__holdout=0.0), tmp_path / "run")
    assert RunFolder(tmp_path / "run").result is None


def test_of_equally_accurate_epochs_the_one_of_lower_loss_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    losses = iter([2.0, 1.5, 1.7])
    evaluate = loop.evaluate_all

    def tied(networks: Any, stream: Any, **options: Any) -> Any:
        found = evaluate(networks, stream, **options)
        held_out = len(stream) < 100
        return (
            {name: replace(one, accuracy=0.5, loss=next(losses)) for name, one in found.items()} if held_out else found
        )

    monkeypatch.setattr(loop, "evaluate_all", tied)
    assert train(recipe(), tmp_path / "run")["best_epoch"] == 1


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "another folder of this name"])
def test_a_run_does_not_go_on_with_other_images(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for place in ("here", "there"):
        for split, number in (("train", 12), ("test", 2)):
            for kind in "ab":
                folder = tmp_path / place / "data" / split / kind
                folder.mkdir(parents=True)
                for each in range(number):
                    Image.new("L", (8, 8), 9 * each).save(folder / f"{place}-{each}.png")
    monkeypatch.chdir(tmp_path / "here")
    options = recipe(data__root="data", data__limit=None)
    with pytest.raises(Stopped):
        train(options, tmp_path / "run", report=At(1, 1, signal.SIGTERM))
    one, new = Path("data/train/a/here-3.png"), Path("data/train/a/new.png")
    match change:
        case "added":
            shutil.copy(one, new)
        case "removed":
            one.unlink()
        case "renamed":
            one.rename(new)
        case _:
            monkeypatch.chdir(tmp_path / "there")
    other = r"another recipe \(data\.root: '.*/here/data' -> '.*/there/data'\)"
    began = "the training images are not those with which this run began"
    with pytest.raises(RecipeError, match=other if change.startswith("another") else began) as error:
        train(options, tmp_path / "run")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("reduction", "TopK() @ KeepRate(0.6)", 'TopK(score="cls_attention") @ KeepRate(0.60)'),
        ("distill", "Labels(0.3) + Logits()", "Labels( 0.30 )+Logits()"),
    ],
)
def test_a_notation_may_be_written_in_several_ways(name: str, one: str, other: str):
    taught = {"teacher": {"name": "t"}} if name == "distill" else {}
    first, second, third = (recipe(**taught, **{name: text}) for text in (one, other, one.replace("0.", "0.1")))
    assert first.differences(second) == []
    assert len(first.differences(third)) == 1


FOREIGN = ["movie.mkv.part", "notes.lock", ".lock", ".tmpabc", ".vitrim-part-file"]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_that_holds_a_foreign_file_of_any_name_is_refused_and_left_alone(name: str, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    with pytest.raises(RecipeError, match="is not empty and holds no run"):
        train(recipe(epochs=1, data__limit=30), tmp_path / "run")
    assert [(path.name, path.read_text()) for path in (tmp_path / "run").iterdir()] == [(name, "mine")]


def test_foreign_files_in_the_folder_of_a_run_outlive_it(tmp_path: Path):
    options = recipe(epochs=1, data__limit=30)
    with pytest.raises(Stopped):
        train(options, tmp_path / "run", report=At(0, 1, signal.SIGTERM))
    (tmp_path / "run" / "inner.part").mkdir()
    (tmp_path / "run" / "x.lock").mkdir()
    mine = [tmp_path / "run" / name for name in (*FOREIGN, "inner.part/movie.mkv.part")]
    for path in mine:
        path.write_text("mine")
    train(options, tmp_path / "run")
    assert [path.read_text() for path in mine] == ["mine"] * len(mine)
    assert (tmp_path / "run" / "x.lock").is_dir()
