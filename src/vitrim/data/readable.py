"""Batches without the images that could not be read; those are counted and named in the log."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..text import message
from .images import Images

log = logging.getLogger(__name__)
_NAMED = 3
"""Unreadable images that the log names; of the others it says how many there are."""


@dataclass
class ReadableBatches:
    """Batches (images (B, C, H, W), classes (B,)) of items of a `Stream`, without its unreadable images.

    A batch that holds no other is left out. The log says at the end how many images were left out, with some names.

    loader: batches of items; the index of an unreadable image is negative.
    images: what the indices are numbers of.
    seen: how many images were given so far.
    """

    loader: Iterable[Any]
    images: Images
    seen: int = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        lost: set[int] = set()
        try:
            for pixels, classes, index, *_ in self.loader:
                kept = index >= 0
                lost |= {-1 - number for number in index[~kept].tolist()}
                if kept.any():
                    self.seen += int(kept.sum())
                    yield pixels[kept], classes[kept]
        finally:  # Also where the reader has enough before the end.
            if lost:
                log.warning("%s", message(f"images that could not be read and were left out: {self._named(lost)}"))

    def _named(self, lost: set[int]) -> str:
        names = ", ".join(self.images.name(number) for number in sorted(lost)[:_NAMED])
        return f"{len(lost)} ({names}{', ...' if len(lost) > _NAMED else ''})"
