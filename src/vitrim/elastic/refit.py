"""Fit the last projections of a cut network again, block after block, to what the full network does.

A compensation knows the inputs of a projection in the full network. In a cut network they differ, since every block
before has changed them a little, and the errors add up. Here each projection is fitted on what the cut network itself
makes, in a ridge regression: the sum of its output and the tokens before it has to be that of the full network, so that
it also makes up for the errors of the blocks before. In closed form, without labels, and free at run time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import Images
from ..errors import DataError, VitrimError
from ..models import Adapter, attached
from ..models.finding import find_adapter
from ..models.removed_branch import RemovedBranch
from ..models.widths.compensation import TINY, Moments, cholesky
from ..models.widths.slicing import store
from ..models.widths.sublayers import Elastic, elastic
from ..tokens.precision import exact, exact_device, wide
from .block_tokens import Goal, Tokens, branch_scale, observe
from .probing import all_reduce, batches, frozen
from .statistics import tensors_in
from .token_weights import held_out_images

RIDGES = (1e-2, 1e-1, 1.0, 10.0)
"""Ridges, as fractions of the mean variance; a projection takes the one that is best on held-out images, or none."""
LEAST_IMAGES = 16


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


class Refitting:
    """Fits networks that were cut from one original to it; what the original does is found once for all of them.

    Args:
        original: the full network, whose tokens after each sub-layer are the goal.
        data: images in any form that `batches_in` takes; labels are not used.
        num_images: number of images to use; the tokens that enter the first block are kept for them, and while a
            network is fitted all tokens of one layer, twice.

    Raises:
        VitrimError: a token reduction is attached.
        DataError: the data holds fewer than 16 images.
    """

    def __init__(self, original: nn.Module, data: Images, *, num_images: int = 1024) -> None:
        _check_whole(original)
        self.original, self.blocks = original, list(find_adapter(original).blocks(original))
        with frozen(original):
            self.goals = [
                Goal.of(original, self.blocks, images) for images, _ in batches(data, original, num_images, False)
            ]
        if (images := sum(len(goal.images) for goal in self.goals)) < LEAST_IMAGES:
            raise DataError(f"{images} images are too few to fit and to check on; give {LEAST_IMAGES} or more")

    def fit(self, network: nn.Module) -> None:
        """Fit the last projection of every sub-layer of a cut network again, in place; see `refit`."""
        adapter, ours = _cut_from(network, self.original)
        branches = adapter.branches_of(network)
        with frozen(network), frozen(self.original):
            flows = [Tokens.before_blocks(network, ours, goal) for goal in self.goals]
            with elastic(network), torch.no_grad():
                for index, (block, reference) in enumerate(zip(ours, self.blocks, strict=True)):
                    for branch in branches:
                        _refit_branch(block, reference, branches, branch, flows, index)
                    for flow in flows:
                        flow.cut = flow.cut_calls[index](block, flow.cut)


def refit(network: nn.Module, original: nn.Module, data: Images, *, num_images: int = 1024) -> None:
    """Fit the last projection of every sub-layer of a cut network again, in place.

    Args:
        network: cut from `original`: the same blocks with narrower or removed sub-layers, in any dtype.
        original, data, num_images: see `Refitting`, which fits several networks. The cost is about that of six forward
            passes.

    Raises:
        VitrimError: the networks do not belong together, a token reduction is attached, or a fit is not finite.
        DataError: the data holds fewer than 16 images.
    """
    _cut_from(network, original)
    Refitting(original, data, num_images=num_images).fit(network)


def _cut_from(network: nn.Module, original: nn.Module) -> tuple[Adapter, list[nn.Module]]:
    """The adapter and the blocks of a cut network; `VitrimError` where it was not cut from this original."""
    _check_whole(network)
    _check_whole(original)
    if network is original:
        raise VitrimError("refit needs the network that was cut and the one that it was cut from; these are the same")
    adapter = find_adapter(network)
    ours, theirs = list(adapter.blocks(network)), list(find_adapter(original).blocks(original))
    if type(network) is not type(original) or len(ours) != len(theirs):
        raise VitrimError("the network was not cut from this original: other blocks")
    return adapter, ours


def _check_whole(network: nn.Module) -> None:
    if attached(network) is not None:
        raise VitrimError("refit compares all tokens of two networks; call it before tokens are reduced")


def _refit_branch(
    block: nn.Module, reference: nn.Module, branches: Mapping[str, str], branch: str, flows: list[Tokens], index: int
) -> None:
    """Fit the last projection of one branch; the last branch of a block also moves `flow.full` behind it."""
    layer: Any = block.get_submodule(branch)
    removed = isinstance(layer, RemovedBranch)
    if not removed and not isinstance(layer, Elastic):  # Attention that always stays.
        return
    weight: Tensor | None = None if removed else layer.last.weight
    bias: Tensor | None = layer.bias if removed else layer.last.bias
    most, held_out = _sums_of_branch(block, reference, branches, branch, flows, index)
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


def _sums_of_branch(
    block: nn.Module, reference: nn.Module, branches: Mapping[str, str], branch: str, flows: list[Tokens], index: int
) -> tuple[Fit, Fit]:
    """Sums over the images that a branch is fitted on, and over those that are held out."""
    layer: Any = block.get_submodule(branch)
    removed = isinstance(layer, RemovedBranch)
    inputs, outputs = (0, layer.bias.numel()) if removed else (layer.last.in_features, layer.last.out_features)
    device = exact_device(flows[0].cut.device)
    most, held_out = Fit.zeros(inputs, outputs, device), Fit.zeros(inputs, outputs, device)
    wanted = ("before", "output") if removed else ("before", "output", "inputs")
    for flow in flows:
        goal = observe(reference, branches, branch, flow.full, flow.full_calls[index], ("before", "output", "after"))
        now = observe(block, branches, branch, flow.cut, flow.cut_calls[index], wanted)
        if branch == list(branches)[-1]:  # Its tokens in this block are not needed any more.
            flow.full = goal["after"]
        errors = goal["output"] - now["output"]
        if (scale := branch_scale(goal["before"], goal["output"], goal["after"])) is not None:
            errors = errors + (goal["before"] - now["before"]) * scale
        given = errors[..., :0] if removed else now["inputs"]
        apart = held_out_images(len(errors), errors.device)
        for sums, chosen in ((most, ~apart), (held_out, apart)):
            sums.add(*(wide(x[chosen].flatten(0, 1)).to(device) for x in (given, errors, flow.weights[index])))
    return most, held_out


def best_ridge(most: Fit, held_out: Fit, bias: bool) -> float | None:
    """The ridge whose fit lowers the error on held-out images most; None if each raises it."""
    gains = {ridge: held_out.gain(*most.solve(ridge, bias)) for ridge in RIDGES}
    best = max(gains, key=lambda ridge: gains[ridge])
    return best if gains[best] > 0 else None
