"""Further workers of a study on this machine: processes that run the same command beside this one."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from ..errors import RecipeError
from .study import Study
from .study_check import check_study
from .study_folder import check_study_folder, mark_folder


@contextmanager
def local_workers(
    number: int, file: str, out: str, scale: str, root: str | None, database: str | None
) -> Iterator[str | None]:
    """Start `number - 1` processes that work on the study beside this one; yields the database that all of them share.

    They take turns at the devices that this process sees, or share the cores evenly where it sees none, and write
    what they have to say to `out/worker-NUMBER.log`. They end by themselves when the study is finished; where this
    process is stopped, they save and stop too.

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
    # So that a mistake is told once, and before anything is written.
    check_study(Study.read(file, scale, root), Path(out))
    mark_folder(Path(out))
    database = database or f"sqlite:///{Path(out).absolute()}/leases.db"
    command = [sys.executable, "-m", "vitrim", "study", file, "--out", out, "--scale", scale]
    command += ["--database", database, *(["--root", root] if root is not None else [])]
    processes: list[subprocess.Popen[bytes]] = []
    with ExitStack() as logs:
        try:
            for index in range(1, number):
                log = logs.enter_context((Path(out) / f"worker-{index}.log").open("ab"))
                environment = {**os.environ, **_share(index, number)}
                processes.append(
                    subprocess.Popen(
                        command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
                    )
                )
            if "OMP_NUM_THREADS" in (own := _share(0, number)):
                torch.set_num_threads(int(own["OMP_NUM_THREADS"]))
            yield database
        except BaseException:
            for process in processes:
                process.send_signal(signal.SIGTERM)
            raise
        finally:
            for process in processes:
                process.wait()


def _share(index: int, number: int) -> dict[str, str]:
    """Variables by which a worker takes its part of the machine."""
    if devices := torch.cuda.device_count():
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = seen if len(seen) == devices and seen[0] else [str(device) for device in range(devices)]
        return {"CUDA_VISIBLE_DEVICES": names[index % devices]}
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // number))}
