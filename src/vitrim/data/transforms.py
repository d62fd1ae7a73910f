"""From a decoded image to the tensor that a model expects: its own input format, and augmentation for training."""

from collections.abc import Callable
from typing import Any

from PIL import Image
from timm.data import create_transform, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation
from torch import Tensor, nn
from torchvision import transforms as T

from ..models.input_format import InputFormat
from .specs import AugmentSpec, DataSpec

Transform = Callable[[Image.Image], Tensor]


def transforms_for(model: nn.Module, spec: DataSpec, augment: AugmentSpec | None = None) -> Transform:
    """Resize, crop and normalise as the model expects; with `augment`, in the varied form for training.

    Args:
        model: its input format holds size, mean, std, interpolation, crop fraction and crop mode.
        spec: `image_size` must be that of the model; `crop_pct` replaces the model's.
        augment: augmentation. Unless it takes random resized crops, images are resized and cropped as in evaluation.

    Raises:
        DataError: the model takes images of another size than `spec.image_size`.
    """
    form = InputFormat.of(model, spec.image_size)
    plain = create_transform(
        form.size, is_training=False, interpolation=form.interpolation, mean=form.mean, std=form.std,
        crop_pct=spec.crop_pct or form.crop_pct, crop_mode=form.crop_mode,
    )  # fmt: skip
    assert isinstance(plain, T.Compose)
    return plain if augment is None else _augmented(plain, form, augment)


def _augmented(plain: T.Compose, form: InputFormat, augment: AugmentSpec) -> Transform:
    size = form.size[1:]
    steps: list[Callable[[Any], Any]] = []
    if augment.crop == "resized":
        scale = (augment.scale, 1.0)
        steps.append(RandomResizedCropAndInterpolation(size, scale=scale, interpolation=form.interpolation))
    else:
        steps += [step for step in plain.transforms if not isinstance(step, MaybeToTensor | T.Normalize)]
    if augment.crop == "pad":
        steps.append(T.RandomCrop(size, padding=max(1, min(size) // 8)))
    if augment.flip:
        steps.append(T.RandomHorizontalFlip())
    if augment.randaugment:
        grey = tuple(min(255, round(255 * m)) for m in form.mean)
        params = {"translate_const": int(min(size) * 0.45), "img_mean": grey}
        steps.append(rand_augment_transform(augment.randaugment, params))
    steps += [T.ToTensor(), T.Normalize(form.mean, form.std)]
    if augment.erasing > 0:
        steps.append(RandomErasing(augment.erasing, mode="pixel", device="cpu"))
    return T.Compose(steps)
