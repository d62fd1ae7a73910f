"""Options for images: which ones, and how training images are augmented. Plain data, no torch."""

import re
from dataclasses import dataclass
from typing import Literal

from ..errors import RecipeError
from ..options import check_ranges

_RANDAUGMENT = re.compile(
    r"rand(-(m\d+|n[1-9]\d*|p(0|0\.\d+|1|1\.0+)|mstd\d+(\.\d+)?|mmax[1-9]\d*|inc[01]|t(weights|3aw|3a)))*"
)


@dataclass
class DataSpec:
    """Which images.

    Args:
        name: "digits" (scikit-learn's, built in), "folder" (one folder per split, in it one per class), or any
            data set name of timm's reader, such as torch/cifar10, hfds/uoft-cs/cifar10 or wds/....
        root: folder of the data set, or where to download it to.
        download: fetch the data set if the reader can.
        train_split: name of the training split.
        test_split: name of the test split; by default test, val or validation, whichever exists.
        holdout: fraction of the training images set aside to choose the epoch; the test images are read once.
        limit: use so many training images at most, the same for a given seed.
        image_size: side of the square input in pixels; by default the model's own.
        crop_pct: centre crop at evaluation; by default the model's own.
        workers: processes that read images; 0 reads them in the training process.
        on_corrupt: "skip" replaces an unreadable image by the next one and counts it, "refuse" stops.
    """

    name: str = "digits"
    root: str | None = None
    download: bool = False
    train_split: str = "train"
    test_split: str | None = None
    holdout: float = 0.1
    limit: int | None = None
    image_size: int | None = None
    crop_pct: float | None = None
    workers: int = 2
    on_corrupt: Literal["skip", "refuse"] = "refuse"

    def check(self) -> None:
        """Raise `RecipeError` for numbers that make no sense."""
        check_ranges(
            ("data.holdout", self.holdout, 0, 0.9),
            ("data.limit", self.limit, 1, None),
            ("data.image_size", self.image_size, 1, None),
            ("data.crop_pct", self.crop_pct, 0.01, 1),
            ("data.workers", self.workers, 0, None),
        )


@dataclass
class AugmentSpec:
    """How training images are varied.

    Args:
        crop: "none", "pad" (shift by up to an eighth, zeros come in), or "resized" (random resized crop).
        scale: smallest area of a "resized" crop.
        flip: mirror every second image.
        randaugment: timm's configuration string, such as rand-m9-n2-mstd0.5.
        erasing: probability of random erasing.
        mixup: alpha of mixup, 0 = off.
        cutmix: alpha of cutmix, 0 = off.
        mix_prob: probability that a batch is mixed at all.
        smoothing: label smoothing.
        views: forms of each image that the epochs show in turn; by default every epoch has one of its own.
    """

    crop: Literal["none", "pad", "resized"] = "none"
    scale: float = 0.08
    flip: bool = False
    randaugment: str | None = None
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    smoothing: float = 0.0
    views: int | None = None

    def check(self) -> None:
        """Raise `RecipeError` for numbers that make no sense."""
        check_ranges(
            ("augment.scale", self.scale, 0, 1),
            ("augment.erasing", self.erasing, 0, 1),
            ("augment.mixup", self.mixup, 0, None),
            ("augment.cutmix", self.cutmix, 0, None),
            ("augment.mix_prob", self.mix_prob, 0, 1),
            ("augment.smoothing", self.smoothing, 0, 0.999),
            ("augment.views", self.views, 1, None),
        )
        if self.randaugment is not None and not _RANDAUGMENT.fullmatch(self.randaugment):
            raise RecipeError(
                f"augment.randaugment is {self.randaugment!r}; it must be rand-, then parts such as m9, n2, p0.5, "
                "mstd0.5 or inc1: rand-m9-n2-mstd0.5"
            )
