"""Options for images: which ones, and how training images are augmented. Plain data, no torch."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from ..errors import RecipeError
from ..options import Range, check_options

_RANDAUGMENT = re.compile(
    r"rand(-(m\d{1,2}|n[1-9]\d?|p(0|0\.\d{1,9}|1|1\.0+)|mstd\d{1,3}(\.\d{1,9})?|mmax[1-9]\d{0,2}|inc[01]"
    r"|t(weights|3aw|3a)))*"
)
TEST_SPLITS = ("test", "val", "validation")
"""Names of the test split, in the order in which they are tried."""


@dataclass
class DataSpec:
    """Which images.

    Args:
        name: "digits" (scikit-learn's, built in), "digits-moved" (the same, turned, shifted and scaled; four copies of
            each training digit), "folder" (ROOT/SPLIT/CLASS/image.jpg), or the name of a data set for timm's readers,
            such as torch/cifar10, hfds/uoft-cs/cifar10 or wds/NAME; by default folder where root is given.
        root: folder of the data set, or where to download it to.
        download: fetch the data set if the reader can.
        train_split: name of the training split.
        test_split: name of the test split; by default test, val or validation, the first of them that exists and
            has classes.
        holdout: fraction of the training images that is held out to choose the epoch on; 0 holds none out
            and keeps the last epoch.
        limit: largest number of training images, held-out ones included; the same seed chooses the same ones.
        image_size: side of square images in pixels; by default the model's own.
        crop_pct: share of the resized image that evaluation crops out; by default the model's own.
        workers: processes that read images; 0 reads them in the process that computes.
        on_corrupt: "refuse" stops at an image that cannot be read; "skip" counts it and takes the next one.
    """

    name: str = ""
    root: str | None = None
    download: bool = False
    train_split: str = "train"
    test_split: str | None = None
    holdout: Annotated[float, Range(0, 0.9)] = 0.1
    limit: Annotated[int, Range(1, 10**12)] | None = None
    image_size: Annotated[int, Range(1, 16_384)] | None = None
    crop_pct: Annotated[float, Range(0.01, 1)] | None = None
    workers: Annotated[int, Range(0, 256)] = 2
    on_corrupt: Literal["skip", "refuse"] = "refuse"

    def __post_init__(self) -> None:
        if self.name == "":
            self.name = "digits" if self.root is None else "folder"

    def check(self) -> None:
        """Raise `RecipeError` for values of a wrong type or out of range."""
        check_options(self, "data.")


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
        views: random variants of each image, used by the epochs in turn; by default every epoch shows a new one.
    """

    crop: Literal["none", "pad", "resized"] = "none"
    scale: Annotated[float, Range(0, 1)] = 0.08
    flip: bool = False
    randaugment: str | None = None
    erasing: Annotated[float, Range(0, 1)] = 0.0
    mixup: Annotated[float, Range(0, 1000)] = 0.0
    cutmix: Annotated[float, Range(0, 1000)] = 0.0
    mix_prob: Annotated[float, Range(0, 1)] = 1.0
    smoothing: Annotated[float, Range(0, 0.999)] = 0.0
    views: Annotated[int, Range(1, 1_000_000)] | None = None

    def check(self) -> None:
        """Raise `RecipeError` for values of a wrong type or out of range."""
        check_options(self, "augment.")
        for name, alpha in (("mixup", self.mixup), ("cutmix", self.cutmix)):
            if 0 < alpha < 1e-3:  # No sampler of the Beta distribution is sound there.
                raise RecipeError(f"augment.{name} is {alpha}; it must be 0 (off), or 0.001 to 1000")
        if self.randaugment is not None and not _RANDAUGMENT.fullmatch(self.randaugment):
            raise RecipeError(
                f"augment.randaugment is {self.randaugment!r}; it must be rand-, then parts such as m9, n2, p0.5, "
                "mstd0.5 or inc1: rand-m9-n2-mstd0.5"
            )
