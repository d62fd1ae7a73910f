"""Whether the code of a class is that of its library: a monkeypatch on the class, and classes derived from it."""

from inspect import isfunction
from itertools import takewhile

from torch import nn

from .adapter import Adapter


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
