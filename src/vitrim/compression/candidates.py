"""What a search chooses from: widths, reducers with their fuse and score, and how a reduction is spread over depth."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import VitrimError
from ..notation import render
from ..tokens import REDUCERS, SCORES, KeepRate, PowerLaw, Reducer, Reduction, Schedule
from .networks import EmptyNetwork

LEAST_RATE = 0.02
"""Keep rate of the strongest stage-wise cut."""
ALPHAS = (0.6, 1.4, 3.0)
"""Power laws of the first round, from cutting early to cutting late."""


@dataclass(frozen=True)
class Candidate:
    """A network of one width under one reduction, with the budget solved.

    index: of the network in the chain. share: the part of the saving that its width makes, on a logarithmic scale;
    0: tokens only, 1: width only. reducer, schedule: None where all tokens stay. shape: what was scaled to get the
    schedule.
    price: what the budget counts: MACs, parameters or milliseconds.
    """

    index: int
    share: float
    price: float
    reducer: Reducer | None = None
    schedule: Schedule | None = None
    shape: Schedule | None = None

    @property
    def reduction(self) -> Reduction | None:
        """What `attach` takes."""
        return None if self.reducer is None or self.schedule is None else Reduction(self.reducer, self.schedule)

    @property
    def kind(self) -> Literal["none", "tokens", "width", "joint"]:
        """Which parts of the model are reduced."""
        if self.schedule is None:
            return "width" if self.index else "none"
        return "joint" if self.index else "tokens"

    def __str__(self) -> str:
        return "all tokens" if self.reduction is None else str(self.reduction)


def reducers(has_cls: bool) -> list[Reducer]:
    """Every registered reducer that needs no training, with each score, each fuse and each other named choice.

    An option takes part if it is called `score`, takes one of several names (a `Literal`), or is in `Reducer.to_try`;
    all others keep their defaults. A reducer that cannot be made without arguments is left out, and so are scores that
    see nothing of the image.
    """
    found: list[Reducer] = []
    for kind in REDUCERS.values():
        for options in _choices(kind):
            try:
                reducer = kind(**options)
            except (VitrimError, TypeError):  # Choices that do not go together, or an option without a default.
                continue
            blind = isinstance(score := options.get("score"), str) and SCORES[score].needs == "nothing"
            if not (reducer.training_only or blind or (reducer.needs == "cls_row" and not has_cls)):
                found.append(reducer)
    return list({render(reducer): reducer for reducer in found}.values())


def named_options(kind: type[Reducer]) -> dict[str, Sequence[Any]]:
    """The options of a reducer that a search tries, each with its values; `score` takes every score."""
    hints = get_type_hints(kind)
    values: dict[str, Sequence[Any]] = {}
    for option in dataclasses.fields(kind):
        if option.name in kind.to_try:
            values[option.name] = kind.to_try[option.name]
        elif option.name == "score":
            values["score"] = list(SCORES)
        elif named := _names(hints[option.name]):
            values[option.name] = named
    return values


def _choices(kind: type[Reducer]) -> Iterator[dict[str, Any]]:
    values = named_options(kind)
    return (dict(zip(values, each, strict=True)) for each in product(*values.values()))


def _names(hint: Any) -> list[Any]:
    """The values of an option that takes one of several names, with None where that is allowed; empty for others."""
    if get_origin(hint) in (Union, UnionType):
        parts = [_names(part) for part in get_args(hint) if part is not NoneType]
        return [None, *(name for part in parts for name in part)] if all(parts) else []
    return [name for name in get_args(hint) if isinstance(name, str)] if get_origin(hint) is Literal else []


def stages(depth: int) -> list[Schedule]:
    """Cuts at a few places: at three as in EViT, at two, the first and a third, and others; all equally strong."""
    parts = ((1 / 4, 1 / 2, 3 / 4), (0, 1 / 3), (1 / 6, 1 / 2), (1 / 4,), (1 / 3, 2 / 3))
    places = dict.fromkeys(tuple(sorted({int(part * depth) for part in each})) for each in parts)
    return [KeepRate(LEAST_RATE, at=at) for at in places]


def power(alpha: float) -> Schedule:
    """A cut in every block, the later the larger `alpha`."""
    return PowerLaw(1.0, alpha)


def first_shapes(depth: int) -> list[Schedule]:
    """The shapes of the first round."""
    return [*map(power, ALPHAS), *stages(depth)[:2]]


def method_shapes(depth: int) -> list[Schedule]:
    """The shapes in which all reducers are compared: cuts in every block, and at two places."""
    return [power(ALPHAS[0]), *stages(depth)[1:2]]


def can_cut(network: EmptyNetwork, reducer: Reducer, shape: Schedule) -> bool:
    """Whether the blocks at which this shape cuts give the reducer what it reads."""
    try:
        network.adapter.check_plan(network.model, network.plan(reducer, shape), reducer)
    except VitrimError:
        return False
    return True
