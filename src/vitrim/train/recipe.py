"""One recipe describes a run completely. Plain data: this module imports no torch, so that the command starts fast."""

from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from ..errors import RecipeError, UnknownNameError


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


@dataclass
class Recipe:
    """Everything that determines a run. The same recipe gives the same numbers, interrupted or not.

    Args:
        model: the network.
        data: the images.
        augment: how training images are varied.
        optim: how weights are changed.
        reduction: `reducer @ schedule [@ curriculum]`, for example `TopK() @ PowerLaw(0.6, 2.0) @ Delayed(4)`.
        phase: whether tokens are reduced in "train", "eval" or "both".
        distill: the objective, for example `Labels(0.3) + Logits(Linear(0.7, 0.5)) + ClsStages(0.3)`; without it, and
            in the term `Labels`, cross-entropy. Terms on features alone learn no classes: `model.args` may leave the
            classifier out by {num_classes: 0}, and the epoch is chosen by the objective itself.
        teacher: the teacher of these terms, made dense and frozen; sees the student's very batch in its own format.
        epochs: passes over the training images.
        batch_size: images per update and all processes together.
        seed: of weights, order, augmentation and dropout.
        compile: use torch.compile.
        checkpointing: recompute activations to save memory.
        track: name of an experiment tracker that accelerate knows, such as tensorboard or wandb.
    """

    model: ModelSpec = field(default_factory=ModelSpec)
    data: DataSpec = field(default_factory=DataSpec)
    augment: AugmentSpec = field(default_factory=AugmentSpec)
    optim: OptimSpec = field(default_factory=OptimSpec)
    reduction: str | None = None
    phase: Literal["both", "train", "eval"] = "both"
    distill: str | None = None
    teacher: ModelSpec | None = None
    epochs: int = 10
    batch_size: int = 128
    seed: int = 0
    compile: bool = False
    checkpointing: bool = False
    track: str | None = None

    def check(self) -> None:
        """Raise `RecipeError` for numbers that make no sense."""
        for name, value, low, high in (
            ("epochs", self.epochs, 1, None),
            ("batch_size", self.batch_size, 1, None),
            ("data.holdout", self.data.holdout, 0, 0.9),
            ("optim.lr", self.optim.lr, 0, None),
            ("optim.accumulate", self.optim.accumulate, 1, None),
            ("optim.ema", self.optim.ema, 0, 0.9999999),
            ("augment.smoothing", self.augment.smoothing, 0, 0.999),
            ("augment.mix_prob", self.augment.mix_prob, 0, 1),
            ("augment.erasing", self.augment.erasing, 0, 1),
            ("data.workers", self.data.workers, 0, None),
            ("data.limit", self.data.limit or 1, 1, None),
            ("seed", self.seed, 0, None),
        ):
            if value < low or (high is not None and value > high):
                raise RecipeError(
                    f"{name} is {value}; it must be {low} or more" + (f", at most {high}" if high else "")
                )
        if self.batch_size % self.optim.accumulate:
            raise RecipeError(f"batch_size {self.batch_size} is not a multiple of accumulate {self.optim.accumulate}")
        if self.distill is None and self.teacher is not None:
            raise RecipeError("a teacher needs terms to teach by; set distill, or leave teacher out")
        if self.track is not None:
            from accelerate.tracking import (  # Here, since it imports torch.
                LOGGER_TYPE_TO_CLASS,
                get_available_trackers,
            )

            if self.track not in LOGGER_TYPE_TO_CLASS:
                raise UnknownNameError("tracker", self.track, LOGGER_TYPE_TO_CLASS)
            if self.track not in map(str, get_available_trackers()):
                raise RecipeError(f"the tracker {self.track} is not installed here; install it, or leave track out")

    def check_processes(self, number: int) -> None:
        """Raise `RecipeError` where a batch cannot be shared evenly among so many processes."""
        batch = self.batch_size // self.optim.accumulate
        if batch % number:
            raise RecipeError(f"a batch of {batch} images cannot be shared evenly among {number} processes")

    def to_dict(self) -> dict[str, Any]:
        """The recipe as nested plain data."""
        return _plain(asdict(self))

    def to_yaml(self) -> str:
        """The recipe as a complete file, options in the order of their definition."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Recipe":
        """A recipe from nested plain data; unknown names are errors with the nearest known one."""
        return fill(cls, data, "recipe")

    @classmethod
    def read(cls, path: str | Path) -> "Recipe":
        """A recipe from a YAML file."""
        return cls.from_dict(read_yaml(path))

    def differences(self, other: "Recipe") -> list[str]:
        """Options in which two recipes differ once they are written down, as `name: this -> other`."""
        mine, theirs = (flatten(yaml.safe_load(recipe.to_yaml())) for recipe in (self, other))
        names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        return [f"{name}: {mine.get(name)!r} -> {theirs.get(name)!r}" for name in names]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping."""
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path} does not exist") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path} does not hold options but {type(data).__name__}")
    return data


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, option by option."""
    merged = dict(base)
    for name, value in changes.items():
        old = merged.get(name)
        merged[name] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as `outer.inner` names."""
    flat: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


_SPECS = {"model": ModelSpec, "teacher": ModelSpec, "data": DataSpec, "augment": AugmentSpec, "optim": OptimSpec}


def fill(kind: type, data: dict[str, Any], where: str) -> Any:
    """A dataclass of options from plain data; `where` is its name in messages.

    Raises:
        RecipeError: an option is of another type.
        UnknownNameError: there is no such option.
    """
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, value in data.items():
        if name not in hints:
            raise UnknownNameError(f"option in {where}", str(name), hints)
        spec = _SPECS.get(name) if kind is Recipe else None
        path = name if kind is Recipe else f"{where}.{name}"
        values[name] = fill(spec, value, name) if spec and isinstance(value, dict) else _typed(hints[name], value, path)
    return kind(**values)


def _typed(hint: Any, value: Any, where: str) -> Any:
    """The value, if it is of the kind that the option takes."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    for kind in kinds:
        if get_origin(kind) is Literal:
            if value in get_args(kind):
                return value
        elif kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
            with suppress(ValueError):  # YAML reads 1e-3 as text.
                return float(value)
        elif type(value) is (get_origin(kind) or kind):
            return value
    choices = " or ".join(_named(kind) for kind in kinds)
    raise RecipeError(f"{where} is {value!r}; it must be {choices}")


def _named(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(map(repr, get_args(kind)))
    return {NoneType: "null", str: "text", int: "a whole number", float: "a number", bool: "true or false"}.get(
        kind, "a mapping of options"
    )
