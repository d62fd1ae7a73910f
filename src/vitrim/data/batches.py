"""Batches of images from whatever people have: the one way from the `images` of public functions to tensors."""

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ..errors import DataError
from ..text import short_name
from .seeding import permutation

Batch = Tensor | tuple[Tensor, ...] | list[Tensor]
Images = Tensor | tuple[Tensor, Tensor] | Dataset[Any] | Iterable[Batch]
"""What `batches_in` takes."""
T = TypeVar("T")
SIZE = 32
"""Images in a batch that is made here."""
_PIXELS = ("pixel_values", "image", "images", "img", "x", "input")
"""How images are called in batches of other libraries."""


def batches_in(data: Any, what: str = "images", *, most: int | None = None) -> Iterator[Batch]:
    """The batches of the data, from the first.

    Of a tensor, and of a data set by index, images are taken in a random order, the same one at every call, so that a
    few of them are of all classes; each process of a distributed run takes others. Anything else is read in its order.

    Args:
        data: a tensor (N, channels, height, width), a pair of it and classes (N,), a `Dataset` of (image, class) or of
            images, a `DataLoader`, or any iterable of batches of images or of (images, classes).
        what: what the images are called in messages.
        most: read no more images of a tensor or of a data set by index than these.

    Raises:
        DataError: it is none of these.
    """
    if isinstance(data, Tensor):
        return _of_tensor(data, None, what, most)
    if _is_pair(data):
        return _of_tensor(data[0], data[1], what, most)
    if _is_pair_of_other_labels(data):
        raise DataError(f"{what}: labels are a tensor (N,) of classes, not {_in_words(data[1])}")
    if isinstance(data, IterableDataset):
        return _of_items(_item(item, what) for item in data)
    if isinstance(data, Dataset):
        rows = _order(len(cast("Sequence[Any]", data)), most)
        return _of_items(_item(data[row], what) for row in rows)
    if isinstance(data, Iterable) and not isinstance(data, str | bytes | Mapping):
        return iter(data)
    raise DataError(f"{what}: give a tensor, a data set, a DataLoader or batches, not a {type(data).__name__}")


def images_of(batch: Batch) -> Tensor:
    """The images of a batch, with or without labels.

    Raises:
        DataError: this is not a batch, it is empty, or its images are whole numbers.
    """
    images = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(images, Tensor) or images.ndim != 4:
        raise DataError(
            "a batch is a tensor of images (B, channels, height, width), or a pair of it and labels, not "
            f"{_in_words(batch)}"
        )
    if not len(images):
        raise DataError("a batch holds no images")
    check_floats(images)
    return images


def check_size(images: Tensor, size: tuple[int, ...], what: str = "images") -> None:
    """Raise `DataError` for images (B, channels, height, width) of another size than (channels, height, width)."""
    if (found := tuple(images.shape[1:])) != tuple(size):
        hint = "resize them, or make the model for their size (timm: img_size= or model.set_input_size)"
        if found[0] != size[0]:
            last = found[-1] == size[0]
            hint = "move the channels first: images.permute(0, 3, 1, 2)" if last else f"give {size[0]} channels"
        raise DataError(f"{what} are of size {found}, but the model takes {tuple(size)}; {hint}")


def check_floats(images: Tensor) -> None:
    """Raise `DataError` for pixels that are whole numbers, which no model takes as they are."""
    if not images.is_floating_point():
        raise DataError(
            f"the images are {str(images.dtype).removeprefix('torch.')}; give them as the model takes them, scaled to "
            "[0, 1] and normalised"
        )


def _of_tensor(images: Tensor, classes: Tensor | None, what: str, most: int | None) -> Iterator[Batch]:
    if images.ndim != 4:
        raise DataError(f"{what}: a tensor of images is (N, channels, height, width), not {tuple(images.shape)}")
    if classes is not None and len(classes) != len(images):
        raise DataError(f"{what}: {len(classes)} labels for {len(images)} images")
    parts = _groups(_order(len(images), most), SIZE)
    return (images[[*rows]] if classes is None else (images[[*rows]], classes[[*rows]]) for rows in parts)


def _of_items(items: Iterable[tuple[Tensor, int | None]]) -> Iterator[Batch]:
    for group in _groups(items, SIZE):
        # Images of another size are refused later, by a message that says which one the model takes.
        alike = len({image.shape for image, _ in group}) == 1
        for part in (group,) if alike else _groups(group, 1):
            images, classes = torch.stack([image for image, _ in part]), [target for _, target in part]
            yield images if None in classes else (images, torch.tensor(classes))


def _groups(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    source = iter(items)
    while group := tuple(islice(source, size)):
        yield group


def _order(length: int, most: int | None) -> list[int]:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    first, step = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    return permutation(length, "compress", 0)[first::step][:most]


def _is_pair(data: Any) -> bool:
    """Whether this is (images, classes), not a sequence of two batches."""
    if not isinstance(data, tuple | list) or len(data) != 2:
        return False
    images, classes = data
    return isinstance(images, Tensor) and images.ndim == 4 and isinstance(classes, Tensor) and classes.ndim == 1


def _is_pair_of_other_labels(data: Any) -> bool:
    """Whether this is a batch of images and labels of a wrong form, not a sequence of two batches."""
    if not isinstance(data, tuple | list) or len(data) != 2 or not isinstance(data[0], Tensor) or data[0].ndim != 4:
        return False
    labels = data[1]
    return labels.ndim != 4 if isinstance(labels, Tensor | np.ndarray) else _starts_with_number(labels)


def _starts_with_number(labels: Any) -> bool:
    return isinstance(labels, tuple | list) and bool(labels) and isinstance(labels[0], int | float)


def _in_words(found: Any) -> str:
    """What was given in place of a batch, and how to make one of it."""
    kind = short_name(type(found).__name__)
    if isinstance(found, Mapping):
        names = [key for key in found if isinstance(key, str)]
        image = next((key for key in names if key in _PIXELS), names[0] if names else "image")
        return f"a {kind} with {short_name(', '.join(names))}; give (batch[{image!r}] for batch in loader)"
    if isinstance(found, np.ndarray):
        return f"a NumPy array {found.shape}; give torch.from_numpy(array), channels before height"
    if isinstance(found, Tensor):
        return f"a tensor {tuple(found.shape)}" + ("; stack images: torch.stack(images)" if found.ndim == 3 else "")
    if isinstance(found, tuple | list) and found:
        return f"a {kind} that begins with {_in_words(found[0])}"
    return f"a {kind}"


def _class_of(target: Any) -> int | None:
    """The class that a label names; None where it is not a whole number."""
    with suppress(TypeError):
        return operator.index(target)
    return None


def _item(item: Any, what: str) -> tuple[Tensor, int | None]:
    image, target = (item[0], item[1] if len(item) > 1 else None) if isinstance(item, tuple | list) else (item, None)
    if not isinstance(image, Tensor) or image.ndim != 3:
        raise DataError(
            f"{what}: the data set gives {_in_words(image).partition(';')[0]} where an image (channels, height, width) "
            "is needed; give it a transform that makes tensors, and items (image, class)"
        )
    return image, _class_of(target)
