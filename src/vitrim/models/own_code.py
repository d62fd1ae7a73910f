"""Whether code is that of its library: a monkeypatch on a class or an instance, and classes derived from one."""

from functools import partial
from inspect import isfunction
from itertools import takewhile
from typing import Any

from torch import nn

from ..errors import UnsupportedModelError
from .adapter import Adapter
from .wrapped import written


def replaced(cls: type[nn.Module], name: str = "forward") -> bool:
    """Whether a method of this class was put there by another package than the one that the class is from.

    Decorators of the same package do not count, and those of another package do: their code runs too.
    """
    home = next(one for one in cls.__mro__ if name in vars(one))
    package, code = _package(home.__module__), vars(home)[name]
    while code is not None:
        if _package(getattr(code, "__globals__", {}).get("__name__", "")) != package:
            return True
        code = getattr(code, "__wrapped__", None)
    return False


def set_on(module: nn.Module, name: str) -> bool:
    """Whether the method `name` of this module is hidden by other code, set on the instance.

    What runs the method itself does not count: the method bound again, a compiled form of it, and what accelerate puts
    around it (hooks, mixed precision).
    """
    own, held = vars(module), vars(module).get(name)
    if held is None:
        return False
    if name == "forward" and _package(_code_of(held).get("__name__", "")) == "accelerate":
        held = next((own[kept] for kept in ("_old_forward", "_original_forward") if kept in own), held)
    return not _runs(held, getattr(type(module), name), module)


def own_methods(module: nn.Module) -> list[str]:
    """The methods of its class that are hidden by other code, set on this very module; see `set_on`.

    Those that all modules have count only if they compute: a `to` that warns changes nothing.
    """
    names = [name for name, value in vars(module).items() if callable(value)]
    return [
        name
        for name in names
        if isfunction(getattr(type(module), name, None))
        and (name == "forward" or not hasattr(_common(module), name))
        and set_on(module, name)
    ]


def check_no_own_methods(model: nn.Module) -> None:
    """Raise `UnsupportedModelError` where other code was set on a module, which no copy or file of the model has."""
    for name, module in model.named_modules():
        if names := own_methods(module):
            raise UnsupportedModelError(
                f"{name or f'this {type(module).__name__}'} has a {names[0]} of its own, set on the instance, which a "
                f"copy or a file of the model would lose; `del {written(name)}.{names[0]}`, or write a "
                "module of your own that holds the model"
            )


def _runs(held: Any, method: Any, module: nn.Module) -> bool:
    """Whether what was set on a module is this method of its class."""
    held = getattr(held, "_torchdynamo_orig_callable", held)
    if isinstance(held, partial):
        return held.func is method and held.args == (module,) and not held.keywords
    return getattr(held, "__func__", None) is method and held.__self__ is module


def _code_of(held: Any) -> dict[str, Any]:
    """The globals of the code of something that can be called."""
    inner = held.func if isinstance(held, partial) else held
    return getattr(getattr(inner, "__func__", inner), "__globals__", {})


def _common(module: nn.Module) -> type[nn.Module]:
    """The class that all models of a library share."""
    bases = [cls for cls in type(module).__mro__ if cls.__module__ == "transformers.modeling_utils"]
    return bases[0] if bases else nn.Module


def own_class(model: nn.Module, base: type[nn.Module], adapter: Adapter) -> str:
    """Why a model of a class derived from `base` is refused, and what to do."""
    cls = type(model)
    classes = takewhile(lambda one: one is not base, cls.__mro__)
    names = [name for one in classes for name, value in vars(one).items() if isfunction(value) and name[:2] != "__"]
    what = f"has {', '.join(names[:3])} of its own" if names else "is a class of its own"
    return (
        f"{cls.__qualname__} {what}, so that it is not known what it does with tokens; hold a plain {base.__name__} in "
        f"your module and give that one, as in vitrim.attach(module.backbone, ...). The {adapter.name} adapter covers "
        f"{adapter.covers}"
    )


def _package(module: str) -> str:
    return module.partition(".")[0]
