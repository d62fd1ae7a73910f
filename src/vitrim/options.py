"""Options as files and as typed data: read YAML, lay changes over it, turn it into dataclasses. No torch.

What an option takes is its type annotation: a number, text, true or false, one of several words, a mapping, or another
dataclass; `Annotated[int, Range(1, 10)]` bounds a number. No value names a class or makes anything be imported.
"""

import stat
from dataclasses import dataclass, fields, is_dataclass
from math import isfinite
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import RecipeError, UnknownNameError
from .text import short
from .yaml_text import MAX_CHARS, MAX_DEPTH, parse_yaml

Options = TypeVar("Options")


@dataclass(frozen=True)
class Range:
    """The numbers that an option takes: `low` to `high`, without `low` itself where `above`."""

    low: float
    high: float | None = None
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return (value > self.low if self.above else value >= self.low) and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        low = f"more than {self.low:,}" if self.above else f"{self.low:,} or more"
        return low if self.high is None else f"{low}, at most {self.high:,}"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        RecipeError: it cannot be read, is too large, is something else, or gives a name twice.
    """
    try:
        mode = Path(path).stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise RecipeError(f"{path} cannot be read (a pipe or device, not a file)")
        with Path(path).open(encoding="utf-8") as file:
            data = parse_yaml(file.read(MAX_CHARS + 1), str(path))
    except FileNotFoundError:
        raise RecipeError(f"{path} does not exist") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start})") from None
    except ValueError as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"{str(path)!r} cannot be the name of a file") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path} does not hold options but {type(data).__name__}")
    return data


def check_ranges(*options: tuple[str, float | None, float, float | None]) -> None:
    """Raise `RecipeError` where an option (name, value, lowest, highest) is out of its range; None never is."""
    for name, value, low, high in options:
        if value is not None and value not in (bounds := Range(low, high)):
            raise RecipeError(f"{name} is {value}; it must be {bounds}")


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, option by option."""
    merged = dict(base)
    for name, value in changes.items():
        old = merged.get(name)
        merged[name] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as `outer.inner` names."""
    flat: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def plain(value: Any) -> Any:
    """Nested options with lists in place of tuples, as YAML reads them back."""
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def from_dict(kind: type[Options], data: dict[str, Any], where: str, prefix: str | None = None) -> Options:
    """A dataclass from nested plain data; an option that is a dataclass itself is made from a mapping.

    Args:
        kind: the dataclass.
        data: values by the names of its options.
        where: what it is called in messages.
        prefix: what stands before its options in messages; by default `where` and a dot.

    Raises:
        UnknownNameError: an option that `kind` does not have, with the nearest that it has.
        RecipeError: a value of another type than the option takes, or out of its range.
    """
    return kind(**typed_values(kind, data, where, prefix))


def typed_values(kind: type, data: dict[str, Any], where: str, prefix: str | None = None) -> dict[str, Any]:
    """The options of a dataclass that are given, checked as by `from_dict`; those that are not given stay away."""
    prefix = f"{where}." if prefix is None else prefix
    hints = get_type_hints(kind, include_extras=True)
    for name in data:
        if name not in hints:
            raise UnknownNameError(f"option in {where}", str(name), hints)
    return {name: typed(hints[name], value, prefix + name) for name, value in data.items()}


def check_options(options: Any, prefix: str = "") -> None:
    """Check a dataclass that was made in Python as `from_dict` checks one from a file.

    Raises:
        RecipeError: a value of another type than the option takes, or out of its range.
    """
    hints = get_type_hints(type(options), include_extras=True)
    for option in fields(options):
        value, path = getattr(options, option.name), prefix + option.name
        if is_dataclass(value):
            check_options(value, f"{path}.")
        else:
            typed(hints[option.name], value, path)


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """The types that an option takes, without the ranges of numbers."""
    if get_origin(hint) is Annotated:
        return kinds_of(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return tuple(kind for one in get_args(hint) for kind in kinds_of(one))
    return (hint,)


def range_of(hint: Any) -> Range | None:
    """The range of an option that takes numbers, None where they are not bounded."""
    if get_origin(hint) is Annotated:
        return next((note for note in get_args(hint)[1:] if isinstance(note, Range)), None)
    if get_origin(hint) in (Union, UnionType):
        return next((found for one in get_args(hint) if (found := range_of(one)) is not None), None)
    return None


def typed(hint: Any, value: Any, where: str) -> Any:
    """The value of an option, if it is of a type that the option takes, and in its range.

    Raises:
        RecipeError: it is not; `where` names the option.
    """
    kinds = kinds_of(hint)
    for kind in kinds:
        if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
            return from_dict(kind, value, where)
        found = _as(kind, value, where)
        if found is not _NO:
            bounds = range_of(hint)
            if bounds is not None and isinstance(found, int | float) and found not in bounds:
                raise RecipeError(f"{where} is {short(value)}; it must be {bounds}")
            return found
    raise RecipeError(f"{where} is {short(value)}; it must be {describe(hint)}")


def describe(hint: Any) -> str:
    """What an option takes, in words."""
    return " or ".join(dict.fromkeys(_named(kind) for kind in kinds_of(hint)))


_NO = object()


def _as(kind: Any, value: Any, where: str) -> Any:
    """The value as one of this kind, `_NO` where it is of another."""
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin is Literal:
        if value is False and "no" in inner:  # YAML reads a bare no as false.
            return "no"
        return value if any(type(value) is type(one) and value == one for one in inner) else _NO
    if kind is float:
        # Not every number that is written like one is one: 10 ** 400 has no float.
        return float(value) if type(value) in (int, float) and abs(value) < 1e308 else _NO
    if type(value) is not origin:
        return _NO
    if origin is dict and inner:
        return _entries(inner[1], value, where, 0)
    if origin is list and inner:
        return [_entry(inner[0], entry, where, 0) for entry in value]
    return value


def _entries(hint: Any, values: dict[Any, Any], where: str, depth: int) -> dict[str, Any]:
    names = (str,) if depth == 0 else (str, int, float)
    for name in values:
        if type(name) not in names:
            raise RecipeError(f"{where} has an entry named {short(name)}; names must be text")
    return {name: _entry(hint, value, f"{where}.{name}"[:80], depth) for name, value in values.items()}


def _entry(hint: Any, value: Any, where: str, depth: int) -> Any:
    """An entry of a mapping or list: as `hint` says, or, where that is Any, plain data only."""
    if hint is not Any:
        return typed(hint, value, where)
    if depth > MAX_DEPTH:
        raise RecipeError(f"{where} is nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, dict):
        return _entries(Any, value, where, depth + 1)
    if isinstance(value, list | tuple):
        return type(value)(_entry(Any, entry, where, depth + 1) for entry in value)
    if type(value) not in (str, int, float, bool, NoneType):
        raise RecipeError(f"{where} is {short(value)}; it must be plain data: text, numbers, lists, mappings")
    if isinstance(value, float) and not isfinite(value):  # It would not even equal itself when a run is continued.
        raise RecipeError(f"{where} is {value}; it must be a finite number")
    return value


def _named(kind: Any) -> str:
    if get_origin(kind) is Literal:
        words = ", ".join(map(repr, get_args(kind)))
        return f"one of {words}" if len(get_args(kind)) > 1 else words
    if (get_origin(kind) or kind) is list:
        return "a list"
    return {NoneType: "null", str: "text", int: "a whole number", float: "a number", bool: "true or false"}.get(
        kind, "a mapping of options"
    )
