"""Seeds: every random choice is a function of what it is for, the seed of the run, and where in the run it is made.

No random state passes from one step or image to the next. So a resumed run, and a run with another number of worker
processes, draws exactly the same numbers.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch

Purpose = Literal[
    "weights",  # (seed): initial weights.
    "subset",  # (seed): which training images are used (`data.limit`) and which of them are held out.
    "order",  # (seed, epoch): order of the training images.
    "augment",  # (seed, view, index): augmentation of one image.
    "step",  # (seed, epoch, step, process): dropout, drop path and mixing of one step.
    "networks",  # (seed, update): sub-networks that one update trains.
    "probe",  # (seed): training images on which importance is measured.
    "entropy",  # (seed): held-out images on which attention entropy is measured.
    "moved",  # (digit, copy): how a built-in digit is turned, shifted and scaled.
    "compress",  # (seed): images of a search for a cheaper model, and those of its certificate.
    "export",  # (seed): noise as small as rounding, to see whether it decides which tokens stay.
    "sweep",  # (seed): order in which a sweep reads test images.
]
"""What a random choice is for. It is part of every seed, so that no two choices share one."""


def mix(purpose: Purpose, *numbers: int) -> int:
    """One 63-bit seed for a purpose and any numbers; all of it counts, so `mix(p, 5)` and `mix(p, 5, 0)` differ."""
    return int.from_bytes(_digest(purpose, numbers)[:8], "little") >> 1


def permutation(length: int, purpose: Purpose, *numbers: int) -> list[int]:
    """The numbers below `length` in an order that depends on nothing but the seed."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(mix(purpose, *numbers))).tolist()


def seed_everything(purpose: Purpose, *numbers: int) -> None:
    """Seed the global generators of Python, NumPy and torch, the latter on all devices."""
    _seed(purpose, numbers, torch.manual_seed)


@contextmanager
def seeded(purpose: Purpose, *numbers: int) -> Iterator[None]:
    """Seed the global generators of the CPU within the context, and restore their state after it."""
    with restored_generators(devices=False):
        # `torch.manual_seed` would also queue a call to CUDA, for every image.
        _seed(purpose, numbers, torch.default_generator.manual_seed)
        yield


@contextmanager
def restored_generators(*, devices: bool = True) -> Iterator[None]:
    """Restore the global generators of Python, NumPy and torch (and of all CUDA devices) when the context ends."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if devices and torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def _seed(purpose: Purpose, numbers: tuple[int, ...], seed_torch: Callable[[int], object]) -> None:
    digest = _digest(purpose, numbers)  # A part of it for each library, so that their numbers are unrelated.
    seed_torch(int.from_bytes(digest[:8], "little") >> 1)
    random.seed(digest[8:16])
    np.random.seed(int.from_bytes(digest[16:20], "little"))


def _digest(purpose: str, numbers: tuple[int, ...]) -> bytes:
    return hashlib.sha256(" ".join([purpose, *(str(int(number)) for number in numbers)]).encode()).digest()
