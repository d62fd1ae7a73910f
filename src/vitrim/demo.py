"""The whole story in miniature on real images, offline: train, prune, train a super-network, compress, compare, report.

The images are scikit-learn's handwritten digits, turned, shifted and scaled; the network is a ViT on 64 tokens. What
comes after the first training starts from the same trained network and is judged by the same test images.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from .compression import Certificate, Compressed
from .compression.certificate import FILE
from .compression.fidelity import Fidelity
from .compression.goal import Goal
from .compression.images import MOST_UNSEEN, Pictures, divide, read
from .compression.job import Job
from .compression.measured_lines import compared_lines
from .compression.request import Request
from .data.specs import AugmentSpec, DataSpec
from .data.splits import plain_stream
from .elastic import SuperNet, stratify
from .elastic.chain import hash_of
from .errors import RecipeError
from .measure.columns import columns
from .measure.environment import environment
from .measure.speed import bench
from .measure.table import Table
from .models import DENSE, attach, find_adapter, load, open_model, variant
from .models.files.classes import kept_classes
from .output import check_folder, is_free
from .showing.pictures import show
from .showing.plots import cost_accuracy_plot
from .showing.progress import live
from .showing.report import write_report
from .train.checkpoint import write_atomic
from .train.loop import train
from .train.recipe import Recipe
from .train.specs import ElasticSpec, ModelSpec, OptimSpec

NETWORK = {"depth": 6, "embed_dim": 64, "num_heads": 4}
EPOCHS = 3
"""Passes over the training images for the dense network; the super-network takes a third of them."""
HALF = 0.5
FOR_TOKENS, FOR_WIDTH = (0.75, HALF), (HALF, 0.25)
"""Parts of the MACs. Fewer tokens alone do not lead to a quarter here: the patch embedding stays as it is."""
TOKENS = {"tokens pruned": "TopK()", "tokens pruned and fused": "TopK(fuse='sum')", "tokens merged": "ToMe()"}
NUM_IMAGES, TRIALS = 512, 6
"""Training images that choose and fit widths and guide the search, and trials of its sampler."""
COLUMNS = columns("method", "budget", "accuracy", "drop", "divergence", "macs_ratio", "speed")
Networks = dict[tuple[str, float | None], nn.Module]
"""(method, budget) -> network."""


def run_demo(out: str | Path, epochs: int | None = None, command: str = "") -> Table:
    """Run the demonstration in folder `out`, or show it again; returns the table of all methods.

    Args:
        out: folder of the two runs, the compressed model, the pictures and the report.
        epochs: passes over the training images for the dense network, by default 3; the super-network takes a third.
        command: what the user typed, for the report.
    """
    out, console = Path(out), Console()
    check_folder(out)
    if out.exists() and not is_free(out) and not (out / "dense" / "recipe.yaml").is_file():
        raise RecipeError(f"{out} is not empty and holds no demo; choose another folder with --out")
    epochs = EPOCHS if epochs is None else epochs

    console.rule("1 of 5: train a small ViT on handwritten digits, which are turned, shifted and scaled", align="left")
    recipe = _recipe(epochs)
    with live(console, "dense") as report:
        train(recipe, out / "dense", command=command, report=report)
    dense = open_model(str(out / "dense")).eval()
    known = read(plain_stream(dense, recipe.data, train=True), NUM_IMAGES, 0, labelled=False)
    test = read(plain_stream(dense, recipe.data), MOST_UNSEEN, 0)
    networks: Networks = {(DENSE, None): variant(dense, DENSE)}

    console.rule("2 of 5: make it cheaper without training: fewer tokens, or narrower layers", align="left")
    for name, text in TOKENS.items():
        networks |= {(name, budget): variant(dense, f"{text} @ Budget({budget})") for budget in FOR_TOKENS}
    family = stratify(dense, known.batches(), num_images=len(known), say=lambda line: None)
    fitted = {"data": known.batches(), "num_images": len(known)}
    networks |= {("width, no training", budget): family.extract(macs=budget, **fitted) for budget in FOR_WIDTH}

    console.rule(
        "3 of 5: train a super-network: all widths learn together, and any size is cut out of it", align="left"
    )
    with live(console, "super-network") as report:
        train(_recipe(max(1, epochs // 3), out / "dense" / "model"), out / "supernet", command=command, report=report)
    family = SuperNet.load(out / "supernet")
    networks |= {("width, super-network", budget): family.extract(macs=budget) for budget in FOR_WIDTH}

    console.rule(
        "4 of 5: compress: half of the MACs by tokens and width together, no training, no labels", align="left"
    )
    found = _compressed(console, dense, recipe.data, known, test, out)
    networks["tokens and width", HALF] = found.model

    console.rule("5 of 5: compare them on the same test images, and in the same rounds of time", align="left")
    table, certificate = _measure(dense, networks, test), found.certificate.in_folder(out / "half").table()
    for each in (table, certificate):
        console.print(each.text(), highlight=False, markup=False)
    _illustrate(dense, table, test.images[:3], out)
    result = {"title": "vitrim in miniature", "tables": [table.to_dict(), certificate.to_dict()]}
    write_atomic(out / "result.json", json.dumps(result, indent=2))
    write_atomic(out / "environment.json", json.dumps(environment(), indent=2))
    write_atomic(out / "command.txt", command + "\n")
    console.print(f"Open {write_report(out)}; the pictures are in the same folder.", soft_wrap=True)
    console.print(f"To measure the certificate again: vitrim verify {out / 'half'}", soft_wrap=True)
    return table


def _recipe(epochs: int, start: Path | None = None) -> Recipe:
    """How the dense network is trained; from the weights in `start`, how the super-network is."""
    return Recipe(
        model=ModelSpec(args=dict(NETWORK)) if start is None else ModelSpec(name=str(start)),
        data=DataSpec(name="digits-moved", workers=0, holdout=0),
        augment=AugmentSpec(smoothing=0.05),
        optim=OptimSpec(lr=2e-3 if start is None else 1e-3, warmup_epochs=min(1.0, epochs / 4)),
        elastic=None if start is None else ElasticSpec(grow_epochs=1, max_saving=0.8, images=256),
        epochs=epochs,
        batch_size=64,
    )


def _compressed(
    console: Console, dense: nn.Module, data: DataSpec, known: Pictures, test: Pictures, out: Path
) -> Compressed:
    """The compressed model in `out`; it is searched for where there is none of this network yet."""
    place, run = out / "half", str(out / "dense")
    if (place / FILE).is_file() and (before := Certificate.read(place)).original == hash_of(dense):
        return Compressed(load(place), before)

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    request = Request(Goal.of(HALF, None, None), ("tokens", "width"), trials=TRIALS, num_images=NUM_IMAGES)
    job = Job(dense, request, divide(known, True, test), torch.device("cpu"), say, {"model": run, "data": asdict(data)})
    found = job.run(labelled=True)
    found.save(place, overwrite=True, **kept_classes(run))
    return found


def _measure(dense: nn.Module, networks: Networks, test: Pictures) -> Table:
    fidelity = Fidelity(dense, test, torch.device("cpu"))
    timed = bench(
        {f"{at}": one for at, one in enumerate(networks.values())}, batch_sizes=(128,), rounds=5, device="cpu"
    )
    rows = [
        {
            "method": method, "budget": budget, **_figures(fidelity, network, method != DENSE), "macs": time.macs,
            "macs_ratio": time.macs_ratio, "speed": time.speedup.median, "images_per_second": time.images_per_second,
        }
        for ((method, budget), network), time in zip(networks.items(), timed.measured, strict=True)
    ]  # fmt: skip
    notes = [
        f"{len(test)} test digits; brackets are 95 % intervals. Accuracy lost and divergence compare a network with "
        "the dense one image by image, and so are known better than either accuracy. Only the super-network was "
        "trained further; where an interval of accuracy lost holds 0, these digits do not tell the two networks apart.",
        "Budget: largest part of the MACs. Ratios are to the dense network; speed is the median of 5 rounds with "
        "batches of 128, all networks timed in turns.",
    ]
    return Table("Moved digits: accuracy against cost", COLUMNS, rows, notes=notes, environment=environment())


def _figures(fidelity: Fidelity, network: nn.Module, against_dense: bool) -> dict[str, float | None]:
    """Accuracy, how much of that of the dense network is lost, and the divergence from it, with their intervals."""
    found = fidelity.compare(network)
    wanted = ("accuracy", "drop", "divergence") if against_dense else ("accuracy",)
    cells: dict[str, float | None] = {}
    for line in compared_lines(fidelity, found):
        if line.key in wanted:
            cells |= line.cells
    return cells


def _illustrate(dense: nn.Module, table: Table, images: Tensor, out: Path) -> None:
    points = [{**row, "dense": row["method"] == DENSE} for row in table.rows]
    cost_accuracy_plot(points, out / "accuracy-against-cost.png")
    for name, text in (("pruned", "TopK()"), ("merged", "ToMe()")):
        drawn = variant(dense, DENSE)
        blocks = range(1, find_adapter(drawn).geometry(drawn).depth, 2)
        attach(drawn, f"{text} @ Budget({FOR_TOKENS[-1]})")
        show(drawn, images, out / f"tokens-{name}.png", montage=True, blocks=list(blocks), overwrite=True)
