"""Counting: multiply-accumulates of an attention block under a plan, as a reduced block executes it."""

from dataclasses import dataclass

from ..tokens import Cut, Reducer
from ..tokens.scores import Needs


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates per image: in layers with weights, and in products of activations (attention, matching)."""

    linear: int = 0
    products: int = 0

    @property
    def total(self) -> int:
        return self.linear + self.products

    def __add__(self, other: "Macs") -> "Macs":
        return Macs(self.linear + other.linear, self.products + other.products)


@dataclass(frozen=True)
class BlockShape:
    """Widths of a pre-norm attention block, for counting. `mlp_macs` is per token; `gate` adds one projection."""

    width: int
    attn_dim: int
    head_dim: int
    mlp_macs: int
    gate: bool = False


def block_macs(
    shape: BlockShape, tokens: int, num_prefix: int, before: Cut | None, inside: Cut | None,
    prefix_only: bool, reducer: Reducer | None,
) -> Macs:  # fmt: skip
    """MACs of one block that `tokens` tokens enter, prefix included, as `ReducedBlock.forward` executes it."""
    one = shape.width * shape.attn_dim  # One token through one of the q, k, v and output projections.
    total = Macs()
    if before is not None and reducer is not None:
        needs = needed(reducer, before)
        projected = {"key": tokens, "cls_row": tokens + 1, "attention": 2 * tokens}.get(needs, 0)
        total += Macs(projected * one, _scoring(shape, tokens, needs))
        total += _deciding(shape, reducer, before)
        tokens = num_prefix + before.num_out
    queries = tokens
    scored = Macs()
    if prefix_only:
        queries = num_prefix
    elif inside is not None and reducer is not None:
        needs = needed(reducer, inside)
        if skips_queries(reducer, inside):
            queries = num_prefix + inside.keep
            scored = Macs(one if needs == "cls_row" else 0)
        scored += Macs(0, _scoring(shape, tokens, needs))
        scored += _deciding(shape, reducer, inside)
    leaving = num_prefix if prefix_only else num_prefix + inside.num_out if inside is not None else tokens
    projections = 2 * tokens + 2 * queries + (queries if shape.gate else 0)
    attention = Macs(projections * one, 2 * queries * tokens * shape.attn_dim)
    return total + scored + attention + Macs(leaving * shape.mlp_macs)


def needed(reducer: Reducer, cut: Cut) -> Needs:
    """What the reducer reads at this cut: nothing where it reuses the scores of an earlier one."""
    return reducer.needs if cut.first or reducer.reads_evidence(cut.block) else "nothing"


def skips_queries(reducer: Reducer, cut: Cut) -> bool:
    """Whether a cut inside a block spares the attention of what it takes out: not where that comes back later."""
    return reducer.drops_queries and not cut.returns


def _scoring(shape: BlockShape, tokens: int, needs: Needs) -> int:
    rows = {"cls_row": 1, "attention": tokens}.get(needs, 0)
    return rows * tokens * shape.attn_dim


def _deciding(shape: BlockShape, reducer: Reducer, cut: Cut) -> Macs:
    fused = (cut.num_in - cut.keep) * shape.width if reducer.extra_tokens else 0
    return Macs(0, reducer.macs(cut.num_in, shape.head_dim) + fused)
