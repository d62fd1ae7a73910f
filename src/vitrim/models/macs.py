"""Counting: multiply-accumulates as a reduced model executes them, by arithmetic on the sizes of its blocks."""

from dataclasses import dataclass
from typing import Literal

from ..tokens import Cut, Reducer
from ..tokens.scores import Needs

Stream = Literal["query", "key", "value"]
WHOLE: tuple[Stream, ...] = ("query", "key", "value")


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

    width: channels of a token. attn_dim: of the queries of all heads by which tokens are chosen. head_dim: of one head.
    qkv_macs: of the projections to queries, keys and values, together.
    query_macs: of the projection to queries, where it differs from the others; None: a third of qkv_macs.
    key_macs: of that to keys; None: half of what queries leave.
    value_dims: of the values of all heads; None: attn_dim.
    whole_qkv: whether the three are one foreign layer (LoRA, quantised, with a hook), which always computes all.
    whole_attention: whether attention as a whole has a hook or a `forward` of its own, and computes all rows.
    proj_macs: of the output projection. gate_macs: of the gate on the output of attention.
    mlp_macs: of the MLP.
    mix_macs: of one query with one key, both products of attention; None: attn_dim and value_dims.
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
    key_macs: int | None = None
    value_dims: int | None = None

    def project(self, tokens: int, *streams: Stream) -> int:
        """MACs of these streams for these tokens, computed in one call."""
        query = self.qkv_macs // 3 if self.query_macs is None else self.query_macs
        key = (self.qkv_macs - query) // 2 if self.key_macs is None else self.key_macs
        each = {"query": query, "key": key, "value": self.qkv_macs - query - key}
        return tokens * (self.qkv_macs if self.whole_qkv else sum(each[stream] for stream in streams))

    @property
    def pair_macs(self) -> int:
        """MACs of one query with one key in both products of attention."""
        values = self.attn_dim if self.value_dims is None else self.value_dims
        return self.attn_dim + values if self.mix_macs is None else self.mix_macs


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
    queries, projected = tokens, shape.project(tokens, *WHOLE)
    if prefix_only and not shape.whole_attention:
        queries = num_prefix
        projected = shape.project(tokens, *WHOLE[1:]) + shape.project(queries, "query")
    elif inside is not None and reducer is not None:
        needs = needed(reducer, inside)
        if shape.whole_attention:
            projected += _evidence(shape, tokens, needs)
        elif skips_queries(reducer, inside):
            queries = num_prefix + inside.keep
            cls_row = shape.project(1, "query") if needs == "cls_row" else 0
            projected = shape.project(tokens, *WHOLE[1:]) + cls_row + shape.project(queries, "query")
        total += Macs(0, _scoring(shape, tokens, needs)) + _deciding(shape, reducer, inside)
    leaving = num_prefix if prefix_only else num_prefix + inside.num_out if inside is not None else tokens
    linear = projected + queries * (shape.proj_macs + shape.gate_macs) + leaving * shape.mlp_macs
    return total + Macs(linear, queries * tokens * shape.pair_macs)


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
        return shape.project(tokens, *WHOLE[:2])
    return shape.project(tokens, "key") + (shape.project(1, "query") if needs == "cls_row" else 0)


def _scoring(shape: BlockShape, tokens: int, needs: Needs) -> int:
    rows = {"cls_row": 1, "attention": tokens}.get(needs, 0)
    return rows * tokens * shape.attn_dim


def _deciding(shape: BlockShape, reducer: Reducer, cut: Cut) -> Macs:
    fused = (cut.num_in - cut.keep) * shape.width if reducer.extra_tokens else 0
    return Macs(0, reducer.macs(cut.num_in, shape.head_dim, shape.width) + fused)
