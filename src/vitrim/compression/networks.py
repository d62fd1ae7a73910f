"""The networks of one width each from which candidates are made, and what a schedule costs in them.

A network exists as a copy without weights, in which schedules are solved and costs are counted, and, once it is to run
on images, as a real one that was cut out of the super-network and fitted to the given model.
"""

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from functools import cache, cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ..elastic.refit import Refitting
from ..elastic.supernet import SuperNet
from ..errors import ScheduleError, ScoreError, VitrimError
from ..models import BlockWidths, find_adapter, narrow, reads_prefix_only, widths_of
from ..models.adapter import Adapter, Geometry
from ..models.copying import copied
from ..models.foreign_macs import empty_copy, num_parameters
from ..tokens import Budget, Plan, Reducer, Schedule, make_plan

Price = Callable[["EmptyNetwork", Plan, Reducer | None], float]
"""What one image costs in a network under a plan, in any unit in which 1 is negligible."""


class EmptyNetwork:
    """A network of one width without weights.

    index: in the chain; 0 is the full width. cls_only: whether the last block computes prefix tokens alone.
    """

    def __init__(self, index: int, model: nn.Module) -> None:
        self.index, self.model = index, model
        self.adapter: Adapter = find_adapter(model)
        self.geometry: Geometry = self.adapter.geometry(model)
        self.cls_only = reads_prefix_only(model)
        self.params = num_parameters(model)

    @cached_property
    def widths(self) -> tuple[BlockWidths, ...]:
        """Of every block."""
        return widths_of(self.model)

    def plan(self, reducer: Reducer | None, schedule: Schedule | None, limits: bool = False) -> Plan:
        """The plan of a schedule; of all tokens without one."""
        g = self.geometry
        if reducer is None or schedule is None:
            plan = Plan(g.num_patches, g.num_prefix, g.depth, ())
        else:
            plan = make_plan(
                schedule, reducer, depth=g.depth, num_patches=g.num_patches, num_prefix=g.num_prefix, limits=limits
            )
        return plan.for_prefix_only() if self.cls_only else plan

    def macs(self, plan: Plan, reducer: Reducer | None) -> int:
        """MACs of one image."""
        return self.adapter.macs(self.model, plan, reducer).total

    def solve(self, reducer: Reducer, shape: Schedule, limit: float, price: Price) -> tuple[Schedule, float] | None:
        """The weakest scaling of `shape` whose price is at most `limit`, and its price; None where there is none.

        The limit holds for what is returned, however the price depends on the strength.
        """

        @cache
        def of_plan(plan: Plan) -> float:
            return price(self, plan, reducer)

        def of_schedule(schedule: Schedule) -> Any:
            return of_plan(self.plan(reducer, schedule))

        if reducer.needs == "cls_row" and not self.geometry.has_cls:
            return None
        try:
            found = Budget(max(limit, 1 + 1e-9), shape).resolve(of_schedule, lambda: of_schedule(shape.scaled(0.0)))
            plan = self.plan(reducer, found, limits=True)
            self.adapter.check_plan(self.model, plan, reducer)
        except (ScheduleError, ScoreError):
            return None
        found = _rounded(found, lambda other: self.plan(reducer, other) == plan)
        # Where nothing has to go, this is the network itself and no candidate of its own.
        spent = of_plan(plan)
        return (found, spent) if spent <= limit and plan.cuts else None


class Networks:
    """All networks of a search.

    Args:
        original: the given model.
        supernet: of it; None where no width is cut.
        fit: batches of images to fit cut networks to the given model.
    """

    def __init__(self, original: nn.Module, supernet: SuperNet | None, fit: list[Tensor]) -> None:
        self.original, self.supernet, self.fit = original, supernet, fit
        self.full = EmptyNetwork(0, empty_copy(original))
        self._empty: dict[int, EmptyNetwork] = {0: self.full}
        self._real: dict[int, nn.Module] = {}
        self._refitting: Refitting | None = None

    def __len__(self) -> int:
        return 1 if self.supernet is None else len(self.supernet.chain)

    def empty(self, index: int) -> EmptyNetwork:
        """Network `index` without weights."""
        if index not in self._empty:
            assert self.supernet is not None
            model = empty_copy(self.supernet.model)
            narrow(model, self.supernet.chain.widths(index))
            self._empty[index] = EmptyNetwork(index, model)
        return self._empty[index]

    def real(self, index: int) -> nn.Module:
        """Network `index` in eval mode, fitted to the given model; the same object at every call."""
        if index not in self._real:
            if index == 0:
                self._real[index] = copied(self.original).eval()
            else:
                assert self.supernet is not None
                network = self.supernet.cut(index)
                if self._refitting is None:
                    self._refitting = Refitting(self.original, self.fit, num_images=sum(map(len, self.fit)))
                self._refitting.fit(network)
                self._real[index] = network
        return self._real[index]

    def is_fitted(self, index: int) -> bool:
        """Whether `real` returns at once."""
        return index in self._real

    def drop_others(self, keep: set[int]) -> None:
        """Free the memory of real networks that are not needed any more, and of what fits them."""
        self._refitting = None
        self._real = {index: model for index, model in self._real.items() if index in keep}

    def narrowest_within(self, limit: float, price: Price) -> int | None:
        """The largest network that meets a limit by its width alone; None where not even the smallest does."""

        def meets(index: int) -> bool:
            network = self.empty(index)
            return price(network, network.plan(None, None), None) <= limit

        if not meets(len(self) - 1):
            return None
        low, high = -1, len(self) - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if meets(middle) else (middle, high)
        return high


def _rounded(schedule: Schedule, same: Callable[[Schedule], bool]) -> Schedule:
    """The schedule with as few decimals as give the same plan."""
    numbers = {
        option.name: value
        for option in dataclasses.fields(schedule)
        if isinstance(value := getattr(schedule, option.name), float)
    }
    for digits, nearest in product(range(2, 8), (True, False)):
        unit = 10.0**-digits
        short = {n: round(v if nearest else v + unit / 2, digits) for n, v in numbers.items()}
        with suppress(VitrimError):  # A number may round to one that is refused, such as a keep rate of 0.
            if same(other := dataclasses.replace(schedule, **short)):
                return other
    return schedule


def macs_price(network: EmptyNetwork, plan: Plan, reducer: Reducer | None) -> float:
    """MACs of one image."""
    return network.macs(plan, reducer)


def params_price(network: EmptyNetwork, plan: Plan, reducer: Reducer | None) -> float:
    """Parameters."""
    return network.params


def device_of(model: nn.Module) -> torch.device:
    """Where a model is."""
    return next(model.parameters()).device
