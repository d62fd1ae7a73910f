"""The network that holds a tower of Hugging Face transformers, which the tower itself does not know."""

import gc
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .layout import Layout


def averaging_owner(layout: Layout, tower: nn.Module) -> nn.Module | None:
    """The model around this tower whose head averages its tokens, if there is one."""
    averaging = {name: whole.tower for name, whole in layout.wholes.items() if whole.reads == "tokens"}
    return holder(layout, tower, averaging)


def holder(
    layout: Layout, tower: nn.Module, names: Mapping[str, str], among: Iterable[object] | None = None
) -> nn.Module | None:
    """The object of one of these classes that holds this tower under the name that belongs to the class."""
    if layout.whole(tower) is not None or not names:
        return None
    if among is None:
        # Few towers are held under such a name: only then is it worth the time to look at all objects.
        dicts = [one for one in gc.get_referrers(tower) if type(one) is dict]
        held = any(one.get(name) is tower for one in dicts for name in names.values())
        among = gc.get_objects() if held else ()
    classes = {getattr(layout.module, name): inside for name, inside in names.items()}
    known: list[Any] = [one for one in among if type(one) in classes]
    return next((one for one in known if getattr(one, classes[type(one)], None) is tower), None)
