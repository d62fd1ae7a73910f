"""Models without values: they take no memory, and no time for drawing weights that nobody reads."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_FILLING = {
    "normal_", "uniform_", "erfinv_", "clamp_", "mul_", "add_", "fill_", "zero_", "copy_",
    "kaiming_uniform_", "kaiming_normal_", "constant_",
}  # fmt: skip
"""What changes the values of a tensor in place, of that which initialisations call; none changes a shape.

Methods of tensors, and functions of `torch.nn.init`, which hand over their tensor by its name.
"""


@contextmanager
def shapes_only() -> Iterator[None]:
    """Build models on the meta device, where tensors have shapes alone, and do not initialise them."""
    with torch.device("meta"), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    """Leaves out what would only fill a tensor without values; PyTorch takes milliseconds to do that to nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _FILLING:
            filled = args[0] if args else kwargs.get("tensor")
            if isinstance(filled, Tensor) and filled.is_meta:
                return filled
        return func(*args, **kwargs)
