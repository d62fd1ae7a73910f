"""Sweeps: their grid and their searches, what a kill leaves, what workers share, and mistakes in one line."""

import json
from pathlib import Path
from threading import Event
from typing import Any

import optuna
import pytest

from processes import start
from vitrim import cli
from vitrim.data.specs import DataSpec
from vitrim.errors import DivergedError, RecipeError, ScheduleError, VitrimError
from vitrim.study import at_test_time as module
from vitrim.study import in_training, local_workers
from vitrim.study.hopeless import Hopeless, Rival, Watch
from vitrim.study.proposals import Proposer
from vitrim.study.space import Space, key_of
from vitrim.study.sweep import sweep
from vitrim.study.sweep_plan import Place, Plan
from vitrim.study.template import check_sweep, fill_template
from vitrim.train.loop import train
from vitrim.train.recipe import Recipe
from vitrim.train.stopping import RunAbandoned
from vitrim.variables import DATABASE

DATA = DataSpec(workers=0, limit=30)
METHOD = "TopK() @ KeepRate({r}, at=[0])"
VARY = {"r": [0.3, 0.4, 0.5, 0.6, 0.7, 0.8]}
COUNTED = ("accuracy", "macs")
"""Objectives that are the same in every run."""


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
    """Counts evaluations; from number `kill_at` on the process is killed."""

    def __init__(self) -> None:
        self.number, self.kill_at, self.real = 0, 10**9, module.evaluate_all

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self.number >= self.kill_at:
            raise Killed
        self.number += 1
        return self.real(*args, **options)


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> Evaluations:
    evaluations = Evaluations()
    monkeypatch.setattr(module, "evaluate_all", evaluations)
    return evaluations


def figures(rows: Any) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in ("images_per_second", "speed")} for row in rows]


def url(folder: Path) -> str:
    return f"sqlite:///{folder}/trials.db"


@pytest.mark.parametrize("search", ["grid", "tpe", "nsga2"])
def test_a_killed_sweep_continues_after_its_finished_trials(
    search: Any, run: str, evaluations: Evaluations, tmp_path: Path
):
    plan, place = Plan(search, 6, COUNTED, seed=4, stop_early=False), Place(url(tmp_path))
    whole = sweep([run], DATA, METHOD, VARY, plan).rows
    assert evaluations.number == 7  # The dense network once, then each setting.
    evaluations.number, evaluations.kill_at = 0, 4
    with pytest.raises(Killed):
        sweep([run], DATA, METHOD, VARY, plan, place)
    evaluations.number, evaluations.kill_at = 0, 10**9
    rows = sweep([run], DATA, METHOD, VARY, plan, place).rows
    assert evaluations.number == 3  # What was finished is not evaluated again.
    assert figures(rows) == figures(whole)
    assert len(rows) == 7
    assert sweep([run], DATA, METHOD, VARY, plan, place).rows == rows
    assert evaluations.number == 3


def test_a_sweep_is_an_optuna_study_with_names_directions_and_attributes(run: str, tmp_path: Path):
    sweep([run], DATA, METHOD, {"r": [0.3, 0.6]}, place=Place(url(tmp_path), "mine"))
    study = optuna.load_study(study_name="mine", storage=url(tmp_path))
    assert study.metric_names == ["accuracy", "GMACs", "time ratio to dense"]
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE", "MINIMIZE"]
    assert [trial.params for trial in study.trials] == [{"r": 0.3}, {"r": 0.6}]
    for trial in study.trials:
        assert trial.state.name == "COMPLETE"
        assert trial.user_attrs["method"] == fill_template(METHOD, trial.params)
        accuracy, gmacs, time = trial.values
        assert (accuracy, gmacs) == (trial.user_attrs["accuracy"], trial.user_attrs["gmacs"])
        assert time == 1 / trial.user_attrs["speed"] > 0
    assert study.user_attrs["sweep"]["method"] == METHOD


