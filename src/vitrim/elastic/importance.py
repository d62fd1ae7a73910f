"""How much each unit of width and each whole sub-layer matters to the network at its present widths."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models import num_classes
from ..models.sublayers import elastic
from ..tokens.precision import exact, exact_device
from .probing import Batch, all_reduce, batches, frozen, is_headless, output_of
from .sampler import narrowed
from .statistics import collect

Loss = Callable[[Tensor, Tensor | None, Tensor], Tensor]
"""(output, labels or None, output of the full network) -> sum of the loss over the images."""


def unit_shares(
    model: nn.Module, data: Iterable[Batch], widths: Mapping[str, int], *, num_images: int = 1024, labels: bool = False
) -> dict[str, Tensor]:
    """Taylor importance |G F| of every unit at these widths; in attention summed over heads and over q, k, v."""
    with narrowed(model, widths):
        sums = collect(model, data, num_images, labels, covariance=False)
    return {name: each.taylor for name, each in sums.items()}


def probe_loss(model: nn.Module, labels: bool) -> Loss:
    """The loss whose rise says how much a sub-layer matters.

    With labels, cross-entropy. Without, cross-entropy with the full network's own probabilities; for a model without
    a head, one plus the relative squared distance from the full network's features; for one of a single class, whose
    cross-entropy is always 0, one plus the squared distance from the full network's logit.
    """
    if is_headless(model):
        return lambda out, _, full: (1 + (out - full).square().sum(1) / full.square().sum(1)).sum()
    if num_classes(model) == 1:
        return lambda out, _, full: (1 + (out - full).square().sum(1)).sum()
    if labels:
        return _cross_entropy
    return lambda out, _, full: F.cross_entropy(out, full.softmax(1), reduction="sum")


def _cross_entropy(out: Tensor, target: Tensor | None, full: Tensor) -> Tensor:
    assert target is not None
    return F.cross_entropy(out, target, reduction="sum")


@torch.no_grad()
def sensitivities(
    model: nn.Module, data: Iterable[Batch], widths: Mapping[str, int], *, num_images: int = 64, labels: bool = False
) -> dict[str, float]:
    """Relative rise of the loss when one sub-layer of the network of these widths is removed, for each of them.

    Removed means that it adds its constant bias and nothing else, exactly what extraction leaves at width 0. Negative
    where the network does better without. Costs half a forward pass of the images per sub-layer.

    The loss is computed in float64, where that of a very confident network is less often 0. Relative to a loss of 0 any
    rise is very large, and no rise is 0.
    """
    loss = probe_loss(model, labels)
    with elastic(model) as layers, frozen(model):
        blocks = [block for block in model.modules() if any(child in layers.values() for child in block.children())]
        present = {name: width for name, width in widths.items() if width > 0}
        home = {name: next(b for b in blocks if layers[name] in b.children()) for name in present}
        totals = torch.zeros(len(present) + 1, dtype=torch.float64)
        whole = {name: layer.full_width for name, layer in layers.items()}
        for images, target in batches(data, model, num_images, labels):
            with narrowed(model, whole):
                full = exact(output_of(model, images))
            target = None if target is None else target.to(full.device)
            with narrowed(model, widths):
                out, inputs = _run_and_keep(model, blocks, images)
                totals[0] += loss(exact(out), target, full).cpu()
                for index, name in enumerate(present, 1):
                    with narrowed(model, {name: 0}), _skipping(blocks, home[name], inputs):
                        totals[index] += loss(exact(output_of(model, images)), target, full).cpu()
        device = exact_device(next(model.parameters()).device)
    totals = all_reduce(totals.to(device)).cpu()
    rises = (totals[1:] - totals[0]) / totals[0].clamp_min(torch.finfo(torch.float32).tiny)
    return dict(zip(present, rises.tolist(), strict=True))


def _run_and_keep(model: nn.Module, blocks: list[nn.Module], images: Tensor) -> tuple[Tensor, dict[nn.Module, Tensor]]:
    """The output for these images, and the tokens that enter each block on the way."""
    inputs: dict[nn.Module, Tensor] = {}
    hooks = [block.register_forward_pre_hook(lambda block, args: inputs.update({block: args[0]})) for block in blocks]
    try:
        return output_of(model, images), inputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _skipping(blocks: list[nn.Module], first: nn.Module, inputs: Mapping[nn.Module, Tensor]) -> Iterator[None]:
    """Blocks before `first` return what enters it, which later changes do not affect: saves half of the work."""
    earlier = blocks[: blocks.index(first)]
    for block in earlier:
        block.forward = lambda *_, **__: inputs[first]
    try:
        yield
    finally:
        for block in earlier:
            del block.forward
