"""Several workers on one study: every run once, the numbers of one worker, and nothing lost with a worker that dies."""

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import yaml

from clocks import Clock
from processes import Started, start
from vitrim import cli
from vitrim.errors import BusyError, RecipeError, VitrimError
from vitrim.study import leases, local_workers, workers
from vitrim.study import run_study as run_study_module
from vitrim.study.leases import GRACE, Leases
from vitrim.study.run_study import run_study
from vitrim.train.checkpoint import RunFolder
from vitrim.train.loop import train
from vitrim.train.recipe import Recipe
from vitrim.variables import DATABASE

STUDY = Path(__file__).parents[1] / "recipes" / "system1" / "study.yaml"
BASE = {
    "model": {"args": {"depth": 1, "embed_dim": 24, "num_heads": 2}},
    "data": {"workers": 0, "limit": 60},
    "epochs": 2,
    "batch_size": 16,
}
ROWS = {
    "student": {"teacher": {"name": "{row:teacher}"}, "distill": "Labels(0.5) + Logits(0.5)"},
    "teacher": {"model": {"args": {"embed_dim": 32}}},
    "plain": {},
}
WORKER = """
import json, os, signal, sys
from vitrim.study.run_study import run_study

folder, log, kill = sys.argv[1:]
name = ""

def note(event, figures):
    global name
    name = figures.get("name", name)
    if event == "done":
        print(name, file=open(log, "a"))
    if kill == name and event == "epoch":
        os.kill(os.getpid(), signal.SIGKILL)

table = run_study("study.yaml", folder, database="sqlite:///leases.db", report=note)
print(json.dumps([row["accuracy"] for row in table.rows]))
"""


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study in the current folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"title": "t", "base": BASE, "rows": ROWS, "seeds": [0]}, sort_keys=False))
    return path


def worker(log: str, kill: str = "none") -> Started:
    return start(WORKER, "out", log, kill)


def accuracies(folder: str) -> dict[str, float]:
    return {p.parent.name: json.loads(p.read_text())["test_accuracy"] for p in Path(folder).glob("*/result.json")}


def test_two_workers_run_everything_once_and_find_what_one_finds(file: Path):
    ends = [one.wait() for one in [worker("log"), worker("log")]]
    assert [one.returncode for one in ends] == [0, 0], ends
    assert sorted(Path("log").read_text().split()) == sorted(f"{row}-s0" for row in ROWS)
    alone = run_study(file, "alone")
    assert accuracies("out") == pytest.approx(accuracies("alone"))
    for one in ends:  # One of them tabulated, both print.
        assert json.loads(one.stdout) == pytest.approx([row["accuracy"] for row in alone.rows])
    assert "| plain |" in Path("out/table.md").read_text()


def test_the_run_of_a_dead_worker_goes_on_from_its_checkpoint(file: Path, monkeypatch: pytest.MonkeyPatch):
    first = worker("log", kill="plain-s0").wait()
    assert first.returncode == -signal.SIGKILL, first
    assert not Path("out/plain-s0/result.json").exists()
    finished = {path.parent.name for path in Path("out").glob("*/result.json")}
    epochs: dict[str, list[int]] = {}

    def note(event: str, figures: Mapping[str, Any]) -> None:
        if event == "run":
            epochs[figures["name"]] = []
        if event == "epoch":
            [*epochs.values()][-1].append(figures["epoch"])

    clock = Clock()
    clock.replace_time_in(leases, monkeypatch)
    monkeypatch.setattr(leases, "has_ended", lambda worker: False)  # As of another machine.
    monkeypatch.setattr(workers, "_pause", lambda leases: clock.sleep(50))
    run_study(file, "out", database="sqlite:///leases.db", report=note)
    assert clock.now > GRACE  # Not before the grace period is over.
    assert epochs.pop("plain-s0") == [1]
    assert set(epochs) == {f"{row}-s0" for row in ROWS} - finished - {"plain-s0"}
    assert all(numbers == [0, 1] for numbers in epochs.values())


def test_a_run_that_is_taken_over_is_left_to_the_other(file: Path, monkeypatch: pytest.MonkeyPatch):
    """A worker that was suspended for longer than the grace period."""
    monkeypatch.setattr(leases, "HEARTBEATS", 10_000)
    monkeypatch.setattr(workers, "_pause", lambda leases: None)
    held, lost, told = Leases.held, list[Event](), list[str]()

    @contextmanager
    def noted(self: Leases, run: str) -> Iterator[Event]:
        with held(self, run) as event:
            lost.append(event)
            yield event

    monkeypatch.setattr(Leases, "held", noted)

    def note(event: str, figures: Mapping[str, Any]) -> None:
        told.append(event)
        if told.count("step") == 1 and event == "step":
            thief = Leases("sqlite:///leases.db", Path("out/.study").read_text())
            with thief._engine.begin() as database:
                database.exec_driver_sql("UPDATE vitrim_leases SET worker = 'thief'")
            assert lost[-1].wait(300)
        if event == "wait":
            raise InterruptedError

    file.write_text(yaml.safe_dump({"base": BASE, "rows": {"plain": {}}}))
    with pytest.raises(InterruptedError):
        run_study(file, "out", database="sqlite:///leases.db", report=note)
    assert told.count("step") == 1
    assert not Path("out/plain-s0/result.json").exists()


