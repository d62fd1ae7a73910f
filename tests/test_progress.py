"""What the bar of a run says while it goes on."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from clocks import Clock
from vitrim.cli import main
from vitrim.showing import progress
from vitrim.showing.figures import format_figure
from vitrim.train.loop import train
from vitrim.train.recipe import Recipe
from vitrim.train.state import Report
from vitrim.train.stopping import Stopped


def test_the_time_left_is_that_of_the_run(monkeypatch: pytest.MonkeyPatch):
    clock, bars = [0.0], []

    class Seen(progress.Progress):
        def __init__(self, *columns: Any, **options: Any) -> None:
            super().__init__(*columns, **options, get_time=lambda: clock[0])
            bars.append(self)

    def go_on(report: Report, epoch: int, epochs: int, steps: range) -> float | None:
        """One second for every step of 4; the seconds left that are shown then."""
        for step in steps:
            clock[0] += 1
            figures = {"loss": 1.0, "accuracy": None, "terms": {}, "images_per_second": 9.0, "tokens": None}
            report("step", {"epoch": epoch, "epochs": epochs, "step": step, "steps": 4, **figures})
        return bars[0].tasks[0].time_remaining

    monkeypatch.setattr(progress, "Progress", Seen)
    with progress.live(Console(file=StringIO())) as report:
        assert go_on(report, 0, 10, range(1, 5)) == 36
        clock[0] += 4  # The evaluation after an epoch takes part of the time that is left.
        assert go_on(report, 1, 10, range(1, 5)) in range(40, 65)
        report("done", {})
        report("run", {"name": "b-s0"})
        clock[0] += 99
        assert go_on(report, 3, 6, range(2, 5)) == 8  # An interrupted run that goes on where it was.


STEP = {"steps": 900, "epochs": 2, "loss": 1.5, "accuracy": 0.25, "terms": {}, "images_per_second": 9.0, "tokens": None}
START = {
    "images": 60000, "held_out": 600, "epochs": 2, "steps": 900, "epoch": 0, "step": 0, "device": "cpu", "processes": 1,
    "folder": "runs/[a]",
}  # fmt: skip


def lines_of(console: Console) -> list[str]:
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines() if line.strip()]  # pyright: ignore


def test_the_first_line_says_how_much_work_there_is_and_where():
    with progress.live(console := Console(file=StringIO(), width=200), "row-s0") as report:
        report("start", START)
        report("start", START | {"held_out": 0, "epoch": 1, "step": 8, "device": "cuda:0", "processes": 4})
    assert lines_of(console) == [
        "row-s0 60000 images, 600 held out 2 epochs of 900 steps cpu runs/[a]",
        "row-s0 60000 images 2 epochs of 900 steps, continued at epoch 2, step 9 4 processes on cuda:0 runs/[a]",
    ]


def test_one_of_a_kind_is_singular_and_epochs_count_from_1_for_people():
    with progress.live(console := Console(file=StringIO(), width=200)) as report:
        report("start", START | {"images": 1, "held_out": 0, "epochs": 1, "steps": 1})
    assert lines_of(console)[0].startswith("1 image 1 epoch of 1 step ")
    assert format_figure("best_epoch", 0) == "1"
    assert format_figure("epoch", 0) == "0"


def test_without_a_terminal_a_line_a_minute_takes_the_place_of_the_bar():
    clock = Clock()
    with progress.live(console := Console(file=StringIO(), width=200), clock=clock.read) as report:
        report("start", START)
        for step in range(1, 901):  # A quarter of an hour.
            clock.sleep(1)
            report("step", STEP | {"epoch": 0, "step": step})
    lines = lines_of(console)[1:]
    assert lines[0] == "epoch 1/2 step 60/900 loss 1.500 acc 25.0% 9.0 images/s"
    assert len(lines) == 15


def test_a_teacher_cache_without_a_terminal_is_not_silent():
    clock = Clock()
    with progress.live(console := Console(file=StringIO(), width=200), clock=clock.read) as report:
        for done in range(0, 300, 30):
            clock.sleep(30)
            report("cache", {"name": "train", "done": done, "rows": 300})
    assert lines_of(console)[0] == "teacher cache, train 30 of 300 images"
    assert len(lines_of(console)) == 5


@pytest.mark.parametrize(("event", "figures", "line"), [
    ("evaluation", {"done": 3, "batches": 400}, "row-s0 evaluation batch 3 of 400"),
    ("wait", {"runs": 2}, "waiting for other workers: 2 runs"),
])  # fmt: skip
def test_no_other_part_of_a_run_without_a_terminal_is_silent(event: str, figures: dict[str, int], line: str):
    clock = Clock()
    with progress.live(console := Console(file=StringIO(), width=200), "row-s0", clock=clock.read) as report:
        for _ in range(7):
            clock.sleep(20)
            report(event, figures)
    assert lines_of(console) == [line] * 2


def test_runs_and_vitrim_eval_report_their_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = {"args": {"depth": 1, "embed_dim": 24, "num_heads": 2}}
    options = Recipe.from_dict({"model": model, "data": {"workers": 0, "limit": 60}, "epochs": 1, "batch_size": 99})
    told: list[Any] = []

    @contextmanager
    def noting() -> Iterator[Report]:
        yield lambda event, figures: told.append((event, figures.get("batches")))

    with noting() as report:
        train(options, tmp_path / "run", report=report)
    tested = [("evaluation", 4)] * 4
    assert told == [("start", None), ("step", None), ("evaluation", 1), ("epoch", None), *tested, ("done", None)]
    told.clear()
    data = {"workers": 0, "limit": 60, "holdout": 0.5}
    model["args"]["num_classes"] = 0  # Without classes the objective itself is measured, 8 images at a time.
    taught = {"teacher": {"name": str(tmp_path / "run")}, "distill": "Tokens()"}
    features = Recipe.from_dict({"model": model, "data": data, "epochs": 1, "batch_size": 8, **taught})
    with noting() as report:
        train(features, tmp_path / "features", report=report)
    assert told.count(("evaluation", 4)) == 4
    told.clear()
    monkeypatch.setattr(progress, "live", noting)
    main(["eval", f"{tmp_path}/run", "--data.workers", "0", "--batch_size", "99", "--device", "cpu"])
    assert told == tested


def test_with_a_terminal_the_bar_is_enough():
    clock = Clock()
    console = Console(file=StringIO(), width=200, force_terminal=True)
    with progress.live(console, clock=clock.read) as report:
        for step in range(1, 901):
            clock.sleep(1)
            report("step", STEP | {"epoch": 0, "step": step})
    assert "step 60/900" not in console.file.getvalue()  # pyright: ignore


def test_a_run_reports_its_start_once_and_says_where_it_goes_on(tmp_path: Path):
    model = {"args": {"depth": 1, "embed_dim": 24, "num_heads": 2}}
    options = Recipe.from_dict({"model": model, "data": {"workers": 0, "limit": 60}, "epochs": 2, "batch_size": 16})
    starts: list[Any] = []

    def report(event: str, figures: Any) -> None:
        starts.extend([figures] if event == "start" else [])
        if len(starts) == 1 and event == "step" and (figures["epoch"], figures["step"]) == (1, 2):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        train(options, tmp_path / "run", report=report)
    train(options, tmp_path / "run", report=report)
    expected = {"images": 54, "held_out": 6, "epochs": 2, "steps": 3, "processes": 1}
    assert [{name: start[name] for name in expected} for start in starts] == [expected] * 2
    assert [(start["epoch"], start["step"]) for start in starts] == [(0, 0), (1, 2)]
