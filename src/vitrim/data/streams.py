"""Streams of transformed images for training and evaluation, each image varied by (seed, epoch, index) alone."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from timm.data import create_transform, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_interp_mode
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from torchvision import transforms as T

from ..errors import DataError
from ..models.input_format import InputFormat
from .images import Images, open_images
from .readers import batches_of
from .seeding import mix, seed_host
from .specs import AugmentSpec, DataSpec
from .views import describe_views


class Known(Protocol):
    """What a teacher said of each image, by row, such as a `TeacherCache`."""

    rows: int

    def __getitem__(self, row: int) -> Any: ...


class Stream(Dataset[tuple[Any, ...]]):
    """Transformed images by key = epoch * len + position; how an image is varied depends on (seed, view, index) alone.

    An item is (image (C, H, W), class, index), and what a teacher says of the image where `known` is set. Every epoch
    is a view of its own, or they take turns with so many `views`. An unreadable image is replaced by the next one if
    `skip` is set; its item then carries -1 - index, so that it can be counted and left out of metrics.
    """

    def __init__(
        self, images: Images, indices: Sequence[int], transform: Callable[[Image.Image], Tensor], seed: int, skip: bool,
        views: int | None = None,
    ) -> None:  # fmt: skip
        self.images, self.indices, self.transform, self.seed, self.skip = images, list(indices), transform, seed, skip
        self.views = views
        self.known: Known | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: int) -> tuple[Any, ...]:
        epoch, position = divmod(int(key), len(self.indices))
        index = self.indices[position]
        image, target, found = self._load(position)
        seed_host(self.seed, epoch % self.views if self.views else epoch, index)
        item = self.transform(image), target, index if found == index else -1 - index
        return item if self.known is None else (*item, self.known[int(key) % self.known.rows])

    def describe(self) -> dict[str, object]:
        """Everything that determines the pixels, as plain data, for a cache of what a teacher says of them."""
        assert self.views is not None  # Endless views cannot be kept.
        images = Subset(self.images.source, self.indices)
        return {**describe_views(images, self.transform, self.views, self.seed), "mode": self.images.mode}

    def _load(self, position: int) -> tuple[Image.Image, int, int]:
        for step in range(len(self)):
            index = self.indices[(position + step) % len(self)]
            try:
                return *self.images.load(index), index
            except DataError:
                if not self.skip:
                    raise
        raise DataError(f"none of the {len(self.indices)} images can be read")


class EpochSampler(Sampler[int]):
    """Keys of one epoch, shuffled by (seed, epoch) or in order."""

    def __init__(self, length: int, seed: int, shuffle: bool) -> None:
        self.length, self.seed, self.shuffle, self.epoch = length, seed, shuffle, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        order = torch.arange(self.length)
        if self.shuffle:
            order = torch.randperm(self.length, generator=torch.Generator().manual_seed(mix(self.seed, self.epoch)))
        return iter((order + self.epoch * self.length).tolist())


@dataclass
class Splits:
    """Streams of the images to learn from, to choose the epoch with (None: nothing held out), and to report on."""

    train: Stream
    select: Stream | None
    test: Stream
    classes: list[str]


def transforms_for(
    model: nn.Module, spec: DataSpec, augment: AugmentSpec | None = None
) -> Callable[[Image.Image], Tensor]:
    """The model's own preprocessing; with `augment`, the varied form for training."""
    form = InputFormat.of(model, spec.image_size)
    if augment is None:
        plain: Any = create_transform(
            form.size, is_training=False, interpolation=form.interpolation, mean=form.mean, std=form.std,
            crop_pct=spec.crop_pct or form.crop_pct,
        )  # fmt: skip
        return plain
    size = form.size[1:]
    steps: list[Callable[[Any], Any]] = []
    if augment.crop == "resized":
        scale = (augment.scale, 1.0)
        steps.append(RandomResizedCropAndInterpolation(size, scale=scale, interpolation=form.interpolation))
    else:
        steps.append(T.Resize(size, str_to_interp_mode(form.interpolation)))
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


def make_splits(
    train: Images, test: Images, model: nn.Module, spec: DataSpec, augment: AugmentSpec, seed: int
) -> Splits:
    """Streams for a model. Epochs are chosen on a held-out part of the training images."""
    train.mode = test.mode = InputFormat.of(model, spec.image_size).mode
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(mix(seed, 1))).tolist()
    order = order[: spec.limit]
    held = round(spec.holdout * len(order))
    if spec.holdout > 0 and not 0 < held < len(order):
        raise DataError(f"{len(order)} training images are too few to hold {spec.holdout:.0%} of them out")
    skip = spec.on_corrupt == "skip"
    plain, varied = transforms_for(model, spec), transforms_for(model, spec, augment)
    return Splits(
        train=Stream(train, sorted(order[held:]), varied, seed, skip, augment.views),
        select=Stream(train, sorted(order[:held]), plain, seed, skip, views=1) if held else None,
        test=Stream(test, range(len(test)), plain, seed, skip, views=1),
        classes=train.classes,
    )


def plain_stream(model: nn.Module, spec: DataSpec, train: bool = False) -> Stream:
    """The test images of a data set, or its training images, as this model wants to see them, not varied."""
    images = open_images(spec, train)
    images.mode = InputFormat.of(model, spec.image_size).mode
    return Stream(images, range(len(images)), transforms_for(model, spec), 0, spec.on_corrupt == "skip")


def make_loader(
    stream: Stream | Subset[Any], batch_size: int, workers: int, seed: int = 0, shuffle: bool = False,
    drop_last: bool = False,
) -> tuple[DataLoader[Any], EpochSampler]:  # fmt: skip
    """Batches of the stream's items, and the sampler whose `epoch` says which epoch comes next."""
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}; it must be 1 or more")
    sampler = EpochSampler(len(stream), seed, shuffle)
    loader = batches_of(
        stream, batch_size, workers, sampler=sampler, drop_last=drop_last, persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    return loader, sampler
