"""How many rotary pairs and how many dims of the values a head keeps at every width: what costs least error goes first.

Both are cut in blocks, so that products stay fast. The error of the layer's output that a block adds is known for
both, from the same images and in the same unit, with the regression in place: for values exactly, for pairs to first
order and head by head. So pairs count double: on a network that was trained for long this cut is the closest.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..models.widths.compensation import cholesky, pair_changes, tail_sums
from ..models.widths.elastic_values import ElasticValues
from ..models.widths.rotary_pairs import PairRule
from .elimination import elimination_order
from .pair_sums import PairSums

RIDGE = 1e-3
"""Added to the moments of pairs, as a fraction of their mean."""
CAUTION = 2.0
"""How often the error of a cut pair counts."""
PairOrder = Callable[[ElasticValues, Tensor], Tensor]
"""(layer, spread of what pairs add, (H, p, p)) -> pairs of every head of the keys, best first (heads, p)."""


def eliminated(layer: ElasticValues, spread_Hpp: Tensor) -> Tensor:
    """Pairs whose loss the others can best make up for go first."""
    groups = spread_Hpp.unflatten(0, (layer.value_heads, -1)).sum(1)
    ones = spread_Hpp.new_ones(1, spread_Hpp.shape[-1])
    factors = [cholesky(each, RIDGE) for each in groups]
    return torch.stack([elimination_order(ones, factor @ factor.mT) for factor in factors])


def by_size(layer: ElasticValues, spread_Hpp: Tensor) -> Tensor:
    """Pairs that add least go first, each by itself."""
    groups = spread_Hpp.diagonal(dim1=1, dim2=2).unflatten(0, (layer.value_heads, -1)).sum(1)
    return groups.argsort(dim=1, descending=True, stable=True)


def factors_of(layer: ElasticValues, spread_Hpp: Tensor, order_Gp: Tensor) -> Tensor:
    """Cholesky factors (H, p, p) of the spread of every head's pairs in this order, see `Compensation`."""
    spreads = zip(spread_Hpp, layer.of_every_head(order_Gp), strict=True)
    return torch.stack([cholesky(spread[order][:, order], RIDGE) for spread, order in spreads])


def make_rule(
    layer: ElasticValues, sums: PairSums, order_of: PairOrder, value_errors: Tensor, multiple: int
) -> tuple[PairRule, Tensor]:
    """The rule of a layer, and the factors of its pairs in their new order.

    Args:
        layer: whose values are in order.
        sums: of its pairs.
        order_of: how pairs are ordered.
        value_errors: of its output (values + 1,) when 0, 1, ..., all dims of the values stay.
        multiple: numbers of dims are multiples of it, as long as several are left.
    """
    order = order_of(layer, sums.spread)
    factors = factors_of(layer, sums.spread, order.to(sums.spread.device))
    numbers = tuple(tuple(each) for each in order.tolist())
    kept = _kept(value_errors.tolist(), pair_errors(factors).tolist(), multiple)
    return PairRule(numbers, *(tuple(table) for table in zip(*kept, strict=True))), factors


def pair_errors(factors_Hpp: Tensor) -> Tensor:
    """Error of the output (p + 1,) when the best 0, 1, ..., all pairs stay, and make up for the others."""
    return tail_sums(pair_changes(factors_Hpp).square().sum(0))


def _kept(value_errors: list[float], pair_errors: list[float], multiple: int) -> list[tuple[int, int]]:
    """Dims of the values and pairs that stay at width 0, 1, ..., the full one, which is that of the values.

    A width stands for the same part of both together, as near as whole pairs allow, so that a unit costs the same as in
    a layer whose queries, keys and values have one width.
    """
    full, pairs = len(value_errors) - 1, len(pair_errors) - 1
    path = _path(value_errors, pair_errors, multiple)
    kept = [(0, 0)]
    for width in range(1, full):
        most = (full + 2 * pairs) * width // full
        kept.append(next((each for each in path if each[0] + 2 * each[1] <= most), path[-1]))
    return [*kept, (full, pairs)]


def _path(value_errors: list[float], pair_errors: list[float], multiple: int) -> list[tuple[int, int]]:
    """From all dims and pairs down to one of each, one at a time: the cheaper block first."""
    now, path = (len(value_errors) - 1, len(pair_errors) - 1), []
    full = now
    path.append(now)
    while now != (1, 1):
        values = _cheapest(value_errors, now[0], multiple)
        pairs = _cheapest(pair_errors, now[1], max(1, multiple // 2))
        cost = values[0], CAUTION * pairs[0] / 2
        by_values = cost[0] < cost[1] if cost[0] != cost[1] else now[0] / full[0] >= now[1] / full[1]
        if by_values:
            path += [(left, now[1]) for left in range(now[0] - 1, values[1] - 1, -1)]
        else:
            path += [(now[0], left) for left in range(now[1] - 1, pairs[1] - 1, -1)]
        now = path[-1]
    return path


def _cheapest(errors: list[float], now: int, multiple: int) -> tuple[float, int]:
    """Error per unit of the cheapest cut to a lower multiple, and the next lower multiple; at least one unit stays."""
    if now == 1:
        return float("inf"), 1
    lower = [max(1, edge) for edge in range((now - 1) // multiple * multiple, -1, -multiple)]
    return min((errors[edge] - errors[now]) / (now - edge) for edge in lower), lower[0]
