"""Images that need no download: scikit-learn's handwritten digits, as they are, and moved."""

import math
import random
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from .seeding import mix

SIDE = 8
"""Height and width of a digit in pixels."""
FINE = 4
"""A moved digit has so many pixels for each of the digit's, so that its parts lie between those."""
TURN, SHIFT, SCALE = 20.0, 1.0, 1.2
"""How far digits are moved at most: degrees to either side, pixels of the digit, and factor of size or its inverse."""
INK = 128
"""The least brightness, of 255, of a pixel that is part of the digit and not of its background."""
COPIES = 4
"""Moved copies of each training digit."""
CLASSES = [str(digit) for digit in range(10)]


class Digits:
    """scikit-learn's 1,797 handwritten digits, 8x8: every fifth of each class is for testing.

    numbers: of each digit in scikit-learn's data set.
    """

    def __init__(self, train: bool) -> None:
        images, targets = _digits()
        position = np.zeros(len(targets), dtype=int)
        for digit in range(10):
            where = np.flatnonzero(targets == digit)
            position[where] = np.arange(len(where))
        chosen = (position % 5 != 0) if train else (position % 5 == 0)
        self.pixels = (images[chosen] * (255 / 16)).round().astype(np.uint8)
        self.targets = targets[chosen]
        self.numbers = np.flatnonzero(chosen)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), int(self.targets[index])


class MovedDigits:
    """The same digits, each turned, shifted and scaled at random, but always in the same way; on 32 px.

    The same digits are for testing, so that a network which was trained on either form has seen none of them. There are
    several copies of each training digit, moved differently: held-out images show digits that training images show too.
    """

    def __init__(self, train: bool) -> None:
        self.digits, self.copies = Digits(train), COPIES if train else 1

    def __len__(self) -> int:
        return self.copies * len(self.digits)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image, target, draw = self._drawn(index)
        return _moved(image, draw), target

    def with_mask(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Image `index`, and what each of its pixels shows, (height, width) of uint8: 0 background, 1 + d the digit d.

        A pixel of the digit is one that has at least half of the most ink, before it is moved. Both are moved alike.
        """
        image, target, draw = self._drawn(index)
        large, move = _enlarged(image), _move(draw)
        ink = large.point([255 * (level >= INK) for level in range(256)])
        mask = np.asarray(_carried(ink, move, Image.Resampling.NEAREST)) > 0
        return _carried(large, move, Image.Resampling.BICUBIC), mask * np.uint8(1 + target)

    def _drawn(self, index: int) -> tuple[Image.Image, int, random.Random]:
        """The digit before it is moved, its class, and the draw of its move."""
        copy, row = divmod(index, len(self.digits))
        return *self.digits[row], random.Random(mix("moved", int(self.digits.numbers[row]), copy))


def _moved(image: Image.Image, draw: random.Random) -> Image.Image:
    return _carried(_enlarged(image), _move(draw), Image.Resampling.BICUBIC)


def _enlarged(image: Image.Image) -> Image.Image:
    return image.resize((FINE * SIDE, FINE * SIDE), Image.Resampling.BICUBIC)


def _move(draw: random.Random) -> tuple[float, ...]:
    """A move as Pillow takes it: the coefficients that say where the colour of each pixel comes from."""
    angle, scale = math.radians(draw.uniform(-TURN, TURN)), SCALE ** draw.uniform(-1, 1)
    dx, dy = (FINE * draw.uniform(-SHIFT, SHIFT) for _ in "xy")
    cos, sin, centre = math.cos(angle) / scale, math.sin(angle) / scale, FINE * SIDE / 2
    return (
        *(cos, sin, centre - cos * (centre + dx) - sin * (centre + dy)),
        *(-sin, cos, centre + sin * (centre + dx) - cos * (centre + dy)),
    )


def _carried(large: Image.Image, move: tuple[float, ...], resampling: Image.Resampling) -> Image.Image:
    return large.transform(large.size, Image.Transform.AFFINE, move, resampling)


BUILT_IN: dict[str, Any] = {"digits": Digits, "digits-moved": MovedDigits}
"""Data sets that need no folder."""


@cache
def _digits() -> tuple[Any, Any]:
    """Images and labels, read once, since that takes longer than a small evaluation."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    return bunch.images, bunch.target
