"""Worker processes: they work on when the whole group is signalled, and end with the process that made them."""

import os
import signal
import subprocess
import sys

import pytest

READING = """
import multiprocessing, sys
import torch
from torch.utils.data import TensorDataset
from vitrim.data.readers import batches_of

def read():
    global kept  # Alive to the very end, as a loader that an error's traceback holds.
    kept = iter(batches_of(TensorDataset(torch.arange(60)), 5, 2, persistent_workers=True))
    first, second = next(kept), next(kept)  # One of each reader, so that both are at work.
    print(first[0].tolist(), *[worker.pid for worker in multiprocessing.active_children()], flush=True)
    if "wait" in sys.argv:
        sys.stdin.read()
        print(sum(len(batch[0]) for batch in kept), flush=True)
"""


def script(*words: str, tail: str = "read()") -> list[str]:
    return [sys.executable, "-c", READING + tail, *words]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(
    "tail",
    [
        "read()",
        "process = multiprocessing.get_context('fork').Process(target=read)\nprocess.start()\nprocess.join()\n"
        "sys.exit(process.exitcode)",
        # How Python 3.14 starts processes: not this process but a server is the parent of the readers.
        "multiprocessing.set_start_method('forkserver')\nread()",
    ],
    ids=["process", "child", "forkserver"],
)
def test_a_loader_that_is_alive_at_the_end_does_not_hold_the_process(tail: str):
    done = subprocess.run(script(tail=tail), capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    numbers, pids = done.stdout.split("] ")
    assert numbers == "[0, 1, 2, 3, 4"
    assert len(pids.split()) == 2
    assert all(gone(int(pid)) for pid in pids.split())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_readers_work_on_when_the_group_is_signalled(number: int):
    words = script("wait", tail="import signal\nsignal.signal(int(sys.argv[2]), lambda *_: None)\nread()")
    with subprocess.Popen(
        [*words, str(int(number))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout
        assert process.stdin
        assert process.stdout.readline()
        os.killpg(process.pid, number)
        process.stdin.close()
        assert process.stdout.read().strip() == "50"
        assert process.wait(300) == 0
