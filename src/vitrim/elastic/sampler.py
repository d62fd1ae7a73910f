"""Running one sub-network of a super-network, and the rules by which training draws them."""

import logging
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from ..errors import UnknownNameError
from ..models.sublayers import Elastic, elastic

RULES: dict[str, Callable[[random.Random, int], tuple[int, ...]]] = {
    "sandwich": lambda rng, size: (0, size - 1, rng.randrange(size)),
    "uniform": lambda rng, size: (rng.randrange(size),),
    "original": lambda rng, size: (rng.randrange(max(size - 1, 1)),),
}
"""Name -> (generator, networks in the chain) -> the networks that one step trains, largest first of a sandwich.

sandwich: full, smallest and a random one. uniform: any one. original: any one but the smallest, as SKD published it.
"""
log = logging.getLogger(__name__)


def draw(rule: str, size: int, seed: int, step: int) -> tuple[int, ...]:
    """The networks to train at this step. A function of (seed, step) alone: processes agree, resuming is exact."""
    if rule not in RULES:
        raise UnknownNameError("sampling rule", rule, RULES)
    drawn = RULES[rule](random.Random(f"{seed} {step}"), size)
    log.debug("step %d trains networks %s of %d", step, drawn, size)
    return drawn


@contextmanager
def narrowed(model: nn.Module, widths: Mapping[str, int]) -> Iterator[None]:
    """Within this context the model runs on the leading `widths` of its sub-layers, in smaller matrix products."""
    with elastic(model) as layers:
        before = {name: layer.vitrim_width for name, layer in layers.items()}
        set_widths(layers, widths)
        try:
            yield
        finally:
            set_widths(layers, before)


def set_widths(layers: Mapping[str, Elastic], widths: Mapping[str, int]) -> None:
    """Choose the widths of the next forward pass."""
    for name, width in widths.items():
        layers[name].vitrim_width = width
