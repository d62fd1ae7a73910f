"""How often the intervals of a certificate contain what they are about: by simulation, and in a second measurement.

    vitrim train --epochs 6 --out runs/digits
    python benchmarks/coverage.py runs/digits --out results/coverage-digits-cpu

Simulation: all test images stand for the images that a user will have. Samples of them are drawn with replacement, and
each interval should contain the value over all of them in 95 % of the draws. Repetitions: a certificate on one half of
the test images, in this process, and what `vitrim verify` finds on the other half, in another process. Bar: statements
hold in at least 19 of 20 repetitions. For another sample an interval of a mean is narrow by the square root of two, so
that it alone contains the mean of that sample in about 83 %; the rule of `vitrim verify` is that intervals overlap.
A benchmark that was stopped goes on where it was when the same command is given again.
"""

from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from finished import Finished, Values
from vitrim.arguments import run
from vitrim.compression.certificate import Line
from vitrim.compression.fidelity import Closeness, Fidelity
from vitrim.compression.findings import Finding
from vitrim.compression.images import Pictures
from vitrim.compression.measured_lines import accuracy_lines, fidelity_lines, time_lines
from vitrim.compression.timing import sessions
from vitrim.data.specs import DataSpec
from vitrim.data.splits import plain_stream
from vitrim.measure.environment import environment
from vitrim.measure.table import Column, Table
from vitrim.models import open_model, variant
from vitrim.options import Range

Times = list[tuple[float, float, float]]
"""Of each session: ratio and both times, see `sessions`."""
REPEATED = "second measurement"
COLUMNS = (
    Column("how", "how"), Column("statement", "statement"), Column("images", "images or sessions", "d"),
    Column("number", "n", "d"), Column("contained", "in the interval", ".1%"),
    Column("holds", "verify says yes", ".1%"),
)  # fmt: skip


class Images:
    """The test images of a model, and how close a method of it is to it on each of them.

    Args:
        model: what to open.
        method: of reduction.
        data: which images.
    """

    def __init__(self, model: str, method: str, data: DataSpec) -> None:
        network = open_model(model).eval()
        stream = plain_stream(network, data)
        every = [stream[index] for index in range(len(stream))]
        self.pictures = Pictures(torch.stack([each[0] for each in every]), torch.tensor([each[1] for each in every]))
        self.fidelity = Fidelity(network, self.pictures, torch.device("cpu"))
        self.found = self.fidelity.compare(variant(network, method).eval())

    def __len__(self) -> int:
        return len(self.pictures)

    def lines(self, rows: np.ndarray | None = None) -> dict[str, Line]:
        """The statements of a certificate on these images, or on all of them."""
        chosen = torch.arange(len(self)) if rows is None else torch.from_numpy(rows)
        part = _Part(self.fidelity, self.pictures, chosen)
        same = None if self.found.same is None else self.found.same[chosen]
        close = Closeness(self.found.divergence[chosen], same, self.found.outputs[chosen])
        return {line.key: line for line in [*fidelity_lines(close), *accuracy_lines(part, close, None)]}


class _Part(Fidelity):
    """A comparison on some images, in which nothing is computed again."""

    def __init__(self, whole: Fidelity, pictures: Pictures, rows: Tensor) -> None:
        classes = None if pictures.classes is None else pictures.classes[rows]
        self.pictures, self._classes = Pictures(pictures.images[rows], classes), True
        self.reference = whole.reference[rows]


def simulated(images: Images, size: int, draws: int) -> Values:
    """The share of draws of `size` images in which each interval contains the value over all images."""
    dice, truth = np.random.default_rng(size), images.lines()
    hits = dict.fromkeys(truth, 0)
    for _ in range(draws):
        for key, line in images.lines(dice.integers(len(images), size=size)).items():
            hits[key] += truth[key].value in line.interval
    return {key: count / draws for key, count in hits.items()}


def measured_again(model: str, method: str, batch_size: int, threads: int) -> Times:
    """Times of the method and of the model itself, from the model as it is opened."""
    torch.set_num_threads(threads)
    network = open_model(model).eval()
    return sessions(
        network, variant(network, method).eval(), batch_size=batch_size, device="cpu", dtype="float32", compile=False
    )


