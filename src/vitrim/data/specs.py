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
        name: "digits" (scikit-learn's, built in), "folder" (ROOT/SPLIT/CLASS/image.jpg), or the name of a data set
            for timm's readers, such as torch/cifar10, hfds/uoft-cs/cifar10 or wds/NAME.
        root: folder of the data set, or where to download it to.
        download: fetch the data set if the reader can.
        train_split: name of the training split.
        test_split: name of the test split; by default test, val or validation, whichever exists.
        holdout: fraction of the training images, below 0.9, that is held out to choose the epoch on; 0 holds none out
            and keeps the last epoch.
        limit: use at most so many training images, held-out ones included; the same seed chooses the same ones.
        image_size: side of square images in pixels; by default the model's own.
        crop_pct: share of the resized image that evaluation crops out; by default the model's own.
        workers: processes that read images; 0 reads them in the process that computes.
        on_corrupt: "refuse" stops at an image that cannot be read; "skip" takes the next one instead and counts it.
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
        crop: "none" (resized and cropped as in evaluation), "pad" (the same, then shifted by up to an eighth; the
            border is black), or "resized" (random resized crop).
        scale: smallest area of a "resized" crop, as a fraction of the image.
        flip: mirror images with probability 1/2.
        randaugment: timm's configuration string, such as rand-m9-n2-mstd0.5.
        erasing: probability of random erasing.
        mixup: alpha of mixup; 0 switches it off.
        cutmix: alpha of CutMix; 0 switches it off.
        mix_prob: probability that a batch is mixed.
        smoothing: label smoothing.
        views: random forms per image, shown in turn by the epochs; by default every epoch shows a new one.
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
