"""The joint answer against the best answers by tokens alone and by width alone, at several budgets, without training.

    python benchmarks/compress.py runs/vits14 --root data/imagenette160 --images 512 --test_images 1000

The model is one that was trained for long, such as a run of recipes/system5/finetune-vits14.yaml. Bar: the answer is
never further from the given model than the best pure one by more than noise, and closer at 0.5 of the MACs and below.
"""

import time
from typing import Annotated, Any

import torch

from vitrim.arguments import run
from vitrim.compression.images import Pictures, read
from vitrim.compression.run import compress
from vitrim.data.specs import DataSpec
from vitrim.data.splits import plain_stream
from vitrim.measure.environment import environment
from vitrim.measure.table import Column, Table
from vitrim.models import open_model
from vitrim.options import Range

COLUMNS = (
    Column("budget", "MACs", ".2f"), Column("kind", "kind"), Column("tokens", "tokens"),
    Column("divergence", "divergence", ".4f"), Column("over_tokens", "over tokens alone", "+.4f"),
    Column("over_width", "over width alone", "+.4f"),
    Column("drop", "accuracy lost", "+.2%"), Column("time", "time ratio", ".2f"),
    Column("seconds", "search [s]", ".0f"),
)  # fmt: skip


def main(
    folder: str,
    root: str,
    budgets: list[float] = [0.75, 0.5, 0.35, 0.25],  # noqa: B006 (shown as the default; never changed)
    images: Annotated[int, Range(64, 100_000)] = 512,
    test_images: Annotated[int, Range(16, 100_000)] = 1000,
    trials: Annotated[int, Range(0, 10_000)] = 12,
    batch_size: Annotated[int, Range(1, 1024)] = 8,
    threads: Annotated[int, Range(1, 1024)] = 2,
    out: str | None = None,
) -> None:
    """Compress one model to several budgets and compare the answers.

    Args:
        folder: run folder of the trained model.
        root: folder of its images, with train/ and val/.
        budgets: fractions of the MACs.
        images: training images for the search.
        test_images: images for the certificates.
        trials: candidates of the sampler.
        batch_size: where times are measured.
        threads: CPU threads.
        out: stem of the files to write the table to.
    """
    torch.set_num_threads(threads)
    model, spec = open_model(folder), DataSpec(name="folder", root=root)
    training = read(plain_stream(model, spec, train=True), images, 0, labelled=False)
    test = read(plain_stream(model, spec), test_images, 0)
    rows = [row(model, training, test, budget, trials, batch_size) for budget in budgets]
    notes = [
        "Over tokens or width alone: divergence minus that of the best answer of that kind, paired by image, with 95 % "
        "intervals; below 0 the joint answer is closer. Empty where that answer is the best, or none meets the budget.",
        *map(verdict, rows),
    ]
    title = f"Joint and pure answers, {images} images for the search, {len(test)} for the figures"
    table = Table(title, COLUMNS, rows, notes=notes, environment=environment())
    print(table.text())
    if out is not None:
        table.write_all(out)


def row(
    model: torch.nn.Module, training: Pictures, test: Pictures, budget: float, trials: int, batch_size: int
) -> dict[str, Any]:
    """One budget."""
    start = time.perf_counter()
    found = compress(
        model, training.images, macs=budget, val=(test.images, test.classes), trials=trials, batch_size=batch_size,
        num_images=len(training),
    ).certificate  # fmt: skip
    values: dict[str, Any] = {
        "budget": budget,
        "tokens": found.reduction or "all",
        "seconds": time.perf_counter() - start,
    }
    for key in ("divergence", "over_tokens", "over_width", "drop", "time"):
        if key in found:
            line = found[key]
            values |= line.cells
    return values


def verdict(values: dict[str, Any]) -> str:
    """Whether the bar is met at one budget, in words."""
    over = [(values[f"{key}_low"], values[f"{key}_high"]) for key in ("over_tokens", "over_width") if key in values]
    where = f"At {values['budget']:g} of the MACs"
    if any(low > 0 for low, _ in over):
        return f"{where} a pure answer is closer: bar not met."
    if values["kind"] == "joint" and all(high < 0 for _, high in over):
        return f"{where} the joint answer is closer than the pure ones: bar met."
    met = "met" if values["budget"] > 0.5 else "not met"
    return f"{where} the answer is not worse than the pure ones, and not closer by more than noise: bar {met}."


if __name__ == "__main__":
    run(main, "benchmarks/compress.py")
