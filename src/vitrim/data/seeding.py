"""Randomness as a function of (seed, epoch, position) alone.

Nothing random survives from one step or sample to the next, so a resumed run, and a run with other numbers of
workers or processes, meets exactly the same dice.
"""

import random
from collections.abc import Callable

import numpy as np
import torch


def mix(*numbers: int) -> int:
    """One 32-bit seed from several numbers; neighbouring inputs give unrelated seeds."""
    return int(np.random.SeedSequence(list(numbers)).generate_state(1)[0])


def seed_host(*numbers: int) -> None:
    """Seed Python's, NumPy's and torch's generators on the CPU, which is what images are varied by."""
    # `torch.manual_seed` would note, for every image, a call to make once CUDA is there.
    _seed(mix(*numbers), torch.default_generator.manual_seed)


def seed_everything(*numbers: int) -> None:
    """Seed Python's, NumPy's and torch's generators, on all devices."""
    _seed(mix(*numbers), torch.manual_seed)


def _seed(seed: int, seed_torch: Callable[[int], object]) -> None:
    random.seed(seed)
    np.random.seed(seed)
    seed_torch(seed)
