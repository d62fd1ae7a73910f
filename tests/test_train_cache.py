"""Runs that learn from cached teacher outputs: the live teacher's numbers, one builder, every mistake in one line."""

import errno
import json
import os
import re
import signal
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_digits

import processes
from limits import no_file_above
from vitrim import load, save
from vitrim.cli import main
from vitrim.data.data_sets import open_both
from vitrim.data.splits import make_splits
from vitrim.distill import Teacher
from vitrim.distill.cache_writer import LOCK
from vitrim.showing.progress import live
from vitrim.study.run_study import run_study
from vitrim.study.study import Study
from vitrim.train import single_network
from vitrim.train.checkpoint import RunFolder
from vitrim.train.learner import prepare_learner, prepare_student
from vitrim.train.loop import train
from vitrim.train.recipe import Recipe
from vitrim.train.specs import CacheSpec
from vitrim.train.stopping import Stopped

pytestmark = pytest.mark.usefixtures("few_test_digits")

SIZES = {"depth": 3, "embed_dim": 24, "num_heads": 2}
FAKD = "Labels(0.5) + Logits(0.5) + ClsStages(0.3) + Tokens(0.1)"
FEATURES = "Cls(0.5) + Tokens(0.5, loss=cosine)"
REDUCTION = "TopK(fuse=sum) @ KeepRate(0.7, at=[1])"
HEADLESS = {"model": {"args": {**SIZES, "num_classes": 0}}, "distill": FEATURES}


def options(taught_by: str, folder: Path | None, **changes: Any) -> dict[str, Any]:
    data: dict[str, Any] = {
        "model": {"args": SIZES},
        "data": {"workers": 0, "limit": 60, "holdout": 0.2},
        "augment": {"crop": "pad", "erasing": 0.5, "views": 2},
        "reduction": REDUCTION,
        "distill": FAKD,
        "teacher": {"name": taught_by},
        "cache": folder and {"folder": str(folder)},
        "epochs": 3,
        "batch_size": 16,
    }
    for name, value in changes.items():
        data[name] = {**(data.get(name) or {}), **value} if isinstance(value, dict) else value
    return data


def recipe(taught_by: str, folder: Path | None, **changes: Any) -> Recipe:
    return Recipe.from_dict(options(taught_by, folder, **changes))


