"""How well each ordering of widths keeps a trained network alive when it is cut, without any training after the cut.

    vitrim demo --out runs/demo
    python benchmarks/orderings.py --run runs/demo/dense --out results/orderings-digits

Every network is cut from the chain of its ordering at the same budget of MACs; images of the training split order the
widths, the test split is evaluated.
"""

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import auto_cli

from vitrim.elastic import stratify
from vitrim.elastic.wpac import ORDERINGS
from vitrim.measure.environment import environment
from vitrim.measure.table import Column, Table
from vitrim.models import load
from vitrim.train.data import make_loader, plain_stream
from vitrim.train.evaluate import evaluate
from vitrim.train.recipe import Recipe


def main(
    run: str,
    out: str,
    fractions: tuple[float, ...] = (0.75, 0.5, 0.33, 0.2, 0.13),
    num_images: int = 1024,
    seeds: Sequence[int] = (0,),
) -> None:
    """Cut the network of a run under every ordering, with and without mean compensation, and write OUT.md and .json."""
    model = load(Path(run) / "model")
    data = Recipe.read(Path(run) / "recipe.yaml").data
    test = plain_stream(model, data)
    rows = [{"ordering": "not cut", "compensated": "-", "full": evaluate(model, test).accuracy}]
    for ordering in ORDERINGS:
        for seed in seeds:
            loader, _ = make_loader(plain_stream(model, data, train=True), 64, data.workers, seed=seed, shuffle=True)
            batches = [(images, classes) for images, classes, _ in loader]
            net = stratify(model, batches, num_images=num_images, ordering=ordering, say=lambda line: None)
            for compensate in (True, False):
                cuts = {str(f): net.extract(macs=f, compensate=compensate) for f in fractions}
                found = {name: evaluate(cut, test).accuracy for name, cut in cuts.items()}
                rows.append({"ordering": ordering, "compensated": "yes" if compensate else "no", **found})
    columns = (
        Column("ordering", "ordering"),
        Column("compensated", "mean compensation"),
        Column("full", "full", ".1%"),
        *(Column(str(f), f"{f:g} of the MACs", ".1%") for f in fractions),
    )
    notes = [
        f"{len(test)} test images; at most {num_images} training images to order by, without labels; no training "
        "after the cut."
    ]
    table = Table("Accuracy after cutting", columns, rows, notes, environment())
    print(table.text())
    for suffix in (".md", ".json"):
        table.write(out + suffix, overwrite=True)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
