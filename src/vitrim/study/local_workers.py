"""Further workers of a study or sweep on this machine: processes that run the same command as this one."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch

from ..errors import RecipeError
from ..measure.environment import cores
from ..user_files import import_options
from ..variables import DATABASE
from .database_url import file_url
from .interruption import stopping_on_sigterm
from .study import Study
from .study_check import check_study
from .study_folder import check_study_folder, mark_folder

STOP_SECONDS = 60.0
"""How long workers that are asked to stop may take to save their runs; then they are killed, which loses a step."""


@contextmanager
def local_workers(
    number: int, file: str, out: str, scale: str, root: str | None, database: str | None
) -> Iterator[str | None]:
    """Start `number - 1` further worker processes; yields the database that all of them share.

    They are spread over the devices that this process sees, or share the cores evenly where it sees none, and write
    their output to `out/worker-NUMBER.log`. They end when the study is finished. When this process is stopped, by
    Ctrl-C, SIGTERM or an error, they save and stop too, and this process waits for them.

    Raises:
        RecipeError: the number is not positive.
        VitrimError: a mistake in the study.
    """
    if number < 1:
        raise RecipeError(f"workers is {number}; it must be 1 or more")
    if number == 1:
        yield database
        return
    check_study_folder(out)
    # A mistake in the study is then reported once, and before anything is written.
    check_study(Study.read(file, scale, root), Path(out))
    mark_folder(Path(out))
    database = database or file_url(Path(out) / "leases.db")
    command = ["study", file, "--out", out, "--scale", scale, *(["--root", root] if root is not None else [])]
    with processes(number, command, Path(out) / "worker", database):
        yield database


@contextmanager
def processes(number: int, command: Sequence[str], log: Path, database: str) -> Iterator[None]:
    """Start `number - 1` further processes, each with its part of the machine.

    Args:
        number: of workers, this process included.
        command: words after `vitrim`; the database comes to them by the environment, where nobody else can read it.
        log: the output goes to `LOG-NUMBER.log`.
        database: URL of what all of them share.
    """
    words = [sys.executable, "-m", "vitrim", *command, *import_options()]
    with ExitStack() as stack:
        stack.enter_context(stopping_on_sigterm())
        started = stack.enter_context(_stopping_together())
        for index in range(1, number):
            output = stack.enter_context(Path(f"{log}-{index}.log").open("ab"))
            started.append(
                subprocess.Popen(
                    words, env={**os.environ, **_share(index, number), DATABASE: database},
                    stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
        if "OMP_NUM_THREADS" in (own := _share(0, number)):
            torch.set_num_threads(int(own["OMP_NUM_THREADS"]))
        yield


@contextmanager
def _stopping_together() -> Iterator[list["subprocess.Popen[bytes]"]]:
    """A list for processes, which are waited for at the end; when an exception ends it, they are asked to stop."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        yield processes
    except BaseException:
        for process in processes:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        for process in processes:
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        raise
    finally:
        for process in processes:
            process.wait()


def _share(index: int, number: int) -> dict[str, str]:
    """Environment variables that give a worker its part of the machine."""
    if devices := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = visible if len(visible) == devices and visible[0] else [str(device) for device in range(devices)]
        return {"CUDA_VISIBLE_DEVICES": names[index % devices]}
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, cores() // number))}
