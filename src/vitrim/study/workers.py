"""Several workers on one study: each trains a run that is free and whose rows are there, until all are finished.

Workers share the study folder, which holds what is finished and the checkpoints of what is not, and a database, in
which they claim runs. A run whose worker has died goes on from its last checkpoint.
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
from .leases import GRACE, Leases
from .study import Study, run_folder
from .study_folder import study_id

POLL = 2.0
"""Seconds between two looks at what the others do."""


class _LeaseLost(Exception):
    """Another worker has taken this one for dead, and its run over."""


def join_study(database: str, out: Path, grace: float = GRACE) -> Leases:
    """Become one of the workers on the study in folder `out`.

    Raises:
        VitrimError: the database cannot be opened.
        RecipeError: this is one of several processes that train together.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("workers that share a study by --database are single processes; start them without launcher")
    leases = Leases(database, "", grace)
    out.mkdir(parents=True, exist_ok=True)
    leases.study = study_id(out)
    return leases


def train_shared(study: Study, out: Path, leases: Leases, *, command: str = "", report: Report | None = None) -> None:
    """Train runs of the study beside other workers; returns when all of them are finished, by whomever.

    Raises:
        RecipeError: the study was edited under runs that are there already.
    """
    tell = report or (lambda event, figures: None)
    left = [(row, seed) for seed in study.seeds for row in study.order()]
    while left := [key for key in left if not RunFolder(run_folder(out, *key)).result]:
        ready = [(row, seed) for row, seed in left if not any((name, seed) in left for name in study.needs(row))]
        if not any(_train(study, out, leases, row, seed, command, tell) for row, seed in ready):
            tell("wait", {"runs": len(left)})
            _pause(leases)


def run_once(leases: Leases, name: str, done: Callable[[], bool], work: Callable[[], object]) -> None:
    """Have one of the workers do what all of them need; returns when it is done."""
    while not done():
        if leases.acquire(name):
            with leases.held(name):
                if not done():
                    work()
        else:
            _pause(leases)


def _train(
    study: Study, out: Path, leases: Leases, row: str, seed: int, command: str, tell: Report
) -> bool:  # fmt: skip
    """Train one run, unless somebody is at it; whether this worker was."""
    folder = run_folder(out, row, seed)
    if not leases.acquire(folder.name):
        return False
    with leases.held(folder.name) as lost, suppress(_LeaseLost):

        def watched(event: str, figures: Mapping[str, Any]) -> None:
            if lost.is_set():
                raise _LeaseLost
            tell(event, figures)

        try:
            with RunFolder(folder).locked():  # By a worker that others take for dead, or by none of the workers.
                pass
            recipe = study.recipe(row, seed, out)
            tell("run", {"name": folder.name})
            train(recipe, folder, command=command, report=watched)
        except BusyError:
            return False
    return True


def _pause(leases: Leases) -> None:
    time.sleep(min(POLL, leases.grace / 10))
