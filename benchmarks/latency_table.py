"""How well the table of block times predicts the time of networks that it has not seen.

    python benchmarks/latency_table.py deit_small_patch16_224 --batch_size 8 32 --threads 2

Each of 30 random networks has widths, a reducer and a schedule of its own. It is timed in interleaved rounds with the
dense model; the error is that of the predicted ratio to the dense model. Bar: median below 5 %, 90th percentile below
10 % at batch 8 and above on a CPU.
"""

import copy
import random
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch

from vitrim import KeepRate, PowerLaw, attach, cost
from vitrim.arguments import run
from vitrim.compression.block_times import Workbench
from vitrim.compression.candidates import reducers
from vitrim.measure.environment import environment
from vitrim.measure.table import Column, Table
from vitrim.models import BlockWidths, open_model, reads_prefix_only, set_widths, widths_of
from vitrim.options import Range
from vitrim.tokens import render

COLUMNS = (
    Column("batch_size", "batch size", "d"), Column("reduction", "tokens"), Column("macs", "MACs", ".3f"),
    Column("predicted", "predicted ratio", ".3f"), Column("measured", "measured ratio", ".3f"),
    Column("error", "error", "+.1%"),
)  # fmt: skip
BARS = (0.05, 0.10)


def main(
    model: str,
    batch_size: list[int] = [8, 32],  # noqa: B006 (shown as the default; never changed)
    number: Annotated[int, Range(2, 1000)] = 30,
    threads: Annotated[int, Range(1, 1024)] = 2,
    image_size: int | None = None,
    rounds: Annotated[int, Range(3, 1000)] = 7,
    out: str | None = None,
) -> None:
    """Compare predicted and measured times of random reduced networks.

    Args:
        model: what `vitrim bench` takes; weights do not matter.
        batch_size: images per forward pass, each with a table of its own.
        number: of random networks for each batch size.
        threads: CPU threads.
        image_size: side of square images in pixels; by default the model's own.
        rounds: in which every network is timed once.
        out: stem of the files to write the table to.
    """
    torch.set_num_threads(threads)
    whole = open_model(model, image_size).eval()
    rows, notes = [], []
    for size in batch_size:
        found = compare(whole, size, number, rounds, random.Random(size))
        errors = np.abs([row["error"] for row in found])
        middle, most = float(np.median(errors)), float(np.percentile(errors, 90))
        met = "met" if middle < BARS[0] and most < BARS[1] else "not met"
        notes.append(f"Batch {size}: median error {middle:.1%}, 90th percentile {most:.1%}; bar {met}.")
        rows += found
    table = Table("Predicted times of networks", COLUMNS, rows, notes=notes, environment=environment())
    print(table.text())
    if out is not None:
        table.write_all(out)


def compare(whole: torch.nn.Module, batch_size: int, number: int, rounds: int, dice: random.Random) -> Sequence[dict]:
    """One row for each random network."""
    bench = Workbench(whole, batch_size, torch.device("cpu"), "float32")
    table, cls_only = bench.measure(), reads_prefix_only(whole)
    methods = [one for one in reducers(bench.geometry.has_cls) if one.needs != "attention"]
    rows = []
    for _ in range(number):
        full, depth = widths_of(whole), bench.geometry.depth
        widths = [
            BlockWidths(max(8, int(each.head_dim * dice.uniform(0.4, 1)) // 8 * 8),
                        max(8, int(each.hidden * dice.uniform(0.3, 1)) // 8 * 8)) for each in full
        ]  # fmt: skip
        reducer = dice.choice(methods)
        shape = dice.choice([KeepRate(dice.uniform(0.4, 0.9), at=(depth // 4, depth // 2)), PowerLaw(0.3, 1.4)])
        network = copy.deepcopy(whole)
        set_widths(network, widths)
        handle = attach(network, reducer, shape, cls_only=cls_only)
        bench.measure_cut(table, reducer)
        with torch.inference_mode():
            calls = {"dense": lambda: bench.model(*bench.inputs), "own": lambda net=network: net(*bench.inputs)}
            times = bench.times(calls, rounds)
        predicted = table.predict(handle.plan(), widths, reducer) / table.dense
        measured = times["own"] / times["dense"]
        rows.append({
            "batch_size": batch_size, "reduction": f"{render(reducer)} @ {shape}", "macs": cost(network).macs / 1e9,
            "predicted": predicted, "measured": measured, "error": predicted / measured - 1,
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    run(main, "benchmarks/latency_table.py")
