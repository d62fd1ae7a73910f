"""What it is worth to cut whole rotary pairs of queries and keys, and not dims of the values alone.

    vitrim train --config recipes/system5/finetune-vits14-rotary.yaml --out runs/vits14-rotary
    python benchmarks/pairs.py runs/vits14-rotary --root data/imagenette160 --out results/pairs-vits14-rotary-cpu

Both super-networks are made from the same images without labels and compared at equal MACs, without any training, on
the same images of the test split. A benchmark that was stopped goes on where it was when the same command is given
again.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

from closeness import TestImages, batches, even_and_measured
from finished import Finished, Values
from vitrim import SuperNet, arguments, stratify
from vitrim.data.specs import DataSpec
from vitrim.measure.environment import environment
from vitrim.measure.table import Column, Table
from vitrim.models import open_model, widths_of
from vitrim.models.widths.elastic_values import ElasticValues

BUDGETS = (0.9, 0.75, 0.6, 0.5, 0.35)
CUT = ("values", "values and pairs")
COLUMNS = (
    Column("macs", "MACs / full", ".2f"),
    Column("widths", "widths"),
    Column("cut", "what heads lose"),
    Column("divergence", "KL(full || cut)", ".4f"),
    Column("accuracy", "accuracy", ".1%"),
    Column("lost", "lost", ".1%"),
    Column("values", "dims of values", ".1f"),
    Column("queries", "dims of queries and keys", ".1f"),
)


@contextmanager
def losing(cut: str) -> Iterator[None]:
    """Within this context heads lose what is said here."""
    with patch.object(ElasticValues, "cuts_pairs", property(lambda layer: cut != "values" and layer.rotates_query_key)):
        yield


def super_networks(network: nn.Module, data: list[torch.Tensor], cut: str, rounds: int) -> dict[str, SuperNet]:
    """Chains of even and of measured widths in the same ordered weights."""
    with losing(cut):
        return even_and_measured(stratify(network, data, num_images=sum(map(len, data)), rounds=rounds))


def main(
    model: str,
    root: str,
    image_size: int | None = None,
    images: int = 1024,
    test_images: int = 1000,
    rounds: int = 4,
    seeds: list[int] = [1],  # noqa: B006 (shown as the default; never changed)
    threads: int | None = 2,
    device: str = "cpu",
    table: bool = True,
    out: str = "results/pairs-vits14-rotary-cpu",
) -> None:
    """Measure; print, and write OUT.md, OUT.csv and OUT.json, if a table is wanted."""
    torch.set_num_threads(threads or torch.get_num_threads())
    network = open_model(model, image_size).eval().to(device)
    spec = DataSpec(name="folder", root=root, image_size=image_size, workers=0)
    test = TestImages(network, spec, test_images)
    settings: Values = {"model": model, "root": root, "images": images, "test_images": len(test), "rounds": rounds}
    finished = Finished(Path(f"{out}.finished.jsonl"), settings)
    found: dict[tuple[float, str, str], list[Values]] = defaultdict(list)
    for seed in seeds:

        @cache
        def nets(cut: str, seed: int = seed) -> dict[str, SuperNet]:
            data = [batch for batch, _ in batches(network, spec, images, seed, train=True)]
            return super_networks(network, data, cut, rounds)

        def measure(macs: float, widths: str, cut: str, nets=nets) -> Values:
            small = nets(cut)[widths].extract(macs=macs)
            heads = [block for block in widths_of(small) if block.head_dim]
            return {
                **test.closeness(small),
                "values": sum(block.values for block in heads) / len(heads),
                "queries": sum(block.queries for block in heads) / len(heads),
            }  # fmt: skip

        for cut in CUT:
            for macs in BUDGETS:
                for widths in ("measured", "even"):
                    key: Values = {"seed": seed, "macs": macs, "widths": widths, "cut": cut}
                    found[macs, widths, cut].append(finished.measured(partial(measure, macs, widths, cut), **key))
    if not table:
        return
    rows = []
    for (macs, widths, cut), values in sorted(found.items(), key=lambda item: (item[0][1], -item[0][0], item[0][2])):
        mean = {name: statistics.fmean(float(each[name]) for each in values) for name in values[0]}
        rows.append({"macs": macs, "widths": widths, "cut": cut, "lost": test.accuracy - mean["accuracy"], **mean})
    closer = sum(
        statistics.fmean(float(each["divergence"]) for each in found[macs, widths, CUT[1]])
        < statistics.fmean(float(each["divergence"]) for each in found[macs, widths, CUT[0]])
        for macs in BUDGETS for widths in ("measured", "even")
    )  # fmt: skip
    notes = [
        f"The full network has {test.accuracy:.1%} on {len(test):,} test images. "
        f"{len(seeds)} seeds of {images:,} images, {rounds} rounds. "
        "Everything with the regression, nothing fitted again. Dims are means of what is left per "
        "head, over the blocks that have attention.",
        f"With pairs the network is closer to the full one in {closer} of {2 * len(BUDGETS)} comparisons.",
    ]
    made = Table("Rotary pairs", COLUMNS, rows, notes=notes, environment=environment())
    print(made.text())
    made.write_all(out)
    finished.close()


if __name__ == "__main__":
    arguments.run(main, "benchmarks/pairs.py")
