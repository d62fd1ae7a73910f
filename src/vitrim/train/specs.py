"""The parts of a recipe: which network, how it learns, how weights are changed. Plain data."""

from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import RecipeError, UnknownNameError
from ..options import check_ranges


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