def repeated(
    images: Images, times: Callable[[], list[tuple[float, float, float]]], other: Executor, seed: int
) -> Values:
    """Of each statement: whether its interval contains the second value, and whether verify says that it holds.

    None where verify does not judge, as of times that nobody asked for.
    """
    order = np.random.default_rng(seed).permutation(len(images))
    half = len(images) // 2
    first, second = images.lines(order[:half]), images.lines(order[half : 2 * half])
    first |= {line.key: line for line in time_lines(times())}
    second |= {line.key: line for line in time_lines(other.submit(times).result())}
    return {
        key: [second[key].value in line.interval, Finding(line, second[key]).holds, line.number]
        for key, line in first.items()
    }


def share(found: list[bool | None]) -> float | None:
    """How often it was true; None where it was not judged."""
    judged = [one for one in found if one is not None]
    return float(np.mean(judged)) if judged else None


def bar(rows: list[Values], which: str) -> str:
    """Whether every statement reaches 19 of 20 repetitions, in words."""
    least = min((row[which] for row in rows if row[which] is not None), default=1.0)
    return f"{'met' if least >= 0.95 else 'not met'} (least {least:.1%})"


def main(
    model: str,
    method: str = "TopK() @ KeepRate(0.5, at=(1, 3))",
    name: str = "digits",
    root: str | None = None,
    sizes: list[int] = [64, 256],  # noqa: B006 (shown as the default; never changed)
    draws: Annotated[int, Range(1, 1_000_000)] = 1000,
    repetitions: Annotated[int, Range(0, 10_000)] = 20,
    batch_size: Annotated[int, Range(1, 4096)] = 32,
    threads: Annotated[int, Range(1, 1024)] = 1,
    out: str = "results/coverage-digits-cpu",
) -> None:
    """Draw, repeat, print, and write OUT.md, OUT.csv and OUT.json.

    Args:
        model: a trained one with a classifier of these images.
        method: of reduction, which is compared with the model itself.
        name: of the data set.
        root: its folder.
        sizes: images of a draw.
        draws: how many samples.
        repetitions: how many certificates are measured a second time.
        batch_size: where times are measured.
        threads: CPU threads.
        out: stem of the files to write the table to.
    """
    torch.set_num_threads(threads)
    images = Images(model, method, DataSpec(name=name, root=root))
    settings: Values = {"model": model, "method": method, "name": name, "root": root, "batch_size": batch_size}
    finished = Finished(Path(f"{out}.finished.jsonl"), settings)
    rows: list[Values] = []
    for size in sizes:
        found = finished.measured(partial(simulated, images, size, draws), size=size, draws=draws)
        rows += [
            {"how": "simulation", "statement": key, "images": size, "number": draws, "contained": share, "holds": None}
            for key, share in found.items()
        ]
    times = partial(measured_again, model, method, batch_size, threads)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
        every = [
            finished.measured(partial(repeated, images, times, other, seed), repetition=seed)
            for seed in range(repetitions)
        ]
    for key in every[0] if every else ():
        contained, holds = (share([one[key][which] for one in every]) for which in (0, 1))
        rows.append({"how": REPEATED, "statement": key, "images": every[0][key][2], "number": repetitions,
                     "contained": contained, "holds": holds})  # fmt: skip
    repeats = [row for row in rows if row["how"] == REPEATED]
    notes = [
        f"{method} against the model itself, {len(images):,} test images of {name}; times of batches of {batch_size} "
        f"with {threads} thread{'s' if threads > 1 else ''}.",
        "Bar, at least 19 of 20 repetitions: that verify says yes to every statement is "
        f"{bar(repeats, 'holds')}; that the interval contains the second value is {bar(repeats, 'contained')}.",
        "In the interval: of all images, which is what an interval is for, by simulation; of another half of the "
        "images, or of another measurement of as many sessions, in repetitions. An interval of a mean contains that of "
        "another sample in about 83 %; intervals of times are made for another measurement.",
    ]
    table = Table("Coverage of the intervals", COLUMNS, rows, notes=notes, environment=environment())
    print(table.text())
    table.write_all(out)
    finished.close()


if __name__ == "__main__":
    run(main, "benchmarks/coverage.py")
