"""How much the loss rises when a sub-layer gets narrower: measured at a few widths, interpolated at the others."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.batches import Images
from ..models import num_classes
from ..models.widths.compensation import Compensation, tail_sums
from ..models.widths.sublayers import elastic
from ..tokens.precision import exact, exact_device
from .chain import Chain
from .probing import all_reduce, batches, frozen, is_headless, output_of
from .sampler import narrowed
from .statistics import collect

Loss = Callable[[Tensor, Tensor | None, Tensor], Tensor]
"""(output, labels or None, output of the full network) -> loss of every image (B,)."""
FRACTIONS = (0.75, 0.5, 0.0)
"""Parts of the present width at which the rise of the loss is measured."""


def taylor_curves(
    model: nn.Module, data: Images, widths: Mapping[str, int], *, num_images: int = 1024, labels: bool = False
) -> dict[str, Tensor]:
    """Expected loss (width + 1,) of every sub-layer when its leading 0, 1, ..., all units stay, without compensation.

    Added up from the Taylor importance |G F| of the lost units; in attention summed over heads and over q, k, v. Where
    positions are rotary it is that of the values, which lose dims as the queries and keys lose pairs.
    """
    with narrowed(model, widths):
        sums = collect(model, data, num_images, labels, covariance=False)
    with elastic(model) as layers:
        kept = {name: [layers[name].units_at(width) for width in range(widths[name] + 1)] for name in sums}
    return {name: tail_sums(each.taylor)[kept[name]] for name, each in sums.items()}


def rise_curves(
    model: nn.Module,
    data: Images,
    chain: Chain,
    expected: Mapping[str, Tensor],
    *,
    num_images: int = 64,
    labels: bool = False,
    compensations: Mapping[str, Compensation] | None = None,
) -> dict[str, Tensor]:
    """Rise of the mean loss (width + 1,) if a sub-layer of the smallest network keeps its leading 0, 1, ..., all units.

    Args:
        model: the super-network.
        data: batches of images, or of images and labels.
        chain: its networks; the smallest is the one that gets narrower.
        expected: per sub-layer the loss to be expected at every width, in any unit: the form between measurements.
        num_images: of which the mean is taken.
        labels: whether the loss compares with labels, see `probe_loss`.
        compensations: what makes up for lost units; None: nothing.
    """
    present = {name: width for name, width in chain.widths(-1).items() if width > 0}
    candidates = {name: probe_widths(width, chain.units[name].step) for name, width in present.items()}
    rises = measure_rises(
        model, data, chain.widths(-1), candidates, num_images=num_images, labels=labels, compensations=compensations
    )
    return {name: interpolate(rises[name] | {present[name]: 0.0}, expected[name]) for name in present}


def probe_widths(width: int, step: int) -> list[int]:
    """The widths at which a sub-layer is measured: multiples of `step` near `FRACTIONS` of the present width."""
    return sorted({min(round(width * part / step) * step, (width - 1) // step * step) for part in FRACTIONS})


def interpolate(measured: Mapping[int, float], expected: Tensor) -> Tensor:
    """A curve through measured values at some widths, 0 and the last one among them, in the form of the expected one.

    Args:
        measured: width -> value.
        expected: values in any unit at widths 0, 1, ..., n, which do not rise with the width.
    """
    curve = torch.zeros(len(expected), dtype=torch.float64)
    expected = exact(expected).cpu()
    for low, high in pairwise(sorted(measured)):
        form = expected[low : high + 1] - expected[high]
        if not form[0] > 0:  # Nothing is expected to change: a straight line.
            form = torch.linspace(1, 0, high - low + 1, dtype=torch.float64)
        curve[low : high + 1] = measured[high] + (measured[low] - measured[high]) * form / form[0]
    return curve


def probe_loss(model: nn.Module, labels: bool) -> Loss:
    """The loss whose rise says how much width matters.

    With labels, cross-entropy. Without, the divergence from the full network: KL of the logits; for a model without a
    head, one minus the cosine of the features, of maps on average over their places; for one of a single class, the
    squared distance of the logit.
    """
    if is_headless(model):
        return _apart
    if num_classes(model) == 1:
        return lambda out, _, full: (out - full).square().sum(1)
    if labels:
        return _cross_entropy
    return lambda out, _, full: F.kl_div(
        out.log_softmax(1), full.log_softmax(1), reduction="none", log_target=True
    ).sum(1)


def _apart(out: Tensor, _: Tensor | None, full: Tensor) -> Tensor:
    """One minus the cosine of features (B, C); of maps (B, C, ...) its mean over the places of each image."""
    return (1 - F.cosine_similarity(out, full, dim=1)).reshape(len(out), -1).mean(1)


def _cross_entropy(out: Tensor, target: Tensor | None, full: Tensor) -> Tensor:
    assert target is not None
    return F.cross_entropy(out, target, reduction="none")


@torch.no_grad()
def measure_rises(
    model: nn.Module,
    data: Images,
    widths: Mapping[str, int],
    candidates: Mapping[str, Sequence[int]],
    *,
    num_images: int = 64,
    labels: bool = False,
    compensations: Mapping[str, Compensation] | None = None,
) -> dict[str, dict[int, float]]:
    """Rise of the mean loss when one sub-layer of the network of these widths gets narrower, at each candidate width.

    Negative where the network does better so. The loss is computed in float64. Costs half a forward pass of the images
    per sub-layer and candidate, since blocks before the sub-layer are not run again.
    """
    loss = probe_loss(model, labels)
    with elastic(model) as layers, frozen(model):
        blocks = [block for block in model.modules() if any(child in layers.values() for child in block.children())]
        home = {name: next(b for b in blocks if layers[name] in b.children()) for name in candidates}
        tried = [(name, width) for name, narrower in candidates.items() for width in narrower]
        totals = torch.zeros(len(tried) + 1, dtype=torch.float64)
        count = torch.zeros((), dtype=torch.float64)
        full_widths = {name: layer.full_width for name, layer in layers.items()}
        for images, target in batches(data, model, num_images, labels):
            count += len(images)
            with narrowed(model, full_widths):
                full = exact(output_of(model, images))
            target = None if target is None else target.to(full.device)
            with narrowed(model, widths, compensations):
                out, inputs = _run_and_keep(model, blocks, images)
                totals[0] += loss(exact(out), target, full).sum().cpu()
                for index, (name, width) in enumerate(tried, 1):
                    with narrowed(model, {name: width}, compensations), _skipping(blocks, home[name], inputs):
                        totals[index] += loss(exact(output_of(model, images)), target, full).sum().cpu()
        device = exact_device(next(model.parameters()).device)
    totals, count = all_reduce(totals.to(device)).cpu(), all_reduce(count.to(device)).cpu()
    rises: dict[str, dict[int, float]] = {name: {} for name in candidates}
    for (name, width), rise in zip(tried, ((totals[1:] - totals[0]) / count).tolist(), strict=True):
        rises[name][width] = rise
    return rises


@torch.no_grad()
def divergences(
    model: nn.Module,
    data: Images,
    networks: Sequence[Mapping[str, int]],
    *,
    num_images: int = 64,
    compensations: Mapping[str, Compensation] | None = None,
) -> Tensor:
    """How far the outputs of networks of these widths are from those of the full one, (networks, images); no labels."""
    loss, found = probe_loss(model, False), []
    with elastic(model) as layers, frozen(model):
        full_widths = {name: layer.full_width for name, layer in layers.items()}
        for images, _ in batches(data, model, num_images, False):
            with narrowed(model, full_widths):
                full = exact(output_of(model, images))
            rows = []
            for widths in networks:
                with narrowed(model, widths, compensations):
                    rows.append(loss(exact(output_of(model, images)), None, full).cpu())
            found.append(torch.stack(rows))
    return torch.cat(found, 1)


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
