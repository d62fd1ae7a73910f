"""Accuracy against cost of super-networks, size by size, beside networks that were trained alone at their own size.

The part `curve` of a study file names the lines to draw through rows of the study:

    curve:
      budgets: [1, 0.75, 0.5]                                      # fractions of the full network's MACs
      lines:
        WPAC: {row: full, ordering: wpac}                           # ordered and cut, not trained any further
        WPAC + compensation: {row: full, ordering: wpac, compensate: true}
        WPAC, even: {row: full, ordering: wpac, even: true}         # every width cut by the same fraction
        PIAD: {row: trained as super-network}                       # the row's own super-network
        trained alone: [full, narrow, narrower]                     # one point per row, as trained
"""

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..elastic import ORDERINGS, SuperNet, stratify
from ..errors import RecipeError, UnknownNameError
from ..measure.environment import environment
from ..measure.table import Column, Table
from ..models import open_model
from ..train.checkpoint import RunFolder
from ..train.data import make_loader, plain_stream
from ..train.evaluate import make_accelerator
from ..train.options import check_ranges, fill
from ..train.recipe import Recipe
from ..train.specs import DataSpec
from .beside import beside_alone, beside_published
from .compare import DataOf, data_for, figures_of, other_images, over_seeds

Folders = Mapping[str, Path]
"""Row -> folder of its run, all of one seed."""
Point = tuple[str, str, float | None]
"""Line, row, budget; no budget where a network is taken as it was trained."""

COLUMNS = (
    Column("curve", "curve"),
    Column("row", "model"),
    Column("budget", "budget", ".2f"),
    Column("accuracy", "accuracy", ".2%"),
    Column("accuracy_std", "std", ".2%"),
    Column("n", "n", "d"),
    Column("published", "published", ".2%"),
    Column("over_alone", "over trained alone", "+.2%"),
    Column("divergence", "divergence [nats]", ".4f"),
    Column("gmacs", "GMACs", ".4f"),
    Column("gmacs_linear_only", "GMACs, linear only", ".4f"),
    Column("params", "parameters", ",d"),
    Column("images_per_second", "images/s", ".0f"),
)


@dataclass(frozen=True)
class Line:
    """One super-network at all budgets.

    row: whose model it is made of.
    ordering: how that model's widths are ordered before they are cut, see `ORDERINGS`; None: the row was trained as a
        super-network.
    compensate: whether means make up for lost units.
    even: whether every sub-layer loses the same fraction, in place of what is worth least.
    """

    row: str = ""
    ordering: str | None = None
    compensate: bool = False
    even: bool = False


@dataclass(frozen=True)
class Curve:
    """The part `curve` of a study.

    budgets: fractions of the full network's MACs, attention products included, in (0, 1].
    lines: by name, a super-network, or a list of rows that are networks by themselves.
    images: training images, without labels, that orderings look at.
    width_multiple: every width but the full one is a multiple of it.
    published: line -> budget -> accuracy to print beside.
    published_linear_only: the budgets of published figures are fractions of the MACs without attention products.
    """

    lines: dict[str, Any] = field(default_factory=dict)
    budgets: list[float] = field(default_factory=lambda: [1, 0.83, 0.75, 0.67, 0.5, 0.33, 0.25])
    images: int = 1024
    width_multiple: int = 8
    published: dict[str, Any] | None = None
    published_linear_only: bool = False

    @classmethod
    def parse(cls, data: Any) -> "Curve":
        """Read what stands in the file.

        Raises:
            RecipeError: an option of the wrong kind, a budget out of range, or no line.
            UnknownNameError: an option that there is not.
        """
        if not isinstance(data, dict):
            raise RecipeError("the curve of the study is a mapping of options, with lines in it")
        curve: Curve = fill(cls, data, "curve")
        if not curve.lines:
            raise RecipeError("the curve of the study has no lines; name one, such as WPAC: {row: ..., ordering: wpac}")
        if not curve.budgets or not all(type(b) in (int, float) and 0 < b <= 1 for b in curve.budgets):
            raise RecipeError(f"curve.budgets is {curve.budgets}; it must list fractions of the MACs, such as [1, 0.5]")
        if min(curve.images, curve.width_multiple) < 1:
            raise RecipeError("curve.images and curve.width_multiple are 1 or more")
        return cls(**vars(curve) | {"lines": {str(name): _line(name, line) for name, line in curve.lines.items()}})

    def check(self, recipes: Mapping[str, Recipe]) -> None:
        """Look at all names before anything is trained.

        Args:
            recipes: of all rows of the study.

        Raises:
            UnknownNameError: a line asks for a row or an ordering that there is not, or a published line is no line.
            RecipeError: a row cannot be cut, or a line compensates without means.
        """
        for name, line in self.lines.items():
            for row in [line.row] if isinstance(line, Line) else line:
                if row not in recipes:
                    raise UnknownNameError("row", row, recipes)
                if recipes[row].model.args.get("num_classes") == 0:
                    raise RecipeError(f"curve {name!r}: row {row!r} learns no classes, so it has no accuracy")
            if not isinstance(line, Line):
                continue
            own = recipes[line.row].elastic
            if line.ordering is None and own is None:
                raise RecipeError(
                    f"curve {name!r}: row {line.row!r} is no super-network; give the row the option elastic, or the "
                    "curve an ordering"
                )
            if line.ordering is None and own is not None and min(self.budgets) < 1 - own.max_saving - 1e-9:
                raise RecipeError(
                    f"curve {name!r}: row {line.row!r} saves {own.max_saving:.1%} of the MACs at most, so it cannot "
                    f"meet the budget {min(self.budgets)}; raise elastic.max_saving"
                )
            if line.ordering is None and (line.compensate or line.even):
                raise RecipeError(
                    f"curve {name!r}: only a curve that orders compensates or cuts evenly; give an ordering"
                )
            if line.ordering is not None and line.ordering not in ORDERINGS:
                raise UnknownNameError("ordering", line.ordering, ORDERINGS)
            if recipes[line.row].reduction is not None:
                raise RecipeError(f"curve {name!r}: row {line.row!r} reduces tokens; only a dense one can be cut")
        for name, figures in (self.published or {}).items():
            if name not in self.lines:
                raise UnknownNameError("curve", str(name), self.lines)
            line = self.lines[name]
            known: list[Any] = self.budgets if isinstance(line, Line) else line
            if not isinstance(figures, dict) or not all(type(figure) in (int, float) for figure in figures.values()):
                raise RecipeError(f"curve {name!r}: published is {figures!r}; it must be figures by budget, or by row")
            for point, figure in figures.items():
                if point not in known:
                    raise UnknownNameError(f"point in curve.published of {name!r}", str(point), map(str, known))
                check_ranges((f"curve {name!r}: published at {point}", figure, 0, 1))


