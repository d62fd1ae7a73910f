"""How long cutting a network out of a super-network takes, compared with building the full model.

    python benchmarks/extract.py --threads 2 --out results/extract-deit-b-cpu

The cut is measured from a super-network in memory to a network ready to run, with the regression of the lost units. Its
widths and compensations are chosen at random, since the time does not depend on them. Both are timed in turns in
interleaved rounds; the process should have the machine to itself.
"""

import time
from collections.abc import Callable

import torch

from vitrim import arguments
from vitrim.elastic.chain import start_chain
from vitrim.elastic.growth import grow
from vitrim.elastic.importance import tail_sums
from vitrim.elastic.supernet import SuperNet
from vitrim.measure.bench_table import Quartiles
from vitrim.measure.environment import environment
from vitrim.measure.table import Column, Table
from vitrim.models import build_model
from vitrim.models.widths.compensation import Compensation
from vitrim.models.widths.sublayers import elastic

COLUMNS = (
    Column("what", "what"),
    Column("ms", "ms, median [quartiles]"),
    Column("over_build", "over building", ".2f"),
)


def milliseconds(work: Callable[[], object]) -> float:
    """How long it takes once."""
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def main(
    model: str = "deit_base_patch16_224",
    macs: float = 0.5,
    rounds: int = 12,
    threads: int | None = 2,
    out: str = "results/extract-deit-b-cpu",
) -> None:
    """Measure, print, and write OUT.md, OUT.csv and OUT.json."""
    torch.set_num_threads(threads or torch.get_num_threads())
    torch.manual_seed(0)
    network = build_model(model).eval()
    start = start_chain(network)
    curves = {name: tail_sums(torch.rand(unit.width)) for name, unit in start.units.items()}
    with elastic(network) as layers:
        sizes = {name: layer.last.in_features for name, layer in layers.items()}
    compensations = {
        name: Compensation(torch.rand(size), torch.rand(size, size).tril() + torch.eye(size) * size)
        for name, size in sizes.items()
    }
    family = SuperNet(network, grow(start, curves, 0.875), compensations)
    works = {
        f"extract(macs={macs})": lambda: family.extract(macs=macs),
        "build the full model with timm": lambda: build_model(model),
    }
    times: dict[str, list[float]] = {what: [] for what in works}
    for round_ in range(rounds + 1):
        for what, work in works.items():
            taken = milliseconds(work)
            if round_:  # The first one warms up.
                times[what].append(taken)
    medians = {what: Quartiles.of(each) for what, each in times.items()}
    build = medians["build the full model with timm"].median
    rows = [{"what": what, "ms": str(each), "over_build": each.median / build} for what, each in medians.items()]
    notes = [f"{model}, {len(family.chain):,} networks in the chain, {rounds} interleaved rounds."]
    table = Table("Cost of an extraction", COLUMNS, rows, notes=notes, environment=environment())
    print(table.markdown())
    table.write_all(out)


if __name__ == "__main__":
    arguments.run(main, "benchmarks/extract.py")
