"""Fit the last projections of a cut network again, block after block, to what the full network does.

A compensation knows the inputs of a projection in the full network. In a cut network they differ, since every block
before has changed them a little, and the errors add up. Here each projection is fitted on what the cut network itself
makes, in a ridge regression: the sum of its output and the tokens before it has to be that of the full network, so that
it also makes up for the errors of the blocks before. In closed form, without labels, and free at run time.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, VitrimError
from ..models import attached
from ..models.adapter import find_adapter
from ..models.compensation import TINY, Moments, cholesky
from ..models.removed_branch import RemovedBranch
from ..models.slicing import store
from ..models.sublayers import Elastic, elastic
from ..tokens.precision import exact, exact_device, wide
from .probing import Batch, all_reduce, batches, frozen, objective_of, output_of
from .statistics import held_out_images, tensors_in, token_weights

RIDGES = (1e-2, 1e-1, 1.0, 10.0)
"""Ridges, as fractions of the mean variance; a projection takes the one that is best on held-out images, or none."""
Call = Callable[[nn.Module, Tensor], Tensor]
LEAST_IMAGES = 16
SAME = 1e-3
"""Largest part of a change of the tokens that may be unexplained where a branch counts as added to them."""


@dataclass
class Fit:
    """Weighted sums over tokens of the inputs (n) of a projection and of the errors (C) that it should lose.

    inputs: their moments. errors (C,), cross (C, n): weighted sums of errors, and of their products with inputs.
    """

    inputs: Moments
    errors: Tensor
    cross: Tensor

    @classmethod
    def zeros(cls, inputs: int, outputs: int, device: torch.device) -> "Fit":
        """Empty sums."""
        errors, cross = (
            torch.zeros(shape, dtype=torch.float64, device=device) for shape in (outputs, (outputs, inputs))
        )
        return cls(Moments.zeros(inputs, device), errors, cross)

    def add(self, inputs_TA: Tensor, errors_TC: Tensor, weight_T: Tensor) -> None:
        """Add T tokens."""
        weighted = errors_TC * weight_T[:, None]
        self.inputs.add(inputs_TA, weight_T)
        self.errors += weighted.sum(0, dtype=torch.float64)
        self.cross += exact(weighted.mT @ inputs_TA)

    def __add__(self, other: "Fit") -> "Fit":
        return Fit(self.inputs + other.inputs, self.errors + other.errors, self.cross + other.cross)

    def solve(self, ridge: float, bias: bool) -> tuple[Tensor, Tensor]:
        """The change of weight (C, n) and bias (C,) that leaves the least error, in float64."""
        total = self.inputs.weight.clamp_min(TINY)
        mean, shift, cross, spread = self.inputs.mean, self.errors / total, self.cross / total, self.inputs.spread(bias)
        if bias:
            cross = cross - torch.outer(shift, mean)
        if not len(spread) or not spread.diagonal().mean() > 0:
            return torch.zeros_like(cross), shift if bias else torch.zeros_like(shift)
        change = torch.cholesky_solve(cross.mT, cholesky(spread, ridge)).mT
        return change, shift - change @ mean if bias else torch.zeros_like(shift)

    def gain(self, change: Tensor, shift: Tensor) -> float:
        """By how much these changes lower the squared error on these tokens."""
        explained = 2 * (change * self.cross).sum() + 2 * shift @ self.errors
        spent = ((change @ self.inputs.second) * change).sum() + 2 * shift @ change @ self.inputs.first
        return (explained - spent - shift.square().sum() * self.inputs.weight).item()


@dataclass
class Tokens:
    """One batch on its way through both networks.

    full, cut: tokens (B, N, C) before the present block, in the full network and in the cut one.
    calls: run a block with its other arguments, in the full network and in the cut one.
    weights: of the tokens after each block, (B, N).
    """

    full: Tensor
    cut: Tensor
    calls: tuple[list[Call], list[Call]]
    weights: list[Tensor]


def refit(network: nn.Module, original: nn.Module, data: Iterable[Batch], *, num_images: int = 1024) -> None:
    """Fit the last projection of every sub-layer of a cut network again, in place.

    Args:
        network: cut from `original`: the same blocks with narrower or removed sub-layers, in any dtype.
        original: the full network, whose tokens after each sub-layer are the goal.
        data: batches of images (B, channels, height, width), or of (images, labels); labels are not used.
        num_images: number of images to use; all tokens of one layer are kept for them, twice. The cost is about that
            of eight forward passes.

    Raises:
        VitrimError: the networks do not belong together, a token reduction is attached, or a fit is not finite.
        DataError: the data holds fewer than 16 images.
    """
    if attached(network) is not None or attached(original) is not None:
        raise VitrimError("refit compares all tokens of two networks; call it before tokens are reduced")
    if network is original:
        raise VitrimError("refit needs the network that was cut and the one that it was cut from; these are the same")
    adapter = find_adapter(network)
    ours, theirs = list(adapter.blocks(network)), list(find_adapter(original).blocks(original))
    if type(network) is not type(original) or len(ours) != len(theirs):
        raise VitrimError("the network was not cut from this original: other blocks")
    with frozen(network), frozen(original):
        flows = [
            _start(network, original, ours, theirs, images) for images, _ in batches(data, network, num_images, False)
        ]
        images = sum(len(flow.cut) for flow in flows)
        if images < LEAST_IMAGES:
            raise DataError(f"{images} images are too few to fit and to check on; give {LEAST_IMAGES} or more")
        with elastic(network), torch.no_grad():
            for index, (block, reference) in enumerate(zip(ours, theirs, strict=True)):
                for branch in adapter.branches_of(network):
                    _refit_branch(block, reference, adapter.branches_of(network), branch, flows, index)
                for flow in flows:
                    flow.cut = flow.calls[1][index](block, flow.cut)
                    flow.full = flow.calls[0][index](reference, flow.full)


def _refit_branch(
    block: nn.Module, reference: nn.Module, branches: Mapping[str, str], branch: str, flows: list[Tokens], index: int
) -> None:
    layer: Any = block.get_submodule(branch)
    removed = isinstance(layer, RemovedBranch)
    weight = None if removed else layer.last.weight
    bias: Tensor | None = layer.bias if removed else layer.last.bias
    inputs, outputs = (0, layer.bias.numel()) if removed else (layer.last.in_features, layer.last.out_features)
    device = exact_device(flows[0].cut.device)
    most, held_out = Fit.zeros(inputs, outputs, device), Fit.zeros(inputs, outputs, device)
    for flow in flows:
        seen = _observe(reference, branches, branch, flow.full, flow.calls[0][index])
        now = _observe(block, branches, branch, flow.cut, flow.calls[1][index])
        errors = seen.output - now.output
        if (scale := _scale(seen)) is not None:
            errors = errors + (seen.before - now.before) * scale
        given = now.inputs if inputs else errors[..., :0]
        apart = held_out_images(len(errors), errors.device)
        for sums, images in ((most, ~apart), (held_out, apart)):
            sums.add(*(wide(x[images].flatten(0, 1)).to(device) for x in (given, errors, flow.weights[index])))
    for each in (*tensors_in(most), *tensors_in(held_out)):
        all_reduce(each)
    together = most + held_out
    if not all(each.isfinite().all() for each in tensors_in(together)):
        raise VitrimError("tokens are not finite; check the weights of both networks and the images")
    if (ridge := best_ridge(most, held_out, bias is not None)) is None:
        return
    change, shift = together.solve(ridge, bias is not None)
    if weight is not None:
        store(weight, exact(weight) + change.to(exact(weight).device))
    if bias is not None:
        store(bias, exact(bias) + shift.to(exact(bias).device))


def best_ridge(most: Fit, held_out: Fit, bias: bool) -> float | None:
    """The ridge whose fit lowers the error on held-out images most; None if each raises it."""
    gains = {ridge: held_out.gain(*most.solve(ridge, bias)) for ridge in RIDGES}
    best = max(gains, key=lambda ridge: gains[ridge])
    return best if gains[best] > 0 else None


@dataclass
class Seen:
    """A branch at work: tokens before and after it, its output, and the inputs of its last projection, if known."""

    before: Tensor
    after: Tensor
    output: Tensor
    inputs: Tensor


def _observe(block: nn.Module, branches: Mapping[str, str], branch: str, x: Tensor, call: Call) -> Seen:
    """Run a block; tokens before a branch are those that enter its norm, after it those that enter the next norm."""
    found: dict[str, Tensor] = {}
    names = list(branches)
    following = names[names.index(branch) + 1 :]
    layer: Any = block.get_submodule(branch)

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, *_: found.update({name: args[0]})

    hooks = [
        block.get_submodule(branches[branch]).register_forward_pre_hook(keep("before")),
        layer.register_forward_hook(lambda module, args, out: found.update(output=out)),
    ]
    if following:
        hooks.append(block.get_submodule(branches[following[0]]).register_forward_pre_hook(keep("after")))
    if isinstance(layer, Elastic):
        layer.vitrim_tap = lambda name, tensor: None if name == "qkv" else found.update(inputs=tensor)
    try:
        out = call(block, x)
    finally:
        for hook in hooks:
            hook.remove()
        if isinstance(layer, Elastic):
            layer.vitrim_tap = None
    return Seen(found["before"], found.get("after", out), found["output"], found.get("inputs", out))


def _scale(seen: Seen) -> Tensor | None:
    """What turns a difference of tokens into one of the branch's output, (C,); None if the branch is not just added.

    Found from the tokens: after = before + scale * output, with one factor for each channel (LayerScale), or 1.
    """
    output, added = (exact(x).flatten(0, 1) for x in (seen.output, seen.after - seen.before))
    factor = (output * added).sum(0) / output.square().sum(0).clamp_min(torch.finfo(torch.float64).tiny)
    if (added - output * factor).square().sum() > SAME * added.square().sum():
        return None
    inverse = torch.where(factor.abs() > 1e-6 * factor.abs().amax(), 1 / factor, 0.0)
    return inverse.to(seen.output)


def _start(
    network: nn.Module, original: nn.Module, ours: list[nn.Module], theirs: list[nn.Module], images: Tensor
) -> Tokens:
    """Run both networks once, for what enters their first block and what each block gets besides."""
    objective = objective_of(original, False)
    with _recorded(theirs) as (full, calls), torch.enable_grad():
        objective(output_of(original, images), None).backward()
    with _recorded(ours) as (cut, own_calls), torch.no_grad():
        output_of(network, images)
    return Tokens(full[0].detach(), cut[0].detach(), (calls, own_calls), [_weights(x) for x in full[1:]])


def _weights(tokens: Tensor) -> Tensor:
    assert tokens.grad is not None
    return token_weights(tokens.grad)


@contextmanager
def _recorded(
    blocks: list[nn.Module],
) -> Iterator[tuple[list[Tensor], list[Call]]]:
    """While this is entered, tokens before each block and after the last are kept, and each block's other arguments."""
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
