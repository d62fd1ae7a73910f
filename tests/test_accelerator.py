"""The accelerator of a process: options of its own each time, and a group of processes that is left at the end."""

import atexit
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vitrim.measure import accelerator
from vitrim.measure.accelerator import end_processes, make_accelerator


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    end_processes()


def test_the_group_of_launched_processes_is_left_at_the_end(group: None) -> None:
    """Threads of it that outlive the interpreter abort the process: "terminate called without an active exception"."""
    end_processes()
    assert not torch.distributed.is_initialized()
    end_processes()  # Where it was left already, nothing happens.


def test_every_accelerator_registers_the_end_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, object]] = []
    for name in ("register", "unregister"):
        monkeypatch.setattr(atexit, name, lambda function, name=name: calls.append((name, function)))
    for _ in range(2):
        make_accelerator(cpu=True)
    ends = [name for name, function in calls if function is accelerator.end_processes]
    assert ends == ["unregister", "register"] * 2


def test_an_accelerator_has_the_options_that_it_is_made_with() -> None:
    assert make_accelerator(cpu=True, gradient_accumulation_steps=3).gradient_accumulation_steps == 3
    assert make_accelerator(cpu=True).gradient_accumulation_steps == 1
