"""Signals to a study: between runs, inside a run, and to the workers that it has started."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from vitrim.study import local_workers as module
from vitrim.study.interruption import stopping_on_sigterm
from vitrim.study.local_workers import _stopping_together, local_workers
from vitrim.study.run_study import run_study
from vitrim.train.stopping import Stopped

pytestmark = pytest.mark.usefixtures("few_test_digits")

BASE = {
    "model": {"args": {"depth": 1, "embed_dim": 24, "num_heads": 2}},
    "data": {"workers": 0, "limit": 30}, "epochs": 1, "batch_size": 16,
}  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"base": BASE, "rows": {"a": {}, "b": {}}}, sort_keys=False))
    return path


@pytest.mark.parametrize("event", ["run", "epoch", "done"])
def test_a_study_trains_nothing_after_sigterm(event: str, file: Path, tmp_path: Path):
    """Wherever in the first run it arrives: before it, while it closes its last epoch, or when it is finished."""
    begun: list[str] = []

    def report(name: str, figures: Mapping[str, Any]) -> None:
        if name == "run":
            begun.append(figures["name"])
        if name == event:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as stopped:
        run_study(file, tmp_path / "out", report=report)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert begun == ["a-s0"]
    assert signal.getsignal(signal.SIGTERM) == before
    run_study(file, tmp_path / "out")  # The same call continues.


def test_sigterm_between_runs_is_one_line():
    with pytest.raises(Stopped) as stopped, stopping_on_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
    assert "stopped by SIGTERM" in str(stopped.value)
    assert "\n" not in str(stopped.value)


def sleeper(script: str = "") -> "subprocess.Popen[bytes]":
    code = f"import signal, time\n{script}\nprint('ready', flush=True)\ntime.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"ready\n"
    return process


@pytest.mark.parametrize("end", [Stopped(signal.SIGTERM, "here"), KeyboardInterrupt(), ValueError()])
def test_workers_end_with_the_process_that_started_them(end: BaseException):
    together = _stopping_together()
    processes = together.__enter__()
    processes += [sleeper(), sleeper()]
    assert not together.__exit__(type(end), end, None)  # It goes on.
    assert [process.poll() for process in processes] == [-signal.SIGTERM] * 2


def test_a_worker_that_does_not_stop_is_killed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "STOP_SECONDS", 0.2)
    together = _stopping_together()
    together.__enter__().append(stubborn := sleeper("signal.signal(signal.SIGTERM, signal.SIG_IGN)"))
    assert not together.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert stubborn.poll() == -signal.SIGKILL


def test_sigterm_to_the_first_worker_reaches_the_others(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also while it waits for others or tests, where no run handles signals."""
    started: list[Any] = []

    def popen(command: Any, **options: Any) -> Any:
        started.append(sleeper())
        return started[-1]

    monkeypatch.setattr(module, "subprocess", type("fake", (), {**vars(subprocess), "Popen": staticmethod(popen)}))
    with pytest.raises(Stopped), local_workers(3, str(file), str(tmp_path / "out"), "full", None, None):
        os.kill(os.getpid(), signal.SIGTERM)
    assert [process.poll() for process in started] == [-signal.SIGTERM] * 2
