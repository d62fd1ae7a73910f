"""WPAC (SKD): order the dimensions of every head and the units of every MLP by importance, with the same function.

Values are rotated onto the principal axes of their saliency-weighted covariance, queries and keys of a head together
onto theirs; hidden units are permuted. Rotary pairs of queries and keys stay where they are, and the layer gets a rule
that says which of them go first. Super-networks are then cut from the end.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..data.batches import Images, batches_in
from ..errors import UnknownNameError, VitrimError
from ..models.widths.attention_heads import AttentionHeads
from ..models.widths.compensation import Compensation, Moments
from ..models.widths.elastic_hidden import ElasticHidden
from ..models.widths.elastic_values import ElasticValues
from ..models.widths.sublayers import Elastic, elastic
from .orderings import ORDERINGS, Axes
from .pair_rule import make_rule
from .probing import batches, frozen, output_of, world_size
from .statistics import HeadSums, Sums, UnitSums, collect

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Ridges, as fractions of the mean variance, of which each sub-layer gets the best one for its regression."""
TOKENS_PER_UNIT = 4


@dataclass(frozen=True)
class Ordered:
    """What an ordering did.

    max_difference: largest change of any output on a batch of images; rounding only.
    compensations: per sub-layer what makes up for its lost units, in the new order.
    shares: per sub-layer the importance of each unit of width, in the new order.
    """

    max_difference: float
    compensations: dict[str, Compensation]
    shares: dict[str, Tensor]


def wpac(
    model: nn.Module,
    data: Images,
    *,
    num_images: int = 1024,
    labels: bool = False,
    ordering: str = "wpac",
    width_multiple: int = 8,
    say: Callable[[str], None] = print,
) -> Ordered:
    """Order all sub-layers of the model in place, and check on images that its outputs are the same.

    Args:
        model: any model that an adapter serves.
        data: images in any form that `batches_in` takes.
        num_images: number of images to use, over all processes together.
        labels: use the logit of the true class instead of that of the predicted class.
        ordering: a name in `ORDERINGS`.
        width_multiple: of what rotary pairs and values are cut in, see `pair_rule`.
        say: called with one line about the largest difference.

    Raises:
        UnsupportedModelError: a gate or a norm forbids the rotation.
        VitrimError: the outputs changed by more than rounding; the model must not be used then.
    """
    if ordering not in ORDERINGS:
        raise UnknownNameError("ordering", ordering, ORDERINGS)
    source = batches_in(data)
    first = list(itertools.islice(source, 1))
    sums = collect(model, itertools.chain(first, source), num_images, labels)
    images, _ = next(batches(first, model, 32 * world_size(), False))
    with frozen(model), torch.no_grad(), _exact_products():
        before = output_of(model, images)
        compensations, shares = apply(model, sums, ordering, width_multiple)
        after = output_of(model, images)
    difference = (before - after).abs().max().item()
    say(f"{ordering}: function preserved, max |difference| = {difference:.1e} ({before.dtype})".replace("torch.", ""))
    if line := few_tokens(sums):
        say(line)
    limit = {torch.float64: 1e-10, torch.float32: 1e-5}.get(before.dtype, 5e-2) * max(1.0, before.abs().max().item())
    if not difference <= limit:
        raise VitrimError(f"{ordering} changed the outputs by {difference:.1e}, more than {limit:.1e}")
    return Ordered(difference, compensations, shares)


def few_tokens(sums: Mapping[str, Sums]) -> str | None:
    """One line for the user where the regression rests on few tokens, else None."""
    tokens = min(int(each.tokens) for each in sums.values())
    units = max(each.moments[0].first.numel() for each in sums.values())
    if tokens >= TOKENS_PER_UNIT * units:
        return None
    return f"warning: {tokens:,} tokens are few for a regression of {units:,} units; give more images"


@contextmanager
def _exact_products() -> Iterator[None]:
    """Matrix products in full float32 within this context, where TensorFloat-32 would round to three digits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def apply(
    model: nn.Module, sums: Mapping[str, Sums], ordering: str, width_multiple: int = 8
) -> tuple[dict[str, Compensation], dict[str, Tensor]]:
    """Change the weights; returns compensations and shares, see `Ordered`."""
    axes_of, order_of, pairs_of = ORDERINGS[ordering]
    compensations: dict[str, Compensation] = {}
    shares: dict[str, Tensor] = {}
    with elastic(model) as layers:
        for name, each in sums.items():
            layer = layers[name]
            if isinstance(each, UnitSums):
                assert isinstance(layer, ElasticHidden)
                order = order_of(layer, each)
                layer.order_units(order)
                moments, held_out = (one.ordered(order) for one in each.moments)
                shares[name] = each.taylor[order]
            else:
                assert isinstance(layer, AttentionHeads)
                value, query_key = _turned(layer, each, axes_of(layer, each))
                shares[name] = each.energy(value, query_key)
                axes = layer.of_every_head(value)
                moments, held_out = (one.rotated(axes).ordered(layer.inputs) for one in each.moments)
            compensations[name] = compensation_of(layer, moments, held_out)
            if isinstance(each, HeadSums) and each.pairs is not None and each.pairs.weight > 0:
                assert isinstance(layer, ElasticValues)
                errors = compensations[name].unexplained(layer.last_by_units)[:: layer.num_heads]
                layer.vitrim_rule, factors = make_rule(layer, each.pairs, pairs_of, errors, width_multiple)
                compensations[name] = replace(compensations[name], pairs=factors.float())
    return compensations, shares


def _turned(layer: AttentionHeads, sums: HeadSums, axes: Axes) -> Axes:
    """Turn the heads of a layer to these axes; the axes that they took."""
    value, query_key = axes
    if query_key is None or layer.rotates_query_key:
        layer.rotate(value, query_key)
        return axes
    order = sums.taylor_SHh[:2].sum((0, 1)).argsort(descending=True, stable=True)
    layer.rotate(value)
    layer.order_query_key(order)
    return value, torch.eye(len(order), dtype=value.dtype, device=value.device)[:, order].expand_as(value)


def compensation_of(layer: Elastic, moments: Moments, held_out: Moments) -> Compensation:
    """The regression of all images, with the ridge of which that of `moments` predicts the held-out images best.

    The widths at which ridges are compared are the quarters of the full one. The largest ridge if nothing is held out.
    """
    weight, bias = layer.last_by_units, layer.last.bias is not None
    ridge = max(RIDGES)
    if held_out.weight > 0 and moments.weight > 0:
        kept = [layer.kept_inputs(layer.full_width * quarter // 4) for quarter in (1, 2, 3)]

        def error(ridge: float) -> float:
            tried = Compensation(moments.mean, moments.factor(ridge, bias))
            return sum(held_out.error(weight, tried, each, bias).log().item() for each in kept)

        ridge = min(RIDGES, key=error)
    together = moments + held_out
    # Contiguous as after reading it from a file, so that both give the same bits.
    return Compensation(together.mean.float(), together.factor(ridge, bias).float().contiguous())
