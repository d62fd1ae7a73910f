"""What a training step costs when tokens are dropped inside a block, beside what its arithmetic says.

    python benchmarks/train_step.py --threads 2 --rounds 12 --out results/bench-train-step-cpu

A step is forward pass, backward pass and AdamW; dense and reduced models take turns in interleaved rounds. MACs are
PyTorch's own count of forward and backward pass together. The process should have the machine to itself.
"""

import json
import random
from collections.abc import Mapping
from timeit import Timer
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import benchmark
from torch.utils.flop_counter import FlopCounterMode

from vitrim import arguments
from vitrim.measure.bench_table import Quartiles, ratios
from vitrim.measure.environment import environment
from vitrim.measure.table import Column, Table
from vitrim.models import attach, build_model
from vitrim.tokens import Reduction

COLUMNS = (
    Column("batch_size", "batch", "d"),
    Column("method", "method"),
    Column("ms", "step [ms]", ".1f"),
    Column("time_ratio", "time / dense"),
    Column("macs_ratio", "training MACs / dense", ".3f"),
    Column("over", "time over MACs", ".3f"),
)
METHODS = (
    "TopK() @ Stages({0: 0.65}, place=inside)",
    "TopK() @ Stages({1: 0.65}, place=inside)",
    "TopK(random) @ Stages({0: 0.65}, place=inside)",
)


class Step:
    """A model with its optimiser, and one step of training on given images."""

    def __init__(self, model: nn.Module, images: Tensor, precision: str) -> None:
        self.model, self.images, self.precision = model.train(), images, precision
        self.labels = torch.arange(len(images), device=images.device) % model.num_classes
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def __call__(self) -> None:
        """Forward pass, backward pass, update."""
        bf16 = self.precision == "bf16"
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(self.model(self.images), self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def training_macs(model: nn.Module, image_size: tuple[int, int, int]) -> int:
    """Multiply-accumulates of forward and backward pass for one image, counted by PyTorch on empty tensors."""
    ghost = model.to("meta").train()
    with FlopCounterMode(display=False) as counter:
        ghost(torch.empty(2, *image_size, device="meta")).sum().backward()
    return counter.get_total_flops() // 4


def measure(steps: Mapping[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round; the order within a round is drawn anew."""
    dice, order = random.Random(0), list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        dice.shuffle(order)
        for name in order:
            taken = Timer(steps[name], timer=benchmark.timer).timeit(1)
            if turn >= 2:  # The first two warm up.
                seconds[name].append(taken)
    return seconds


def compare(model: str, batch_size: int, rounds: int, precision: str, device: str) -> list[dict[str, Any]]:
    """Figures of all methods at one batch size."""

    def made(name: str) -> nn.Module:
        network = build_model(model)
        if name != "dense":
            attach(network, Reduction.parse(name, "train"))
        return network

    names = ("dense", *METHODS)
    size = made("dense").pretrained_cfg["input_size"]
    images = torch.randn(batch_size, *size, generator=torch.Generator().manual_seed(0)).to(device)
    macs = {name: training_macs(made(name), size) for name in names}
    seconds = measure({name: Step(made(name).to(device), images, precision) for name in names}, rounds)
    rows = []
    for name in names:
        time, share = ratios(seconds[name], seconds["dense"]), macs[name] / macs["dense"]
        rows.append({
            "batch_size": batch_size, "method": name, "ms": 1e3 * Quartiles.of(seconds[name]).median,
            "time_ratio": str(time), "macs_ratio": share, "over": time.median / share, "seconds": seconds[name],
        })  # fmt: skip
    return rows


def main(
    model: str = "vitrim_hybrid_vit",
    batch_sizes: list[int] = [32, 128],  # noqa: B006 (never changed)
    threads: int | None = 2,
    rounds: int = 12,
    precision: str = "no",
    device: str = "cpu",
    out: str = "results/bench-train-step-cpu",
) -> None:
    """Measure, print, and write OUT.md, OUT.csv and OUT.json."""
    torch.set_num_threads(threads or torch.get_num_threads())
    rows = [row for size in batch_sizes for row in compare(model, size, rounds, precision, device)]
    settings = {"model": model, "precision": precision, "device": device, "rounds": rounds}
    notes = [f"Settings: {json.dumps(settings)}. Median [quartiles] of the ratios within each round."]
    table = Table("Training steps with dropped tokens", COLUMNS, rows, notes=notes, environment=environment())
    print(table.markdown())
    table.write_all(out)


if __name__ == "__main__":
    arguments.run(main, "benchmarks/train_step.py")
