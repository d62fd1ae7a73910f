"""Blocks of uneven width: fewer dims in every head, fewer hidden units, or a branch that is gone altogether.

A narrowed block stays a stock block of its family; only a branch of width 0 is replaced, by a `RemovedBranch`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import UnsupportedModelError, VitrimError
from .compensation import Compensation
from .finding import find_adapter
from .sublayers import Kind, elastic, sublayers


@dataclass(frozen=True)
class BlockWidths:
    """Dims per attention head and hidden units of the MLP; 0 means that the branch is removed."""

    head_dim: int
    hidden: int


def widths_of(model: nn.Module) -> tuple[BlockWidths, ...]:
    """The widths of every block, in order.

    Raises:
        UnsupportedModelError: the model is not made of blocks whose widths can change.
    """
    found: dict[tuple[int, Kind], int] = {}
    parts = sublayers(model)
    with elastic(model) as layers:
        for part in parts:
            found[part.block, part.kind] = layers[part.name].full_width
    adapter = find_adapter(model)
    blocks = adapter.blocks(model)
    if adapter.keeps_attention(model):
        attention = next(iter(adapter.branches_of(model)))
        found |= {(i, "attention"): getattr(block, attention).head_dim for i, block in enumerate(blocks)}
    return tuple(BlockWidths(found.get((i, "attention"), 0), found.get((i, "mlp"), 0)) for i in range(len(blocks)))


def set_widths(model: nn.Module, widths: Sequence[BlockWidths]) -> None:
    """Narrow the blocks in place: the leading dims of every head and the leading hidden units stay. See `narrow`.

    Raises:
        VitrimError: a list of another length, or a width that is negative or larger than it was.
        UnsupportedModelError: blocks of a kind that no width can be given to.
    """
    present = widths_of(model)
    if len(widths) != len(present):
        raise VitrimError(f"{len(widths)} widths for {len(present)} blocks; give one BlockWidths per block")
    kept = find_adapter(model).keeps_attention(model)
    for index, (new, old) in enumerate(zip(widths, present, strict=True)):
        if not 0 <= new.head_dim <= old.head_dim or not 0 <= new.hidden <= old.hidden:
            raise VitrimError(f"block {index} can be narrowed from {old} only, not set to {new}")
        if new.head_dim != old.head_dim and kept:
            raise UnsupportedModelError(
                f"the heads of this {type(model).__name__} keep their {old.head_dim} dims, since its rotary positions "
                f"or its kind of attention need all of them; give head_dim={old.head_dim} and change the hidden units"
            )
    wanted = {"attention": [w.head_dim for w in widths], "mlp": [w.hidden for w in widths]}
    narrow(model, {part.name: wanted[part.kind][part.block] for part in sublayers(model)})


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
