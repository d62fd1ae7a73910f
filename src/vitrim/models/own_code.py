"""Whether the code of a class is that of its library, or was replaced by others (a monkeypatch on the class)."""

from torch import nn


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


def _package(module: str) -> str:
    return module.partition(".")[0]
