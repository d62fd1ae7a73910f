"""Which family a model belongs to."""

from torch import nn

from ..errors import UnsupportedModelError, VitrimError
from .adapter import ADAPTERS, OTHERS, Adapter
from .refused import reason
from .wrapped import check_is_model, find_inside


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter of any model at all; it may be unable to reduce tokens, see `find_adapter`.

    Raises:
        VitrimError: not a model but its name, its weights, or something else.
    """
    check_is_model(model)
    return next(adapter for adapter in in_order() if adapter.claims(model))


def find_adapter(model: nn.Module) -> Adapter:
    """The adapter that can reduce the tokens of the model, checked.

    Raises:
        UnsupportedModelError: names the class met and the families that exist.
    """
    adapter = adapter_of(model)
    if ADAPTERS.get(adapter.name) is adapter:
        adapter.check(model)
        return adapter
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    found = find_inside(model, _reducible)
    if found is not None and (owner := adapter_of(found[1]).dense_owner(found[1], model.modules())) is not None:
        hint = needs_all_tokens(owner)
    elif found is not None:
        hint = f"give the model inside it: {found[0]} (attach a reduction before wrapping or compiling)"
    elif known := reason(model):
        raise UnsupportedModelError(f"the tokens of {known[0]} ({name}) cannot be reduced: {known[1]}")
    else:
        hint = f"adapters: {', '.join(ADAPTERS)}; vitrim list says what each covers"
    raise UnsupportedModelError(f"no adapter for {name}; {hint}")


def needs_all_tokens(owner: nn.Module) -> str:
    """Why nothing can be cut in a model inside `owner`."""
    return (
        f"a {type(owner).__name__} needs the tokens of all patches in their places, so none can be cut inside it (a "
        "head on a backbone, whose maps stay whole, takes fewer: docs/dense.md)"
    )


def num_classes(model: nn.Module) -> int:
    """Classes of the model's classifier; 0 without one."""
    return adapter_of(model).classifier(model).classes


def in_order() -> list[Adapter]:
    """All families in the order in which they are tried: those registered last, and those that can cut, come first."""
    return [*list(ADAPTERS.values())[::-1], *list(OTHERS.values())[::-1]]


def _reducible(model: nn.Module) -> bool:
    adapter = adapter_of(model)
    if ADAPTERS.get(adapter.name) is not adapter:
        return False
    try:
        adapter.check(model)
    except VitrimError:
        return False
    return True
