"""What ordering the units of a network costs (WPAC), by itself and with the importance of sub-layers (stratify),
compared with forward passes over the same images, and its memory.

    python benchmarks/stratify.py --threads 2 --out results/stratify-deit-s-cpu

Half of the forward passes come before, half after; memory is the peak of the process, first with an eighth of the
images, then with all of them. The process should have the machine to itself.
"""

import resource
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from vitrim import arguments
from vitrim.elastic import stratify
from vitrim.elastic.wpac import wpac
from vitrim.measure.environment import environment
from vitrim.measure.table import Column, Table
from vitrim.models import build_model, find_adapter

COLUMNS = (
    Column("what", "what"),
    Column("images", "images", "d"),
    Column("seconds", "seconds", ".1f"),
    Column("over_forward", "over forward", ".2f"),
    Column("peak_mib", "peak of the process [MiB]", ".0f"),
)


def noise(images: int, batch_size: int, size: tuple[int, int, int]) -> Iterator[Tensor]:
    """Batches of random pixels, made one by one and the same every time."""
    generator = torch.Generator().manual_seed(0)
    for first in range(0, images, batch_size):
        yield torch.randn(min(batch_size, images - first), *size, generator=generator)


def peak() -> float:
    """The most memory that this process has taken so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(
    model: str = "deit_small_patch16_224",
    images: int = 1024,
    batch_size: int = 64,
    threads: int | None = 2,
    out: str = "results/stratify-deit-s-cpu",
) -> None:
    """Measure, print, and write OUT.md, OUT.csv and OUT.json."""
    torch.set_num_threads(threads or torch.get_num_threads())
    network = build_model(model).eval()
    size = find_adapter(network).geometry(network).input_size

    def forward(count: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            for batch in noise(count, batch_size, size):
                network(batch)
        return time.perf_counter() - start

    def order(count: int) -> float:
        start = time.perf_counter()
        wpac(network, noise(count, batch_size, size), num_images=count, say=print)
        return time.perf_counter() - start

    def whole_chain(count: int) -> float:
        start = time.perf_counter()
        stratify(network, noise(count, batch_size, size), num_images=count)
        return time.perf_counter() - start

    few = images // 8
    forward(few)
    rows = [{"what": "WPAC", "images": few, "seconds": order(few), "over_forward": None, "peak_mib": peak()}]
    before = forward(images // 2)
    seconds, most = order(images), peak()
    chain, top = whole_chain(images), peak()
    whole = before + forward(images - images // 2)
    rows += [
        {"what": "WPAC", "images": images, "seconds": seconds, "over_forward": seconds / whole, "peak_mib": most},
        {"what": "stratify", "images": images, "seconds": chain, "over_forward": chain / whole, "peak_mib": top},
        {"what": "forward", "images": images, "seconds": whole, "over_forward": 1.0, "peak_mib": None},
    ]
    notes = [f"{model}, random weights and pixels, without labels, batches of {batch_size}."]
    table = Table("Cost of ordering the units", COLUMNS, rows, notes=notes, environment=environment())
    print(table.markdown())
    table.write_all(out)


if __name__ == "__main__":
    arguments.run(main, "benchmarks/stratify.py")
