"""Budgets of time: a price from the table of block times, and candidates that are corrected until the clock agrees."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..heartbeat import heartbeat
from ..models import attach
from ..tokens import Plan, Reducer
from .block_times import NANO, BlockTimes, Workbench, kind_of
from .candidates import Candidate
from .networks import EmptyNetwork, Networks
from .search import Tried
from .solver import Solver
from .times_file import circumstances, read_table, write_table
from .timing import sessions

CANDIDATES = 3
"""How many candidates of a kind are timed at most."""
CORRECTIONS = 4
"""How often a candidate is solved again for a corrected price."""
AIM = 0.98
"""Part of the budget that is aimed at, so that noise does not spoil the answer."""
CLOSE = 0.93
"""A candidate that takes less of the budget than this gives some of it back."""


class LatencyPrice:
    """Predicted nanoseconds of one batch, as a price."""

    def __init__(self, table: BlockTimes) -> None:
        self.table = table

    def __call__(self, network: EmptyNetwork, plan: Plan, reducer: Reducer | None) -> float:
        """See `networks.Price`."""
        return NANO * self.table.predict(plan, network.widths, reducer)


def table_for(
    model: nn.Module, reducers: Sequence[Reducer], *, batch_size: int, device: torch.device, dtype: str,
    say: Callable[[str], None],
) -> BlockTimes:  # fmt: skip
    """The table of block times under these circumstances: from the cache, or measured and kept there.

    Raises:
        UnsupportedModelError: blocks of this family cannot be timed alone.
    """
    where = circumstances(model, batch_size, device, dtype)
    table = read_table(where)
    bench: Workbench | None = None
    if table is None:
        bench = Workbench(model, batch_size, device, dtype)
        say("measuring how long a block takes with fewer tokens and at smaller widths; kept for the next time")
        with heartbeat("measuring how long a block takes", say):
            table = bench.measure()
        write_table(table, where)
    if missing := [one for one in reducers if kind_of(one) not in table.cuts]:
        bench = bench or Workbench(model, batch_size, device, dtype)
        with heartbeat("measuring how long reducers take", say):
            for reducer in missing:
                bench.measure_cut(table, reducer)
        write_table(table, where)
    return table


class Clock:
    """Measures candidates against the given model, and corrects those that are too slow or need not be so fast.

    Args:
        networks: of the search.
        solver: of the search.
        most: the budget, as a fraction of the time of the given model, or in milliseconds.
        fraction: whether `most` is a fraction.
        options: of `timing.sessions`.
    """

    def __init__(
        self, networks: Networks, solver: Solver, most: float, fraction: bool, options: dict[str, Any]
    ) -> None:
        self.networks, self.solver, self.most, self.fraction, self.options = networks, solver, most, fraction, options

    def spent(self, candidate: Candidate) -> float:
        """The part of the budget that a candidate takes, measured."""
        network = self.networks.real(candidate.index)
        with attach(network, candidate.reduction, cls_only=self.networks.full.cls_only):
            ((ratio, _, cheaper),) = sessions(self.networks.original, network, **self.options, number=1)
        return (ratio if self.fraction else cheaper) / self.most

    def first_in_time(self, ranked: Sequence[Tried]) -> tuple[float, Tried]:
        """The first of some candidates that meets the budget once it is corrected, or the fastest of them.

        With the part of the budget that it takes, above 1 where no candidate meets it.
        """
        tried: list[tuple[float, Tried]] = []
        for one in ranked[:CANDIDATES]:
            spent, candidate = self.corrected(one.candidate)
            tried.append((spent, Tried(candidate, one.parts)))
            if spent <= 1:
                return tried[-1]
        return min(tried, key=lambda each: each[0])

    def answers(self, ranked: Sequence[Tried]) -> tuple[float, dict[str, Tried]]:
        """The best candidate, and the best ones of one kind, each corrected as `first_in_time` does.

        With the part of the budget that the best one takes.
        """
        spent, best = self.first_in_time(ranked)
        found = {"best": best}
        for kind in ("tokens", "width"):
            if best.candidate.kind == kind:
                found[kind] = best
            elif own := [tried for tried in ranked if tried.candidate.kind == kind]:
                found[kind] = self.first_in_time(own)[1]
        return spent, found

    def corrected(self, candidate: Candidate) -> tuple[float, Candidate]:
        """The candidate, solved again for a smaller or larger price until it takes just less than the budget.

        Returns:
            The part of the budget that it takes, and the candidate; the fastest where no correction meets the budget.
        """
        limit, tried = self.solver.limit, list[tuple[float, Candidate]]()
        for _ in range(CORRECTIONS):
            spent = self.spent(candidate)
            tried.append((spent, candidate))
            if CLOSE <= spent <= 1:
                break
            # What takes too long must get cheaper than it is; the limit may lie between two schedules.
            limit = AIM / spent * (min(limit, candidate.price) if spent > 1 else limit)
            other = self._solved(candidate, limit)
            if other is None or any(self.solver.key(other) == self.solver.key(one) for _, one in tried):
                break
            candidate = other
        fitting = [one for one in tried if one[0] <= 1]
        # Of those that are fast enough the one that takes most time has lost least.
        return max(fitting, key=lambda one: one[0]) if fitting else min(tried, key=lambda one: one[0])

    def _solved(self, candidate: Candidate, limit: float) -> Candidate | None:
        price = self.solver.price
        if candidate.reducer is None or candidate.shape is None:
            index = self.networks.narrowest_within(limit, price)
            if index is None:
                return None
            network = self.networks.empty(index)
            return replace(candidate, index=index, price=price(network, network.plan(None, None), None))
        found = self.networks.empty(candidate.index).solve(candidate.reducer, candidate.shape, limit, price)
        return None if found is None else replace(candidate, schedule=found[0], price=found[1])
