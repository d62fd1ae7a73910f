"""What a tensor holds at one moment, in a few numbers, and whether it still holds the same.

PyTorch counts what is written into a tensor, but not what goes through `.data`, NumPy or DLPack, and tensors of
inference mode count nothing. Sums of their bits over each row and over each column show all of it: whole numbers add up
to the same in any order, and no other values have the same sums but by intent.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...tokens.recording import recording

_WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by the bytes of a number."""


@dataclass(frozen=True, eq=False)
class Contents:
    """Sums of the bits of a tensor (..., C): of each row (...) and of each column (C)."""

    dtype: torch.dtype
    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "Contents | None":
        """What `x` holds; None where its memory cannot be read: while graphs are made, and for tensors without memory.

        Nothing waits for an accelerator here.
        """
        if recording() or not _readable(x):
            return None
        with torch.no_grad():
            bits = x.data.view(_WHOLE[x.itemsize])
            rows, columns = bits.sum(-1, dtype=torch.int64), bits.flatten(0, -2).sum(0, dtype=torch.int64)
        return cls(x.dtype, rows, columns)

    def still_in(self, x: Tensor) -> bool | None:
        """Whether `x` holds the same; None where it cannot be read. Waits for the accelerator that it is on."""
        if capturing(x):
            return None
        now = Contents.of(x)
        if now is None:
            return None
        if (now.dtype, now.rows.shape, now.columns.shape) != (self.dtype, self.rows.shape, self.columns.shape):
            return False
        if now.rows.device != self.rows.device:
            return False
        return bool((now.rows == self.rows).all() & (now.columns == self.columns).all())

    def __deepcopy__(self, memo: dict[int, object]) -> "Contents":
        return self


def storage_of(x: Tensor) -> torch.UntypedStorage | None:
    """The memory of a tensor; None where it has none of its own, and while graphs are made."""
    if recording():
        return None
    try:
        return x.untyped_storage()
    except (RuntimeError, NotImplementedError):  # As under `vmap`.
        return None


def writes(x: Tensor) -> int:
    """How often something was written into this memory; tensors of inference mode do not count it."""
    return 0 if x.is_inference() else x._version


def capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is captured on the device of `x`, where nothing can wait for it."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _readable(x: Tensor) -> bool:
    plain = type(x) in (Tensor, torch.nn.Parameter) and x.layout == torch.strided and not x.is_meta and x.ndim > 1
    if not plain or x.itemsize not in _WHOLE or x.is_complex():
        return False
    try:
        return x.untyped_storage().data_ptr() != 0
    except (RuntimeError, NotImplementedError):  # As under `vmap`.
        return False
