"""Training all widths together (PIAD) against the same arithmetic spent on fine-tuning one network that was cut.

    python benchmarks/piad.py runs/vits14 --root data/imagenette160 --out results/piad-vits14-cpu

Both start from one trained network and see the same training images. A cut network is fitted to the full one first and
then learns its predictions, for as many epochs as cost what PIAD costs: 3 forward passes for each training step of a
network, and one for its teacher. PIAD's networks are tested as they were trained, and fitted to their own full network
as well. Runs are kept in a folder, so that a benchmark which was stopped goes on where it was.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from closeness import TestImages, batches
from vitrim import SuperNet, arguments, load, save, stratify
from vitrim.compression.finetune import recipe_for
from vitrim.data.specs import DataSpec
from vitrim.measure.environment import environment
from vitrim.measure.table import Column, Table
from vitrim.models import open_model
from vitrim.train.checkpoint import RunFolder
from vitrim.train.loop import train
from vitrim.train.recipe import Recipe
from vitrim.train.specs import ElasticSpec, FinetuneSpec

BUDGETS = (0.75, 0.5, 0.25)
MAX_SAVING = 0.875
COLUMNS = (
    Column("macs", "MACs / full", ".2f"), Column("network", "network"), Column("epochs", "epochs", "d"),
    Column("seconds", "training [s]", ".0f"), Column("divergence", "KL(full || this)", ".4f"),
    Column("accuracy", "accuracy", ".1%"), Column("lost", "lost", ".1%"),
)  # fmt: skip


def piad_cost(epochs: int, grow_epochs: int) -> float:
    """Forward passes of the full network for each training image: full, smallest and random network, with backward."""
    smallest = [1 - MAX_SAVING * min(1.0, (epoch + 1) / grow_epochs) for epoch in range(epochs)]
    return sum(3 * (1 + low + (1 + low) / 2) for low in smallest)


def epochs_for(cost: float, macs: float) -> int:
    """For how many epochs a network of so many MACs can learn from the full one at this cost."""
    return max(1, round(cost / (3 * macs + 1)))


def main(
    model: str,
    root: str,
    limit: int = 3000,
    epochs: int = 2,
    lr: float = 2.5e-5,
    images: int = 1024,
    test_images: int = 3925,
    workers: int = 2,
    threads: int | None = 2,
    device: str = "cpu",
    runs: str = "runs/piad",
    out: str = "results/piad-vits14-cpu",
) -> None:
    """Train, measure, print, and write OUT.md, OUT.csv and OUT.json.

    Args:
        model: run folder of the trained network.
        root: folder of its images, with train/ and val/.
        limit: training images.
        epochs: of PIAD; its chain grows in the first half.
        lr: learning rate of all training here.
        images: unlabelled images by which networks are ordered and fitted.
        test_images: images of the test split.
        workers: processes that read images.
        threads: CPU threads.
        device: where networks are cut and tested; training takes a GPU if there is one.
        runs: folder in which the runs are kept.
        out: stem of the files to write.
    """
    torch.set_num_threads(threads or torch.get_num_threads())
    full = open_model(model).eval().to(device)
    spec = DataSpec(name="folder", root=root, workers=workers, limit=limit, holdout=0.1)
    test = TestImages(full, spec, test_images)
    calibration = [batch for batch, _ in batches(full, spec, images, 1, train=True)]
    fitted = {"data": calibration, "num_images": images}
    rows: list[dict[str, Any]] = []

    def add(macs: float, name: str, network: nn.Module, run: RunFolder | None = None) -> None:
        found = test.closeness(network.eval().to(device))
        result = {} if run is None else run.result or {}
        rows.append({"macs": macs, "network": name, "epochs": result.get("epochs", 0),
                     "seconds": result.get("train_seconds"), **found,
                     "lost": test.accuracy - found["accuracy"]})  # fmt: skip
        print(*rows[-1].values(), sep="  ", flush=True)

    cut = stratify(full, calibration, num_images=images)
    recipe = recipe_for(FinetuneSpec(epochs=epochs, lr=lr, batch_size=32), model, model, spec)
    together = Recipe(
        recipe.teacher, recipe.data, recipe.augment, optim=recipe.optim, epochs=epochs, batch_size=32,
        elastic=ElasticSpec(grow_epochs=max(1, epochs // 2), max_saving=MAX_SAVING, images=images),
    )  # fmt: skip
    run = RunFolder(Path(runs) / "piad")
    train(together, run.path)
    piad, cost = SuperNet.load(run.model_path), piad_cost(epochs, max(1, epochs // 2))
    piad.model.to(device)
    for macs in BUDGETS:
        one = cut.extract(macs=macs, **fitted)
        add(macs, "cut and fitted, no training", one)
        add(macs, "PIAD", piad.extract(macs=macs), run)
        add(macs, "PIAD, then fitted", piad.extract(macs=macs, **fitted), run)
        start, tuned = Path(runs) / f"cut-{macs}", RunFolder(Path(runs) / f"tuned-{macs}")
        save(one, start, overwrite=True)
        learning = FinetuneSpec(epochs=epochs_for(cost, macs), lr=lr, batch_size=32)
        train(recipe_for(learning, start, model, spec), tuned.path)
        add(macs, "cut and fitted, fine-tuned", load(tuned.model_path), tuned)
    notes = [
        f"The full network has {test.accuracy:.1%} on {len(test):,} test images. {limit:,} training images, a tenth "
        f"held out. PIAD: {epochs} epochs for all sizes together; fine-tuning: as much arithmetic for one size.",
    ]
    table = Table("All widths together, or one at a time", COLUMNS, rows, notes=notes, environment=environment())
    print(table.text())
    table.write_all(out)


if __name__ == "__main__":
    arguments.run(main, "benchmarks/piad.py")
