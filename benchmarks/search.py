"""What a search for one budget costs: its time, the memory of the process, and how often it says how far it is.

    python benchmarks/search.py --threads 2 --out results/search-deit-s-cpu

Bars: DeiT-S with 256 random images on two CPU cores takes less than 12 minutes and 4 GiB, and never works for a minute
without a line. The images show the cost alone: networks with random weights have nothing that an answer could keep.
The process should have the machine to itself.
"""

import resource
import time
from typing import Annotated

import torch

from vitrim import arguments
from vitrim.compression.run import compress
from vitrim.measure.environment import environment
from vitrim.measure.table import Column, Table
from vitrim.models import build_model, find_adapter
from vitrim.options import Range

COLUMNS = (
    Column("budget", "MACs", ".2f"),
    Column("images", "images", "d"),
    Column("tried", "networks compared", "d"),
    Column("minutes", "minutes", ".1f"),
    Column("silence", "longest time between two lines [s]", ".0f"),
    Column("peak_gib", "peak of the process [GiB]", ".2f"),
)


class Lines:
    """Prints lines, and keeps the longest time between two of them, in seconds."""

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.longest = 0.0

    def __call__(self, line: str = "") -> None:
        """Print a line, if there is one."""
        now = time.perf_counter()
        self.longest, self.last = max(self.longest, now - self.last), now
        if line:
            print(line, flush=True)


def main(
    model: str = "deit_small_patch16_224",
    macs: Annotated[float, Range(0.01, 1.0)] = 0.5,
    images: Annotated[int, Range(64, 100_000)] = 256,
    batch_size: Annotated[int, Range(1, 4096)] = 32,
    threads: Annotated[int, Range(1, 1024)] = 2,
    out: str = "results/search-deit-s-cpu",
) -> None:
    """Search once, print, and write OUT.md, OUT.csv and OUT.json.

    Args:
        model: name of the model; its weights are random.
        macs: the budget, a fraction of the MACs.
        images: random images for the search and the certificate.
        batch_size: for which times are measured.
        threads: of PyTorch.
        out: path of the tables without ending.
    """
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    network = build_model(model).eval()
    pixels = torch.randn(images, *find_adapter(network).geometry(network).input_size)
    say = Lines()
    start = time.perf_counter()
    answer = compress(network, pixels, macs=macs, batch_size=batch_size, num_images=images, say=say)
    seconds = time.perf_counter() - start
    say()
    row = {
        "budget": macs, "images": images, "tried": len(answer.certificate.tried), "minutes": seconds / 60,
        "silence": say.longest, "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }  # fmt: skip
    notes = [f"{model}, random weights and pixels, times measured in batches of {batch_size}, {threads} threads."]
    table = Table("Cost of a search", COLUMNS, [row], notes=notes, environment=environment())
    print(table.markdown())
    table.write_all(out)


if __name__ == "__main__":
    arguments.run(main, "benchmarks/search.py")
