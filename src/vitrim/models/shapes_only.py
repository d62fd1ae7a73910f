"""Models without values: they take no memory, and no time for drawing weights that nobody reads."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_FILLING = {"normal_", "uniform_", "erfinv_", "clamp_", "mul_", "add_", "fill_", "zero_", "copy_"}
"""Methods that change the values of a tensor in place, of those that initialisations use; none changes a shape."""


@contextmanager
def shapes_only() -> Iterator[None]:
    """Build models on the meta device, where tensors have shapes alone, and do not initialise them."""
    with torch.device("meta"), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    """Leaves out what would only fill a tensor without values; PyTorch takes milliseconds to do that to nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _FILLING and args and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))
