"""Images in a fixed number of random forms, each a function of (seed, view, index) alone, so that it can come again.

A cache of teacher outputs needs only this of a data set (`Views`): keys are `epoch * len + position`, epochs beyond
the number of views start over, and the same key always gives the same pixels. Mixing images must follow the same
rule, so it happens here, image by image, rather than in the batch.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset

from ..errors import DataError


class Views(Protocol):
    """What a cache needs: item `key` is (image (C, H, W), target, index), the same for equal `key % (views * len)`."""

    views: int

    def __len__(self) -> int: ...

    def __getitem__(self, key: int) -> tuple[Any, ...]: ...

    def describe(self) -> dict[str, object]:
        """Everything that determines the pixels, as plain data."""
        ...


class SeededViews(Dataset[tuple[Any, ...]]):
    """A data set by key, each image in `views` forms; items are (transformed image, target, index).

    Args:
        dataset: by index, items (image, target, ...) without a transform of its own.
        transform: draws from Python's, NumPy's and torch's generators on the CPU, and from nothing else.
        views: forms per image; epoch e shows form `e % views`.
        seed: of all forms.
    """

    def __init__(self, dataset: Any, transform: Callable[[Any], Tensor], views: int, seed: int = 0) -> None:
        if views < 1:
            raise DataError(f"an image has 1 view or more, not {views}")
        self.dataset, self.transform, self.views, self.seed = dataset, transform, views, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int) -> tuple[Any, ...]:
        view, index = divmod(key % (self.views * len(self)), len(self))
        image, target = self.dataset[index][:2]
        with seeded(self.seed, view, index):
            return self.transform(image), target, index

    def describe(self) -> dict[str, object]:
        """Everything that determines the pixels, as plain data."""
        return describe_views(self.dataset, self.transform, self.views, self.seed)


class MixedViews(Dataset[tuple[Any, ...]]):
    """Mixup of views whose partner and lambda are functions of (seed, view, index); targets become (K,) probabilities.

    Args:
        views: what is mixed; lambda is drawn for each image from Beta(alpha, alpha) (arXiv 1710.09412).
    """

    def __init__(self, views: Views, alpha: float, num_classes: int, seed: int = 0) -> None:
        if not alpha > 0:
            raise DataError(f"mixup alpha is above 0, not {alpha}")
        self.plain, self.views, self.alpha, self.num_classes, self.seed = views, views.views, alpha, num_classes, seed

    def __len__(self) -> int:
        return len(self.plain)

    def __getitem__(self, key: int) -> tuple[Any, ...]:
        view, index = divmod(key % (self.views * len(self)), len(self))
        dice = np.random.default_rng([self.seed, view, index])
        partner, share = int(dice.integers(len(self))), float(dice.beta(self.alpha, self.alpha))
        image, target, *rest = self.plain[view * len(self) + index]
        other, other_target = self.plain[view * len(self) + partner][:2]
        pair = torch.tensor([int(target), int(other_target)])
        one, two = F.one_hot(pair, self.num_classes).float()
        return (share * image + (1 - share) * other, share * one + (1 - share) * two, *rest)

    def describe(self) -> dict[str, object]:
        """Everything that determines the pixels, as plain data."""
        return {**self.plain.describe(), "mixup": [self.alpha, self.seed]}


def describe_views(dataset: Any, transform: Callable[[Any], Tensor], views: int, seed: int) -> dict[str, object]:
    """What determines the pixels of these images (by index, as `fingerprint` takes them) in so many views."""
    return {
        "data": fingerprint(dataset),
        "images": len(dataset),
        "views": views,
        "seed": seed,
        # Functions print the address where they happen to lie.
        "augmentation": re.sub(r" at 0x[0-9a-f]+", "", repr(transform)),
    }


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's CPU generators for the block, then put them back as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seeds = np.random.SeedSequence(numbers).generate_state(3)
    random.seed(int(seeds[0]))
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(int(seeds[2]))  # `torch.manual_seed` would queue a call to CUDA for each image.
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def fingerprint(dataset: Any, probes: int = 64) -> str:
    """SHA-256 of names and sizes of the image files; for data sets without files, of some of the images themselves."""
    if isinstance(dataset, Subset):
        return _digest([fingerprint(dataset.dataset, probes), *map(int, dataset.indices)])
    names = _file_names(dataset)
    if names is not None:
        return _digest([part for name in names for part in (Path(name).name, Path(name).stat().st_size)])
    length = len(dataset)
    chosen = sorted({round(i * (length - 1) / max(probes - 1, 1)) for i in range(probes)}) if length else []
    code = hashlib.sha256(str(length).encode())
    for index in chosen:
        image, target = dataset[index][:2]
        code.update(repr(target).encode() + np.ascontiguousarray(image).tobytes())
    return code.hexdigest()


def _file_names(dataset: Sized) -> Sequence[str] | None:
    if callable(getattr(dataset, "filenames", None)):  # timm
        names: Sequence[str] = dataset.filenames(absolute=True)
    else:  # torchvision
        names = [sample[0] for sample in getattr(dataset, "samples", [])]
    return names if len(names) and all(Path(name).is_file() for name in names) else None


def _digest(parts: Sequence[object]) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()
