"""What a teacher costs per epoch of a student: none, from the cache, live; interleaved rounds, median of each.

python benchmarks/distill_cache.py --student deit_small_patch16_224 --teacher vit_base_patch16_224
"""

import argparse
import json
import statistics
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
from vitrim.distill import CachedViews, Distiller, SeededViews, Teacher, TeacherCache, student_grid


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


def main() -> None:
    """Print one line of JSON: seconds per epoch and ratios to the epoch without a teacher."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="deit_small_patch16_224")
    parser.add_argument("--teacher", default="vit_base_patch16_224")
    parser.add_argument("--reduction", default="TopK(fuse=sum) @ KeepRate(0.7, at=(3, 6, 9))")
    parser.add_argument("--terms", default="Labels() + Logits() + ClsStages() + Cls() + Tokens()")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student = timm.create_model(args.student)
    vitrim.attach(student, args.reduction)
    teacher = Teacher(timm.create_model(args.teacher)).to(device)
    views = SeededViews(Noise(args.images, 256), create_transform(224, is_training=True), views=1)
    with tempfile.TemporaryDirectory() as folder:
        cache = TeacherCache.build(folder, teacher, views, args.terms, grid=student_grid(student))
        options = {"batch_size": args.batch, "num_workers": args.workers, "persistent_workers": args.workers > 0}
        pin = device.type == "cuda"
        plain = DataLoader(views, pin_memory=pin, **options)
        kept = DataLoader(CachedViews(views, cache), pin_memory=pin, **options)
        ways = {
            "none": (Distiller(student, None, "Labels()").to(device), plain),
            "cache": (Distiller(student, cache, args.terms).to(device), kept),
            "live": (Distiller(student, teacher, args.terms).to(device), plain),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(args.rounds + 1):
            for name, (distiller, loader) in ways.items():
                taken = epoch(distiller, loader, device)
                if turn > 0:  # The first warms up.
                    seconds[name].append(taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {name: round(value / medians["none"], 3) for name, value in medians.items()}
    print(json.dumps({**vars(args), "device": device.type, "seconds": medians, "ratio_to_none": ratios}))


if __name__ == "__main__":
    main()