def trace(
    curve: Curve, title: str, seeds: Mapping[int, Folders], data: DataOf, *, trained_on: Collection[str] = (),
    batch_size: int = 128, device: str = "auto",
) -> Table:  # fmt: skip
    """Cut every network of every line, and evaluate all of one seed side by side on the test images.

    Args:
        curve: what to draw, checked.
        title: of the table.
        seeds: the finished runs by seed; accuracies are means over seeds.
        data: the images, for all rows or by name. Training images are ordered by, test images evaluated.
        trained_on: rows whose networks start from those of other rows.
        batch_size: images at a time.
        device: "auto", "cpu" or "cuda".

    Raises:
        VitrimError: a model that cannot be cut, or not even the smallest network meets a budget.
    """
    found: dict[Point, list[dict[str, Any]]] = {}
    for seed, folders in seeds.items():
        points = networks(curve, folders, data, seed=seed, device=device)
        named = {(f"{number}", ""): network for number, network in enumerate(points.values())}
        images = {name: data_for(row, data) for (name, _), (_, row, _) in zip(named, points, strict=True)}
        cut = {key: (row, "full") for key, (_, row, budget) in zip(named, points, strict=True) if budget is not None}
        full = {key: open_model(str(folders[key[0]])) for key in cut.values()}
        images |= {row: data_for(row, data) for row, _ in full}
        figures = figures_of(named | full, images, originals=cut, batch_size=batch_size, device=device)
        for point, row in zip(points, figures, strict=False):  # Behind them: the full networks.
            found.setdefault(point, []).append(row)
    rows = [_row(curve, point, per_seed) for point, per_seed in found.items()]
    notes = [
        "Budgets are fractions of the MACs of the full network, attention products included; the largest network that "
        "fits is taken. Nothing is trained after the cut. All networks took turns batch by batch.",
        "Divergence is how far predictions are from those of the network before the cut: mean KL(full || cut).",
        f"Orderings look at {curve.images} training images without labels. Those that are not even are cut by the same "
        f"rule. Widths are multiples of {curve.width_multiple}.",
        *beside_alone(rows, trained_on),
        *beside_published(rows, curve.published_linear_only),
    ]
    notes += other_images({row["row"]: data_for(row["row"], data) for row in rows})
    return Table(f"{title}: accuracy of every size", COLUMNS, rows, notes=notes, environment=environment())


def networks(
    curve: Curve, folders: Folders, data: DataOf, *, seed: int = 0, device: str = "auto"
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
            found[name, line.row, budget] = opened[key].extract(macs=budget, compensate=line.compensate)
    return found


def _line(name: object, line: Any) -> Line | list[str]:
    if isinstance(line, list) and line and all(isinstance(row, str) for row in line):
        return line
    if not isinstance(line, dict):
        raise RecipeError(f"curve {name!r} is {line!r}; it must be {{row: ..., ordering: ...}} or a list of rows")
    return fill(Line, line, f"curve {name!r}")


def _supernet(curve: Curve, line: Line, folder: Path, data: DataSpec, seed: int, device: Any) -> SuperNet:
    """The super-network of a line; orderings of one seed look at the same images."""
    if line.ordering is None:
        return SuperNet.load(RunFolder(folder).model_path)
    model = open_model(str(folder)).to(device)
    loader, _ = make_loader(plain_stream(model, data, train=True), 64, data.workers, seed=seed, shuffle=True)
    return stratify(
        model, ((images, classes) for images, classes, _ in loader), num_images=curve.images, ordering=line.ordering,
        width_multiple=curve.width_multiple, even=line.even, say=lambda told: None,
    )  # fmt: skip


def _row(curve: Curve, point: Point, per_seed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    name, row, budget = point
    published = (curve.published or {}).get(name) or {}
    return {
        "curve": name, "row": row, "budget": budget,
        **over_seeds(per_seed, "gmacs", "gmacs_linear_only", "images_per_second"),
        "published": published.get(row if budget is None else budget),
        "divergence": None if budget is None else statistics.fmean(figures["divergence"] for figures in per_seed),
        "params": round(statistics.fmean(figures["params"] for figures in per_seed)),
    }  # fmt: skip
