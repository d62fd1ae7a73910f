"""The parts of a recipe: which network, how it learns, how weights are changed. Plain data."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from ..errors import RecipeError, UnknownNameError
from ..options import Range, check_options
from ..text import short, shortened

_FILES = ("checkpoint_path", "cache_dir", "model_name", "pretrained_cfg", "pretrained_cfg_overlay", "spec")
"""Arguments of model builders that choose another model or other weights."""


@dataclass
class ModelSpec:
    """Which network.

    Args:
        name: a timm name, a folder written by vitrim or transformers, hf:NAME (a transformers model on the hub), or a
            weights file.
        pretrained: start from timm's published weights (downloaded by timm).
        checkpoint: weights to start from: a model folder, a .safetensors or .pth file.
        checkpoint_size: height and width of the images that these weights were trained on, where their positions do not
            show it.
        reset_head: take everything but the classifier from the checkpoint.
        args: further arguments of the model's constructor, by name, as plain values or lists of them.
    """

    name: str = "vitrim_digits_vit"
    pretrained: bool = False
    checkpoint: str | None = None
    checkpoint_size: list[Annotated[int, Range(1, 16_384)]] | None = None
    reset_head: bool = False
    args: dict[str, Any] = field(default_factory=dict)

    def check(self, where: str) -> None:
        """Raise `RecipeError` where `args` hold an option of its own, or what no saved model holds, such as a mapping.

        Args:
            where: "model" or "teacher".
        """
        check_options(self, f"{where}.")
        if self.checkpoint_size is not None and (len(self.checkpoint_size) != 2 or self.checkpoint is None):
            raise RecipeError(
                f"{where}.checkpoint_size is {shortened(str(self.checkpoint_size), 60)}; it must be the height and the "
                f"width of the images of {where}.checkpoint, such as [128, 288]"
            )
        from ..models.files.description import fault_of_args, largest  # Here, since it imports torch.

        for name, value in self.args.items():
            if name in ("pretrained", "checkpoint", "checkpoint_size", "reset_head"):
                raise RecipeError(f"{where}.args holds {name}; set {where}.{name} instead")
            if name in _FILES:
                raise RecipeError(
                    f"{where}.args holds {name}, which is not a size of the network; set {where}.checkpoint for weights"
                )
            if not name.isidentifier():
                raise RecipeError(
                    f"{where}.args has an entry named {name[:60]!r}; write {{name: value}}, with a space after :"
                )
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, int) and part > largest(name):
                    raise RecipeError(f"{where}.args.{name} is {short(part)}; it must be at most {largest(name):,}")
        if (fault := fault_of_args(self.args)) is not None:  # What cannot be described can be trained, but not saved.
            raise RecipeError(f"{where}.{fault}")


@dataclass
class CacheSpec:
    """Where the teacher's outputs are kept.

    Args:
        folder: folder of the outputs; written by the first run, and read by all others with the same teacher, images,
            augmentation and seed.
        top_k: how many of the largest logits are kept of each image, together with the sum of the others; all logits
            are kept where there are no more classes.
    """

    folder: str = "teacher-cache"
    top_k: Annotated[int, Range(1, 1_000_000)] = 128


@dataclass
class ElasticSpec:
    """How a super-network learns: all networks of a chain together, while the chain still grows (PIAD).

    Args:
        grow_epochs: epochs over which the chain grows; the saving of its smallest network rises linearly to max_saving.
        max_saving: fraction of the MACs that the smallest network saves in the end.
        rule: which networks a step trains: the full, the smallest and a random one ("sandwich"), any one ("uniform"),
            or any one but the smallest ("original").
        distill: smaller networks learn from the full one, or all of them from the teacher where the recipe has one;
            otherwise from labels.
        temperature: temperature of the softmax in that distillation.
        images: training images by which units are ordered and, at every growth, importance is judged.
        width_multiple: every width but the full one is a multiple of it.
    """

    grow_epochs: Annotated[int, Range(1, 1_000_000)] = 50
    max_saving: Annotated[float, Range(0, 0.999, above=True)] = 0.875
    rule: Literal["sandwich", "uniform", "original"] = "sandwich"
    distill: bool = True
    temperature: Annotated[float, Range(0.01, 1000)] = 1.0
    images: Annotated[int, Range(1, 10_000_000)] = 1024
    width_multiple: Annotated[int, Range(1, 100_000)] = 8


@dataclass
class OptimSpec:
    """How weights are changed.

    Args:
        name: optimiser, by its timm name.
        lr: peak learning rate.
        weight_decay: weight decay; not applied to biases and norms.
        layer_decay: factor on the learning rate from each layer to the one below.
        warmup_epochs: epochs of linear warm-up, from a hundredth of lr to lr.
        min_lr: learning rate at the end of the cosine.
        clip: largest norm of the gradient, 0 = off.
        ema: decay of the moving average of weights that is evaluated and saved, 0 = off.
        freeze: train the classifier alone (linear probe).
        accumulate: batches per update; batch_size is that of all of them together.
        precision: "no" computes in float32, "bf16" and "fp16" in automatic mixed precision; "auto" is "bf16" on a GPU
            that has such arithmetic and "no" elsewhere: on most processors bf16 is many times slower than float32.
    """

    name: str = "adamw"
    lr: Annotated[float, Range(0, 1_000_000, above=True)] = 1e-3
    weight_decay: Annotated[float, Range(0, 1_000_000)] = 0.05
    layer_decay: Annotated[float, Range(1e-6, 1)] | None = None
    warmup_epochs: Annotated[float, Range(0, 1_000_000)] = 1.0
    min_lr: Annotated[float, Range(0, 1_000_000)] = 1e-6
    clip: Annotated[float, Range(0, 1_000_000)] = 1.0
    ema: Annotated[float, Range(0, 0.9999999)] = 0.0
    freeze: bool = False
    accumulate: Annotated[int, Range(1, 100_000)] = 1
    precision: Literal["auto", "no", "bf16", "fp16"] = "no"

    def check(self) -> None:
        """Raise `RecipeError` for values of a wrong type or out of range, `UnknownNameError` for optimisers."""
        check_options(self, "optim.")
        if self.min_lr > self.lr:
            raise RecipeError(f"optim.min_lr is {self.min_lr}; it must be at most optim.lr, {self.lr}")
        from timm.optim import list_optimizers  # Here, since it imports torch.

        known = [name for name in list_optimizers() if isinstance(name, str)]
        if self.name.lower().removeprefix("lookahead_") not in known:
            raise UnknownNameError("optimiser", self.name, known)


@dataclass
class FinetuneSpec:
    """How a cheaper model learns from the given one afterwards.

    Args:
        epochs: passes over the training images; 0 trains nothing.
        lr: highest learning rate of AdamW; it falls along a cosine. Weights that were trained for long need small
            steps.
        batch_size: images per update.
    """

    epochs: Annotated[int, Range(0, 1_000_000)] = 0
    lr: Annotated[float, Range(0, 1, above=True)] = 5e-6
    batch_size: Annotated[int, Range(1, 1_000_000)] = 32
