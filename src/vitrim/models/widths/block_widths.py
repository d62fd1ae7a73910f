"""Blocks of uneven width: fewer dims in every head, fewer hidden units, or a branch that is gone altogether.

A narrowed block stays a stock block of its family; only a branch of width 0 is replaced, by a `RemovedBranch`, and
attention with rotary positions by a class of its own, see `elastic_values`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...errors import UnsupportedModelError, VitrimError
from ..finding import find_adapter
from .attention_heads import AttentionHeads
from .compensation import Compensation
from .elastic_pairs import query_dim
from .elastic_values import ElasticValues
from .sublayers import elastic, sublayers


@dataclass(frozen=True)
class BlockWidths:
    """Dims per attention head and hidden units of the MLP; 0 means that the branch is removed.

    value_dim, query_dim: where positions are rotary: dims of the values per head, and of queries and keys, in whole
        pairs. None: `head_dim`, which stays that of the whole head, by which its logits are scaled.
    """

    head_dim: int
    hidden: int
    value_dim: int | None = None
    query_dim: int | None = None

    @property
    def values(self) -> int:
        """Dims of the values per head."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def queries(self) -> int:
        """Dims of queries and keys per head."""
        return self.head_dim if self.query_dim is None else self.query_dim

    @property
    def dims(self) -> float:
        """Dims per head of queries and keys and of values, on average: what attention costs is in proportion."""
        return (self.queries + self.values) / 2


def widths_of(model: nn.Module) -> tuple[BlockWidths, ...]:
    """The widths of every block, in order.

    Raises:
        UnsupportedModelError: the model is not made of blocks whose widths can change.
    """
    heads: dict[int, tuple[int, int, int]] = {}
    hidden: dict[int, int] = {}
    parts, adapter = sublayers(model), find_adapter(model)
    blocks = adapter.blocks(model)
    if adapter.keeps_attention(model):
        attention = next(iter(adapter.branches_of(model)))
        heads = {i: (dim, dim, dim) for i, block in enumerate(blocks) for dim in [getattr(block, attention).head_dim]}
    with elastic(model) as layers:
        for part in parts:
            layer = layers[part.name]
            if isinstance(layer, AttentionHeads):
                queries = query_dim(layer) if isinstance(layer, ElasticValues) else layer.head_dim
                heads[part.block] = layer.head_dim, layer.full_width, queries
            else:
                hidden[part.block] = layer.full_width
    return tuple(_widths(*heads.get(i, (0, 0, 0)), hidden.get(i, 0)) for i in range(len(blocks)))


def _widths(head_dim: int, values: int, queries: int, hidden: int) -> BlockWidths:
    value_dim, query_dim = (None if dim == head_dim else dim for dim in (values, queries))
    return BlockWidths(head_dim, hidden, value_dim, query_dim)


