"""Processes that start in a moment: each is forked from one that has imported everything and has done nothing else.

An interpreter that imports torch and timm takes seconds. Where a test needs another process but not another
interpreter, it takes one of these. What is imported at start, and how launchers start processes, other tests check.
"""

import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

MODULES = [
    "accelerate", "pytest", "sklearn.datasets", "timm", "torch.distributed", "torchvision",
    "vitrim.cli", "vitrim.elastic", "vitrim.showing.progress", "vitrim.study.run_study", "vitrim.train.loop",
]  # fmt: skip
multiprocessing.set_forkserver_preload(MODULES)
SECONDS = 300


@dataclass
class Ended:
    """What is left of a process: the exit code, negative if a signal ended it, and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


class Started:
    """A process that runs a piece of Python, with its output in files."""

    def __init__(self, code: str, words: tuple[str, ...], environment: Mapping[str, str]) -> None:
        self.output = Path(mkdtemp(prefix="process-"))
        work = (code, words, {**os.environ, **environment}, os.getcwd(), str(self.output))
        self.process: ForkServerProcess = multiprocessing.get_context("forkserver").Process(target=_work, args=work)
        self.process.start()

    def kill(self) -> None:
        """End it without any clean-up."""
        os.kill(self.process.pid or 0, signal.SIGKILL)

    def wait(self) -> Ended:
        """Wait for its end."""
        self.process.join(SECONDS)
        if self.process.exitcode is None:
            self.kill()
            raise TimeoutError(f"still at it after {SECONDS} seconds: {(self.output / 'err').read_text()}")
        out, err = ((self.output / name).read_text() for name in ("out", "err"))
        rmtree(self.output)
        return Ended(self.process.exitcode, out, err)


def start(code: str, *words: str, **environment: str) -> Started:
    """Run this as `python -c CODE WORDS...` would, with these environment variables as well."""
    return Started(code, words, environment)


def together(count: int, code: str, *words: str, **environment: str) -> list[Ended]:
    """Run so many processes as torchrun would, the processes of one training; when one fails, it stops the others."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    running = started = [start(code, *words, **shared, **rank, **environment) for rank in ranks]
    failed = False
    while running:
        multiprocessing.connection.wait([one.process.sentinel for one in running], SECONDS)
        if not failed and any(one.process.exitcode for one in started):
            failed = True
            for one in running:
                one.process.terminate()
        running = [one for one in running if one.process.exitcode is None]
    return [one.wait() for one in started]


def _work(code: str, words: tuple[str, ...], environment: dict[str, str], place: str, output: str) -> None:
    gc.freeze()  # What is imported stays: no search for garbage need look through it.
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(os.path.join(output, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(place)
    sys.argv = ["-c", *words]
    exec(compile(code, "<code of a test>", "exec"), {"__name__": "__main__"})
