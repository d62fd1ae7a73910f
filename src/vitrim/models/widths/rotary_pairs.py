"""Whole rotary pairs of queries and keys: which of them every head keeps, and the columns of its table that they need.

A rotation by place turns pairs of query and key dims, each by an angle of its own. A pair that is cut takes its angle
away; the others turn as before. Every head, or every group of heads that share keys, keeps pairs of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError
from ...text import short_name


@dataclass(frozen=True)
class PairRule:
    """What an attention layer keeps at every width: one number says how many dims of values and how many pairs.

    order: of the pairs in each head of the keys, best first.
    values, pairs: how many of each stay at width 0, 1, ..., the full one, per head. Neither ever falls.
    """

    order: tuple[tuple[int, ...], ...] = field(repr=False)
    values: tuple[int, ...]
    pairs: tuple[int, ...]

    def kept(self, number: int, device: torch.device) -> Tensor:
        """The best `number` pairs of each head of the keys (heads, pairs)."""
        return _tensor(self.order, device)[:, :number]

    def check(self, heads: int, values: int, pairs: int) -> None:
        """Raise `CheckpointError` unless this is a rule for so many heads of keys, value dims and pairs."""
        orders = all(sorted(each) == list(range(pairs)) for each in self.order) and len(self.order) == heads
        tables = ((self.values, values), (self.pairs, pairs))
        steps = all(
            len(table) == values + 1 and table[0] == 0 and min(table[1:]) > 0 and table[-1] == most
            and all(low <= high for low, high in pairwise(table))
            for table, most in tables
        )  # fmt: skip
        if not (orders and steps):
            raise CheckpointError("the rotary pairs of a layer do not fit it; stratify again")


def rule_from(raw: Mapping[str, Any] | None) -> PairRule | None:
    """A rule as JSON holds it.

    Raises:
        CheckpointError: it is none.
    """
    if raw is None:
        return None
    made = PairRule(tuple(tuple(each) for each in raw["order"]), tuple(raw["values"]), tuple(raw["pairs"]))
    numbers = (*made.values, *made.pairs, *(number for each in made.order for number in each))
    if not all(type(number) is int for number in numbers):
        raise CheckpointError("the rotary pairs of a layer are not whole numbers; stratify again")
    return made


@lru_cache(maxsize=1024)
def _tensor(order: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    return torch.tensor(order, device=device)


def dims_of(pairs_Hp: Tensor, number: int, half: bool) -> Tensor:
    """The dims (H, 2p) of these pairs, in the order in which a rotation takes them.

    Args:
        pairs_Hp: pairs of every head.
        number: of pairs in a head.
        half: whether a pair is (i, i + number), as in DINOv3, and not (2i, 2i + 1).
    """
    if half:
        return torch.cat([pairs_Hp, pairs_Hp + number], dim=1)
    return torch.stack([2 * pairs_Hp, 2 * pairs_Hp + 1], dim=2).flatten(1)


def columns(part: Tensor, dims_HD: Tensor) -> Tensor:
    """Columns of a rotary table for these dims of every head.

    Args:
        part: sines or cosines (N, D), (H, N, D), (B, 1, N, D) or (B, H, N, D), all dims of a head.
        dims_HD: for each of the H heads of queries.

    Returns:
        (H, N, dims) or (B, H, N, dims).
    """
    part = part.unsqueeze(0) if part.ndim == 2 else part
    shape = (*part.shape[:-3], len(dims_HD), part.shape[-2])
    return part.expand(*shape, -1).gather(-1, dims_HD[:, None].expand(*shape, -1))


def check_kept_pairs(model: nn.Module, source: object) -> None:
    """Raise `CheckpointError` if a layer that was cut names pairs that its table does not have, or one twice."""
    for name, module in model.named_modules():
        kept = getattr(module, "kept_pairs", None)
        if kept is None:
            continue
        number, ordered = getattr(module, "head_dim", 0) // 2, kept.sort(1).values
        if ordered.min() < 0 or ordered.max() >= number or bool((ordered.diff(dim=1) == 0).any()):
            raise CheckpointError(f"{source} names rotary pairs that {short_name(name)} does not have; save it again")
