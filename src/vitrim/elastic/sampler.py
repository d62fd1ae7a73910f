"""Running one sub-network of a super-network, and the rules by which training draws them."""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from ..data.seeding import mix
from ..errors import UnknownNameError
from ..models.sublayers import Elastic, elastic

RULES: dict[str, dict[str, Callable[[random.Random, int], int]]] = {
    "sandwich": {
        "full": lambda rng, size: 0,
        "smallest": lambda rng, size: size - 1,
        "random": lambda rng, size: rng.randrange(size),
    },
    "uniform": {"random": lambda rng, size: rng.randrange(size)},
    "original": {"random": lambda rng, size: rng.randrange(max(size - 1, 1))},
}
"""Name -> the parts that networks play in one step, in order -> (generator, networks in the chain) -> the network.

sandwich: full, smallest and a random one. uniform: any one. original: any one but the smallest, as SKD published it.
"""


def draw(rule: str, size: int, seed: int, step: int) -> dict[str, int]:
    """The networks to train at this step, by the part that each plays.

    A function of (seed, step) alone: processes agree, resuming is exact.
    """
    if rule not in RULES:
        raise UnknownNameError("sampling rule", rule, RULES)
    rng = random.Random(mix("networks", seed, step))
    return {part: pick(rng, size) for part, pick in RULES[rule].items()}


@contextmanager
def narrowed(model: nn.Module, widths: Mapping[str, int]) -> Iterator[None]:
    """Within this context the model runs on the leading `widths` of its sub-layers, in smaller matrix products."""
    with elastic(model) as layers:
        before = {name: layer.vitrim_width for name, layer in layers.items()}
        _apply_widths(layers, widths)
        try:
            yield
        finally:
            _apply_widths(layers, before)


def _apply_widths(layers: Mapping[str, Elastic], widths: Mapping[str, int]) -> None:
    """Choose the widths of the next forward pass."""
    for name, width in widths.items():
        layers[name].vitrim_width = width
