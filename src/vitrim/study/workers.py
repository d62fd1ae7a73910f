"""Several workers on one study: each trains a run that is free and whose rows are finished, until all runs are.

Workers share the study folder, which holds results and checkpoints, and a database, in which they lease runs. A run
whose worker has died continues from its last checkpoint.
"""

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import BusyError, RecipeError
from ..train.checkpoint import RunFolder
from ..train.loop import train
from ..train.state import Report
from ..train.stopping import RunAbandoned
from .leases import GRACE, Leases
from .study import Study, run_folder
from .study_folder import study_id

POLL_SECONDS = 2.0
"""Seconds between two checks of what the other workers have finished."""


def join_study(database: str, out: Path, report: Report, grace: float = GRACE) -> Leases:
    """Become one of the workers on the study in folder `out`.

    Raises:
        VitrimError: the database cannot be opened.
        RecipeError: this is one of several processes that train together.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("workers that share a study by --database are single processes; start them without launcher")
    leases = Leases(database, "", grace, lambda line: report("outage", {"line": line}))
    out.mkdir(parents=True, exist_ok=True)
    leases.study = study_id(out)
    return leases


def train_shared(study: Study, out: Path, leases: Leases, report: Report, *, command: str = "") -> None:
    """Train runs of the study together with other workers; returns when all runs are finished.

    Raises:
        RecipeError: the study was edited under runs that exist already.
        VitrimError: the database does not answer any more.
    """
    left = [(row, seed) for seed in study.seeds for row in study.order()]
    while left := [key for key in left if not RunFolder(run_folder(out, *key)).result]:
        ready = [(row, seed) for row, seed in left if not any((name, seed) in left for name in study.needs(row))]
        if not any(_train(study, out, leases, row, seed, command, report) for row, seed in ready):
            report("wait", {"runs": len(left)})
            _pause(leases)


def run_once(leases: Leases, name: str, done: Callable[[], bool], work: Callable[[], object]) -> None:
    """Let one of the workers do what all of them need; returns when it is done."""
    while not done():
        if leases.acquire(name):
            with leases.held(name):
                if not done():
                    work()
        else:
            _pause(leases)


def _train(
    study: Study, out: Path, leases: Leases, row: str, seed: int, command: str, report: Report
) -> bool:  # fmt: skip
    """Train one run unless another process is training it; returns whether this worker trained it."""
    folder = run_folder(out, row, seed)
    if not leases.acquire(folder.name):
        return False
    with leases.held(folder.name) as lost, suppress(RunAbandoned):

        def report_unless_lost(event: str, figures: Mapping[str, Any]) -> None:
            if lost.is_set():  # Another worker has counted this one as dead, and has taken over its run.
                raise RunAbandoned
            report(event, figures)

        try:
            with RunFolder(folder).locked():  # By a worker that counts as dead, or by another command.
                pass
            recipe = study.recipe(row, seed, out)
            report("run", {"name": folder.name})
            train(recipe, folder, command=command, report=report_unless_lost)
        except BusyError:
            return False
    return True


def _pause(leases: Leases) -> None:
    time.sleep(min(POLL_SECONDS, leases.grace / 10))
