"""By which number a search should rank candidates that have seen few images.

    vitrim train --config recipes/system5/finetune-vits14.yaml --out runs/vits14
    python benchmarks/ranking.py runs/vits14 --root data/imagenette160 --out results/ranking-vits14-cpu

Candidates of one budget are judged on a few images, drawn many times; the best by each number is compared with the best
of all on the other images. What is lost is the ratio of their mean divergences: 1 where the best was found. The
divergences of images differ by orders of magnitude, so that a few of them decide a mean.
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from finished import Finished, Values
from vitrim import Budget, ToMe, TopK, arguments, attach
from vitrim.compression.candidates import first_shapes
from vitrim.compression.fidelity import Fidelity
from vitrim.compression.images import read
from vitrim.data.specs import DataSpec
from vitrim.data.splits import plain_stream
from vitrim.errors import ScheduleError
from vitrim.measure.environment import environment
from vitrim.measure.table import Column, Table
from vitrim.models import open_model
from vitrim.models.finding import find_adapter
from vitrim.notation import render
from vitrim.tokens import Reducer, Schedule

Numbers = NDArray[np.float64]
BUDGETS = (0.75, 0.5)
REDUCERS = (ToMe(), TopK(), TopK(fuse="mean"))
NUMBERS: dict[str, Callable[[Numbers], Numbers]] = {
    "mean": lambda kl: kl.mean(1),
    "mean without the largest 5 %": lambda kl: np.sort(kl, 1)[:, : int(0.95 * kl.shape[1])].mean(1),
    "mean square root": lambda kl: np.sqrt(kl).mean(1),
    "mean cube root": lambda kl: np.cbrt(kl).mean(1),
    "mean logarithm": lambda kl: np.log(kl + 1e-6).mean(1),
    "median": lambda kl: np.median(kl, 1),
}
COLUMNS = (
    Column("budget", "MACs / full", ".2f"), Column("seen", "images seen", "d"), Column("number", "ranked by"),
    Column("lost", "KL over that of the best, mean", ".3f"), Column("worst", "of 1 draw in 20", ".2f"),
)  # fmt: skip


def rows_for(budget: float, kl: Numbers, seen: int, draws: int) -> list[dict[str, Any]]:
    """What each number loses, of candidates with divergences (candidates, images)."""
    generator, lost = np.random.default_rng(0), {name: [] for name in NUMBERS}
    for _ in range(draws):
        order = generator.permutation(kl.shape[1])
        truth = kl[:, order[seen:]].mean(1)
        for name, number in NUMBERS.items():
            lost[name].append(truth[number(kl[:, order[:seen]]).argmin()] / truth.min())
    return [
        {"budget": budget, "seen": seen, "number": name, "lost": np.mean(each), "worst": np.quantile(each, 0.95)}
        for name, each in lost.items()
    ]


def main(
    model: str,
    root: str,
    images: int = 700,
    seen: list[int] = [42, 114, 342],  # noqa: B006 (shown as the default; never changed)
    draws: int = 2000,
    threads: int | None = 2,
    device: str = "cpu",
    out: str = "results/ranking-vits14-cpu",
) -> None:
    """Measure, print, and write OUT.md, OUT.csv and OUT.json.

    Args:
        model: run folder of a trained model.
        root: folder of its images, with train/ and val/.
        images: of the test split.
        seen: by how many of them candidates are ranked.
        draws: of these images.
        threads: CPU threads.
        device: where to run.
        out: stem of the files to write.
    """
    torch.set_num_threads(threads or torch.get_num_threads())
    network = open_model(model).eval().to(device)
    spec = DataSpec(name="folder", root=root, workers=0)
    fidelity = Fidelity(network, read(plain_stream(network, spec), images, 0), torch.device(device))
    depth = find_adapter(network).geometry(network).depth
    finished = Finished(Path(f"{out}.finished.jsonl"), {"model": model, "root": root, "images": images})

    def divergences(reducer: Reducer, schedule: Schedule) -> Values:
        try:
            handle = attach(network, reducer, schedule)
        except ScheduleError:  # It cannot go so low.
            return {"kl": None}
        with handle:
            return {"kl": fidelity.compare(network).divergence.tolist()}

    rows, best = [], []
    for budget in BUDGETS:
        found = {}
        for reducer, shape in product(REDUCERS, first_shapes(depth)):
            key = {"budget": budget, "reducer": render(reducer), "shape": render(shape)}
            values = finished.measured(partial(divergences, reducer, Budget(budget, shape)), **key)["kl"]
            if values is not None:
                found[f"{render(reducer)} with {render(shape)}"] = values
        kl = np.array(list(found.values()))
        for number in seen:
            rows += rows_for(budget, kl, number, draws)
        best.append(
            f"At {budget} of the MACs {list(found)[kl.mean(1).argmin()]} is the best of {len(found)} candidates."
        )
    notes = [f"{len(fidelity):,} test images, {draws:,} draws.", *best]
    table = Table("By which number to rank candidates", COLUMNS, rows, notes=notes, environment=environment())
    print(table.text())
    table.write_all(out)
    finished.close()


if __name__ == "__main__":
    arguments.run(main, "benchmarks/ranking.py")
