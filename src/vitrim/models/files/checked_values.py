"""Values of a file that may come from anywhere: each is checked for its kind and its bounds before it is used."""

import re
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any

from ...text import short_name

_WORD = re.compile(r"[\w.+-]{0,100}(?: [\w.+-]{1,100})*")


class Misfit(Exception):
    """What is wrong with a value. All checks below raise it; `where` names the value in the message."""


def plain(where: str, value: Any, most: int, depth: int = 0) -> Any:
    """A scalar, or a list of them, which becomes a tuple."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return word(where, value)
    if isinstance(value, int):
        return integer(where, value, -1, most)
    if isinstance(value, float):
        return number(where, value, -1e9, 1e9)
    if isinstance(value, list | tuple) and depth < 3 and len(value) <= 256:
        return tuple(plain(where, part, most, depth + 1) for part in value)
    raise Misfit(f"{where} is {shown(value)}; it must be a plain value or a short list of them")


def mapping(where: str, value: Any) -> Mapping[str, Any]:
    """Named values."""
    if not isinstance(value, dict):
        raise Misfit(f"{where} is {shown(value)}; it must hold named values")
    return value


def word(where: str, value: Any) -> str:
    """A short name."""
    if not isinstance(value, str) or not _WORD.fullmatch(value) or ".." in value or len(value) > 200:
        raise Misfit(f"{where} is {shown(value)}; it must be a short name")
    return value


def one_of(where: str, value: Any, known: Sequence[str]) -> str:
    """One of these names."""
    if value not in known:
        raise Misfit(f"{where} is {shown(value)}; it must be {', '.join(known[:-1])} or {known[-1]}")
    return value


def integer(where: str, value: Any, least: int, most: int) -> int:
    """A whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise Misfit(f"{where} is {shown(value)}; it must be a whole number from {least} to {most}")
    return value


def number(where: str, value: Any, least: float, most: float) -> float:
    """A finite number from `least` to `most`."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
    if not fits or not isfinite(value):
        raise Misfit(f"{where} is {shown(value)}; it must be a number from {least} to {most}")
    return value


def numbers(where: str, value: Any, least: float, most: float) -> tuple[float, ...]:
    """A list of numbers, one per channel."""
    if not isinstance(value, list) or not 0 < len(value) <= 64:
        raise Misfit(f"{where} is {shown(value)}; it must be a list of numbers, one per channel")
    return tuple(number(where, part, least, most) for part in value)


def optional(check: Callable[..., Any]) -> Callable[..., Any]:
    """The same check, which lets None pass."""
    return lambda where, value, *bounds: None if value is None else check(where, value, *bounds)


def shown(value: Any) -> str:
    """A value for a message; a large or deep one by its type, since writing it out may take for ever."""
    small = isinstance(value, str | float | bool | None) or (isinstance(value, int) and abs(value) < 10**20)
    return short_name(repr(value[:50] if isinstance(value, str) else value)) if small else f"a {type(value).__name__}"
