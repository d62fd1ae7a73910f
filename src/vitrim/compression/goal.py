"""What the user asks for: one budget, and the parts of the model that may be reduced."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

from ..budgets import check_budget
from ..elastic.latency import parse
from ..errors import UnknownNameError, VitrimError

Kind = Literal["macs", "params", "latency"]
Part = Literal["tokens", "width"]


@dataclass(frozen=True)
class Goal:
    """One budget.

    asked: as it was given. most: the fraction of what the given model needs, or an absolute number: MACs per image,
    parameters, or milliseconds for one batch.
    """

    kind: Kind
    asked: float | str
    most: float
    fraction: bool

    @classmethod
    def of(cls, macs: float | None, params: float | None, latency: float | str | None) -> "Goal":
        """The one budget among these.

        Raises:
            VitrimError: none or several, or one that is not a positive number.
        """
        given = {"macs": macs, "params": params, "latency": latency}
        found = [(kind, asked) for kind, asked in given.items() if asked is not None]
        if len(found) != 1:
            raise VitrimError("give exactly one budget: macs=, params= or latency=, such as macs=0.5")
        ((kind, asked),) = found
        if kind == "latency":
            most, fraction = parse(asked)
            return cls(kind, asked, most, fraction)
        check_budget(kind, asked)
        return cls(kind, float(asked), float(asked), float(asked) <= 1)  # type: ignore[arg-type]

    def limit(self, full: float) -> float:
        """The budget as an absolute number, for a model that needs `full`."""
        return self.most * full if self.fraction else self.most

    @property
    def largest_saving(self) -> float:
        """The part of the MACs by which a chain of widths has to go down for this goal."""
        if not self.fraction:
            return 0.9
        most = {"macs": 1 - self.most, "params": 0.9, "latency": 1 - self.most / 2}[self.kind]
        return min(0.95, max(0.1, most + 0.03))

    @property
    def unit(self) -> str:
        """What is counted, in words."""
        return {"macs": "MACs", "params": "parameters", "latency": "time"}[self.kind]

    def __str__(self) -> str:
        if self.fraction:
            return f"at most {self.most:g} of the {self.unit}"
        return f"at most {self.most:g} ms" if self.kind == "latency" else f"at most {self.most:,.0f} {self.unit}"


def check_using(using: Collection[str] | str, goal: Goal) -> tuple[Part, ...]:
    """The parts that may be reduced, those that can do nothing for the goal left out.

    Raises:
        VitrimError: none of them, or parameters are to be saved and width may not be cut.
        UnknownNameError: another part.
    """
    names = (using,) if isinstance(using, str) else tuple(dict.fromkeys(using))
    for name in names:
        if name not in get_args(Part):
            raise UnknownNameError("part to reduce", str(name), get_args(Part))
    if not names:
        raise VitrimError('nothing may be reduced; give using=("tokens", "width") or one of them')
    if goal.kind == "params":
        if "width" not in names:
            raise VitrimError("fewer tokens save no parameters; give using=('width',) for a budget of parameters")
        return ("width",)
    return names  # type: ignore[return-value]