def test_a_study_of_another_sweep_is_neither_used_nor_changed(run: str, tmp_path: Path):
    place, vary = Place(url(tmp_path), "mine"), {"r": [0.5]}
    sweep([run], DATA, METHOD, vary, place=place)
    optuna.create_study(storage=url(tmp_path), study_name="other").add_trial(optuna.trial.create_trial(value=1.0))
    for data, method, values, plan, says in (
        (DATA, METHOD, {"r": [0.6]}, Plan(), "with another vary"),
        (DATA, "TopK(norm) @ KeepRate({r}, at=[0])", vary, Plan(), "with another method"),
        (DataSpec(workers=0, crop_pct=0.5), METHOD, vary, Plan(), "with another data"),
        (DATA, METHOD, vary, Plan(objectives=COUNTED), "with another objectives"),
    ):
        with pytest.raises(RecipeError, match=f"'mine' in the database is a sweep {says}; choose another --name"):
            sweep([run], data, method, values, plan, place)
    with pytest.raises(RecipeError, match="study 'other' that is not a sweep of vitrim; choose another --name"):
        sweep([run], DATA, METHOD, vary, place=Place(url(tmp_path), "other"))
    for name in ("mine", "other"):
        assert len(optuna.load_study(study_name=name, storage=url(tmp_path)).trials) == 1
    sweep([run], DataSpec(workers=1, limit=7), METHOD, vary, place=place)  # The same test images.


SHARED = """
import os, signal, sys, time
from vitrim.study.space import Space
from vitrim.study.sweep_plan import Place, Plan
from vitrim.study.sweep_run import swept
from vitrim.study.template import fill_template

database, search, log, kill = sys.argv[1:]

class Subject:
    name = "m"
    def identity(self): return {"model": "m"}
    def reference(self): return {"accuracy": 0.5, "gmacs": 1.0, "speed": 1.0}
    def cost(self, setting): return {"gmacs": setting["r"] / 10, "speed": 1.0}
    def accuracy(self, setting, watch):
        with open(log, "a") as file:
            print(int(setting["r"]), file=file)
        if str(int(setting["r"])) == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"accuracy": setting["r"] / 100}

space = Space({"r": [1, 12]} if search != "grid" else {"r": list(range(1, 13))},
              lambda setting: fill_template("ToMe() @ ConstantR({r})", setting, check=True))
rows = swept(Subject(), space, Plan(search, 20, stop_early=False), Place(database), "s")
print(sorted(row["r"] for row in rows[1:]), [row["r"] for row in rows[1:] if "accuracy" not in row])
"""


@pytest.mark.parametrize("search", ["grid", "tpe", "nsga2"])
def test_two_workers_on_one_file_share_all_settings_and_repeat_none(search: str, tmp_path: Path):
    ends = [one.wait() for one in [start(SHARED, url(tmp_path), search, f"{tmp_path}/log", "none") for _ in range(2)]]
    assert [one.returncode for one in ends] == [0, 0], ends
    every = list(range(1, 13))  # A search stops where all settings were tried, before its 20 trials.
    assert sorted(map(int, (tmp_path / "log").read_text().split())) == every
    assert [one.stdout.strip() for one in ends] == [f"{every} []"] * 2


def test_the_trial_of_a_killed_worker_is_done_at_once_under_its_number(tmp_path: Path):
    words = url(tmp_path), "grid", f"{tmp_path}/log"
    assert start(SHARED, *words, "5").wait().returncode == -9
    assert optuna.load_study(study_name="s", storage=url(tmp_path)).trials[4].state.name == "RUNNING"
    end = start(SHARED, *words, "none").wait()
    assert (end.returncode, end.stdout.strip()) == (0, f"{list(range(1, 13))} []"), end
    assert (tmp_path / "log").read_text().split() == [*"12345", *"56789", "10", "11", "12"]
    trials = optuna.load_study(study_name="s", storage=url(tmp_path)).trials
    assert [(trial.number, trial.state.name) for trial in trials] == [(n, "COMPLETE") for n in range(12)]


