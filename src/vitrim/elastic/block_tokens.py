"""Tokens on their way through the blocks of a full and a cut network, and what one branch of a block does to them."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.widths.sublayers import Elastic
from ..tokens.precision import exact
from .probing import objective_of, output_of
from .token_weights import token_weights

Call = Callable[[nn.Module, Tensor], Tensor]
SAME = 1e-3
"""Largest part of a change of the tokens that may be unexplained where a branch counts as added to them."""


@dataclass(frozen=True)
class Goal:
    """One batch in the full network, which is the same for every network that is cut from it.

    images: (B, channels, height, width). tokens: (B, N, C) before the first block. calls: for each block, a function
    that runs it with all its other arguments. weights: of the tokens after each block, (B, N).
    """

    images: Tensor
    tokens: Tensor
    calls: list[Call]
    weights: list[Tensor]

    @classmethod
    def of(cls, original: nn.Module, blocks: list[nn.Module], images: Tensor) -> "Goal":
        """Run the full network once, and its gradients back."""
        objective = objective_of(original, False)
        with _recorded(blocks) as (tokens, calls), torch.enable_grad():
            objective(output_of(original, images), None).backward()
        return cls(images, tokens[0].detach(), calls, [_weights(x) for x in tokens[1:]])


@dataclass
class Tokens:
    """One batch on its way through both networks.

    full, cut: tokens (B, N, C) before the present block, in the full network and in the cut one.
    full_calls, cut_calls: for each block, a function that runs it with all its other arguments.
    weights: of the tokens after each block, (B, N).
    """

    full: Tensor
    cut: Tensor
    full_calls: list[Call]
    cut_calls: list[Call]
    weights: list[Tensor]

    @classmethod
    def before_blocks(cls, network: nn.Module, blocks: list[nn.Module], goal: Goal) -> "Tokens":
        """Run the cut network once, for what enters its first block and the other arguments of each block."""
        with _recorded(blocks) as (cut, cut_calls), torch.no_grad():
            output_of(network, goal.images)
        return cls(goal.tokens, cut[0].detach(), goal.calls, cut_calls, goal.weights)


def _weights(tokens: Tensor) -> Tensor:
    assert tokens.grad is not None
    return token_weights(tokens.grad)


@contextmanager
def _recorded(blocks: list[nn.Module]) -> Iterator[tuple[list[Tensor], list[Call]]]:
    """Within this context, tokens before each block and after the last are kept, and each block's other arguments."""
    tokens: list[Tensor] = []
    calls: list[Call] = []

    def keep(x: Tensor) -> None:
        if torch.is_grad_enabled():
            if not x.requires_grad:
                x.requires_grad_()
            x.retain_grad()
        tokens.append(x)

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = args[1:]
        keep(args[0])
        calls.append(lambda other, x: other(x, *rest, **kwargs))

    def after(block: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        keep(out)

    hooks = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    hooks.append(blocks[-1].register_forward_hook(after))
    try:
        yield tokens, calls
    finally:
        for hook in hooks:
            hook.remove()


class _Complete(Exception):
    """Ends the pass through a block once everything that is wanted has been seen."""


def observe(
    block: nn.Module, branches: Mapping[str, str], branch: str, x: Tensor, call: Call, wanted: Collection[str]
) -> dict[str, Tensor]:
    """Run a block on tokens (B, N, C) as far as is needed to see what one of its branches does.

    Args:
        block: of a network.
        branches: names of its branches and of the norm that feeds each, see `Adapter.branches_of`.
        branch: name of the one to observe.
        x: tokens that enter the block.
        call: runs the block.
        wanted: any of "before" (tokens that enter its norm), "output", "after" (tokens that enter the norm of the next
            branch, or that leave the block) and, for an elastic layer, "inputs" (of its last projection).
    """
    found: dict[str, Tensor] = {}
    names = list(branches)
    following = names[names.index(branch) + 1 :]
    layer: Any = block.get_submodule(branch)

    def keep(name: str, tensor: Tensor) -> None:
        found[name] = tensor
        if all(name in found for name in wanted):
            raise _Complete

    hooks = [
        block.get_submodule(branches[branch]).register_forward_pre_hook(lambda norm, args: keep("before", args[0])),
        # Attention layers of transformers return their maps too.
        layer.register_forward_hook(lambda _, args, out: keep("output", out[0] if isinstance(out, tuple) else out)),
    ]
    if following:
        norm = block.get_submodule(branches[following[0]])
        hooks.append(norm.register_forward_pre_hook(lambda norm, args: keep("after", args[0])))
    if isinstance(layer, Elastic):
        layer.vitrim_tap = lambda name, tensor, *_: None if name == "streams" else keep("inputs", tensor)
    try:
        out = call(block, x)
        found.setdefault("after", out)
    except _Complete:
        pass
    finally:
        for hook in hooks:
            hook.remove()
        if isinstance(layer, Elastic):
            layer.vitrim_tap = None
    return found


def branch_scale(before: Tensor, output: Tensor, after: Tensor) -> Tensor | None:
    """What turns a difference of tokens into one of the branch's output, (C,); None if the branch is not just added.

    Found from the tokens (B, N, C): after = before + scale * output, with one factor for each channel (LayerScale),
    or 1.
    """
    output_TC, added_TC = (exact(x).flatten(0, 1) for x in (output, after - before))
    factor = (output_TC * added_TC).sum(0) / output_TC.square().sum(0).clamp_min(torch.finfo(torch.float64).tiny)
    if (added_TC - output_TC * factor).square().sum() > SAME * added_TC.square().sum():
        return None
    inverse = torch.where(factor.abs() > 1e-6 * factor.abs().amax(), 1 / factor, 0.0)
    return inverse.to(output)
