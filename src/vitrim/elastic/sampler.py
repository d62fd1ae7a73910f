"""Run one sub-network of a super-network, and the rules by which training draws them."""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from ..data.seeding import mix
from ..errors import UnknownNameError
from ..models.widths.compensation import Compensation
from ..models.widths.sublayers import STATE, elastic

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
def narrowed(
    model: nn.Module, widths: Mapping[str, int], compensations: Mapping[str, Compensation] | None = None
) -> Iterator[None]:
    """Within this context, the model runs on the leading `widths` of its sub-layers, in smaller matrix products.

    Args:
        model: the super-network.
        widths: of sub-layers, by name; those that are not named stay as they are.
        compensations: per sub-layer what makes up for its lost units; None: they add nothing.
    """
    with elastic(model) as layers:
        states = {name: {key: vars(layers[name])[key] for key in STATE} for name in widths}
        for name, width in widths.items():
            layers[name].run_at(width, None if compensations is None else compensations[name])
        try:
            yield
        finally:
            for name, state in states.items():
                vars(layers[name]).update(state)