def test_a_database_that_goes_away_is_one_line(run: str, evaluations: Evaluations, tmp_path: Path):
    lines: list[str] = []
    real = evaluations.real

    def remove(*args: Any, **options: Any) -> Any:
        if evaluations.number == 3:
            (tmp_path / "trials.db").rename(tmp_path / "away.db")
        return real(*args, **options)

    evaluations.real = remove
    with pytest.raises(VitrimError, match=r"trials.db cannot be used \(no such table.*repeat the command") as raised:
        sweep([run], DATA, METHOD, VARY, place=Place(url(tmp_path), say=lines.append, grace=0.2))
    assert "\n" not in str(raised.value)
    assert any("trying again" in line for line in lines)
    (tmp_path / "away.db").rename(tmp_path / "trials.db")
    evaluations.number, evaluations.real = 0, real
    assert len(sweep([run], DATA, METHOD, VARY, place=Place(url(tmp_path), grace=0.2)).rows) == 7
    assert evaluations.number == 5  # One was finished before, besides the dense network.


def test_a_file_that_is_no_database_or_of_another_version_is_refused_at_once(run: str, tmp_path: Path):
    (tmp_path / "text.db").write_text("no database" * 100)
    with pytest.raises(VitrimError, match=r"text.db cannot be used \(file is not a database\)"):
        sweep([run], DATA, METHOD, VARY, place=Place(f"sqlite:///{tmp_path}/text.db"))
    assert (tmp_path / "text.db").read_text() == "no database" * 100
    storage = optuna.storages.RDBStorage(url(tmp_path))
    with storage.engine.begin() as database:
        database.exec_driver_sql("UPDATE alembic_version SET version_num = 'v99.0.0.a'")
    with pytest.raises(VitrimError, match="of another version of optuna"):
        sweep([run], DATA, METHOD, VARY, place=Place(url(tmp_path)))


def test_a_search_stops_trials_that_another_network_beats(run: str, evaluations: Evaluations):
    def stopped(*args: Any, watch: Any, **options: Any) -> Any:
        found = evaluations.real(*args, watch=watch, **options)
        if watch is not None:
            watch("m", 0, 200)  # As if none of the first 200 images was right.
        return found

    evaluations_of = module.evaluate_all
    module.evaluate_all = stopped  # type: ignore[assignment]
    try:
        table = sweep([run], DATA, METHOD, {"r": [0.99, 1.0]}, Plan("tpe", 3, COUNTED))
        filled = sweep([run], DATA, METHOD, {"r": [0.99]}, Plan("grid", 3, COUNTED))
    finally:
        module.evaluate_all = evaluations_of
    # cls_only makes each of them cheaper than the dense network, so that only another setting can beat one.
    assert all(row["model"].endswith(" (stopped)") or row.get("accuracy") is not None for row in table.rows)
    assert "stopped" not in filled.rows[1]["model"]  # A grid is filled.


def test_hopeless_means_beaten_in_everything_beyond_doubt():
    watch = Watch((0.5, 0.5), [Rival("trial 3", (0.5, 0.4), 0.8), Rival("trial 4", (0.6, 0.1), 0.99)])
    watch.check(20, 31, 1000)  # Too few to say anything.
    watch.check(600, 1000, 1000)  # All were seen: there is nothing to save.
    watch.check(142, 200, 1000)  # 71 % may become 80 %.
    with pytest.raises(Hopeless, match=r"50.0% on 200 images, at most 61.\d% to be expected; trial 3 costs no"):
        watch.check(100, 200, 1000)
    Watch((0.5, 0.3), watch.rivals).check(100, 200, 1000)  # It is faster than trial 3, and cheaper than trial 4.
    trained = Watch((0.5,), [Rival("trial 1", (0.5,), 0.9, [0.2, 0.9])])
    trained.check_epoch(0, 0.2, 500)  # Neither was better after this epoch.
    trained.check_epoch(2, 0.2, 500)  # The other was not trained for so long.
    with pytest.raises(Hopeless, match=r"20.0% after epoch 2"):
        trained.check_epoch(1, 0.2, 500)
    lost = Event()
    lost.set()
    with pytest.raises(RunAbandoned):
        Watch((), [], lost).check(1, 1, 10)


def test_a_trial_as_good_as_another_is_hardly_ever_stopped():
    import numpy as np

    stopped, dice = 0, np.random.default_rng(0)
    for _ in range(300):
        right = dice.permutation(np.arange(2000) < 1400).cumsum()
        watch = Watch((1.0,), [Rival("equal", (1.0,), 0.7)])
        try:
            for seen in range(128, 2000, 128):
                watch.check(int(right[seen - 1]), seen, 2000)
        except Hopeless:
            stopped += 1
    assert stopped <= 3


