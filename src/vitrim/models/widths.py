"""Blocks of uneven width: fewer dims in every head, fewer hidden units, or a branch that is gone altogether.

A narrowed block stays a stock block of its family; only a branch of width 0 is replaced, by a `RemovedBranch`, and
attention whose values alone were cut by a class of its own, see `elastic_values`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import UnsupportedModelError, VitrimError
from .attention_heads import AttentionHeads
from .compensation import Compensation
from .elastic_values import ElasticValues
from .finding import find_adapter
from .sublayers import elastic, sublayers


@dataclass(frozen=True)
class BlockWidths:
    """Dims per attention head and hidden units of the MLP; 0 means that the branch is removed.

    value_dim: dims of the values per head, where they are fewer than those of queries and keys; None: `head_dim`.
    """

    head_dim: int
    hidden: int
    value_dim: int | None = None

    @property
    def values(self) -> int:
        """Dims of the values per head."""
        return self.head_dim if self.value_dim is None else self.value_dim


def widths_of(model: nn.Module) -> tuple[BlockWidths, ...]:
    """The widths of every block, in order.

    Raises:
        UnsupportedModelError: the model is not made of blocks whose widths can change.
    """
    heads: dict[int, tuple[int, int]] = {}
    hidden: dict[int, int] = {}
    parts, adapter = sublayers(model), find_adapter(model)
    blocks = adapter.blocks(model)
    if adapter.keeps_attention(model):
        attention = next(iter(adapter.branches_of(model)))
        heads = {i: (dim, dim) for i, block in enumerate(blocks) for dim in [getattr(block, attention).head_dim]}
    with elastic(model) as layers:
        for part in parts:
            layer = layers[part.name]
            if isinstance(layer, AttentionHeads):
                heads[part.block] = layer.head_dim, layer.full_width
            else:
                hidden[part.block] = layer.full_width
    return tuple(_widths(*heads.get(i, (0, 0)), hidden.get(i, 0)) for i in range(len(blocks)))


def _widths(head_dim: int, values: int, hidden: int) -> BlockWidths:
    return BlockWidths(head_dim, hidden, None if values == head_dim else values)


def set_widths(model: nn.Module, widths: Sequence[BlockWidths]) -> None:
    """Narrow the blocks in place: the leading dims of every head and the leading hidden units stay. See `narrow`.

    Raises:
        VitrimError: a list of another length, or a width that is negative or larger than it was.
        UnsupportedModelError: blocks of a kind that no width can be given to, or not this one.
    """
    present = widths_of(model)
    if len(widths) != len(present):
        raise VitrimError(f"{len(widths)} widths for {len(present)} blocks; give one BlockWidths per block")
    parts, kept, cut_alone = sublayers(model), find_adapter(model).keeps_attention(model), cuts_values_alone(model)
    for index, (new, old) in enumerate(zip(widths, present, strict=True)):
        pairs = ((new.head_dim, old.head_dim), (new.values, old.values), (new.hidden, old.hidden))
        if not all(0 <= width <= most for width, most in pairs):
            raise VitrimError(f"block {index} can be narrowed from {old} only, not set to {new}")
        if why := _misfit(new, old, index in cut_alone, kept):
            raise UnsupportedModelError(f"block {index} of this {type(model).__name__} cannot be set to {new}: {why}")
    wanted = {"attention": [w.values for w in widths], "mlp": [w.hidden for w in widths]}
    narrow(model, {part.name: wanted[part.kind][part.block] for part in parts})


def cuts_values_alone(model: nn.Module) -> set[int]:
    """The blocks whose attention keeps its queries and keys and loses dims of its values alone."""
    parts = sublayers(model)
    with elastic(model) as layers:
        return {part.block for part in parts if isinstance(layers[part.name], ElasticValues)}


def even_widths(model: nn.Module, values: int, hidden: int) -> list[BlockWidths]:
    """Widths for `set_widths` with so many dims per head, of values at least, and hidden units in every block."""
    alone = cuts_values_alone(model)
    return [
        BlockWidths(old.head_dim if index in alone and values else values, hidden, values if index in alone else None)
        for index, old in enumerate(widths_of(model))
    ]


def _misfit(new: BlockWidths, old: BlockWidths, values_alone: bool, kept: str) -> str:
    """Why attention cannot have these dims; "" where it can."""
    dims = old.head_dim
    if kept and (new.head_dim, new.values) != (dims, dims):
        return f"its heads keep their {dims} dims, since {kept}; give head_dim={dims} and change the hidden units"
    if values_alone and new.head_dim != dims and (new.head_dim, new.values) != (0, 0):
        return f"its queries and keys keep their {dims} dims; give head_dim={dims}, value_dim={new.values}"
    if not values_alone and new.values != new.head_dim:
        return "its queries, keys and values have one width; give no value_dim"
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
