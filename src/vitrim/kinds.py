"""Options of all that the notation writes are of the kind that their annotation names, wherever they come from."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from math import inf
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin

from .errors import VitrimError

_NUMBERS: dict[Any, type] = {int: Integral, float: Real}
_OWN: tuple[tuple[type, Any], ...] = ((bool, bool), (str, str), (Integral, int), (Real, float))
_SAID: dict[Any, str] = {
    int: "a whole number", float: "a number", str: "text", bool: "True or False", NoneType: "None",
}  # fmt: skip


def check_options(part: Any, error: type[VitrimError]) -> None:
    """Raise `error` for the first option of a dataclass that is of another kind than its annotation says.

    Numbers and text of NumPy become Python's own, which alone can be written down and read again.
    """
    for option in fields(part):
        value = _own(getattr(part, option.name))
        object.__setattr__(part, option.name, value)
        if not _fits(value, option.type):
            raise error(f"{type(part).__name__}: {option.name} is {_said(option.type)}, not {value!r}")


def as_tuple(value: Any) -> Any:
    """A list or range as a tuple, which can be hashed; anything that holds no entries as it is."""
    return tuple(cast("Iterable[Any]", value)) if isinstance(value, Iterable) and not isinstance(value, str) else value


def _own(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_own, cast("tuple[Any, ...]", value)))
    if isinstance(value, Mapping):
        return {_own(key): _own(entry) for key, entry in cast("Mapping[Any, Any]", value).items()}
    for kind, own in _OWN:
        if isinstance(value, kind):
            return value if type(value) is own else own(value)
    return value


def _fits(value: Any, hint: Any) -> bool:
    inner = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if hint in _NUMBERS:  # Numbers of NumPy are welcome; True is no number here, nor are infinity and nan.
        return isinstance(value, _NUMBERS[hint]) and not isinstance(value, bool) and abs(value) < inf
    if get_origin(hint) is Literal:
        return value in inner
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(entry, inner[0]) for entry in cast("tuple[Any, ...]", value))
    if get_origin(hint) is Mapping:
        return isinstance(value, Mapping) and all(
            _fits(key, inner[0]) and _fits(entry, inner[1]) for key, entry in cast("Mapping[Any, Any]", value).items()
        )
    return not isinstance(hint, type) or isinstance(value, hint)


def _said(hint: Any) -> str:
    inner = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_said, inner))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, inner))
    if get_origin(hint) is tuple:
        return f"a tuple, each entry {_said(inner[0])}"
    if get_origin(hint) is Mapping:
        return f"a mapping, each key {_said(inner[0])} and each value {_said(inner[1])}"
    return _SAID.get(hint) or f"a {getattr(hint, '__name__', hint)}"