def test_settings_of_a_search():
    def check(setting: Any) -> None:
        fill_template("TopK({s}) @ ConstantR({n})", {"s": "norm", "n": 1, **setting}, check=True)

    space = Space({"n": [1, 3], "s": ["norm", "cls_attention"]}, check)
    tried: list[Any] = []
    for search in ("tpe", "nsga2"):
        propose, trials = Proposer(search, space, ["maximize"], 50, 0), []
        while (proposal := propose(trials)) is not None:
            trials.append(
                optuna.trial.create_trial(
                    params=proposal.setting, distributions=space.distributions, value=0.5,
                    system_attrs=proposal.memory,
                )
            )  # fmt: skip
        tried = [key_of(trial.params) for trial in trials]
        assert len(tried) == len({*tried}) == 6
        assert all(isinstance(trial.params["n"], int) for trial in trials)
    wide = Space({"lr": [1e-5, 1e-2], "r": [0.1, 0.9]}, lambda setting: None).distributions
    assert [one.log for one in wide.values()] == [True, False]  # pyright: ignore


def test_the_command_keeps_trials_next_to_its_table(run: str, evaluations: Evaluations, tmp_path: Path):
    out = tmp_path / "table.json"
    words = ["sweep", run, "--method", METHOD, "--vary", json.dumps(VARY), "--data.workers", "0", "--out", str(out)]
    evaluations.kill_at = 3
    with pytest.raises(Killed):
        cli.main(words)
    assert [path.name for path in tmp_path.iterdir()] == ["table.json.db"]
    evaluations.kill_at = 10**9
    cli.main(words)
    assert evaluations.number == 7
    assert len(json.loads(out.read_text())["rows"]) == 1 + len(VARY["r"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.json", "table.json.db"]


def test_further_workers_run_the_same_command_without_a_table(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[tuple[list[str], str]] = []

    class Popen:
        def __init__(self, words: list[str], env: dict[str, str], **options: object) -> None:
            seen.append((words[3:], env[DATABASE]))

        def wait(self, *args: object) -> int:
            return 0

    monkeypatch.setattr(local_workers.subprocess, "Popen", Popen)
    words = [run, "--method", METHOD, "--vary", '{"r": [0.5, 0.6]}', "--data.workers", "0", "--name", "n"]
    cli.main(["sweep", *words, "--out", str(tmp_path / "t.md"), "--workers", "4"])  # More workers than trials.
    assert len(seen) == 3
    command, database = seen[0]
    assert database == f"sqlite:///{tmp_path}/t.md.db"
    assert not {"--out", "--workers", "--database"} & {*command}
    monkeypatch.setenv(DATABASE, database)
    cli.main(command)  # Finds all trials finished.
    assert len(optuna.load_study(study_name="n", storage=database).trials) == 2


RECIPE = """
model: {args: {depth: 1, embed_dim: 24, num_heads: 2}}
data: {workers: 0, limit: 60, holdout: 0.3}
epochs: 2
batch_size: 16
reduction: TopK() @ KeepRate({r}, at=[0]) @ {curriculum}
"""


def test_a_recipe_is_trained_at_every_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(RECIPE)
    vary = {"r": [0.5], "curriculum": ["Constant()", "Delayed(1)"], "optim.lr": [0.001, 7]}

    def diverging(recipe: Recipe, *args: Any, **options: Any) -> Any:
        if recipe.optim.lr == 7:
            raise DivergedError("the loss is nan")
        return train(recipe, *args, **options)

    monkeypatch.setattr(in_training, "train", diverging)
    words = ["sweep", "small.yaml", "--vary", json.dumps(vary), "--out", "t.json"]
    cli.main(words)
    rows = json.loads(Path("t.json").read_text())["rows"]
    assert [(row["curriculum"], row["optim.lr"]) for row in rows] == [
        ("Constant()", 0.001), ("Constant()", 7), ("Delayed(1)", 0.001), ("Delayed(1)", 7),
    ]  # fmt: skip
    fine = [row for row in rows if row["optim.lr"] == 0.001]
    for row in fine:
        result = json.loads((Path(row["run"]) / "result.json").read_text())
        assert row["accuracy"] == result["val_accuracy"]
        assert row["gmacs"] == pytest.approx(result["macs"] / 1e9, rel=0.4)
        recipe = Recipe.read(Path(row["run"]) / "recipe.yaml")
        assert (recipe.optim.lr, recipe.reduction) == (0.001, row["method"])
    assert all(row["model"] == "small (failed)" and "accuracy" not in row for row in rows if row not in fine)
    before = sorted(Path("t.json.runs").rglob("result.json"))
    Path("t.json").unlink()
    cli.main(words)  # Nothing is trained again.
    assert sorted(Path("t.json.runs").rglob("result.json")) == before
    assert json.loads(Path("t.json").read_text())["rows"] == rows


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("small.yaml --vary {optim.lrr:[1]}", "in braces, 'optim.lrr'; did you mean optim.lr"),
        ("small.yaml --vary {r:[0.5]}", "the recipe names {curriculum}, which is not varied"),
        ("small.yaml --vary {r:[0.5],curriculum:[Delayd(1)]}", "small.yaml at r 0.5, curriculum Delayd(1): unknown"),
        ("small.yaml --vary {r:[7],curriculum:[Constant()]}", "keep rate"),
        ("small.yaml --vary {optim.lr:[1]} --method TopK()@KeepRate(0.5) --data.holdout 0", "set data.holdout"),
        ("small.yaml other.yaml --vary {r:[0.5]}", "a recipe is swept alone"),
        ("small.yaml --vary {r:[0.5]} --device cpu", "leave --device out"),
        ("none.yaml --vary {r:[0.5]}", "none.yaml does not exist"),
        ("m --vary {r:[0.5]}", "missing: --method"),
        ("m --vary {r:[0.5]} --method x --trials 0", "trials is 0; it must be 1 or more"),
        ("m --vary {r:[0.5]} --method x --objectives macs", "objectives without accuracy"),
        ("m --vary {r:[0.5]} --method x --objectives accuracy accuracy", "name one twice"),
        ("m --vary {r:[0.5]} --method x --database trials.db", "--database is no URL; write sqlite:///FILE"),
        ("m --vary {r:[0.5]} --method x --database sqlite:///none/x.db", "cannot be used (unable to open"),
        ("m --vary {r:[0.5]} --method x --database mysql+mysqldb://u:secret@h/d", "needs a driver; run: pip install"),
    ],
)
def test_mistakes_are_one_line(
    words: str, line: str, tmp_path: Path, run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(RECIPE)
    given = [run if word == "m" else METHOD if word == "x" else word for word in words.split()]
    given = [word.replace(":[", ": [") if "{" in word else word for word in given]
    with pytest.raises(SystemExit) as end:
        cli.main(["sweep", *given, "--data.workers", "0", "--out", "t.md"])
    said = capsys.readouterr().err.strip()
    assert (end.value.code, said.count("\n")) == (2, 0), said
    assert line in said
    assert "secret" not in said
    assert not Path("t.md").exists()


def test_workers_and_recipes_need_a_place(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "r.yaml").write_text(RECIPE)
    for words, line in (
        ([run, "--method", METHOD, "--workers", "2"], "workers share their trials in a database; add --out"),
        ([str(tmp_path / "r.yaml")], "say where to: --out TABLE or --runs FOLDER"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["sweep", *words, "--vary", "{r: [0.5]}"])
        assert line in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "vary", "says"),
    [
        (METHOD, {"r": [0.5, 0.5]}, "r lists 0.5 twice"),
        ("ToMe() @ ConstantR({r})", {"r": [1, 1.0]}, "r lists 1 twice"),
        (METHOD, {"r": ["0.5", 0.5]}, "r lists 0.5 twice"),
        (METHOD, {"r": [0.5000001, 0.5, 0.5]}, "r lists 0.5 twice"),
        (METHOD, {"r": [float("nan")]}, "r lists nan"),
        ("TopK({r}) @ KeepRate(0.5)", {"r": ["norm", "norm"]}, "r lists norm twice"),
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
