"""What a teacher costs per epoch of its student: none, from the cache, live; interleaved rounds, quartiles of each.

    python benchmarks/distill_cache.py --threads 2 --out results/distill-cache-deit-s-cpu

The process should have the machine to itself.
"""

import tempfile
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader

import vitrim
from vitrim import arguments
from vitrim.data.streams import Stream
from vitrim.distill import Distiller, Teacher, TeacherCache, student_grid
from vitrim.measure.bench_table import Quartiles, ratios
from vitrim.measure.environment import environment
from vitrim.measure.table import Column, Table

COLUMNS = (
    Column("teacher", "teacher"),
    Column("epoch", "epoch [s]"),
    Column("over_none", "over no teacher"),
    Column("kilobytes", "kB per image and view", ".0f"),
)


class Noise:
    """Images of random pixels, by index."""

    def __init__(self, length: int, side: int) -> None:
        self.pixels = np.random.default_rng(0).integers(0, 256, (length, side, side, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), index % 1000


def epoch(distiller: Distiller, loader: Iterable[Any], device: torch.device) -> float:
    """Seconds of one pass of training."""
    optimiser = torch.optim.AdamW([p for p in distiller.parameters() if p.requires_grad], lr=1e-5)
    distiller.train()
    start = time.perf_counter()
    for images, targets, _, *known in loader:
        given = {name: value.to(device, non_blocking=True) for name, value in known[0].items()} if known else None
        out = distiller(images.to(device, non_blocking=True), targets.to(device, non_blocking=True), given)
        optimiser.zero_grad()
        out.loss.backward()
        optimiser.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(
    student: str = "deit_small_patch16_224",
    teacher: str = "vit_base_patch16_224",
    reduction: str = "TopK(fuse=sum) @ KeepRate(0.7, at=(3, 6, 9))",
    terms: str = "Labels() + Logits() + ClsStages() + Cls() + Tokens()",
    images: int = 32,
    batch_size: int = 16,
    workers: int = 1,
    threads: int | None = 2,
    rounds: int = 5,
    device: str = "cpu",
    out: str = "results/distill-cache-deit-s-cpu",
) -> None:
    """Measure, print, and write OUT.md, OUT.csv and OUT.json."""
    if threads is not None:
        torch.set_num_threads(threads)
    place = torch.device(device)
    learner = timm.create_model(student)
    vitrim.attach(learner, reduction)
    source = Teacher(timm.create_model(teacher)).to(place)
    transform = create_transform(224, is_training=True)
    plain, kept = (Stream(Noise(images, 256), transform, views=1) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        cache = TeacherCache.build(folder, source, kept, terms, grid=student_grid(learner))
        kept.known = cache
        row = sum(value.numel() * value.element_size() for value in cache[0].values())
        options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
        without, with_cache = (
            DataLoader(data, batch_size, pin_memory=place.type == "cuda", **options) for data in (plain, kept)
        )
        ways = {
            "none": (Distiller(learner, None, "Labels()").to(place), without),
            "from the cache": (Distiller(learner, cache, terms).to(place), with_cache),
            "live": (Distiller(learner, source, terms).to(place), without),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        names = list(ways)
        for turn in range(rounds + 1):
            for name in names[turn % 3 :] + names[: turn % 3]:
                taken = epoch(*ways[name], place)
                if turn > 0:  # The first warms up.
                    seconds[name].append(taken)
    rows = [
        {
            "teacher": name,
            "epoch": str(Quartiles.of(taken)),
            "over_none": "-" if name == "none" else str(ratios(taken, seconds["none"])),
            "kilobytes": row / 1e3 if name == "from the cache" else None,
            "seconds": taken,
        }
        for name, taken in seconds.items()
    ]
    notes = [
        f"Median [quartiles] over {rounds} rounds, each of one epoch in all three ways; ratios are within rounds.",
        f"Student {student}, {reduction}; teacher {teacher}; {terms}. {images} images of random pixels, augmented, "
        f"in batches of {batch_size}, {workers} worker processes; optimiser included.",
    ]
    table = Table("Cost of a teacher per epoch", COLUMNS, rows, notes, environment())
    print(table.text())
    table.write_all(out)


if __name__ == "__main__":
    arguments.run(main, "benchmarks/distill_cache.py")
