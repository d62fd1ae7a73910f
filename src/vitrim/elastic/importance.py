"""How much each unit of width and each whole sub-layer matters to the network as it is now."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.sublayers import Elastic, elastic
from .sampler import narrowed
from .statistics import Batch, all_reduce, batches, collect, frozen, is_headless, output_of

Loss = Callable[[Tensor, Tensor | None, Tensor], Tensor]
"""(output, labels or None, output of the full network) -> sum of the loss over the images."""


def unit_shares(
    model: nn.Module, data: Iterable[Batch], widths: Mapping[str, int], *, num_images: int = 1024, labels: bool = False
) -> dict[str, Tensor]:
    """First-order Taylor importance |G F| of every unit that network has; of attention, summed over heads and q, k, v."""
    with narrowed(model, widths):
        sums = collect(model, data, num_images, labels, covariance=False)
    return {name: each.taylor for name, each in sums.items()}


def probe_loss(model: nn.Module, labels: bool) -> Loss:
    """Loss by which sub-layers are judged.

    With labels, cross-entropy. Without, cross-entropy with the full network's own probabilities; for a model without
    a head, one plus the relative squared distance from the full network's features.
    """
    if is_headless(model):
        return lambda out, _, full: (1 + (out - full).square().sum(1) / full.square().sum(1)).sum()
    if labels:
        return lambda out, target, _: F.cross_entropy(out, target, reduction="sum")
    return lambda out, _, full: F.cross_entropy(out, full.softmax(1), reduction="sum")


@torch.no_grad()
def sensitivities(
    model: nn.Module, data: Iterable[Batch], widths: Mapping[str, int], *, num_images: int = 64, labels: bool = False
) -> dict[str, float]:
    """Relative rise of the loss when one sub-layer of the network of these widths is removed, for each of them.

    Removed means that it adds its constant bias and nothing else, exactly what extraction leaves at width 0. Negative
    where the network does better without. Costs one forward pass of the images per sub-layer.
    """
    loss = probe_loss(model, labels)
    names = [name for name, width in widths.items() if width > 0]
    totals = torch.zeros(len(names) + 1, dtype=torch.float64)
    with elastic(model) as layers, frozen(model):
        for images, target in batches(data, model, num_images, labels):
            full = _run(model, layers, {name: layer.full_width for name, layer in layers.items()}, images)
            for index, gone in enumerate([None, *names]):
                present = {**widths, gone: 0} if gone is not None else widths
                totals[index] += loss(_run(model, layers, present, images), target, full).double().cpu()
        device = next(model.parameters()).device
    totals = all_reduce(totals.to(device)).cpu()
    return {name: (value / totals[0] - 1).item() for name, value in zip(names, totals[1:], strict=True)}


def _run(model: nn.Module, layers: Mapping[str, Elastic], widths: Mapping[str, int], images: Tensor) -> Tensor:
    with narrowed(model, widths):
        return output_of(model, images)
