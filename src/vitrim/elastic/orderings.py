"""How the units of a model are ordered: WPAC, elimination, and what studies compare them with."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..models.widths.attention_heads import AttentionHeads
from ..models.widths.elastic_hidden import ElasticHidden
from ..tokens.precision import exact
from .elimination import elimination_order
from .pair_rule import PairOrder, by_size, eliminated
from .statistics import HeadSums, UnitSums

Axes = tuple[Tensor, Tensor | None]
"""Orthogonal matrices (H, h, h) for the values and for queries and keys, new axes in columns, best first.

None for queries and keys that keep all their dims.
"""

Heads = Callable[[AttentionHeads, HeadSums], Axes]
Units = Callable[[ElasticHidden, UnitSums], Tensor]
ELIMINATION_RIDGE = 1e-3


class Ordering(NamedTuple):
    """Axes of an attention layer; order of the units of an MLP, best first; order of the rotary pairs of heads."""

    axes: Heads
    units: Units
    pairs: PairOrder


ORDERINGS: dict[str, Ordering] = {}
"""By name."""


def principal_axes(covariance_Hhh: Tensor) -> Tensor:
    """Eigenvectors (H, h, h) in columns, largest eigenvalue first, signs fixed so that every process agrees."""
    vectors = torch.linalg.eigh((covariance_Hhh + covariance_Hhh.mT) / 2).eigenvectors.flip(-1)
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


def permutation(score_Hh: Tensor) -> Tensor:
    """The permutation of every head's dims by descending score, as matrices (H, h, h)."""
    order = score_Hh.argsort(dim=-1, descending=True, stable=True)
    return exact(nn.functional.one_hot(order, order.shape[-1]).mT)


def _register(
    name: str, heads: Callable[[AttentionHeads, HeadSums], Tensor], units: Units, pairs: PairOrder | None = None
) -> None:
    """Enter an ordering that permutes: scores of the dims of all streams (S, H, h), values last, and of units."""

    def axes(layer: AttentionHeads, sums: HeadSums) -> Axes:
        *query_key, value = heads(layer, sums)
        return permutation(value), permutation(torch.stack(query_key).sum(0)) if query_key else None

    ORDERINGS[name] = Ordering(
        axes, lambda layer, sums: units(layer, sums).argsort(descending=True, stable=True), pairs or by_size
    )


def _random(shape: torch.Size, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(shape.numel())
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(like.device)


def _random_streams(sums: HeadSums) -> Tensor:
    scores = _random(sums.plain_SHh.shape, sums.tokens)
    scores[1:-1] = 0  # Keys have the order of queries.
    return scores


def _wpac_axes(_: AttentionHeads, sums: HeadSums) -> Axes:
    query_key = principal_axes(sums.covariance(0, 1)) if sums.has_query_key else None
    return principal_axes(sums.covariance(-1)), query_key


def _eliminated(layer: ElasticHidden, sums: UnitSums) -> Tensor:
    together = sums.hidden + sums.hidden_held_out
    factor = together.factor(ELIMINATION_RIDGE, centred=layer.last.bias is not None)
    return elimination_order(layer.last.weight, factor @ factor.mT)


ORDERINGS["elimination"] = Ordering(_wpac_axes, _eliminated, eliminated)
ORDERINGS["wpac"] = Ordering(_wpac_axes, lambda _, sums: sums.fisher.argsort(descending=True, stable=True), by_size)
_register("taylor", lambda _, sums: sums.taylor_SHh, lambda _, sums: sums.taylor)
_register(
    "magnitude",
    lambda layer, _: layer.stream_norms(),
    lambda layer, _: layer.unit_norms(),
    lambda layer, _: layer.pair_norms().argsort(dim=1, descending=True, stable=True),
)
_register(
    "random",
    lambda _, sums: _random_streams(sums),
    lambda _, sums: _random(sums.taylor_sum.shape, sums.tokens),
    lambda layer, spread: _random(torch.Size((layer.value_heads, layer.pairs)), spread).argsort(dim=1),
)
