"""The chain of an ordered model by measurement, never worse than cutting every width by the same fraction.

For every sub-layer the rise of the divergence from the full network is measured at a few widths, on some images, with
compensation in place; between them it follows the error that the regression leaves. Sub-layers then lose width where
that costs least per MAC. This is repeated on the smallest network so far, so that what sub-layers do to each other is
measured too. Finally the networks, and those of blends with the even cut, are compared with the even cut at equal MACs.

Every repetition, and the comparison, has images of its own, since a chain follows the noise of the few images that it
was measured on, and looks far closer to the full network on them than on others.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..models.widths.compensation import Compensation
from ..models.widths.elastic_values import ElasticValues
from ..models.widths.sublayers import Elastic, elastic
from ..tokens.precision import exact
from .chain import Chain
from .growth import blend, grow, grow_evenly
from .importance import divergences, rise_curves
from .pair_rule import pair_errors
from .probing import Batch

BUDGETS = 12
"""At how many sizes, equally far apart, a chain is compared with the even cut."""
PARTS = (0.0, 0.25, 0.5, 0.75)
"""Parts of the even cut that are blended in for the comparison, until more of it brings a chain no closer."""
NOISE = 2.6
"""Standard errors above which a network counts as worse. One of 12 that are no worse gets there in 1 of 20 cases."""
NOTHING = 1e-9
"""A divergence that rounding alone makes."""


def measured_chain(
    model: nn.Module,
    start: Chain,
    probes: Sequence[Sequence[Batch]],
    compensations: Mapping[str, Compensation],
    *,
    max_saving: float,
    num_images: int,
    labels: bool = False,
) -> Chain:
    """The chain of networks from `start` to the saving `max_saving`.

    Args:
        model: with its units in order.
        start: the chain of the full network.
        probes: for each time that the rises are measured, batches of the images to measure on; last, those on which the
            chain is compared with the even cut.
        compensations: what makes up for lost units, per sub-layer.
        max_saving: fraction of the MACs that the smallest network saves.
        num_images: of each of the probes to use.
        labels: whether rises are those of the cross-entropy with the labels of the probes.
    """
    with elastic(model) as layers:
        expected = {name: expected_error(layer, compensations[name]) for name, layer in layers.items()}
    chain, (*measured, compared) = start, probes
    for number, probe in enumerate(measured, 1):
        widths = chain.widths(-1)
        forms = {name: form[: widths[name] + 1] for name, form in expected.items()}
        curves = rise_curves(
            model, probe, chain, forms, num_images=num_images, labels=labels, compensations=compensations
        )
        last = number == len(measured)
        # The last measurement orders all cuts that are left, so that blending finds the same ones in both chains.
        chain = grow(chain, curves, 1.0 if last else max_saving * number / len(measured))
    even = grow_evenly(start, 1.0)
    smallest = max(even.macs_at(-1), start.macs * (1 - max_saving))
    sizes = [start.macs - (start.macs - smallest) * step / BUDGETS for step in range(1, BUDGETS + 1)]

    def measure(one: Chain) -> Tensor:
        networks = [one.widths(one.largest("macs", size)) for size in sizes]
        return divergences(model, compared, networks, num_images=num_images, compensations=compensations)

    by_even = measure(even)
    best, best_ratio = blend(start, chain, even, 1.0, max_saving), 0.0
    for part in PARTS:
        blended = blend(start, chain, even, part, max_saving)
        found = measure(blended)
        ratio = log_ratio(found, by_even)
        if ratio < best_ratio and not worse(found, by_even).any():
            best, best_ratio = blended, ratio
        elif best_ratio < 0:  # More of the even cut brings it no closer.
            break
    return best


def log_ratio(one: Tensor, other: Tensor) -> float:
    """Mean over networks of the logarithm of the ratio of two mean divergences, both (networks, images)."""
    return ((one.mean(1) + NOTHING) / (other.mean(1) + NOTHING)).log().mean().item()


def expected_error(layer: Elastic, compensation: Compensation) -> Tensor:
    """Error of a sub-layer (width + 1,) that the regression leaves when it has width 0, 1, ..., the full one."""
    widths = range(layer.full_width + 1)
    errors = compensation.unexplained(layer.last_by_units).cpu()
    found = errors[[layer.kept_inputs(width) for width in widths]]
    if isinstance(layer, ElasticValues) and compensation.pairs is not None:
        found = found + pair_errors(exact(compensation.pairs)).cpu()[[layer.pairs_at(width) for width in widths]]
    return found


def worse(one: Tensor, other: Tensor) -> Tensor:
    """Which networks diverge more than others by more than noise; both (networks, images), paired by image."""
    difference = one - other
    error = difference.std(1) / difference.shape[1] ** 0.5 if difference.shape[1] > 1 else torch.zeros(len(one))
    return difference.mean(1) > NOISE * error + NOTHING
