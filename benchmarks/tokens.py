"""Which reducer, score and shape of schedule lose least at equal MACs, without training, on a trained model.

    vitrim train --config recipes/system5/finetune-vits14.yaml --data.limit 9469 --out runs/vits14
    python benchmarks/tokens.py runs/vits14 --root data/imagenette160 --out results/tokens-vits14-cpu

Several shapes of schedule for the reducers in common use, then every other reducer, score and fuse under one shape.
All rows see the same test images, and every schedule is the weakest that meets its budget, so that rows of one budget
differ by at most 0.01 of the MACs. A benchmark that was stopped goes on where it was when the same command is given
again.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn

from finished import Finished, Values
from vitrim import Budget, Cluster, ToMe, TopK, arguments, attach, cost
from vitrim.compression.candidates import first_shapes, power, reducers
from vitrim.compression.fidelity import Fidelity
from vitrim.compression.images import read
from vitrim.compression.measured_lines import compared_lines
from vitrim.data.specs import DataSpec
from vitrim.data.splits import plain_stream
from vitrim.errors import ScheduleError
from vitrim.measure.environment import environment
from vitrim.measure.table import Column, Table
from vitrim.models import open_model
from vitrim.models.finding import find_adapter
from vitrim.notation import render
from vitrim.tokens import Reducer, Schedule

SHAPE = power(1.4)
"""The shape of schedule under which reducers and scores are compared."""
IN_USE = (Cluster(), Cluster(prop_attn=False), ToMe(), TopK())
"""The reducers for which shapes are compared."""
COLUMNS = (
    Column("reducer", "reducer"), Column("shape", "shape"), Column("budget", "MACs / full", ".2f"),
    Column("macs", "counted", ".3f"),
    Column("divergence", "KL(full || reduced)", ".4f"),
    Column("divergence_low", "from", ".4f"), Column("divergence_high", "to", ".4f"),
    Column("agreement", "same class", ".1%"), Column("drop", "accuracy lost", "+.2%"),
    Column("drop_low", "from", "+.2%"), Column("drop_high", "to", "+.2%"),
)  # fmt: skip


def cases(has_cls: bool, depth: int, in_use: bool) -> Iterator[tuple[Reducer, Schedule]]:
    """Reducers in common use under all shapes; then, unless they are asked for alone, all others under one shape."""
    for reducer in IN_USE:
        for shape in first_shapes(depth):
            yield reducer, shape
    for reducer in [] if in_use else [*reducers(has_cls), TopK("random")]:  # Blind choice is the control.
        if reducer not in IN_USE:
            yield reducer, SHAPE


def measure(
    model: nn.Module, fidelity: Fidelity, reducer: Reducer, shape: Schedule, budget: float, full: int
) -> Values:
    """One method at one budget; empty where it cannot go so low."""
    try:
        handle = attach(model, reducer, Budget(budget, shape))
    except ScheduleError:
        return {}
    with handle:
        macs, found = cost(model).macs / full, fidelity.compare(model)
    values: Values = {"macs": macs}
    for line in compared_lines(fidelity, found):
        values |= line.cells
    return values


def main(
    model: str,
    root: str,
    image_size: int | None = None,
    test_images: int = 1000,
    threads: int | None = 2,
    device: str = "cpu",
    budgets: list[float] = [0.9, 0.75, 0.5, 0.35, 0.25],  # noqa: B006 (shown as the default; never changed)
    in_use: bool = False,
    out: str = "results/tokens-vits14-cpu",
) -> None:
    """Measure, print, and write OUT.md, OUT.csv and OUT.json.

    Args:
        model: run folder of a trained model, or whatever else commands open.
        root: folder of its images, with train/ and val/.
        image_size: pixels, if other than the model's own.
        test_images: images of the test split, drawn once.
        threads: CPU threads.
        device: where to run.
        budgets: fractions of the MACs.
        in_use: compare the reducers in common use alone, not all with every score.
        out: stem of the files to write.
    """
    torch.set_num_threads(threads or torch.get_num_threads())
    network = open_model(model, image_size).eval().to(device)
    spec = DataSpec(name="folder", root=root, image_size=image_size, workers=0)
    fidelity = Fidelity(network, read(plain_stream(network, spec), test_images, 0), torch.device(device))
    right, full = fidelity.right(fidelity.reference), cost(network).macs
    geometry = find_adapter(network).geometry(network)
    finished = Finished(
        Path(f"{out}.finished.jsonl"),
        {"model": model, "root": root, "size": image_size, "images": len(fidelity), "device": device},
    )
    rows = []
    for reducer, shape in cases(geometry.num_prefix > 0, geometry.depth, in_use):
        for budget in budgets:
            key = {"reducer": render(reducer), "shape": render(shape), "budget": budget}
            values = finished.measured(partial(measure, network, fidelity, reducer, shape, budget, full), **key)
            rows += [key | values] if values else []
    notes = [
        f"{len(fidelity):,} test images, the same for all rows"
        + ("." if right is None else f"; the full network has {right.double().mean():.1%} on them."),
        "Intervals of 95 %: divergence by a studentised bootstrap over images, accuracy lost paired by image.",
        *map(partial(closest, rows), budgets),
    ]
    table = Table("Tokens without training", COLUMNS, rows, notes=notes, environment=environment())
    print(table.text())
    table.write_all(out)
    finished.close()


def closest(rows: list[Values], budget: float) -> str:
    """What loses least at one budget, in words."""
    best, second = sorted((row for row in rows if row["budget"] == budget), key=lambda row: row["divergence"])[:2]
    apart = best["divergence_high"] < second["divergence_low"]
    return (
        f"At {budget} of the MACs {best['reducer']} with {best['shape']} is closest (KL {best['divergence']:.4f}), "
        f"{'beyond' if apart else 'within'} the interval of the next, {second['reducer']} with {second['shape']}."
    )


if __name__ == "__main__":
    arguments.run(main, "benchmarks/tokens.py")
