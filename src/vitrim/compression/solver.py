"""Candidates that meet one budget: the schedule of each is solved for the part of the budget that its width leaves."""

from collections.abc import Collection, Iterable, Sequence

from ..tokens import Plan, Reducer, Schedule
from .candidates import Candidate, can_cut, first_shapes, method_shapes, reducers
from .networks import Networks, Price
from .sampler_space import FIRST_STEPS, METHOD_STEPS, SHARES

Key = tuple[int, Reducer | None, Plan]
"""Network, reducer and numbers of tokens."""


class Solver:
    """What meets one budget.

    Args:
        networks: of every width.
        limit: the budget, in units of `price`.
        price: what the budget counts.
        tokens: whether tokens may be removed.
    """

    def __init__(self, networks: Networks, limit: float, price: Price, *, tokens: bool) -> None:
        self.networks, self.limit, self.price = networks, limit, price
        self.reducers = reducers(networks.full.geometry.has_cls) if tokens else []
        self.narrowest = networks.narrowest_within(limit, price)
        self._width_of: dict[int, int] = {0: 0}

    @property
    def steps(self) -> Sequence[int]:
        """Steps of the width that are tried first."""
        return FIRST_STEPS if len(self.networks) > 1 else (0,)

    def width_at(self, step: int) -> int:
        """The network that makes `step / SHARES` of the saving that width alone can make within the budget."""
        if step not in self._width_of:
            last = len(self.networks) - 1
            dense, least = self._dense(0), max(self.limit, self._dense(last))
            found = self.networks.narrowest_within(dense * min(1.0, least / dense) ** (step / SHARES), self.price)
            self._width_of[step] = last if found is None else found
        return self._width_of[step]

    def least(self) -> float:
        """The smallest price that some candidate can have."""
        if self.narrowest is not None:
            return self._dense(self.narrowest)
        network = self.networks.empty(len(self.networks) - 1)
        prices = [self._dense(network.index)]
        for reducer in self.reducers:
            for shape in first_shapes(network.geometry.depth):
                if can_cut(network, reducer, shape):
                    prices.append(self.price(network, network.plan(reducer, shape), reducer))
        return min(prices)

    def methods(self) -> list[Candidate]:
        """A few of every reducer, to compare the reducers by."""
        if self.narrowest == 0:  # The given model meets the budget.
            return []
        steps = [step for step in METHOD_STEPS if step in self.steps]
        return self._different(steps, self.reducers, method_shapes(self.networks.full.geometry.depth))

    def candidates(self, methods: Collection[Reducer] | None = None) -> list[Candidate]:
        """Those of the first round, with these reducers; by default with all."""
        if self.narrowest == 0:
            return [self._dense_candidate(0, SHARES)]
        chosen = self.reducers if methods is None else [one for one in self.reducers if one in methods]
        dense = [] if self.narrowest is None else [self._dense_candidate(self.narrowest, SHARES)]
        steps = [step for step in self.steps if step < SHARES or not dense]
        found = self._different(steps, chosen, first_shapes(self.networks.full.geometry.depth))
        return [*found, *(dense if len(self.networks) > 1 else [])]

    def _different(
        self, steps: Iterable[int], methods: Iterable[Reducer], shapes: Sequence[Schedule]
    ) -> list[Candidate]:
        found: dict[Key, Candidate] = {}
        for step in steps:
            for reducer in methods:
                for shape in shapes:
                    if (one := self.candidate(step, reducer, shape)) is not None:
                        found.setdefault(self.key(one), one)
        return list(found.values())

    def candidate(self, step: int, reducer: Reducer, shape: Schedule) -> Candidate | None:
        """A candidate with its schedule solved; None where it cannot meet the budget."""
        network = self.networks.empty(self.width_at(step))
        if not can_cut(network, reducer, shape):
            return None
        solved = network.solve(reducer, shape, self.limit, self.price)
        return None if solved is None else Candidate(network.index, step / SHARES, solved[1], reducer, solved[0], shape)

    def key(self, candidate: Candidate) -> Key:
        """Equal for candidates that do the same."""
        plan = self.networks.empty(candidate.index).plan(candidate.reducer, candidate.schedule)
        return candidate.index, candidate.reducer, plan

    def _dense(self, index: int) -> float:
        network = self.networks.empty(index)
        return self.price(network, network.plan(None, None), None)

    def _dense_candidate(self, index: int, step: int) -> Candidate:
        return Candidate(index, step / SHARES, self._dense(index))
