"""What a benchmark times: a module, or a file of another runtime. Both give their size and MACs, and run on images."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import UncountableError, UnsupportedModelError, VitrimError
from ..models import adapter_of, find_adapter, without_limit
from ..models.copying import copied
from ..models.foreign_macs import counted
from .cost import cost
from .served import ServedFile

Size = tuple[int, int, int]


class Timed(Protocol):
    """One entry of a benchmark."""

    @property
    def kind(self) -> str:
        """What it is called in messages."""
        ...

    @property
    def size(self) -> Size | None:
        """(channels, height, width) of its images; None where it is not known."""
        ...

    @property
    def runtime(self) -> str | None:
        """What runs it; None for PyTorch itself."""
        ...

    def macs_at(self, size: Size) -> int | None:
        """MACs per image of this size; None where they cannot be counted."""
        ...

    def check(self, batch_size: int, size: Size) -> None:
        """Raise `VitrimError` where it does not take such a batch."""
        ...

    def prepared(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """What is run: a copy in eval mode on the device."""
        ...

    def compiled(self, model: nn.Module) -> Callable[[Tensor], object]:
        """What `prepared` returned, compiled for one shape of images."""
        ...


class Live:
    """A module, which is left as it is."""

    runtime = None

    def __init__(self, model: nn.Module) -> None:
        self.model, self.kind = model, type(model).__name__

    @property
    def size(self) -> Size | None:
        """That of the model's input format."""
        try:
            own = adapter_of(self.model).input_format(self.model).size
        except UnsupportedModelError:
            return None
        return None if own is None else (own[0], own[1], own[2])

    def macs_at(self, size: Size) -> int | None:
        """vitrim's count where an adapter knows the model at this size, else PyTorch's on empty tensors."""
        try:
            if find_adapter(self.model).geometry(self.model).input_size == size:
                return cost(self.model, training=False).macs  # As it is timed.
        except UnsupportedModelError:
            pass
        try:
            return counted(self.model, (1, *size)).total
        except UncountableError:
            return None

    def check(self, batch_size: int, size: Size) -> None:
        """A module says for itself what it does not take, when it runs."""

    def prepared(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """A copy there."""
        return copied(self.model).to(device, dtype).eval()

    def compiled(self, model: nn.Module) -> Callable[[Tensor], object]:
        """By torch.compile, without its limit on the number of shapes."""
        return without_limit(torch.compile(model, dynamic=False))


def timed(model: nn.Module) -> Timed:
    """The entry of a benchmark for a module or an opened file."""
    return model if isinstance(model, ServedFile) else Live(model)


def size_for(entry: Timed, given: Size | int | None) -> Size:
    """The images for an entry: as given, or its own; a number is the side of a square.

    Raises:
        VitrimError: none is given and its own is not known.
    """
    if isinstance(given, tuple):
        return given
    own = entry.size
    if isinstance(given, int):
        return (own[0] if own else 3, given, given)
    if own is None:
        raise VitrimError(f"the input size of this {entry.kind} is not known; give input_size")
    return own
