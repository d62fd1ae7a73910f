"""Streams of transformed images for training, evaluation and teacher caches. An image depends on its key alone."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from ..errors import DataError
from .fingerprint import fingerprint
from .images import Images
from .readable import ReadableBatches
from .readers import batches_of
from .seeding import permutation, seeded
from .transforms import Transform


class Known(Protocol):
    """Teacher outputs by row (view * images + position), such as a `TeacherCache`."""

    rows: int

    def __getitem__(self, row: int) -> Any: ...


class Stream(Dataset[tuple[Any, ...]]):
    """Transformed images by key = epoch * len + position.

    An item is (image (C, H, W), class, index); with `known` set, what the teacher said of the image comes last. The
    random part of the transform is a function of (seed, view, index) alone: the same key gives the same pixels in any
    process and at any time, and the global random generators are not changed.

    Args:
        images: `Images`, or any data set by index whose items begin with (Pillow image, class).
        transform: draws random numbers from the global generators of Python, NumPy and torch on the CPU only.
        indices: which of the images, in this order; by default all.
        seed: of all random choices.
        views: random forms per image; epoch e shows form e % views. By default every epoch shows a new one.
        skip: replace an unreadable image by the next readable one; the index in its item is then -1 - index, so that
            it can be counted and left out of figures. By default unreadable images raise `DataError`.

    Raises:
        DataError: `views` is below 1.
    """

    def __init__(
        self, images: Any, transform: Transform, *, indices: Sequence[int] | None = None, seed: int = 0,
        views: int | None = None, skip: bool = False,
    ) -> None:  # fmt: skip
        if views is not None and views < 1:
            raise DataError(f"an image has 1 view or more, not {views}")
        self.images = images if isinstance(images, Images) else Images(images)
        self.indices = list(range(len(images)) if indices is None else indices)
        self.transform, self.seed, self.views, self.skip = transform, seed, views, skip
        self.known: Known | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return (self[key] for key in range(len(self)))  # Keys go on for ever, so that Python's own way would not end.

    def __getitem__(self, key: int) -> tuple[Any, ...]:
        epoch, position = divmod(int(key), len(self.indices))
        view, index = epoch % self.views if self.views else epoch, self.indices[position]
        image, target, found = self._load(position)
        with seeded("augment", self.seed, view, index):
            pixels = self.transform(image)
        item = pixels, target, index if found == index else -1 - index
        return item if self.known is None else (*item, self.known[int(key) % self.known.rows])

    def describe(self) -> dict[str, object]:
        """Everything that determines the pixels, as plain data, for a cache of teacher outputs.

        Raises:
            DataError: the number of views is not limited.
        """
        if self.views is None:
            raise DataError("a cache needs a limited number of views; give views=1 or more")
        return {
            "data": self.fingerprint(),
            "images": len(self),
            "views": self.views,
            "seed": self.seed,
            "mode": self.images.mode,
            # Functions print their address in memory.
            "augmentation": re.sub(r" at 0x[0-9a-f]+", "", repr(self.transform)),
        }

    def fingerprint(self) -> str:
        """What identifies the images and their order, see `data.fingerprint`."""
        return fingerprint(Subset(self.images.source, self.indices))

    def sample(self, count: int) -> Tensor:
        """At most `count` images spread at random over the whole stream, the same at every call, (B, C, H, W)."""
        chosen = sorted(permutation(len(self), "entropy", self.seed)[:count])
        return torch.stack([self[position][0] for position in chosen])

    def _load(self, position: int) -> tuple[Image.Image, int, int]:
        for step in range(len(self)):
            index = self.indices[(position + step) % len(self)]
            try:
                return *self.images.load(index), index
            except DataError:
                if not self.skip:
                    raise
        raise DataError(f"none of the {len(self.indices)} images can be read")


class Share(Dataset[tuple[Any, ...]]):
    """Every nth item of a stream, for one of n processes: equally many for each, so that some items are repeated.

    The index of a repeated item is negative, as is that of an unreadable image, so that it can be left out of figures.
    """

    def __init__(self, stream: Stream, process: int, processes: int) -> None:
        self.stream, self.process, self.processes = stream, process, processes

    def __len__(self) -> int:
        return math.ceil(len(self.stream) / self.processes)

    def __getitem__(self, position: int) -> tuple[Any, ...]:
        place = position * self.processes + self.process
        image, target, index, *known = self.stream[place % len(self.stream)]
        return image, target, index if place < len(self.stream) else -1, *known


class EpochSampler(Sampler[int]):
    """Keys of one epoch, in order or shuffled by (seed, epoch)."""

    def __init__(self, length: int, seed: int, shuffle: bool) -> None:
        self.length, self.seed, self.shuffle, self.epoch = length, seed, shuffle, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        order = permutation(self.length, "order", self.seed, self.epoch) if self.shuffle else range(self.length)
        first = self.epoch * self.length
        return (first + position for position in order)


def make_loader(
    stream: Stream | Share, batch_size: int, workers: int, seed: int = 0, shuffle: bool = False,
    drop_last: bool = False,
) -> tuple[DataLoader[Any], EpochSampler]:  # fmt: skip
    """Batches of the stream's items, and their sampler: set its `epoch` before each pass."""
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}; it must be 1 or more")
    sampler = EpochSampler(len(stream), seed, shuffle)
    loader = batches_of(
        stream, batch_size, workers, sampler=sampler, drop_last=drop_last, persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    return loader, sampler


def shuffled_batches(stream: Stream, workers: int, seed: int = 0) -> ReadableBatches:
    """Batches of 64 images (B, C, H, W) and their classes (B,), in an order drawn by the seed, once through the stream.

    Images that cannot be read are left out, and named in the log, where the stream skips them.
    """
    return ReadableBatches(make_loader(stream, 64, workers, seed=seed, shuffle=True)[0], stream.images)