def set_widths(model: nn.Module, widths: Sequence[BlockWidths]) -> None:
    """Narrow the blocks in place: the leading dims of every head and the leading hidden units stay. See `narrow`.

    Of rotary pairs the leading ones stay, or the best ones where a super-network has put them in order.

    Raises:
        VitrimError: a list of another length, or a width that is negative or larger than it was.
        UnsupportedModelError: blocks of a kind that no width can be given to, or not this one.
    """
    present = widths_of(model)
    if len(widths) != len(present):
        raise VitrimError(f"{len(widths)} widths for {len(present)} blocks; give one BlockWidths per block")
    parts, kept, rotary = sublayers(model), find_adapter(model).keeps_attention(model), rotary_blocks(model)
    for index, (new, old) in enumerate(zip(widths, present, strict=True)):
        pairs = (
            (new.head_dim, old.head_dim), (new.values, old.values), (new.queries, old.queries), (new.hidden, old.hidden)
        )  # fmt: skip
        if not all(0 <= width <= most for width, most in pairs):
            raise VitrimError(f"block {index} can be narrowed from {old} only, not set to {new}")
        if why := _misfit(new, old, rotary.get(index), kept):
            raise UnsupportedModelError(f"block {index} of this {type(model).__name__} cannot be set to {new}: {why}")
    wanted = {"attention": [w.values for w in widths], "mlp": [w.hidden for w in widths]}
    removed = {part.name: 0 for part in parts if wanted[part.kind][part.block] == 0}
    with elastic(model) as layers, torch.no_grad():
        for part in parts:
            layer, new, old = layers[part.name], widths[part.block], present[part.block]
            if part.name in removed:
                continue
            if isinstance(layer, ElasticValues):
                if (new.values, new.queries) != (old.values, old.queries):
                    layer.shrink_to(new.values, new.queries // 2)
            elif (width := wanted[part.kind][part.block]) < layer.full_width:
                layer.shrink(width)
    narrow(model, removed)


def rotary_blocks(model: nn.Module) -> dict[int, bool]:
    """The blocks whose attention has rotary positions, and whether pairs of its queries and keys can be cut."""
    parts = sublayers(model)
    with elastic(model) as layers:
        found = [(part.block, layers[part.name]) for part in parts]
        return {block: layer.cuts_pairs for block, layer in found if isinstance(layer, ElasticValues)}


def even_widths(model: nn.Module, dims: int, hidden: int) -> list[BlockWidths]:
    """Widths for `set_widths` with so many dims per head and hidden units in every block; of queries whole pairs."""
    rotary = rotary_blocks(model)

    def of_block(index: int, old: BlockWidths) -> BlockWidths:
        if index not in rotary or dims == 0:
            return BlockWidths(dims, hidden)
        queries = min(dims + dims % 2, old.queries) if rotary[index] else old.queries
        return _widths(old.head_dim, min(dims, old.values), queries, hidden)

    return [of_block(index, old) for index, old in enumerate(widths_of(model))]


def _misfit(new: BlockWidths, old: BlockWidths, cuts_pairs: bool | None, kept: str) -> str:
    """Why attention cannot have these dims; "" where it can. `cuts_pairs`: None where positions are not rotary."""
    dims = old.head_dim
    if kept and (new.head_dim, new.values, new.queries) != (dims, dims, dims):
        return f"its heads keep their {dims} dims, since {kept}; give head_dim={dims} and change the hidden units"
    if cuts_pairs is None:
        one = new.values == new.queries == new.head_dim
        return "" if one else "its queries, keys and values have one width; give no value_dim and no query_dim"
    if (new.head_dim, new.values) == (0, 0):
        return ""
    if new.head_dim != dims:
        return f"its heads are scaled by their {dims} dims; give head_dim={dims}, value_dim={new.values}"
    if new.queries != old.queries and not cuts_pairs:
        return f"a norm of its queries and keys mixes their dims, which all stay; give query_dim={old.queries}"
    if new.queries % 2 or not (new.queries and new.values):
        return "its queries and keys have whole pairs of dims, at least one, and its values at least one dim"
    return ""


def narrow(
    model: nn.Module, widths: Mapping[str, int], compensations: Mapping[str, Compensation] | None = None
) -> None:
    """Narrow sub-layers, given by their names in the model, in place and for good.

    The narrow model computes what the wide one does with its trailing dims masked: queries (or the weights of their
    norm) take the factor sqrt(new / old), which keeps the scale of the attention logits. A norm inside a sub-layer
    becomes a norm over what is left, and the norm before a removed one goes with it, since parameters that nothing
    reads get no gradient. Parameters are replaced, so make the optimizer afterwards.

    Args:
        model: with stock sub-layers.
        widths: dims per head or hidden units that stay; sub-layers that are not named stay as they are.
        compensations: per sub-layer what makes up for its lost units. None: they add nothing.
    """
    norms = {part.name: part.norm for part in sublayers(model)}
    with elastic(model) as layers, torch.no_grad():
        narrower = {name: width for name, width in widths.items() if width < layers[name].full_width}
        gone: dict[str, nn.Module] = {}
        for name, width in narrower.items():
            compensation = None if compensations is None else compensations[name]
            if width == 0:
                gone[name] = layers[name].remains(compensation)
            else:
                layers[name].shrink(width, compensation)
    for name, branch in gone.items():
        model.set_submodule(name, branch)
        model.set_submodule(norms[name], nn.Identity().train(branch.training))
