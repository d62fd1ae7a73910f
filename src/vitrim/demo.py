"""Everything in miniature on real images, offline: train, prune without training, train with pruning, measure, draw.

The images are scikit-learn's handwritten digits; the network is a ViT of 8 blocks on 64 tokens.
"""

import json
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from .data.specs import AugmentSpec, DataSpec
from .data.splits import plain_stream
from .errors import RecipeError
from .measure.columns import columns
from .measure.environment import environment
from .measure.speed import bench
from .measure.table import Table
from .models import DENSE, attach, find_adapter, open_model, variant
from .output import check_folder, is_free
from .show.pictures import show
from .show.plots import cost_accuracy_plot
from .show.progress import live
from .show.report import write_report
from .study.compare import CLS_ONLY_NOTE, evaluate_variants
from .train.checkpoint import write_atomic
from .train.loop import train
from .train.recipe import Recipe
from .train.specs import OptimSpec

TRAINED_WITH = "TopK() @ PowerLaw(r_max=0.6, alpha=2.0)"
METHODS = {
    "pruned at every layer": ["TopK() @ PowerLaw(r_max=0.4, alpha=2.0)", TRAINED_WITH],
    "pruned in three stages": ["TopK() @ KeepRate(rate=0.7)", "TopK() @ KeepRate(rate=0.5)"],
    "EViT (pruned and fused)": ["TopK(fuse='sum') @ KeepRate(rate=0.7)", "TopK(fuse='sum') @ KeepRate(rate=0.5)"],
    "ToMe (merged)": ["ToMe() @ ConstantR(r=4)", "ToMe() @ ConstantR(r=7)"],
}
COLUMNS = columns("model", "method", "accuracy", "macs", "images_per_second", "speed", "tokens")


def run_demo(out: str | Path, epochs: int | None = None, command: str = "") -> Table:
    """Run the demonstration in folder `out`, or show it again; returns the table of all methods.

    Args:
        out: folder of the two runs, the pictures and the report.
        epochs: passes over the 1,437 training digits in each of the two trainings; default 7.
        command: what the user typed, for the report.
    """
    out, console = Path(out), Console()
    check_folder(out)
    if out.exists() and not is_free(out) and not (out / "dense" / "recipe.yaml").is_file():
        raise RecipeError(f"{out} is not empty and holds no demo; choose another folder with --out")
    recipes = {"dense": _recipe(epochs, None), "pruned": _recipe(epochs, TRAINED_WITH)}
    for number, (name, recipe) in enumerate(recipes.items(), 1):
        how = "with pruning switched on half-way" if recipe.reduction else "without pruning"
        console.rule(f"{number} of 4: train a small ViT {how}", align="left")
        with live(console, name) as report:
            train(recipe, out / name, command=command, report=report)
    console.rule("3 of 4: attach methods to the trained networks, at test time only", align="left")
    models = {name: open_model(str(out / name)) for name in recipes}
    table = _measure(models, recipes["dense"].data)
    console.print(table.text(), highlight=False)
    console.rule("4 of 4: pictures and report", align="left")
    _illustrate(models["dense"], recipes["dense"].data, table, out)
    result = {"title": "vitrim in miniature", "table": table.to_dict()}
    write_atomic(out / "result.json", json.dumps(result, indent=2))
    write_atomic(out / "environment.json", json.dumps(environment(), indent=2))
    write_atomic(out / "command.txt", command + "\n")
    console.print(f"Open {write_report(out)}; the pictures are in the same folder.")
    return table


def _recipe(epochs: int | None, reduction: str | None) -> Recipe:
    epochs = 7 if epochs is None else epochs
    return Recipe(
        data=DataSpec(name="digits", workers=0),
        augment=AugmentSpec(smoothing=0.05),
        optim=OptimSpec(lr=2e-3),
        reduction=reduction and f"{reduction} @ Delayed({epochs // 2})",
        epochs=epochs,
        batch_size=64,
    )


def _measure(models: dict[str, nn.Module], data: DataSpec) -> Table:
    dense, pruned = models["dense"], models["pruned"]
    families = {text: name for name, texts in METHODS.items() for text in texts}
    variants = {("trained dense", DENSE): variant(dense, DENSE)}
    variants |= {("trained dense", text): variant(dense, text) for text in families}
    variants |= {("trained with pruning", text): variant(pruned, text) for text in (DENSE, TRAINED_WITH)}
    rows = evaluate_variants(variants, data, device="cpu")
    timed = bench({str(at): model for at, model in enumerate(variants.values())}, batch_sizes=(128,), rounds=5)
    for row, time in zip(rows, timed.measured, strict=True):
        row |= {
            "macs": round(row["gmacs"] * 1e9),
            "images_per_second": time.images_per_second,
            "speed": time.speedup.median,
            "family": families.get(row["method"], "dense"),
        }
    notes = [
        f"{rows[0]['num_images']} test digits. Speed: batch of 128, median of 5 rounds, all timed in turns; "
        "ratios are to the first row.",
        CLS_ONLY_NOTE,
    ]
    return Table("Digits: accuracy against cost", COLUMNS, rows, notes=notes, environment=environment())


def _illustrate(model: nn.Module, data: DataSpec, table: Table, out: Path) -> None:
    points = [{**row, "method": row["family"], "dense": row["method"] == DENSE} for row in table.rows]
    cost_accuracy_plot([p for p in points if p["model"] == "trained dense"], out / "accuracy-against-cost.png")
    digits, names = plain_stream(model, data), ("pruned", "merged")
    for name, text in zip(names, (TRAINED_WITH, "ToMe() @ ConstantR(r=7)"), strict=True):
        images = torch.stack([digits[index * 37][0] for index in range(6)])
        drawn = variant(model, DENSE)
        blocks = range(1, find_adapter(drawn).geometry(drawn).depth, 2)
        attach(drawn, text)
        show(drawn, images, out / f"tokens-{name}.png", montage=True, blocks=list(blocks), overwrite=True)
