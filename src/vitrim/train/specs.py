"""The parts of a recipe: which network, which images, how they are varied, how weights are changed. Plain data."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import RecipeError, UnknownNameError
from .options import check_ranges

_RANDAUGMENT = re.compile(
    r"rand(-(m\d+|n[1-9]\d*|p(0|0\.\d+|1|1\.0+)|mstd\d+(\.\d+)?|mmax[1-9]\d*|inc[01]|t(weights|3aw|3a)))*"
)


@dataclass
class ModelSpec:
    """Which network.

    Args:
        name: a timm name, a folder written by `vitrim.save`, or a weights file.
        pretrained: start from timm's published weights (downloaded by timm).
        checkpoint: weights to start from: a model folder, a .safetensors or .pth file.
        reset_head: take everything but the classifier from the checkpoint.
        args: further arguments of the timm constructor.
    """

    name: str = "vitrim_digits_vit"
    pretrained: bool = False
    checkpoint: str | None = None
    reset_head: bool = False
    args: dict[str, Any] = field(default_factory=dict)


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


@dataclass
class CacheSpec:
    """Where the teacher's outputs are kept.

    Args:
        folder: made by the first run, read by all others with the same teacher, images, augmentation and seed.
        top_k: logits kept of each image, with the sum of the others; all of them for no more classes than that.
    """

    folder: str = "teacher-cache"
    top_k: int = 128


@dataclass
class ElasticSpec:
    """How a super-network learns: all networks of a chain together, while the chain still grows (PIAD).

    Args:
        grow_epochs: epochs over which the chain grows; what its smallest network saves rises linearly to max_saving.
        max_saving: fraction of the MACs that the smallest network saves in the end.
        rule: which networks a step trains: the full, the smallest and a random one ("sandwich"), any one ("uniform"),
            or any one but the smallest ("original").
        distill: smaller networks learn from the full one, or all of them from the teacher where the recipe has one;
            otherwise from labels.
        temperature: of that distillation.
        images: training images by which units are ordered and, at every growth, importance is judged.
        width_multiple: every width but the full one is a multiple of it.
    """

    grow_epochs: int = 50
    max_saving: float = 0.875
    rule: Literal["sandwich", "uniform", "original"] = "sandwich"
    distill: bool = True
    temperature: float = 1.0
    images: int = 1024
    width_multiple: int = 8


@dataclass
class OptimSpec:
    """How weights are changed.

    Args:
        name: optimiser, by its timm name.
        lr: peak learning rate.
        weight_decay: not applied to biases and norms.
        layer_decay: factor on the learning rate from each layer to the one below.
        warmup_epochs: linear warm-up from a hundredth of lr.
        min_lr: where the cosine ends.
        clip: largest norm of the gradient, 0 = off.
        ema: decay of the moving average of weights that is evaluated and saved, 0 = off.
        freeze: train the classifier alone (linear probe).
        accumulate: batches per update.
        precision: "no" is float32.
    """

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    layer_decay: float | None = None
    warmup_epochs: float = 1.0
    min_lr: float = 1e-6
    clip: float = 1.0
    ema: float = 0.0
    freeze: bool = False
    accumulate: int = 1
    precision: Literal["no", "bf16", "fp16"] = "no"

    def check(self) -> None:
        """Raise `RecipeError` for numbers that make no sense, `UnknownNameError` for an unknown optimiser."""
        if not self.lr > 0:
            raise RecipeError(f"optim.lr is {self.lr}; it must be positive")
        check_ranges(
            ("optim.weight_decay", self.weight_decay, 0, None),
            ("optim.layer_decay", self.layer_decay, 1e-6, 1),
            ("optim.warmup_epochs", self.warmup_epochs, 0, None),
            ("optim.min_lr", self.min_lr, 0, self.lr),
            ("optim.clip", self.clip, 0, None),
            ("optim.ema", self.ema, 0, 0.9999999),
            ("optim.accumulate", self.accumulate, 1, None),
        )
        from timm.optim import list_optimizers  # Here, since it imports torch.

        if self.name.lower().removeprefix("lookahead_") not in (known := list_optimizers()):
            raise UnknownNameError("optimiser", self.name, known)
