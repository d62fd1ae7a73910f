"""Verbs that train: one run, or the runs of a study."""

import os
from contextlib import nullcontext
from typing import Annotated

from ..options import Range
from ..train.recipe import Recipe
from ..variables import DATABASE
from .delivery import command_line, hide_password, say


def train(recipe: Recipe, out: str) -> None:
    """Train a model as a recipe says; repeat the same command to continue an interrupted run.

    Args:
        recipe: options of the run; --config reads them from a file.
        out: run folder to create or to continue.
    """
    from ..showing.progress import live
    from ..train.loop import train as run

    first = int(os.environ.get("RANK", 0)) == 0  # Of processes that a launcher started, one prints.
    with live() if first else nullcontext() as report:
        result = run(recipe, out, command=command_line(), report=report)
    if not first:
        return
    figure = f"test accuracy {result['test_accuracy']:.2%}" if "test_accuracy" in result else "finished"
    say(f"{figure} (epoch {result['best_epoch'] + 1}); see {out}/result.json")


def study(
    file: str,
    out: str,
    scale: str = "full",
    root: str | None = None,
    database: str | None = None,
    workers: Annotated[int, Range(1, 256)] = 1,
) -> None:
    """Run the rows of a study under one recipe and tabulate them; finished rows are not run again.

    Args:
        file: study file (YAML).
        out: folder of the study.
        scale: one of the scales that the file defines, or "full", the file as it is. In vitrim's own studies "smoke"
            takes seconds, and "small" is for a CPU.
        root: folder of the images, in place of the one in the file.
        database: URL of a database, such as postgresql://USER:PASSWORD@HOST/NAME. All processes and machines that run
            the same command share the runs; they must share the folder of the study too. Without it, the environment
            variable VITRIM_DATABASE is used, which other users of the machine cannot read.
        workers: processes to start here; without --database they share the runs by a file in the folder of the study.
    """
    from ..showing.progress import live
    from ..showing.report import write_report
    from ..showing.study_pictures import draw_study
    from ..study.local_workers import local_workers
    from ..study.run_study import run_study
    from ..study.study import Study

    shared = database or os.environ.get(DATABASE) or None
    with local_workers(workers, file, out, scale, root, shared) as place, live() as report:
        table = run_study(
            file, out, scale=scale, root=root, database=place, command=hide_password(command_line(), database),
            report=report,
        )  # fmt: skip
    draw_study(Study.read(file, scale, root), out)
    print(table.text())
    say(f"written to {out}/table.md and {write_report(out)}")
