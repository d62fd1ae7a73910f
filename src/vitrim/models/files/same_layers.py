"""Whether two models compute the same from the same weights: kinds and settings of layers, which no weight shows."""

from collections.abc import Collection
from typing import Any, cast

from timm.layers import DropPath, PatchDropout
from torch import nn

from ...text import short_name
from ..reduction.exchange import Reduced

_FREE: tuple[type[nn.Module], ...] = (nn.Identity, nn.Dropout, DropPath, PatchDropout)
"""Layers that change nothing in eval mode."""
_NAMES = frozenset({"num_classes", "num_labels", "name_or_path"})
"""What says how a model is called, or is shown by its weights."""
_MOST = 3


def other_layers(model: nn.Module, stock: nn.Module, left_out: Collection[str]) -> str:
    """How the layers of `model` differ from those of `stock` in what no tensor shows, in one line; empty if not at all.

    A reduction, dropout, and whatever else is not done in eval mode do not count.

    Args:
        model, stock: with the same names and shapes of weights.
        left_out: settings that change no output, such as `training`.
    """
    mine, theirs = (dict(each.named_modules(remove_duplicate=False)) for each in (model, stock))
    found: list[str] = []
    for name in {**theirs, **mine}:
        one, other = mine.get(name, _NOTHING), theirs.get(name, _NOTHING)
        if isinstance(one, _FREE) and isinstance(other, _FREE):
            continue
        if _kind(one) is not _kind(other):
            found.append(f"{short_name(name)} is a {_kind(one).__name__}, not a {_kind(other).__name__}")
            continue
        now, before = _settings(one, left_out), _settings(other, left_out)
        for key in sorted(now.keys() & before.keys()):
            if now[key] != before[key]:
                found.append(f"{short_name(f'{name}.{key}'.lstrip('.'))} is {now[key]}, not {before[key]}")
    more = ", ..." if len(found) > _MOST else ""
    return ", ".join(found[:_MOST]) + more


_NOTHING = nn.Identity()


def _kind(module: nn.Module) -> type:
    """The class of a layer as it is without a reduction."""
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, Reduced))


def _settings(module: nn.Module, left_out: Collection[str]) -> dict[str, Any]:
    """The public plain values of a layer."""
    return {
        name: tuple(cast("list[Any]", value)) if isinstance(value, list | tuple) else value
        for name, value in vars(module).items()
        if name not in left_out and name not in _NAMES and not name.startswith(("_", "vitrim_")) and _plain(value)
    }


def _plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(_plain(entry) for entry in cast("tuple[object, ...]", value))
    return isinstance(value, bool | int | float | str | None)