def curve(folder: Path) -> list[dict[str, float]]:
    """The losses and terms of all epochs."""
    told = ("train_", "val_")
    return [
        {name: value for name, value in line.items() if name.startswith(told) and "accuracy" not in name}
        for line in RunFolder(folder).metrics
    ]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batches that the teacher is shown, by their length."""
    batches: list[int] = []
    forward = Teacher.forward
    monkeypatch.setattr(
        Teacher, "forward", lambda self, images, *a: batches.append(len(images)) or forward(self, images, *a)
    )
    return batches


@pytest.mark.parametrize("kind", [{}, HEADLESS], ids=["classes", "features"])
def test_a_run_from_the_cache_has_the_numbers_of_the_live_teacher(
    teacher: str, tmp_path: Path, kind: dict[str, Any], asked: list[int]
):
    changes = {**kind, "optim": {"ema": 0.8}}
    train(recipe(teacher, None, **changes), tmp_path / "live")
    asked.clear()
    finished: list[tuple[str, int]] = []

    def note(event: str, figures: Mapping[str, Any]) -> None:
        if event == "cache" and figures["done"] == figures["rows"]:
            finished.append((figures["name"], figures["rows"]))

    train(recipe(teacher, tmp_path / "kept", **changes), tmp_path / "built", report=note)
    # Held-out images need a teacher only where the objective chooses the epoch.
    assert finished == [("train", 96), ("held-out", 12)][: 2 if kind else 1]
    assert sum(asked) == sum(rows + 1 for _, rows in finished)  # One image more tells the shapes.
    asked.clear()
    train(recipe(teacher, tmp_path / "kept", **changes), tmp_path / "reused")
    assert asked == []
    live, built, reused = (curve(tmp_path / name) for name in ("live", "built", "reused"))
    assert reused == built
    for one, two in zip(live, built, strict=True):
        assert two == pytest.approx(one, rel=2e-3)
    assert len({line["train_loss"] for line in live}) == 3


def test_views_take_turns(teacher: str):
    given = recipe(teacher, None)
    images, tested = open_both(given.data)
    stream = make_splits(images, tested, prepare_student(given, images.classes), given.data, given.augment, 0).train
    first, again = [stream[key][0] for key in range(48)], [stream[96 + key][0] for key in range(48)]
    other = [stream[48 + key][0] for key in range(48)]
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert sum(torch.equal(one, two) for one, two in zip(first, other, strict=True)) < 10


def test_the_teacher_is_let_go(teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[Any] = []
    monkeypatch.setattr(single_network, "prepare_learner", lambda *a: made.append(prepare_learner(*a)) or made[-1])
    train(recipe(teacher, tmp_path / "kept", epochs=1), tmp_path / "run")
    assert made[0].teacher is None
    assert not [name for name, _ in made[0].named_parameters() if name.startswith("teacher")]


@pytest.mark.parametrize("moment", [(0, 2), (1, 3)])
def test_an_interrupted_run_ends_with_the_same_numbers(teacher: str, tmp_path: Path, moment: tuple[int, int]):
    given = recipe(teacher, tmp_path / "kept", **HEADLESS, optim={"ema": 0.9}, epochs=2)

    def stop(event: str, figures: Mapping[str, Any]) -> None:
        if event == "step" and (figures["epoch"], figures["step"]) == moment:
            os.kill(os.getpid(), signal.SIGTERM)

    train(given, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(given, tmp_path / "parts", report=stop)
    train(given, tmp_path / "parts")
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    kept = [load(tmp_path / name / "model").state_dict() for name in ("whole", "parts")]
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


def test_building_stops_when_asked_and_goes_on(teacher: str, tmp_path: Path, asked: list[int]):
    def stop(event: str, figures: Mapping[str, Any]) -> None:
        if event == "cache" and figures["done"] == 64:
            os.kill(os.getpid(), signal.SIGTERM)

    given = recipe(teacher, tmp_path / "kept", epochs=1)
    with pytest.raises(Stopped, match=r"stopped by SIGTERM at row 64 of 96 of the teacher cache; .* repeat the same"):
        train(given, tmp_path / "run", report=stop)
    assert np.load(tmp_path / "kept" / "train" / "done.npy").sum() == 64
    assert not (tmp_path / "run").exists()
    asked.clear()
    train(given, tmp_path / "run")
    assert sum(asked) == 32


def test_a_cache_serves_other_students_with_the_same_images(teacher: str, tmp_path: Path, asked: list[int]):
    console = Console(file=StringIO(), width=200)
    with live(console) as report:
        train(recipe(teacher, tmp_path / "kept", epochs=1), tmp_path / "first", report=report)
    assert "teacher cache, train  96 images\n" in console.file.getvalue()  # pyright: ignore
    asked.clear()
    changes = {
        "distill": "Cls() + Logits()",
        "reduction": None,
        "batch_size": 8,
        "model": {"args": {**SIZES, "depth": 2}},
    }
    with pytest.raises(ValueError, match="holds logits, stages@3, tokens, temperature 4, but the terms need"):
        train(recipe(teacher, tmp_path / "kept", epochs=1, **changes), tmp_path / "second")
    train(recipe(teacher, tmp_path / "kept", epochs=2, **{**changes, "distill": "Logits()"}), tmp_path / "second")
    assert asked == []


@pytest.fixture(scope="module")
def kept(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache beside another teacher and other images of the same number and classes."""
    place = tmp_path_factory.mktemp("kept")
    train(recipe(teacher, place / "cache", epochs=1), place / "run")
    save(timm.create_model("vitrim_digits_vit", depth=3, embed_dim=36, num_heads=3), place / "other")
    digits = load_digits()
    for split, rows in (("train", range(60)), ("val", range(60, 120))):
        for row in rows:
            folder = place / "images" / split / f"digit{row % 10}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[row] * 15).astype("uint8")).save(folder / f"{row}.png")
    return place


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment": {"mixup": 0.2}}, "cache cannot know mixed images; set augment.mixup and augment.cutmix to 0, or"),
        ({"augment": {"cutmix": 1.0}}, "a teacher cache cannot know mixed images"),
        ({"augment": {"views": None}}, "cache holds a fixed number of forms of each image; set augment.views, for"),
        ({"augment": {"views": 0}}, "augment.views is 0; it must be 1 or more"),
        ({"cache": {"top_k": 0}}, "cache.top_k is 0; it must be 1 or more"),
        ({"cache": {"top": 0}}, "top"),
        ({"teacher": None, "distill": None}, "a teacher cache needs a teacher; set teacher, or leave cache out"),
        (
            {"distill": None, "reduction": None, "elastic": {"grow_epochs": 1}},
            "cache serves the terms of distill; leave",
        ),
        ({"distill": "Labels()"}, "no term of Labels() reads the teacher; leave teacher"),
        ({"teacher": {"name": "{other}"}}, "cache/train is of another teacher (vitrim_digits_vit: other weights, s"),
        ({"seed": 1}, "was made with seed 0, not 1"),
        ({"augment": {"views": 3}}, "was made with views 2, not 3"),
        ({"augment": {"flip": True}}, "is of another augmentation"),
        ({"data": {"limit": 50}}, "was made with images 48, not 40"),
        ({"data": {"name": "folder", "root": "{images}"}}, "is of other images"),
        ({"distill": "Logits(temperature=2)"}, "temperature 4, but the terms need logits, temperature 2"),
        ({"cache": {"top_k": 3}}, "holds the top 128 logits, not 3"),
    ],
)
def test_mistakes_leave_the_command_with_one_line(
    kept: Path, teacher: str, tmp_path: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
):
    text = yaml.safe_dump(options(teacher, kept / "cache", epochs=1, **changes))
    text = text.replace("{other}", str(kept / "other")).replace("{images}", str(kept / "images"))
    assert message in refusal(text, tmp_path, capsys)
    assert not (tmp_path / "run").exists()


