"""Models by the name of their architecture, from whatever family builds it."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import UnknownNameError, UnsupportedModelError, VitrimError
from .adapter import Adapter
from .finding import adapter_of, in_order
from .shapes_only import shapes_only

MOST_PATCHES = 1 << 16
"""Of one image: 4,096 px with patches of 16."""
_SURELY_SMALL = 512  # Pixels; has at most that many patches of 2 px and more.


def builder_of(name: str) -> Adapter | None:
    """The family that builds this architecture; None if there is no such name."""
    return next((adapter for adapter in in_order() if adapter.builds(name)), None)


def architectures() -> list[str]:
    """The names of all architectures that can be built, sorted."""
    return sorted({name for adapter in in_order() for name in adapter.architectures()})


def check_patches(model: nn.Module, size: int | Sequence[int]) -> None:
    """Raise `VitrimError` for images of (height, width), or square ones, of no patch or of more than memory holds.

    Not attention takes it, which is computed in parts, but the positions and what the MLP makes of every patch.
    """
    height, width = (size, size) if isinstance(size, int) else size
    try:
        rows, columns = adapter_of(model).grid(model, (height, width))
    except UnsupportedModelError:
        return
    if rows * columns < 1:
        raise UnsupportedModelError(
            f"images of {height} x {width} px are smaller than one patch; choose a larger image size"
        )
    if rows * columns > MOST_PATCHES:
        raise VitrimError(
            f"images of {height} x {width} px give {rows * columns:,} patches each, more than {MOST_PATCHES:,}; choose "
            "a smaller image size"
        )


def build_architecture(
    name: str, args: Mapping[str, Any], *, pretrained: bool = False, images: Mapping[str, Any] | None = None
) -> nn.Module:
    """A new model of a named architecture, see `Adapter.build`; `UnknownNameError` if no family knows the name."""
    adapter = builder_of(name)
    if adapter is None:
        raise UnknownNameError("architecture", name, architectures())
    size = args.get("img_size")
    if isinstance(size, int) and size > _SURELY_SMALL and name in adapter.architectures():
        with shapes_only():
            check_patches(adapter.build(name, args, pretrained=False, images={}), size)
    model = adapter.build(name, args, pretrained=pretrained, images=images or {})
    if size is not None:
        check_patches(model, adapter_of(model).input_format(model).size[1:])
    return model
