"""What vitrim must know of a foreign model family, and the table of the families that it knows.

To add a family, write one file with a subclass of `Adapter` and a `ReducedBlock`, and import it in
`models/__init__.py`. The command, the contract tests and `vitrim list` find it there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from ..errors import UnsupportedModelError
from ..tokens import Cut, Plan, Reducer
from ..tokens.scores import Needs

Head = Literal["prefix", "tokens"]
ADAPTERS: list["Adapter"] = []


@dataclass(frozen=True)
class Geometry:
    """Sizes that a plan depends on. `head` says what the head reads: prefix tokens alone, or patch tokens too."""

    depth: int
    num_patches: int
    num_prefix: int
    has_cls: bool
    head: Head
    input_size: tuple[int, int, int]


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


class Adapter:
    """Base of all families. Instances hold no state."""

    name: ClassVar[str]
    covers: ClassVar[str]
    """One line for `vitrim list`: which models the family covers."""
    branches: ClassVar[Mapping[str, str]]
    """Names within a block of its two branches, and of the norm that feeds each of them and nothing else."""

    def __init_subclass__(cls) -> None:
        ADAPTERS.append(cls())

    def claims(self, model: nn.Module) -> bool:
        """Whether the model belongs to this family at all."""
        raise NotImplementedError

    def check(self, model: nn.Module) -> None:
        """Raise `UnsupportedModelError` naming the part that cannot be changed."""

    def geometry(self, model: nn.Module) -> Geometry:
        """Depth, tokens and head of the model."""
        raise NotImplementedError

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """The transformer blocks in order."""
        raise NotImplementedError

    def reduced_class(self, module: nn.Module) -> type[nn.Module]:
        """The module-level subclass that takes the place of the class of this block, or of the model itself."""
        raise NotImplementedError

    def check_plan(self, model: nn.Module, plan: Plan, reducer: Reducer) -> None:
        """Raise `ScoreError` if a block where the plan cuts cannot supply what the reducer reads."""

    def macs(self, model: nn.Module, plan: Plan, reducer: Reducer | None) -> Macs:
        """MACs of one image under the plan, as the reduced model executes it."""
        raise NotImplementedError


def find_adapter(model: nn.Module) -> Adapter:
    """The adapter of the model, checked; `UnsupportedModelError` names the class met and the adapters that exist."""
    for adapter in ADAPTERS:
        if adapter.claims(model):
            adapter.check(model)
            return adapter
    known = "; ".join(f"{adapter.name} ({adapter.covers})" for adapter in ADAPTERS)
    wrapped = type(model).__name__ in ("OptimizedModule", "DistributedDataParallel", "FullyShardedDataParallel")
    hint = "attach to the model before wrapping or compiling it" if wrapped else f"adapters: {known}"
    raise UnsupportedModelError(f"no adapter for {type(model).__module__}.{type(model).__qualname__}; {hint}")


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