def test_two_commands_in_one_run_folder(tmp_path: Path):
    recipe = Recipe.from_dict(BASE)
    with RunFolder(tmp_path / "run").locked(), pytest.raises(BusyError, match=r"another process is writing to .*run;"):
        train(recipe, tmp_path / "run")
    assert train(recipe, tmp_path / "run")["epochs"] == 2  # Once the other is through.


def test_the_lock_dies_with_its_process(tmp_path: Path):
    os.mkfifo("inside")
    script = (
        "import sys, time\nfrom vitrim.train.checkpoint import RunFolder\n"
        "with RunFolder(sys.argv[1]).locked():\n    open('inside', 'w').close()\n    time.sleep(600)"
    )
    other = start(script, str(tmp_path / "run"))
    Path("inside").read_text()  # Waits until the other is.
    with pytest.raises(BusyError), RunFolder(tmp_path / "run").locked():
        pass
    other.kill()
    assert other.wait().returncode == -signal.SIGKILL
    with RunFolder(tmp_path / "run").locked():
        RunFolder(tmp_path / "run").check(Recipe())  # The lock alone makes it no foreign folder.


def test_workers_are_started_here(file: Path, capsys: pytest.CaptureFixture[str]):
    content = {"title": "t", "base": {**BASE, "epochs": 1}, "rows": {"a": {}, "b": {"seed": 3}, "c": {"epochs": 2}}}
    file.write_text(yaml.safe_dump(content))
    cli.main(["study", "study.yaml", "--out", "out", "--workers", "2"])
    assert "written to out/table.md" in capsys.readouterr().out
    assert "written to out/table.md" in Path("out/worker-1.log").read_text()
    assert sorted(accuracies("out")) == ["a-s0", "b-s0", "c-s0"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--database studies.db", "--database is no URL; write sqlite:///FILE"),
        ("--database sqlite://", "other workers cannot see a database in memory"),
        ("--database sqlite:///none/x.db", "the database sqlite:///none/x.db cannot be used (unable to open"),
        ("--database postgres://u@h/d", "unknown kind of database 'postgres'; did you mean postgresql?"),
        ("--database mysql+mysqldb://u:secret@h/d", "mysql+mysqldb needs a driver; run: pip install 'mysqlclient'"),
        ("--workers 0", "workers is 0; it must be 1 or more"),
    ],
)
def test_mistakes_are_one_line(words: str, line: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        cli.main(["study", "study.yaml", "--out", "out", *words.split()])
    said = capsys.readouterr().err.strip()
    assert (end.value.code, said.count("\n")) == (2, 0)
    assert said.startswith(f"vitrim study: {line}")
    assert "secret" not in said
    assert not Path("out").exists()


def test_launched_processes_are_no_workers(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="single processes"):
        run_study(file, "out", database="sqlite:///leases.db")


def test_a_study_edited_under_other_workers(file: Path):
    """Runs that another worker has begun since are looked at again when all are there."""

    def note(event: str, figures: Mapping[str, Any]) -> None:
        if event == "run" and figures["name"] == "teacher-s0":  # Meanwhile, by a worker that reads an older file:
            train(Recipe.from_dict({**BASE, "epochs": 1}), "out/plain-s0")

    with pytest.raises(VitrimError, match=r"plain-s0 holds a run of another recipe \(epochs: 1 -> 2\)"):
        run_study(file, "out", database="sqlite:///leases.db", report=note)


def test_passwords_are_not_written_down(file: Path, monkeypatch: pytest.MonkeyPatch):
    from vitrim.verbs.delivery import hide_password

    url = "postgresql://me:pa@ss@host/name"
    command = hide_password(f"vitrim study s.yaml --database {url} --out x", url)
    assert command == "vitrim study s.yaml --database postgresql://***@host/name --out x"
    assert hide_password("vitrim study s.yaml", None) == "vitrim study s.yaml"
    assert os.environ.get("WORLD_SIZE") is None


@pytest.mark.parametrize("given", ["option", "variable"])
def test_the_password_of_the_database_is_on_no_command_line(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Other users see the command lines of all processes."""
    url, seen = "postgresql://user:secret@nowhere/db", []
    words = ["study", str(STUDY), "--scale", "smoke", "--out", str(tmp_path / "out"), "--workers", "2"]
    words += ["--database", url] if given == "option" else []
    monkeypatch.setattr(sys, "argv", ["vitrim", *words])
    if given == "variable":
        monkeypatch.setenv(DATABASE, url)

    def popen(command: list[str], env: dict[str, str], **options: object) -> None:
        seen.append((command, env[DATABASE]))
        raise KeyboardInterrupt

    monkeypatch.setattr(local_workers.subprocess, "Popen", popen)
    with pytest.raises(SystemExit):
        cli.main(words)
    ((command, place),) = seen
    assert "secret" not in " ".join(command)
    assert place == url


def test_a_worker_finds_the_database_in_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []

    def run_study(*args: object, **options: object) -> None:
        seen.append((options["database"], options["command"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(run_study_module, "run_study", run_study)
    for value in ("sqlite:///leases.db", ""):
        monkeypatch.setenv(DATABASE, value)
        with pytest.raises(SystemExit):
            cli.main(["study", str(STUDY), "--out", str(tmp_path / "out")])
    assert [place for place, _ in seen] == ["sqlite:///leases.db", None]
