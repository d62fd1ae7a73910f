"""Reduced classes for models of Hugging Face transformers, made when a model of their family is first met.

They are attributes of this module, such as `ReducedViTLayer`, so that pickle finds them by name.
"""

import inspect
import threading
from typing import Any

from torch import nn

from .layout import LAYOUTS, Layout
from .reduced_block import ReducedLayer
from .reduced_models import ReducedTower, ReducedTransformer, ReducedWhole

_PREFIX = "Reduced"
_lock = threading.RLock()
_made: dict[type[nn.Module], type[nn.Module]] = {}


def reduced_class(foreign: type[nn.Module]) -> type[nn.Module]:
    """The reduced class of a class of transformers."""
    with _lock:
        if foreign not in _made:  # Parts that a backbone shares with the tower of its family are those of the tower.
            found = ((layout, _mixin(layout, foreign)) for layout in LAYOUTS.values())
            layout, mixin = next((layout, mixin) for layout, mixin in found if mixin is not None)
            _made[foreign] = _make(layout, mixin, foreign)
        return _made[foreign]


def _mixin(layout: Layout, foreign: type[nn.Module]) -> type[nn.Module] | None:
    if not foreign.__module__.startswith(f"transformers.models.{layout.package}."):
        return None
    name = foreign.__name__
    mixins = {layout.prefix + layout.layer: layout.block or ReducedLayer}
    mixins |= {layout.tower: layout.tower_class or ReducedTower}
    mixins |= dict.fromkeys(layout.wholes, layout.whole_class or ReducedWhole)
    return {**mixins, **layout.others}.get(name)


def _make(layout: Layout, mixin: type[nn.Module], foreign: type[nn.Module]) -> type[nn.Module]:
    # transformers writes the name of a model's class into its files, and looks up there what a class can record.
    names = tuple(inspect.signature(foreign.forward).parameters)[2:]
    body: dict[str, Any] = {
        "__module__": __name__,
        "__qualname__": _PREFIX + foreign.__name__,
        "__doc__": f"`{foreign.__name__}` with a reduction attached.",
        "vitrim_layout": layout,
        "vitrim_arguments": tuple(name for name in names if name not in ("args", "kwargs")),
    }
    meta: Any = type(foreign)
    made = meta(foreign.__name__, (mixin, foreign), body)
    if issubclass(made, ReducedTransformer):
        made.forward.__wrapped__ = foreign.forward  # Trainer reads the arguments of a model from its signature.
    if hasattr(foreign, "_can_record_outputs"):
        from transformers.utils import output_capturing

        dict.__setitem__(output_capturing._CAN_RECORD_REGISTRY, str(made), foreign._can_record_outputs)
    return made


class _Unknown(AttributeError):
    pass


def __getattr__(name: str) -> Any:
    """The reduced class of this name: pickle asks for it where nothing has been attached yet."""
    if name.startswith(_PREFIX):
        for layout in LAYOUTS.values():
            known = (layout.prefix + layout.layer, *layout.names, *layout.others)
            if name.removeprefix(_PREFIX) in known:
                return reduced_class(getattr(layout.module, name.removeprefix(_PREFIX)))
    raise _Unknown(f"module {__name__!r} has no attribute {name!r}")
