"""Which images are for training, for the choice of the epoch, and for the report."""

from dataclasses import dataclass

from torch import nn

from ..errors import DataError
from ..models.input_format import InputFormat
from .data_sets import open_images
from .images import Images
from .seeding import permutation
from .specs import AugmentSpec, DataSpec
from .streams import Stream
from .transforms import transforms_for


@dataclass
class Splits:
    """Streams of images for training, for the choice of the epoch (None: none held out), and for the report.

    notes: lines on what is in a folder and was not read.
    """

    train: Stream
    select: Stream | None
    test: Stream
    classes: list[str]
    notes: list[str]


def make_splits(
    train: Images, test: Images, model: nn.Module, spec: DataSpec, augment: AugmentSpec, seed: int
) -> Splits:
    """Streams in the input format of a model. The epoch is chosen on a held-out part of the training images.

    Raises:
        DataError: there are too few training images to hold some of them out.
    """
    train.mode = test.mode = InputFormat.of(model, spec.image_size).mode
    order = permutation(len(train), "subset", seed)[: spec.limit]
    held = round(spec.holdout * len(order))
    if spec.holdout > 0 and not 0 < held < len(order):
        raise DataError(
            f"{len(order)} training images are too few to hold {spec.holdout:.0%} of them out; use more images, or "
            "set data.holdout to 0"
        )
    plain, varied = transforms_for(model, spec), transforms_for(model, spec, augment)
    skip = spec.on_corrupt == "skip"
    chosen = sorted(order[held:])
    return Splits(
        train=Stream(train, varied, indices=chosen, seed=seed, views=augment.views, skip=skip),
        select=Stream(train, plain, indices=sorted(order[:held]), seed=seed, views=1, skip=skip) if held else None,
        test=Stream(test, plain, seed=seed, views=1, skip=skip),
        classes=train.classes,
        notes=[*train.notes, *test.notes],
    )


def plain_stream(model: nn.Module, spec: DataSpec, train: bool = False, seed: int = 0) -> Stream:
    """The test images of a data set, or its training images, in the input format of a model, without augmentation.

    Training images are at most `spec.limit`; a training run with the same seed uses the same ones.
    """
    images = open_images(spec, train)
    images.mode = InputFormat.of(model, spec.image_size).mode
    indices = sorted(permutation(len(images), "subset", seed)[: spec.limit]) if train else None
    return Stream(images, transforms_for(model, spec), indices=indices, seed=seed, skip=spec.on_corrupt == "skip")
