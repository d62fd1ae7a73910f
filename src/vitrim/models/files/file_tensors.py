"""Tensors as a file of weights declares them: bytes are read when they are needed, and never beyond the file."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor


class BombError(Exception):
    """The file declares more than it can hold; the text says what, after the name of the file."""


@dataclass(frozen=True, eq=False)
class Unusable:
    """In place of a tensor that cannot be a weight: sparse, quantised, without data, of a foreign class."""

    kind: str


class Storage:
    """Bytes in the file that one or several tensors share; read when they are needed."""

    def __init__(self, dtype: torch.dtype, nbytes: int, read: Callable[[], Tensor] | None = None) -> None:
        self.dtype, self.nbytes, self.reader = dtype, nbytes, read
        self._content: Tensor | None = None

    def content(self) -> Tensor:
        """All bytes, as a tensor of uint8."""
        if self._content is None:
            if self.reader is None:
                raise EOFError("a tensor without data")
            self._content = self.reader()
        return self._content


@dataclass(frozen=True, eq=False)
class Entry:
    """A tensor in the file. `offset` and `stride` count elements of the storage."""

    storage: Storage
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def checked(cls, storage: Storage, dtype: Any, shape: Any, stride: Any, offset: Any, *, most: int) -> "Entry":
        """An entry as the file declares it, whose bytes are in its storage.

        Raises:
            ValueError: these are not sizes of a tensor.
            BombError: it is larger than its storage, or than `most` bytes, the size of the file.
        """
        numbers = (offset, *shape, *stride)
        if any(type(number) is not int or number < 0 for number in numbers) or len(shape) != len(stride):
            raise ValueError("not a tensor")
        last = offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
        beyond = prod(shape) and (last + 1) * dtype.itemsize > storage.nbytes
        # A step of 0 makes a large tensor of a small storage.
        if len(shape) > 16 or beyond or prod(shape) * dtype.itemsize > max(most, 1 << 20):
            raise BombError("declares larger tensors than it has bytes; it is damaged, or made to fill the memory")
        return cls(storage, dtype, tuple(shape), tuple(stride), offset)

    def tensor(self) -> Tensor:
        """Read it."""
        return torch.as_strided(self.storage.content().view(self.dtype), self.shape, self.stride, self.offset)


class Bounded:
    """A file that never allocates more than is left of it, whatever length is asked for."""

    def __init__(self, file: Any, size: int) -> None:
        self._file, self._left = file, size

    def read(self, length: int) -> bytes:
        data = self._file.read(max(0, min(length, self._left)))
        self._left -= len(data)
        return data

    def readline(self) -> bytes:
        data = self._file.readline(max(0, self._left))
        self._left -= len(data)
        return data
