"""Sweeps: what a kill leaves, and mistakes in methods and values, which are reported before any work."""

import json
from pathlib import Path
from typing import Any

import pytest

from vitrim import cli
from vitrim.data.specs import DataSpec
from vitrim.errors import BusyError, RecipeError, ScheduleError, VitrimError
from vitrim.study import sweep as module
from vitrim.study.sweep import TOGETHER, sweep
from vitrim.study.template import check_sweep, fill_template
from vitrim.study.trials import Trials, kept_trials
from vitrim.train.loop import train
from vitrim.train.recipe import Recipe

DATA = DataSpec(workers=0, limit=30)
METHOD = "TopK() @ KeepRate({r}, at=[0])"
VARY = {"r": [0.3, 0.4, 0.5, 0.6, 0.7, 0.8]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("sweep") / "run"
    data = {"workers": 0, "limit": 30}
    model = {"args": {"depth": 1, "embed_dim": 24, "num_heads": 2}}
    train(Recipe.from_dict({"model": model, "data": data, "epochs": 1, "batch_size": 16}), folder)
    return str(folder)


class Killed(BaseException):
    """As a kill: nothing catches it."""


class Evaluations:
    """The methods of every evaluation; from number `kill_at` on the process is killed."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.kill_at = 10**9
        self.real = module.evaluate_variants

    def __call__(self, variants: Any, *args: Any, **options: Any) -> Any:
        if len(self.calls) >= self.kill_at:
            raise Killed
        self.calls.append([method for _, method in variants])
        return self.real(variants, *args, **options)


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> Evaluations:
    evaluations = Evaluations()
    monkeypatch.setattr(module, "evaluate_variants", evaluations)
    return evaluations


def figures(rows: Any) -> list[dict[str, Any]]:
    timed = ("seconds", "images_per_second", "speed")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


@pytest.mark.parametrize("search", ["grid", "tpe"])
def test_a_killed_sweep_continues_after_its_finished_trials(
    search: Any, run: str, evaluations: Evaluations, tmp_path: Path
):
    options: dict[str, Any] = {"search": search, "trials": 3, "seed": 4}
    whole = sweep([run], DATA, METHOD, VARY, **options).rows
    evaluations.kill_at = len(evaluations.calls) - 1
    evaluations.calls.clear()
    kept = tmp_path / "trials"
    with pytest.raises(Killed):
        sweep([run], DATA, METHOD, VARY, **options, kept=kept)
    assert len(evaluations.calls) == evaluations.kill_at
    evaluations.kill_at = 10**9
    evaluations.calls.clear()
    rows = sweep([run], DATA, METHOD, VARY, **options, kept=kept).rows
    assert len(evaluations.calls) == 1  # What was finished is not evaluated again.
    assert figures(rows) == figures(whole)
    assert len(rows) == 1 + (len(VARY["r"]) if search == "grid" else 3)


def test_trials_of_another_sweep_are_neither_used_nor_lost(run: str, tmp_path: Path):
    kept = tmp_path / "trials"
    sweep([run], DATA, METHOD, {"r": [0.5]}, kept=kept)
    before = kept.read_bytes()
    for data, method, vary, name in (
        (DATA, METHOD, {"r": [0.6]}, "vary"),
        (DATA, "TopK(norm) @ KeepRate({r}, at=[0])", {"r": [0.5]}, "method"),
        (DataSpec(workers=0, crop_pct=0.5), METHOD, {"r": [0.5]}, "data"),
    ):
        with pytest.raises(RecipeError, match=f"holds trials of a sweep with another {name}; choose another --out"):
            sweep([run], data, method, vary, kept=kept)
    assert kept.read_bytes() == before
    sweep([run], DataSpec(workers=1, limit=7), METHOD, {"r": [0.5]}, kept=kept)  # The same test images.
    kept.write_text('{"settings": ')
    with pytest.raises(RecipeError, match="is damaged; remove it"):
        sweep([run], DATA, METHOD, {"r": [0.5]}, kept=kept)


def test_trials_go_when_the_table_is_written_and_stay_when_it_is_not(tmp_path: Path):
    out = tmp_path / "table.md"
    opened = kept_trials(out)
    path = opened.__enter__()
    assert path is not None
    Trials(path, {}).add("m", [{"a": 1.0}])
    assert not opened.__exit__(Killed, Killed(), None)
    assert path.exists()
    with kept_trials(out) as path, pytest.raises(BusyError, match="another process runs the sweep"), kept_trials(out):
        pass
    assert [path.name for path in tmp_path.iterdir()] == []
    with kept_trials(None) as path:
        assert path is None


def test_the_command_keeps_trials_next_to_its_table(run: str, evaluations: Evaluations, tmp_path: Path):
    out = tmp_path / "table.json"
    words = ["sweep", run, "--method", METHOD, "--vary", json.dumps(VARY), "--data.workers", "0", "--out", str(out)]
    evaluations.kill_at = 1
    with pytest.raises(Killed):
        cli.main(words)
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["table.json.trials.jsonl"]
    evaluations.kill_at = 10**9
    cli.main(words)
    assert len(json.loads(out.read_text())["rows"]) == 1 + len(VARY["r"])
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


@pytest.mark.parametrize(
    ("method", "vary", "says"),
    [
        (METHOD, {"r": [0.5, 0.5]}, "r lists 0.5 twice"),
        ("ToMe() @ ConstantR({r})", {"r": [1, 1.0]}, "r lists 1 twice"),
        (METHOD, {"r": [float("nan")]}, "r lists nan"),
        ("TopK() @ KeepRate({r.foo})", {"r": [0.5]}, "braces hold one name each"),
        ("TopK() @ KeepRate({r[0]})", {"r": [0.5]}, "braces hold one name each"),
        ("TopK() @ KeepRate({r!r})", {"r": [0.5]}, "braces hold one name each"),
        ("TopK() @ KeepRate({r:>999999999})", {"r": [0.5]}, "braces hold one name each"),
        ("TopK() @ KeepRate({})", {"r": [0.5]}, "braces hold one name each"),
        ("TopK() @ KeepRate({0})", {"0": [0.5]}, "braces hold one name each"),
        ("TopK() @ KeepRate({r)", {"r": [0.5]}, "write a literal brace twice"),
        ("TopK() @ KeepRate({{r}})", {"r": [0.5]}, r"does not use \{r\}"),
        ("TopK() @ KeepRate({speed})", {"speed": [0.5]}, "is the name of a column of the table"),
        ("TopK() @ PowerLaw({a}, {b})", {"a": [n / 200 for n in range(200)], "b": list(range(99))}, "at most 10,000"),
    ],
)
def test_mistakes_in_a_sweep_are_reported_before_any_work(method: str, vary: Any, says: str):
    with pytest.raises(ScheduleError, match=says):
        check_sweep(method, vary)
    with pytest.raises(VitrimError, match=says):
        sweep(["no such model"], DATA, method, vary)


def test_templates_write_whole_numbers_and_literal_braces():
    assert fill_template("ConstantR({r}) {{0: {a}}}", {"r": 13.0, "a": 0.25}) == "ConstantR(13) {0: 0.25}"
    assert TOGETHER >= 1
