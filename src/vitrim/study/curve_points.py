"""Cut the networks of a curve and evaluate them: accuracy, divergence and cost at every size."""

import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..data.specs import DataSpec
from ..data.splits import plain_stream
from ..data.streams import shuffled_batches
from ..elastic import SuperNet, stratify
from ..measure.accelerator import make_accelerator
from ..measure.columns import columns
from ..measure.environment import environment
from ..measure.table import Table
from ..models import open_model
from ..train.checkpoint import RunFolder
from .compare import ModelData, data_for, different_images_note, evaluate_variants, mean_over_seeds
from .comparisons import compare_with_trained_alone, published_budgets_note
from .curve import Curve, Line

Folders = Mapping[str, Path]
"""Row -> folder of its run, all of one seed."""
Point = tuple[str, str, float | None]
"""Line, row, budget; no budget where a network is taken as it was trained."""

COLUMNS = columns(
    "curve", "row", "budget", "accuracy", "accuracy_std", "n", "gain", "published", "over_alone", "divergence", "gmacs",
    "gmacs_linear_only", "params", "images_per_second",
)  # fmt: skip


def measure_curve(
    curve: Curve, title: str, seeds: Mapping[int, Folders], data: ModelData, *, trained_on: Collection[str] = (),
    batch_size: int = 128, device: str = "auto",
) -> Table:  # fmt: skip
    """Cut every network of every line, and evaluate all networks of one seed together on the test images.

    Args:
        curve: which lines and budgets; already checked.
        title: of the table.
        seeds: the finished runs by seed; accuracies are means over seeds.
        data: the images, for all rows or by name: training images for the orderings, test images for the accuracy.
        trained_on: rows whose networks start from those of other rows.
        batch_size: images per forward pass.
        device: "auto", "cpu" or "cuda".

    Raises:
        VitrimError: a model that cannot be cut, or not even the smallest network meets a budget.
    """
    found: dict[Point, list[dict[str, Any]]] = {}
    for seed, folders in seeds.items():
        points = curve_networks(curve, folders, data, seed=seed, device=device)
        named = {(f"{number}", ""): network for number, network in enumerate(points.values())}
        images = {name: data_for(row, data) for (name, _), (_, row, _) in zip(named, points, strict=True)}
        whole = {row: (f"full {row}", "") for _, row, budget in points if budget is not None}
        cut = {key: whole[row] for key, (_, row, budget) in zip(named, points, strict=True) if budget is not None}
        full = {key: open_model(str(folders[row])) for row, key in whole.items()}
        images |= {name: data_for(row, data) for row, (name, _) in whole.items()}
        figures = evaluate_variants(named | full, images, originals=cut, batch_size=batch_size, device=device)
        for point, row in zip(points, figures, strict=False):  # The full networks come after the points.
            found.setdefault(point, []).append(row)
    rows = [_row(curve, point, per_seed) for point, per_seed in found.items()]
    notes = [
        "Budgets are fractions of the MACs of the full network, attention products included; the largest network that "
        "fits is taken. Nothing is trained after the cut. All networks were timed in turns, batch by batch.",
        "Divergence is the mean KL(full || cut) between the predictions before and after the cut. Accuracy gained is "
        "over the network before the cut, for networks trained alone over the first row; the 95 % interval is paired "
        "by image.",
        f"Orderings use {curve.images} training images without labels. Lines that are not even are cut by the same "
        f"rule. Widths are multiples of {curve.width_multiple}.",
        *compare_with_trained_alone(rows, trained_on),
        *published_budgets_note(rows, curve.published_linear_only),
    ]
    notes += different_images_note({row["row"]: data_for(row["row"], data) for row in rows})
    return Table(f"{title}: accuracy of every size", COLUMNS, rows, notes=notes, environment=environment())


def curve_networks(
    curve: Curve, folders: Folders, data: ModelData, *, seed: int = 0, device: str = "auto"
) -> dict[Point, nn.Module]:
    """The networks of all points of one seed, in the order of lines and budgets."""
    place = make_accelerator(cpu=device == "cpu").device
    opened: dict[tuple[str, str | None, bool], SuperNet] = {}
    found: dict[Point, nn.Module] = {}
    for name, line in curve.lines.items():
        if not isinstance(line, Line):
            found |= {(name, row, None): open_model(str(folders[row])) for row in line}
            continue
        key = line.row, line.ordering, line.even
        if key not in opened:
            opened[key] = _supernet(curve, line, folders[line.row], data_for(line.row, data), seed, place)
        for budget in curve.budgets:
            images = _training_batches(opened[key].model, data_for(line.row, data), seed) if line.refit else None
            found[name, line.row, budget] = opened[key].extract(
                macs=budget, compensate=line.compensate, data=images, num_images=curve.images
            )
    return found


def _supernet(curve: Curve, line: Line, folder: Path, data: DataSpec, seed: int, device: Any) -> SuperNet:
    """The super-network of a line; orderings of one seed use the same images."""
    if line.ordering is None:
        return SuperNet.load(RunFolder(folder).model_path)
    model = open_model(str(folder)).to(device)
    return stratify(
        model, _training_batches(model, data, seed), num_images=curve.images, ordering=line.ordering,
        width_multiple=curve.width_multiple, even=line.even, say=lambda line: None,
    )  # fmt: skip


def _training_batches(model: nn.Module, data: DataSpec, seed: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Shuffled training images with their classes, the same for every line of one seed."""
    return shuffled_batches(plain_stream(model, data, train=True), data.workers, seed)


def _row(curve: Curve, point: Point, per_seed: Sequence[dict[str, Any]]) -> dict[str, Any]:
    name, row, budget = point
    published = (curve.published or {}).get(name) or {}
    return {
        "curve": name, "row": row, "budget": budget,
        **mean_over_seeds(per_seed, "gmacs", "gmacs_linear_only", "images_per_second"),
        "published": published.get(row if budget is None else budget),
        "divergence": None if budget is None else statistics.fmean(figures["divergence"] for figures in per_seed),
        "params": round(statistics.fmean(figures["params"] for figures in per_seed)),
    }  # fmt: skip