def refusal(recipe: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The line with which `vitrim train` leaves."""
    (folder / "recipe.yaml").write_text(recipe)
    with pytest.raises(SystemExit) as left:
        main(["train", "--config", str(folder / "recipe.yaml"), "--out", str(folder / "run")])
    assert left.value.code == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    return said


def test_what_is_wrong_with_the_place_is_told_in_one_line(
    teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "kept"
    text = yaml.safe_dump(options(teacher, folder))
    folder.write_text("a file")
    assert f"{folder}/train: Not a directory" in refusal(text, tmp_path, capsys)
    folder.unlink()
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "holiday.jpg").write_bytes(b"")
    assert "is not empty and holds no teacher cache; choose another folder" in refusal(text, tmp_path, capsys)
    (folder / "train" / "holiday.jpg").unlink()
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    said = refusal(text, tmp_path, capsys)
    assert re.search(r"cache needs [\d.]+ kB in .*, where 100 B are free; free some", said), said
    monkeypatch.undo()

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert "done.npy (No space left on device); free some space, then repeat" in refusal(text, tmp_path, capsys)
    monkeypatch.undo()
    with no_file_above(20_000):
        said = refusal(text, tmp_path, capsys)
    assert ".npy (File too large); allow larger files (ulimit -f), or choose another folder" in said
    train(recipe(teacher, folder, epochs=1), tmp_path / "run")  # Nothing of all this is in the way.
    inside = yaml.safe_dump(options(teacher, tmp_path / "run"))
    (tmp_path / "next").mkdir()
    said = refusal(inside, tmp_path / "next", capsys)
    assert f"cache.folder is {tmp_path}/run, the folder of a run; choose another for the cache" in said
    (folder / "train" / "manifest.json").write_text("{")
    assert "manifest.json is not the manifest of a teacher cache, or is damaged" in refusal(
        text, tmp_path / "next", capsys
    )


def test_one_process_fills_the_cache_and_the_others_wait(teacher: str, tmp_path: Path, asked: list[int]):
    fcntl = pytest.importorskip("fcntl")
    given, folder = recipe(teacher, tmp_path / "kept", epochs=1), tmp_path / "kept" / "train"

    def stop(event: str, figures: Mapping[str, Any]) -> None:
        if event == "cache":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        train(given, tmp_path / "begun", report=stop)
    asked.clear()
    waited: list[tuple[int, int]] = []
    with (folder / LOCK).open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        def wait(event: str, figures: Mapping[str, Any]) -> None:
            if event == "cache" and len(waited) < 2:
                assert asked == []
                waited.append((figures["done"], figures["rows"]))
                if len(waited) == 2:  # The other is done.
                    np.load(folder / "done.npy", mmap_mode="r+")[:] = 1
                    fcntl.flock(other, fcntl.LOCK_UN)

        train(given, tmp_path / "run", report=wait)
    assert waited == [(16, 96), (16, 96)]
    assert asked == []


def test_two_processes_learn_as_one(teacher: str, tmp_path: Path):
    code = (
        "import sys\nfrom vitrim.train.loop import train\nfrom vitrim.train.recipe import Recipe\n"
        "train(Recipe.read(sys.argv[1]), sys.argv[2])\n"
    )
    changes = {**HEADLESS, "reduction": None, "epochs": 2, "optim": {"ema": 0.9}}
    train(recipe(teacher, tmp_path / "kept-one", **changes), tmp_path / "one")
    (tmp_path / "two.yaml").write_text(recipe(teacher, tmp_path / "kept-two", **changes).to_yaml())
    ended = processes.together(2, code, str(tmp_path / "two.yaml"), str(tmp_path / "two"))
    assert [one.returncode for one in ended] == [0, 0], ended
    for alone, both in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert both == pytest.approx(alone, rel=2e-3)
    one, two = (np.load(tmp_path / f"kept-{name}" / "train" / "tokens.npy") for name in ("one", "two"))
    assert np.allclose(one, two, rtol=2e-3, atol=1e-3)


def test_rows_of_a_study_share_the_cache_of_their_teacher(teacher: str, tmp_path: Path, asked: list[int]):
    base = options(teacher, None, epochs=1, distill=None, teacher=None)
    taught = {"teacher": {"name": "{row:teacher}"}, "cache": {"folder": "{row:teacher}-cache"}}
    rows = {
        "teacher": {"epochs": 1, "reduction": None},
        "all": {**taught, "distill": "Labels() + Logits() + Tokens()"},
        "logits": {**taught, "distill": "Logits()"},
    }
    other = {"cache": {"folder": "cache-{seed}"}}
    study = {"base": base, "rows": {**rows, "other": other}, "seeds": [0, 1]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    by_seed = [Study.read(tmp_path / "study.yaml", "full").recipe("other", seed, tmp_path).cache for seed in (0, 1)]
    assert by_seed == [CacheSpec("cache-0"), CacheSpec("cache-1")]
    del study["rows"]["other"]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    run_study(tmp_path / "study.yaml", tmp_path / "out")
    assert sum(asked) == 2 * 97  # One cache per seed, which has another teacher and other images.
    for seed in (0, 1):
        manifest = json.loads((tmp_path / f"out/teacher-s{seed}/model-cache/train/manifest.json").read_text())
        assert manifest["views"]["seed"] == seed
