"""How close to the full network its sub-networks stay, by how they were chosen and compensated, without any training.

    vitrim train --config recipes/system5/finetune-vits14.yaml --out runs/vits14
    python benchmarks/widths.py runs/vits14 --root data/imagenette160 --out results/widths-vits14-cpu

Calibration images are drawn from the training split by several seeds and have no labels; all networks are tested on the
same images of the test split. A network that was trained for minutes has width to spare, so that every method is good
there: take one that was trained for long. A benchmark that was stopped goes on where it was when the same command is
given again; several processes may measure seeds of their own, with `--table false`, before one makes the table.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from closeness import TestImages, batches, even_and_measured
from finished import Finished, Values
from vitrim import SuperNet, arguments, stratify
from vitrim.data.specs import DataSpec
from vitrim.measure.environment import environment
from vitrim.measure.table import Column, Table
from vitrim.models import open_model

BUDGETS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.35, 0.3, 0.25)
REFITTED = (0.75, 0.5, 0.25)
"""Budgets at which networks are also fitted to the full one, which takes longest."""
BARS = {0.75: (0.03, 0.01), 0.5: (0.20, 0.06)}
"""Budget -> largest divergence, and how much accuracy may be lost."""
COLUMNS = (
    Column("macs", "MACs / full", ".2f"),
    Column("widths", "widths"),
    Column("compensation", "what makes up for lost units"),
    Column("divergence", "KL(full || cut), mean", ".4f"),
    Column("largest", "of the worst seed", ".4f"),
    Column("accuracy", "accuracy", ".1%"),
    Column("lost", "lost", ".1%"),
)


def cases() -> Iterator[tuple[float, str, str]]:
    """Budget, how widths were chosen, and what makes up for lost units."""
    for macs in BUDGETS:
        yield from ((macs, "even", "means"), (macs, "even", "regression"), (macs, "measured", "regression"))
        if macs in REFITTED:
            yield macs, "measured", "regression, refitted"


class Cuts:
    """Sub-networks of one super-network, which is made when the first is asked for.

    Args:
        network: the full network.
        images: reads the calibration images.
        number: of calibration images.
    """

    def __init__(self, network: nn.Module, images: Callable[[], list[tuple[Tensor, Tensor]]], number: int) -> None:
        self.network, self.images, self.number = network, images, number
        self._nets = cache(self._make)

    def cut(self, macs: float, widths: str, how: str) -> nn.Module:
        """One sub-network."""
        data, nets = self._nets()
        if how == "regression, refitted":
            return nets[widths].extract(macs=macs, data=data)
        return nets[widths].extract(macs=macs, compensate="means" if how == "means" else "regression")

    def _make(self) -> tuple[list[Tensor], dict[str, SuperNet]]:
        data = [batch for batch, _ in self.images()]
        net = stratify(self.network, data, num_images=self.number)
        return data, even_and_measured(net)


def main(
    model: str,
    root: str,
    image_size: int | None = None,
    images: int = 1024,
    test_images: int = 1000,
    seeds: list[int] = [1, 2, 3],  # noqa: B006 (shown as the default; never changed)
    threads: int | None = 2,
    device: str = "cpu",
    table: bool = True,
    out: str = "results/widths-vits14-cpu",
) -> None:
    """Measure; print, and write OUT.md, OUT.csv and OUT.json, if a table is wanted."""
    torch.set_num_threads(threads or torch.get_num_threads())
    network = open_model(model, image_size).eval().to(device)
    spec = DataSpec(name="folder", root=root, image_size=image_size, workers=0)
    test = TestImages(network, spec, test_images)
    settings: Values = {"model": model, "root": root, "images": images, "test_images": len(test), "device": device}
    finished = Finished(Path(f"{out}.finished.jsonl"), settings)

    def closeness(cut: Callable[[], nn.Module]) -> Values:
        return test.closeness(cut())

    found: dict[tuple[float, str, str], list[tuple[float, float]]] = defaultdict(list)
    for seed in seeds:
        cuts = Cuts(network, partial(batches, network, spec, images, seed, train=True), images)
        for macs, widths, how in cases():
            key = {"seed": seed, "macs": macs, "widths": widths, "compensation": how}
            values = finished.measured(partial(closeness, partial(cuts.cut, macs, widths, how)), **key)
            found[macs, widths, how].append((values["divergence"], values["accuracy"]))

    if not table:
        return

    def mean(key: tuple[float, str, str], which: int) -> float:
        return statistics.fmean(each[which] for each in found[key])

    rows = [
        {
            "macs": key[0], "widths": key[1], "compensation": key[2], "divergence": mean(key, 0),
            "largest": max(each[0] for each in found[key]), "accuracy": mean(key, 1),
            "lost": test.accuracy - mean(key, 1),
        }
        for key in sorted(found, key=lambda key: (-key[0], key[1:]))
    ]  # fmt: skip
    better = sum(mean((m, "measured", "regression"), 0) < mean((m, "even", "means"), 0) for m in BUDGETS)
    notes = [
        f"The full network has {test.accuracy:.1%} on {len(test):,} test images. "
        f"{len(seeds)} seeds of {images:,} images.",
        f"Measured widths with regression are closer than an even cut with means at {better} of {len(BUDGETS)} sizes.",
    ]
    for macs, (divergence, lost) in BARS.items():
        key = (macs, "measured", "regression, refitted")
        worst, gone = max(each[0] for each in found[key]), test.accuracy - mean(key, 1)
        notes.append(
            f"Bar at {macs} of the MACs, refitted: divergence of every seed at most {divergence} "
            f"{'met' if worst <= divergence else 'not met'} ({worst:.4f}); at most {lost:.0%} of accuracy lost "
            f"{'met' if gone <= lost else 'not met'} ({gone:.1%})."
        )
    made = Table("Widths without training", COLUMNS, rows, notes=notes, environment=environment())
    print(made.text())
    made.write_all(out)
    finished.close()


if __name__ == "__main__":
    arguments.run(main, "benchmarks/widths.py")
