"""Accuracy against cost of super-networks at several sizes, and of networks that were trained alone at one size.

The part `curve` of a study file names the lines to draw through rows of the study:

    curve:
      budgets: [1, 0.75, 0.5]                                      # fractions of the full network's MACs
      lines:
        WPAC: {row: full, ordering: wpac}                           # ordered and cut, not trained further
        WPAC + compensation: {row: full, ordering: wpac, compensate: regression}
        WPAC, even: {row: full, ordering: wpac, even: true}         # every width cut by the same fraction
        PIAD: {row: trained as super-network}                       # the row's own super-network
        WPAC, refitted: {row: full, ordering: wpac, refit: true}    # and fitted to the full network after the cut
        trained alone: [full, narrow, narrower]                     # one point per row, as trained

A line that a scale sets to null is left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..elastic import ORDERINGS
from ..elastic.supernet import Compensate
from ..errors import RecipeError, UnknownNameError
from ..options import check_ranges, from_dict
from ..train.recipe import Recipe


@dataclass(frozen=True)
class Line:
    """One super-network at all budgets.

    row: the row whose model is cut.
    ordering: how that model's units are ordered before they are cut, see `ORDERINGS`; None: the row was trained as a
        super-network.
    compensate: what makes up for removed units, see `SuperNet.extract`.
    even: whether every sub-layer loses the same fraction, instead of the least important units.
    refit: whether what was cut is then fitted to the full network, see `SuperNet.extract`.
    """

    row: str = ""
    ordering: str | None = None
    compensate: Compensate = "none"
    even: bool = False
    refit: bool = False


@dataclass(frozen=True)
class Curve:
    """The part `curve` of a study.

    budgets: fractions of the full network's MACs, attention products included, in (0, 1].
    lines: by name, a super-network, or a list of rows, each a network of its own size.
    images: number of training images, without labels, from which orderings are computed.
    width_multiple: every width but the full one is a multiple of it.
    published: line -> budget -> published accuracy.
    published_linear_only: whether budgets of published figures are fractions of the MACs without attention products.
    """

    lines: dict[str, Any] = field(default_factory=dict)
    budgets: list[float] = field(default_factory=lambda: [1, 0.83, 0.75, 0.67, 0.5, 0.33, 0.25])
    images: int = 1024
    width_multiple: int = 8
    published: dict[str, Any] | None = None
    published_linear_only: bool = False

    @classmethod
    def parse(cls, data: Any) -> "Curve":
        """Read what the file holds.

        Raises:
            RecipeError: an option of the wrong kind, a budget out of range, or no line.
            UnknownNameError: an option that does not exist.
        """
        if not isinstance(data, dict):
            raise RecipeError("the curve of the study is a mapping of options, with lines in it")
        curve: Curve = from_dict(cls, data, "curve")
        curve = replace(curve, lines={name: line for name, line in curve.lines.items() if line is not None})
        if not curve.lines:
            raise RecipeError("the curve of the study has no lines; name one, such as WPAC: {row: ..., ordering: wpac}")
        if not curve.budgets or not all(type(b) in (int, float) and 0 < b <= 1 for b in curve.budgets):
            raise RecipeError(f"curve.budgets is {curve.budgets}; it must list fractions of the MACs, such as [1, 0.5]")
        if min(curve.images, curve.width_multiple) < 1:
            raise RecipeError("curve.images and curve.width_multiple are 1 or more")
        return replace(curve, lines={str(name): _line(name, line) for name, line in curve.lines.items()})

    def check(self, recipes: Mapping[str, Recipe]) -> None:
        """Check all names before anything is trained.

        Args:
            recipes: of all rows of the study.

        Raises:
            UnknownNameError: a line names a row or an ordering that does not exist, or a published line is not a line.
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
                    f"curve {name!r}: row {line.row!r} is not a super-network; give the row the option elastic, or the "
                    "curve an ordering"
                )
            if line.ordering is None and own is not None and min(self.budgets) < 1 - own.max_saving - 1e-9:
                raise RecipeError(
                    f"curve {name!r}: row {line.row!r} saves {own.max_saving:.1%} of the MACs at most, so it cannot "
                    f"meet the budget {min(self.budgets)}; raise elastic.max_saving"
                )
            if line.ordering is None and (line.compensate != "none" or line.even or line.refit):
                raise RecipeError(
                    f"curve {name!r}: only a curve that orders compensates, refits or cuts evenly; give an ordering"
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


def _line(name: object, line: Any) -> Line | list[str]:
    if isinstance(line, list) and line and all(isinstance(row, str) for row in line):
        return line
    if not isinstance(line, dict):
        raise RecipeError(f"curve {name!r} is {line!r}; it must be {{row: ..., ordering: ...}} or a list of rows")
    return from_dict(Line, line, f"curve {name!r}")
