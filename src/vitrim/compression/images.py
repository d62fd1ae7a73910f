"""The images of a search: from whatever the user has, in parts that are used for one purpose each.

A part that fits weights, a part that judges candidates, and a part that neither has seen: a candidate that was fitted
to the images it is judged by would look better than it is, and so would the winner on the images that made it win.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from ..data.batches import batches_in, check_size, images_of
from ..data.readable import ReadableBatches
from ..data.readers import batches_of
from ..data.seeding import permutation
from ..data.streams import Stream
from ..elastic.probing import all_alike, check_classes
from ..errors import DataError
from ..heartbeat import heartbeat

LEAST = 16
"""Images without which no part of a search says anything."""
LEAST_FOR_WIDTH = 64
"""Images without which a projection cannot be fitted and checked."""
BATCH = 32
MOST_UNSEEN = 5000
"""How many images are used for a certificate at most."""


@dataclass(frozen=True)
class Pictures:
    """Images (N, channels, height, width), and their classes (N,) where they are known."""

    images: Tensor
    classes: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def part(self, start: int, stop: int) -> "Pictures":
        """Images from `start` to before `stop`."""
        rows = slice(start, stop)
        return Pictures(self.images[rows], None if self.classes is None else self.classes[rows])

    def batches(self, size: int = BATCH) -> list[Tensor]:
        """The images in batches."""
        return list(self.images.split(size))


@dataclass(frozen=True)
class Parts:
    """fit: for orders and projections; may be empty. judge: to compare candidates on. unseen: for the certificate."""

    fit: Pictures
    judge: Pictures
    unseen: Pictures

    @property
    def sizes(self) -> "Sizes":
        """How many images each part has."""
        return Sizes(len(self.fit), len(self.judge), len(self.unseen))


def gather(
    data: Any, size: tuple[int, int, int], most: int, what: str = "images", classes: int | None = None, *,
    needed: bool = True,
) -> Pictures:  # fmt: skip
    """At most so many images from a tensor, a data set, a loader or any iterable of batches.

    Of a tensor and of a data set by index they are chosen at random, the same ones at every call; of anything else the
    first ones are taken, so that a loader should shuffle.

    Args:
        data: a tensor (N, channels, height, width), a pair of it and classes, a `Dataset` of (image, class) or of
            images, a `DataLoader`, or an iterable of batches of images or of (images, classes).
        size: (channels, height, width) that the model takes.
        most: number of images.
        what: what they are called in messages.
        classes: how many the model has; by default labels are left out, whatever they are.
        needed: whether all images must have a class; otherwise classes are left out where some have none.

    Raises:
        DataError: there are none, they are of another size, not finite, or no images at all; or labels that are no
            classes of the model.
    """
    batches = _first(batches_in(data, what, most=most), most)
    if not batches:
        raise DataError(f"{what}: there are none; give some, from an iterator that is not used up")
    for images, _ in batches:
        check_size(images, size, what)
    labels = None
    known = all(target is not None for _, target in batches)
    if classes is not None and (known or needed):
        if not known:
            raise DataError(
                f"{what} has no whole numbers as classes, so no accuracy can be measured; give batches of "
                "(images, classes)"
            )
        checked = [check_classes(target, len(images), classes, what) for images, target in batches]
        labels = torch.cat(checked)[:most]
    images = torch.cat([images for images, _ in batches])[:most]
    if not images.isfinite().all():
        raise DataError(f"{what}: some values are not finite; check how they were read")
    return _different(Pictures(images, labels), what)


def read(
    stream: Stream, most: int, workers: int, *, labelled: bool = True, start: int = 0,
    say: Callable[[str], None] = print,
) -> Pictures:  # fmt: skip
    """At most so many of the images of a stream, in an order drawn at random, the same one at every call.

    Args:
        stream: of images in the model's format; images that cannot be read are left out, and named in the log,
            where it skips them.
        most: number of images.
        workers: processes that read.
        labelled: whether the classes of the images are those of the model.
        start: leave out so many images from the front of that order.
        say: called from time to time where reading takes long.

    Raises:
        DataError: there is no image, or one cannot be read and the stream does not skip it.
    """
    rows = permutation(len(stream), "compress", 0)[start : start + most]
    if not len(rows):
        raise DataError(
            "there are no images" if not start else f"there are no images besides the {start} that were used"
        )
    loader = batches_of(Subset(stream, rows), BATCH, workers)
    with heartbeat("reading images", say):
        found = list(ReadableBatches(loader, stream.images))
    if not found:
        raise DataError(f"none of {len(rows)} images can be read")
    images = torch.cat([images for images, _ in found])
    return _different(Pictures(images, torch.cat([classes for _, classes in found]) if labelled else None), "images")


def _different(pictures: Pictures, what: str) -> Pictures:
    if all_alike([pictures.images]):
        raise DataError(f"{what} are all the same, so nothing can be learnt from them; give different ones")
    return pictures


@dataclass(frozen=True)
class Sizes:
    """Numbers of images in the parts of a search, see `Parts`."""

    fit: int
    judge: int
    unseen: int

    @property
    def used(self) -> int:
        """Images that the search uses."""
        return self.fit + self.judge


def sizes(number: int, fits: bool, unseen: int | None = None) -> Sizes:
    """How many images each part gets: half of them for fitting, if anything is fitted, the rest in two equal parts.

    Args:
        number: of all of them.
        fits: whether weights are fitted.
        unseen: number of images for the certificate from somewhere else; then a third of the others judges.

    Raises:
        DataError: there are too few.
    """
    least = LEAST_FOR_WIDTH if fits else LEAST
    if number < least:
        images = "one image is" if number == 1 else f"{number} images are"
        raise DataError(f"{images} too few to compare candidates on; give {least} or more, 512 if possible")
    fit = (number // 2 if unseen is None else 2 * number // 3) if fits else 0
    judge = number - fit if unseen is not None else (number - fit) // 2
    return Sizes(fit, judge, number - fit - judge if unseen is None else unseen)


def divide(pictures: Pictures, fits: bool, unseen: Pictures | None = None) -> Parts:
    """The parts of a search, see `sizes`.

    Args:
        pictures: all of them, shuffled.
        fits: whether weights are fitted.
        unseen: images for the certificate from somewhere else.

    Raises:
        DataError: there are too few.
    """
    found = sizes(len(pictures), fits, None if unseen is None else len(unseen))
    rest = pictures.part(found.used, len(pictures)) if unseen is None else unseen
    return Parts(pictures.part(0, found.fit), pictures.part(found.fit, found.used), rest)


def _first(data: Iterable[Any], most: int) -> list[tuple[Tensor, Tensor | None]]:
    found: list[tuple[Tensor, Tensor | None]] = []
    left = most
    for batch in islice(data, most):
        images = images_of(batch)
        target = batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
        whole = isinstance(target, Tensor) and target.ndim == 1 and not target.is_floating_point()
        found.append((images, target if whole else None))
        left -= len(images)
        if left <= 0:
            break
    return found
