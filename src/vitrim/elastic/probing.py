"""Run images through an unchanged model: batches, outputs, the scalar to differentiate, and sums over processes."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import Batch, Images, batches_in, check_size, images_of
from ..errors import DataError, UnsupportedModelError, VitrimError
from ..models import as_tensor, num_classes
from ..models.evaluating import evaluating
from ..models.finding import adapter_of


def output_of(model: Callable[[Tensor], Any], images: Tensor) -> Tensor:
    """Logits (B, classes), pooled features (B, C) or a map of them (B, C, ...); heads of a distilled model averaged."""
    return adapter_of(model).predict(model, images) if isinstance(model, nn.Module) else as_tensor(model(images))


def is_headless(model: nn.Module) -> bool:
    """Whether the model returns features instead of class logits."""
    return num_classes(model) == 0


def objective_of(model: nn.Module, labels: bool) -> Callable[[Tensor, Any], Tensor]:
    """The scalar S of a batch: sum of the logits of the true class or of the predicted class, or squared feature norm.

    Raises:
        VitrimError: labels are wanted and the model has no classifier.
    """
    if is_headless(model):
        if labels:
            raise VitrimError("this model has no classifier, so it cannot use labels; leave labels=True out")
        return lambda out, _: out.square().sum()
    if labels:
        return lambda out, target: out.gather(1, target.view(-1, 1)).sum()
    return lambda out, _: out.amax(1).sum()


def check_counts(**counts: Any) -> None:
    """Raise `VitrimError` for the first of these numbers that is not a positive integer."""
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            raise VitrimError(f"{name} is a positive integer, not {value!r}")


def all_alike(batches: list[Tensor]) -> bool:
    """Whether several images in these batches are all the same one."""
    first = batches[0][:1]
    several = sum(map(len, batches)) > 1
    return several and all(images.shape[1:] == first.shape[1:] and bool((images == first).all()) for images in batches)


def first_batches(source: Iterator[Batch], num_images: int) -> list[Batch]:
    """As many batches from the iterator as hold so many images, or all that are left."""
    kept: list[Batch] = []
    while num_images > 0 and (batch := next(source, None)) is not None:
        kept.append(batch)
        num_images -= len(images_of(batch))
    return kept


def portions(kept: Sequence[Batch], size: int) -> list[list[Batch]]:
    """The images of these batches in portions of `size`, without what is left over; one portion if they are fewer."""
    found: list[list[Batch]] = [[]]
    room = size
    for batch in kept:
        start, stop = 0, len(images_of(batch))
        while stop - start >= room:
            found[-1].append(_part(batch, start, start + room))
            found.append([])
            start, room = start + room, size
        if start < stop:
            found[-1].append(_part(batch, start, stop))
            room -= stop - start
    return found[:-1] or found


def in_turn(parts: Sequence[list[Batch]], number: int) -> list[list[Batch]]:
    """So many portions: the last is that of no other if there are two, the others come in turn."""
    *others, last = parts
    return [*itertools.islice(itertools.cycle(others or [last]), number - 1), last]


def _part(batch: Batch, start: int, stop: int) -> Batch:
    if isinstance(batch, Tensor):
        return batch[start:stop]
    return tuple(each[start:stop] if isinstance(each, Tensor) else each for each in batch)


def batches(data: Images, model: nn.Module, num_images: int, labels: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(images, labels or None) on the model's device, at most `num_images` images over all processes together.

    Raises:
        DataError: there are no images, or labels are wanted and missing.
        VitrimError: a number of images below 1.
    """
    check_counts(num_images=num_images)
    parameter = next(model.parameters())
    left = wanted = -(-num_images // world_size())
    for batch in batches_in(data):
        images = images_of(batch)
        check_pixels(model, images)
        given = None if isinstance(batch, Tensor) or len(batch) < 2 else batch[1]
        target = check_classes(given, len(images), num_classes(model), "labels=True") if labels else None
        images = images[:left].to(parameter.device, parameter.dtype, non_blocking=True)
        yield images, None if target is None else target[:left].to(parameter.device)
        left -= len(images)
        if left <= 0:
            return
    if left == wanted:
        raise DataError("the data holds no images; give batches of images, from an iterator that is not used up")


def check_pixels(model: nn.Module, images: Tensor) -> None:
    """Raise `DataError` for images that are not as the model takes them.

    They are of another size, or hold values that normalised pixels are far from, such as 255, which would be silently
    wrong.
    """
    try:
        form = adapter_of(model).input_format(model)
    except UnsupportedModelError:
        return
    check_size(images, form.size)
    largest = max(max(mean, 1 - mean) / std for mean, std in zip(form.mean, form.std, strict=True))
    if 20 * largest < (found := images.abs().max().item()) < inf:  # What is not finite has a message of its own.
        raise DataError(
            f"the images have values up to {found:g}, but pixels that are normalised as this model takes them stay "
            f"within {largest:.3g}; scale them to [0, 1], then subtract mean={form.mean} and divide by std={form.std}"
        )


def check_classes(target: object, num_images: int, classes: int, what: str) -> Tensor:
    """The classes (B,) of a batch of images, as whole numbers that the model can predict.

    Args:
        target: what the batch holds.
        num_images: in the batch.
        classes: of the model.
        what: needs them, for messages.

    Raises:
        DataError: they are something else, or of another number of images.
    """
    integers = isinstance(target, Tensor) and not (target.is_floating_point() or target.dtype == torch.bool)
    if not isinstance(target, Tensor) or not integers or target.ndim != 1:
        raise DataError(f"{what} needs batches of (images, integer labels)")
    if len(target) != num_images:
        raise DataError(f"a batch holds {len(target)} labels for {num_images} images")
    if len(target) and not 0 <= int(target.min()) <= int(target.max()) < classes:
        raise DataError(f"labels go from {target.min()} to {target.max()}, but the model has {classes} classes")
    return target.long()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode without weight gradients; both are restored afterwards."""
    wanted = {p: p.requires_grad for p in model.parameters()}
    with evaluating(model):
        model.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, flag in wanted.items():
                parameter.requires_grad_(flag)


def world_size() -> int:
    """Number of processes, 1 outside of torch.distributed."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1


def all_reduce(x: Tensor) -> Tensor:
    """Add the tensor up over all processes, in place."""
    if world_size() > 1:
        torch.distributed.all_reduce(x)
    return x
