"""Options of everything that the notation writes have the types of their annotations, wherever the values come from."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from .errors import VitrimError
from .text import short

LARGEST = 1e18
"""No option counts further: neither tokens nor MACs."""
MOST_ENTRIES = 256
"""Of a tuple or mapping: more than any model has blocks."""
_NUMBERS: dict[Any, type] = {int: Integral, float: Real}
_PYTHON: tuple[tuple[type, Any], ...] = ((bool, bool), (str, str), (Integral, int), (Real, float))
_NAMES: dict[Any, str] = {
    int: "a whole number", float: "a number", str: "text", bool: "True or False", NoneType: "None",
}  # fmt: skip


def check_options(part: Any, error: type[VitrimError]) -> None:
    """Raise `error` for the first option of a dataclass that has another type than its annotation.

    Numbers and text of NumPy become Python's, which can be written as text and read again.
    """
    hints = _hints(type(part))
    for option in fields(part):
        value = _to_python(getattr(part, option.name))
        object.__setattr__(part, option.name, value)
        hint = hints.get(option.name, option.type)
        if isinstance(value, tuple | Mapping) and len(cast("tuple[Any, ...]", value)) > MOST_ENTRIES:
            raise error(f"{type(part).__name__}: {option.name} has more than {MOST_ENTRIES} entries")
        if not _fits(value, hint):
            raise error(f"{type(part).__name__}: {option.name} is {_name(hint)}, not {short(value)}")


def as_tuple(value: Any) -> Any:
    """A list or range as a tuple, which can be hashed; any other value unchanged."""
    return tuple(cast("Iterable[Any]", value)) if isinstance(value, Iterable) and not isinstance(value, str) else value


@cache
def _hints(part: type) -> dict[str, Any]:
    """The types of its options, also where a file writes annotations as text."""
    try:
        return get_type_hints(part)
    except NameError:  # A name that only a type checker imports.
        return {}


def _to_python(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_to_python, cast("tuple[Any, ...]", value)))
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return {_to_python(key): _to_python(entry) for key, entry in items}
    for kind, python in _PYTHON:
        if isinstance(value, kind):
            return value if type(value) is python else python(value)
    return value


def _fits(value: Any, hint: Any) -> bool:
    inner = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if hint in _NUMBERS:  # True is not a number here; infinity, nan and absurd sizes are not either.
        return isinstance(value, _NUMBERS[hint]) and not isinstance(value, bool) and abs(value) <= LARGEST
    if get_origin(hint) is Literal:
        return isinstance(value, str | int | NoneType) and value in inner
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(entry, inner[0]) for entry in cast("tuple[Any, ...]", value))
    if get_origin(hint) is Mapping:
        return isinstance(value, Mapping) and all(
            _fits(key, inner[0]) and _fits(entry, inner[1]) for key, entry in cast("Mapping[Any, Any]", value).items()
        )
    return not isinstance(hint, type) or isinstance(value, hint)


def _name(hint: Any) -> str:
    inner = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_name, inner))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, inner))
    if get_origin(hint) is tuple:
        return f"a tuple, each entry {_name(inner[0])}"
    if get_origin(hint) is Mapping:
        return f"a mapping, each key {_name(inner[0])} and each value {_name(inner[1])}"
    return _NAMES.get(hint) or f"a {getattr(hint, '__name__', hint)}"
