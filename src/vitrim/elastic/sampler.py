"""Run one sub-network of a super-network, and the rules by which training draws them."""

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
"""Name -> parts of the networks in one step, in order -> (generator, length of the chain) -> index of the network.

sandwich: full, smallest and a random one. uniform: any one. original: any one but the smallest, as SKD published it.
"""


def draw(rule: str, size: int, seed: int, step: int) -> dict[str, int]:
    """The networks to train at this step, by part.

    It depends only on seed and step, so that processes agree and a resumed run draws the same.
    """
    if rule not in RULES:
        raise UnknownNameError("sampling rule", rule, RULES)
    rng = random.Random(mix("networks", seed, step))
    return {part: pick(rng, size) for part, pick in RULES[rule].items()}


@contextmanager
def narrowed(model: nn.Module, widths: Mapping[str, int]) -> Iterator[None]:
    """While this is entered, the model runs on the leading `widths` of its sub-layers, in smaller matrix products."""
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
