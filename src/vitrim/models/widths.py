"""Blocks of uneven width: fewer dims in every head, fewer hidden units, or a branch that is gone altogether.

A narrowed block stays a stock timm block; only a branch of width 0 is replaced, by a `RemovedBranch`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..errors import UnsupportedModelError, VitrimError


@dataclass(frozen=True)
class BlockWidths:
    """Dims per attention head and hidden units of the MLP; 0 means that the branch is removed."""

    head_dim: int
    hidden: int


class RemovedBranch(nn.Module):
    """What is left of an attention or MLP branch of width 0: a constant, zero unless something is learnt or put there.

    A branch without inputs still has the bias of its output projection, which is where the mean of what was removed
    may be kept. Costs no MACs.
    """

    def __init__(self, dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """The constant, in the shape of `x` (..., C); attention masks change nothing."""
        return self.bias.to(x.dtype).expand_as(x)


def widths_of(model: nn.Module) -> tuple[BlockWidths, ...]:
    """The widths of every block, in order.

    Raises:
        UnsupportedModelError: the model is not made of stock timm blocks.
    """
    return tuple(BlockWidths(_head_dim(block.attn), _hidden(block.mlp)) for block in _stock_blocks(model))


@torch.no_grad()
def set_widths(model: nn.Module, widths: Sequence[BlockWidths]) -> None:
    """Narrow the blocks in place: the leading dims of every head and the leading hidden units stay.

    The narrow model computes what the wide one does with its trailing dims masked: the rows of q take the factor
    sqrt(new / old), which keeps the scale of the attention logits; the biases of proj and fc2 stay as they are.
    Parameters are replaced, so make the optimizer afterwards.

    Raises:
        VitrimError: a list of another length, or a width that is negative or larger than it was.
        UnsupportedModelError: blocks that are not stock timm blocks, or norms and gates that tie the dims together.
    """
    blocks = _stock_blocks(model)
    if len(widths) != len(blocks):
        raise VitrimError(f"{len(widths)} widths for {len(blocks)} blocks; give one BlockWidths per block")
    for index, (new, old) in enumerate(zip(widths, widths_of(model), strict=True)):
        if not 0 <= new.head_dim <= old.head_dim or not 0 <= new.hidden <= old.hidden:
            raise VitrimError(f"block {index} can be narrowed from {old} only, not set to {new}")
        if new.head_dim < old.head_dim:
            _check_free(index, blocks[index].attn, ("q_norm", "k_norm", "norm", "gate"))
        if new.hidden < old.hidden:
            _check_free(index, blocks[index].mlp, ("norm",))
    for block, new in zip(blocks, widths, strict=True):
        if new.head_dim < _head_dim(block.attn):
            block.attn = _narrow_attention(block.attn, new.head_dim)
        if new.hidden < _hidden(block.mlp):
            block.mlp = _narrow_mlp(block.mlp, new.hidden)


def _narrow_attention(attn: Attention, head_dim: int) -> nn.Module:
    if head_dim == 0:
        return _removed(attn.proj)
    heads, old = attn.num_heads, attn.head_dim
    dims = torch.arange(heads * old, device=attn.qkv.weight.device).view(heads, old)[:, :head_dim].flatten()
    rows = torch.cat([dims + stream * heads * old for stream in range(3)])
    attn.qkv = _linear(attn.qkv, rows=rows)
    attn.proj = _linear(attn.proj, columns=dims)
    for param in attn.qkv.parameters():
        param[: heads * head_dim] *= (head_dim / old) ** 0.5
    attn.head_dim, attn.attn_dim, attn.scale = head_dim, heads * head_dim, head_dim**-0.5
    return attn


def _narrow_mlp(mlp: Mlp, hidden: int) -> nn.Module:
    if hidden == 0:
        return _removed(mlp.fc2)
    units = torch.arange(hidden, device=mlp.fc1.weight.device)
    mlp.fc1, mlp.fc2 = _linear(mlp.fc1, rows=units), _linear(mlp.fc2, columns=units)
    return mlp


def _removed(last: nn.Linear) -> RemovedBranch:
    branch = RemovedBranch(last.out_features, last.weight.device, last.weight.dtype)
    if last.bias is not None:
        branch.bias.copy_(last.bias)
    return branch.train(last.training)


def _linear(layer: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> nn.Linear:
    weight, bias = layer.weight, layer.bias
    if rows is not None:
        weight, bias = weight[rows], None if bias is None else bias[rows]
    if columns is not None:
        weight = weight[:, columns]
    out = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device=weight.device, dtype=weight.dtype)
    out.weight.copy_(weight)
    if bias is not None:
        out.bias.copy_(bias)
    return out.requires_grad_(layer.weight.requires_grad).train(layer.training)


def _head_dim(attn: nn.Module) -> int:
    return 0 if isinstance(attn, RemovedBranch) else attn.head_dim


def _hidden(mlp: nn.Module) -> int:
    return 0 if isinstance(mlp, RemovedBranch) else mlp.fc1.out_features


def _stock_blocks(model: nn.Module) -> list[nn.Module]:
    blocks = list(getattr(model, "blocks", ()))
    for index, block in enumerate(blocks):
        attn, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
        stock = type(attn) in (Attention, RemovedBranch) and type(mlp) in (Mlp, RemovedBranch)
        if not isinstance(block, Block) or not stock:
            raise UnsupportedModelError(
                f"blocks.{index} is no stock timm Block with Attention and Mlp; uneven widths need one"
            )
    if not blocks:
        raise UnsupportedModelError(f"{type(model).__name__} has no transformer blocks to narrow")
    return blocks


def _check_free(index: int, branch: nn.Module, parts: tuple[str, ...]) -> None:
    tied = [part for part in parts if not isinstance(getattr(branch, part, None), nn.Identity | None)]
    if tied:
        raise UnsupportedModelError(
            f"blocks.{index} cannot be narrowed without changing what it computes: its {type(branch).__name__} has "
            f"{' and '.join(tied)}"
        )
