"""A method with names in braces, `TopK() @ PowerLaw(0.6, {alpha})`, the values of the names, and their combinations."""

from collections.abc import Mapping, Sequence
from itertools import product
from math import isfinite, prod
from string import Formatter

from ..errors import ScheduleError
from ..tokens import Reduction
from .compare import ROW_KEYS

Settings = Mapping[str, Sequence[float | str]]
"""The values of each name: numbers, or texts such as the names of scores."""
Setting = Mapping[str, float | str]
"""One value of each name."""
MOST_SETTINGS = 10_000


def check_sweep(method: str, vary: Settings) -> None:
    """Check a sweep before anything is evaluated.

    Raises:
        ScheduleError: a name without values or that the method does not use, a name in the method without values, a
            value given twice or impossible, too many combinations, or a name that is a column of the table.
    """
    check_values(vary)
    used = names_in(method)
    for name in vary:
        if name not in used:
            raise ScheduleError(f"{method!r} does not use {{{name}}}")
    for name in used:
        if name not in vary:
            raise ScheduleError(f"{method!r} names a setting that is not varied; give values for {name}")
    for setting in settings_of(vary):
        fill_template(method, setting, check=True)


def check_values(vary: Settings) -> None:
    """Raise `ScheduleError` for values given twice or impossible, too many combinations, or the name of a column."""
    if not vary:
        raise ScheduleError("there is nothing to vary; give values for a name, such as {alpha: [1.0, 2.0]}")
    for name, values in vary.items():
        if name in ROW_KEYS:
            raise ScheduleError(f"{{{name}}} is the name of a column of the table; give the setting another name")
        if not values:
            raise ScheduleError(f"there are no values for {name}; give at least one")
        for at, value in enumerate(values):
            if not isinstance(value, str) and not isfinite(value):
                raise ScheduleError(f"{name} lists {value}; give finite numbers")
            if (shown := _text(value)) in map(_text, values[:at]):
                raise ScheduleError(f"{name} lists {shown} twice; give each value once")
    if prod(map(len, vary.values())) > MOST_SETTINGS:
        raise ScheduleError(f"a sweep has at most {MOST_SETTINGS:,} settings; give fewer values")


def settings_of(vary: Settings) -> list[dict[str, float | str]]:
    """Every combination of the values; the last name varies fastest."""
    return [dict(zip(vary, values, strict=True)) for values in product(*vary.values())]


def names_in(method: str) -> list[str]:
    """The names in braces, each once.

    Raises:
        ScheduleError: braces without a partner, or with more in them than a name.
    """
    return list(dict.fromkeys(name for _, name in _parts(method) if name is not None))


def fill_template(method: str, setting: Setting, check: bool = False) -> str:
    """The method with values in place of names, whole numbers without a decimal point: ConstantR(13), not 13.0.

    Args:
        method: the text; doubled braces stand for single ones.
        setting: the value of every name in it.
        check: raise `VitrimError` where the result is not a reduction.
    """
    text = "".join(literal + ("" if name is None else _text(setting[name])) for literal, name in _parts(method))
    if check:
        Reduction.parse(text)
    return text


def _text(value: float | str) -> str:
    """A value as it stands in a method."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _parts(method: str) -> list[tuple[str, str | None]]:
    """Plain text and the name behind it, from left to right."""
    try:
        parts = list(Formatter().parse(method))
    except ValueError as error:
        raise ScheduleError(f"cannot read {method!r}: {error}; write a literal brace twice") from None
    for _, name, form, conversion in parts:
        if name is not None and (not name.isidentifier() or form or conversion):
            raise ScheduleError(f"cannot read {method!r}: braces hold one name each, such as {{alpha}}")
    return [(literal, name) for literal, name, _, _ in parts]
