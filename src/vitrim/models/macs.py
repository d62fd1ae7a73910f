"""Counting: multiply-accumulates as a reduced model executes them, by arithmetic on the sizes of its blocks."""

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
    """Sizes of an attention block. All MACs are those of one token.

    width: channels of a token. attn_dim: of the values of all heads. head_dim: of one head.
    qkv_macs: of the projections to queries, keys and values, together.
    query_macs: of the projection to queries, where groups of heads share keys and values; None: a third of qkv_macs.
    whole_qkv: whether the three are one foreign layer (LoRA, quantised, with a hook), which always computes all.
    whole_attention: whether attention as a whole has a hook or a `forward` of its own, and computes all rows.
    proj_macs: of the output projection. gate_macs: of the gate on the output of attention.
    mlp_macs: of the MLP.
    mix_macs: of one query with one key, both products of attention; None: twice attn_dim.
    """

    width: int
    attn_dim: int
    head_dim: int
    qkv_macs: int
    proj_macs: int
    mlp_macs: int
    gate_macs: int = 0
    whole_qkv: bool = False
    whole_attention: bool = False
    query_macs: int | None = None
    mix_macs: int | None = None

    def project(self, tokens: int, queries: int, others: int) -> int:
        """MACs of queries (0 or 1) and of so many of keys and values for these tokens, computed in one call."""
        query = self.qkv_macs // 3 if self.query_macs is None else self.query_macs
        parts = queries * query + others * (self.qkv_macs - query) // 2
        return tokens * (self.qkv_macs if self.whole_qkv else parts)


def block_macs(
    shape: BlockShape, tokens: int, num_prefix: int, before: Cut | None, inside: Cut | None,
    prefix_only: bool, reducer: Reducer | None,
) -> Macs:  # fmt: skip
    """MACs of one block that `tokens` tokens enter, prefix included, as `ReducedBlock.forward` executes it."""
    total = Macs()
    if before is not None and reducer is not None:
        needs = needed(reducer, before)
        total += Macs(_evidence(shape, tokens, needs), _scoring(shape, tokens, needs))
        total += _deciding(shape, reducer, before)
        tokens = num_prefix + before.num_out
    queries, projected = tokens, shape.project(tokens, 1, 2)
    if prefix_only and not shape.whole_attention:
        queries = num_prefix
        projected = shape.project(tokens, 0, 2) + shape.project(queries, 1, 0)
    elif inside is not None and reducer is not None:
        needs = needed(reducer, inside)
        if shape.whole_attention:
            projected += _evidence(shape, tokens, needs)
        elif skips_queries(reducer, inside):
            queries = num_prefix + inside.keep
            cls_row = shape.project(1, 1, 0) if needs == "cls_row" else 0
            projected = shape.project(tokens, 0, 2) + cls_row + shape.project(queries, 1, 0)
        total += Macs(0, _scoring(shape, tokens, needs)) + _deciding(shape, reducer, inside)
    leaving = num_prefix if prefix_only else num_prefix + inside.num_out if inside is not None else tokens
    linear = projected + queries * (shape.proj_macs + shape.gate_macs) + leaving * shape.mlp_macs
    each = 2 * shape.attn_dim if shape.mix_macs is None else shape.mix_macs
    return total + Macs(linear, queries * tokens * each)


def needed(reducer: Reducer, cut: Cut) -> Needs:
    """What the reducer reads at this cut: nothing where it reuses the scores of an earlier one."""
    return reducer.needs if cut.first or reducer.reads_evidence(cut.block) else "nothing"


def skips_queries(reducer: Reducer, cut: Cut) -> bool:
    """Whether a cut inside a block saves the queries of the tokens that it removes; not where these come back later."""
    return reducer.drops_queries and not cut.returns


def _evidence(shape: BlockShape, tokens: int, needs: Needs) -> int:
    """MACs of the queries and keys that a decision reads, where attention does not compute them already."""
    if needs in ("nothing", "hidden"):
        return 0
    if needs == "attention":
        return shape.project(tokens, 1, 1)
    return shape.project(tokens, 0, 1) + (shape.project(1, 1, 0) if needs == "cls_row" else 0)


def _scoring(shape: BlockShape, tokens: int, needs: Needs) -> int:
    rows = {"cls_row": 1, "attention": tokens}.get(needs, 0)
    return rows * tokens * shape.attn_dim


def _deciding(shape: BlockShape, reducer: Reducer, cut: Cut) -> Macs:
    fused = (cut.num_in - cut.keep) * shape.width if reducer.extra_tokens else 0
    return Macs(0, reducer.macs(cut.num_in, shape.head_dim) + fused)
