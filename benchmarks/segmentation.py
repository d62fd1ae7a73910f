"""Dense prediction under reduction: linear segmentation heads on the frozen features of a small model.

    python benchmarks/segmentation.py --out results/segmentation-digits-cpu

Images are moved digits, whose masks are moved with them: each pixel is background or one of ten digits. For every
reduction there are three answers to what stands at the places of the patches that it took away: nothing (zeros, with a
head trained on that), what `handle.restore` gives (with a head trained on that), and the same under the head that was
trained on the dense model. A benchmark that was stopped goes on where it was when the same command is given again.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finished import Finished, Values
from linear_head import CLASSES, Scores, patches_of, scored, trained
from vitrim import KeepRate, ToMe, TopK, arguments, attach, cost
from vitrim.data.digits import MovedDigits
from vitrim.data.specs import AugmentSpec, DataSpec
from vitrim.data.transforms import transforms_for
from vitrim.errors import DataError
from vitrim.measure.environment import environment
from vitrim.measure.intervals import Interval
from vitrim.measure.table import Column, Table
from vitrim.models import open_model
from vitrim.notation import render
from vitrim.tokens import Reducer, TokenState
from vitrim.train.loop import train
from vitrim.train.recipe import Recipe
from vitrim.train.specs import ModelSpec, OptimSpec

KEPT = (0.7, 0.5, 0.3)
"""Parts of the patches that leave the last block."""
CUTS = (2, 4)
REDUCERS = (TopK(), TopK(fuse="mean"), ToMe())
COLUMNS = (
    Column("reducer", "reducer"), Column("keep", "kept", ".1f"), Column("places", "lost places"),
    Column("head", "head trained on"), Column("patches", "patches left", "d"), Column("macs", "MACs / dense", ".2f"),
    Column("iou", "mean IoU", ".1%"), Column("iou_lost", "lost", "+.1%"),
    Column("accuracy", "pixels right", ".1%"), Column("accuracy_lost", "lost", "+.2%"),
)  # fmt: skip
Row = dict[str, Any]
Features = tuple[Tensor, Tensor]
"""Of the training and of the test images, each (images, patches, C)."""


def recipe(epochs: int) -> Recipe:
    """How the model is trained when none is given: to name the digit, never to find its pixels."""
    size = {"img_size": 32, "patch_size": 4, "depth": 6, "embed_dim": 96, "num_heads": 3}
    return Recipe(
        model=ModelSpec(args=size),
        data=DataSpec(name="digits-moved", workers=0, holdout=0),
        augment=AugmentSpec(smoothing=0.05),
        optim=OptimSpec(lr=2e-3, warmup_epochs=min(1.0, epochs / 4)),
        epochs=epochs,
        batch_size=64,
    )


def pictures(model: nn.Module, side: int, is_training: bool) -> tuple[Tensor, Tensor]:
    """All images in the format of the model, and the classes of their pixels by patch."""
    data, transform = MovedDigits(is_training), transforms_for(model, DataSpec(name="digits-moved"))
    pairs = [data.with_mask(index) for index in range(len(data))]
    images, masks = torch.stack([transform(image) for image, _ in pairs]), np.stack([mask for _, mask in pairs])
    if images.shape[2:] != masks.shape[1:]:
        wanted, found = (" x ".join(map(str, shape)) for shape in (masks.shape[1:], images.shape[2:]))
        raise DataError(f"masks are of {wanted} px, but the model takes images of {found} px; give one for {wanted} px")
    return images, patches_of(masks, side)


def at_own_places(tokens: Tensor, state: TokenState, has_fused: bool) -> Tensor:
    """Patch tokens (B, M, C) where they sit, (B, N, C), and zeros elsewhere.

    A merged token sits at the nearest of its patches; a fused one, which stands for all that was dropped, nowhere.
    """
    origin, places = state.origin, state.coordinates
    assert places is not None
    own = state.positions.gather(1, origin.clamp(min=0).unsqueeze(2).expand(-1, -1, 2))
    # The index decides between patches that are equally near.
    distance = (own - places).norm(dim=2) + torch.arange(origin.shape[1]) * 1e-5
    distance = distance.masked_fill(origin < 0, torch.inf)
    nearest = torch.full_like(distance, torch.inf).scatter_reduce(1, origin.clamp(min=0), distance, "amin")
    is_own = (origin >= 0) & (distance == nearest.gather(1, origin.clamp(min=0)))
    if has_fused:
        is_own &= origin != tokens.shape[1] - 1
    return state.spread(tokens) * is_own.unsqueeze(2)


@torch.no_grad()
def features(model: Any, images: Tensor, reducer: Reducer | None, keep: float) -> dict[str, Tensor]:
    """Features of all patches by what stands at lost places; by "" without a reduction."""
    first, found = model.num_prefix_tokens, dict[str, list[Tensor]]()
    handle = None if reducer is None else attach(model, reducer, schedule(keep), restorable=True)
    for batch in images.split(256):
        tokens = model.forward_features(batch)
        if handle is None or reducer is None:
            found.setdefault("", []).append(tokens[:, first:])
            continue
        empty = at_own_places(tokens[:, first:], handle.state_of(tokens), reducer.extra_tokens > 0)
        found.setdefault("zeros", []).append(empty)
        found.setdefault("restored", []).append(handle.restore(tokens)[:, first:])
    if handle is not None:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def schedule(keep: float) -> KeepRate:
    """Equal cuts, after which this part of the patches is left."""
    return KeepRate(round(keep ** (1 / len(CUTS)), 3), at=CUTS)


def line(found: Scores, dense: Scores | None = None) -> Row:
    """The figures of a row, against those of the dense model where it is given."""
    row: Row = {"iou": found.mean_iou, "accuracy": found.accuracy}
    lost: dict[str, Interval] = {}
    if dense is not None:
        lost = {"iou_lost": dense.iou_lost(found), "accuracy_lost": dense.accuracy_lost(found)}
    for name, interval in lost.items():
        row |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return row


def main(
    model: str | None = None, epochs: int = 5, threads: int | None = 1, out: str = "results/segmentation-digits-cpu"
) -> None:
    """Train, measure, print, and write OUT.md, OUT.csv and OUT.json.

    Args:
        model: run folder of a model for images of 32 px; by default one is trained in runs/segmentation.
        epochs: of that training.
        threads: CPU threads.
        out: stem of the files to write.
    """
    torch.set_num_threads(threads or torch.get_num_threads())
    if model is None:
        model = "runs/segmentation"
        train(recipe(epochs), Path(model))
    network: Any = open_model(model).eval().requires_grad_(False)
    side, full = network.patch_embed.patch_size[0], cost(network).macs
    sets = [pictures(network, side, is_training) for is_training in (True, False)]
    labels = [pixels for _, pixels in sets]

    def both(reducer: Reducer | None, keep: float) -> dict[str, Features]:
        parts = [features(network, images, reducer, keep) for images, _ in sets]
        return {name: (parts[0][name], parts[1][name]) for name in parts[0]}

    known, test = both(None, 1.0)[""]
    head = trained(known, labels[0])
    dense = scored(head, test, labels[1])

    def measure(reducer: Reducer, keep: float) -> Values:
        with attach(network, reducer, schedule(keep)) as handle:
            size = {"patches": handle.token_counts[-1] - network.num_prefix_tokens, "macs": cost(network).macs / full}
        rows: list[Row] = []
        for places, (known, test) in both(reducer, keep).items():
            heads = {"the same": trained(known, labels[0])} | ({"dense": head} if places == "restored" else {})
            for name, each in heads.items():
                rows.append({"places": places, "head": name} | size | line(scored(each, test, labels[1]), dense))
        return {"rows": rows}

    finished = Finished(Path(f"{out}.finished.jsonl"), {"model": model, "dense": line(dense)})
    rows: list[Row] = [{"reducer": "dense", "head": "dense", "patches": test.shape[1], "macs": 1.0} | line(dense)]
    for reducer in REDUCERS:
        for keep in KEPT:
            key = {"reducer": render(reducer), "keep": keep}
            rows += [key | row for row in finished.measured(partial(measure, reducer, keep), **key)["rows"]]
    notes = [
        f"{len(labels[1])} test images of moved digits, {CLASSES} classes, 32 x 32 pixels, patches of {side} px. "
        "The model was trained to name the digit and is frozen, each head is one linear layer from a patch to its "
        "pixels.",
        f"Reductions cut inside blocks {CUTS[0]} and {CUTS[1]}; a fused token counts among the patches that are left. "
        "Zeros: nothing where a patch was taken away; a merged token sits at the nearest of its patches.",
        "Lost: against the dense model, paired by image, with intervals of 95 % over the test images; of the mean IoU "
        "by a percentile bootstrap. One model and one seed: the intervals do not say how another training comes out.",
    ]
    table = Table("Segmentation by linear heads under reduction", COLUMNS, rows, notes, environment())
    print(table.text())
    table.write_all(out)
    finished.close()


if __name__ == "__main__":
    arguments.run(main, "benchmarks/segmentation.py")
