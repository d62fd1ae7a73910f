"""The teacher's outputs from disk in place of a live teacher; computed before training where they are not there yet.

`FOLDER/train` holds them for the training images in all their views. `FOLDER/held-out` holds them for the images held
out, where the objective itself chooses the epoch; otherwise the teacher does not compute those.
"""

from pathlib import Path

import torch

from ..data.splits import Splits
from ..data.streams import Stream
from ..distill import Distiller, TeacherCache, student_grid
from .recipe import Recipe
from .state import Report
from .stopping import Stopped, StopSignals


def with_cache(recipe: Recipe, learner: Distiller, splits: Splits, device: torch.device, report: Report) -> None:
    """Load the teacher's outputs together with the images; the learner then drops the teacher itself.

    Every process calls it: one computes, the others wait. `report` is called with ("cache", figures) meanwhile.

    Raises:
        DistillError: the folder holds the cache of another teacher or of other images.
        Stopped: SIGTERM or Ctrl-C arrived; what was done is kept, the same call continues.
    """
    spec, teacher, terms = recipe.cache, learner.teacher, learner.terms
    assert spec is not None
    assert teacher is not None  # As the recipe is checked.
    teacher.to(device)
    grid = student_grid(learner.student) if learner.of_teacher.per_patch else None

    def answers(stream: Stream, name: str) -> TeacherCache:
        def tick(done: int, rows: int) -> None:
            report("cache", {"name": name, "done": done, "rows": rows})
            stop_if_asked(f"row {done} of {rows} of the teacher cache")

        return TeacherCache.build(
            Path(spec.folder) / name, teacher, stream, terms, grid=grid, top_k=spec.top_k,
            batch_size=recipe.batch_size, workers=recipe.data.workers, tick=tick,
        )  # fmt: skip

    def stop_if_asked(where: str) -> None:
        if signals.number:
            raise Stopped(signals.number, where)

    with StopSignals() as signals:
        splits.train.known = known = answers(splits.train, "train")
        if splits.select is not None and not learner.classifies:
            splits.select.known = answers(splits.select, "held-out")
        stop_if_asked("the end of the teacher cache")
    learner.rely_on(known)
