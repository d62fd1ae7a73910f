"""Options as files and as typed data: read YAML, lay changes over it, and turn it into dataclasses. No torch."""

from contextlib import suppress
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from .errors import RecipeError, UnknownNameError

Options = TypeVar("Options")


class _TwiceError(Exception):
    def __init__(self, name: str, line: int) -> None:
        self.name, self.line = name, line


class _Loader(yaml.SafeLoader):
    """Refuses a name that a mapping gives twice, of which YAML would silently take the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise _TwiceError(key.value, key.start_mark.line + 1)
                seen.add((key.tag, key.value))
        return node


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        RecipeError: it cannot be read, is something else, or gives a name twice.
    """
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)  # A safe one.
    except FileNotFoundError:
        raise RecipeError(f"{path} does not exist") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror})") from None
    except _TwiceError as error:
        raise RecipeError(f"{path}, line {error.line}: {error.name!r} is given twice; remove or rename one") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path} does not hold options but {type(data).__name__}")
    return data


def check_ranges(*options: tuple[str, float | None, float, float | None]) -> None:
    """Raise `RecipeError` where an option (name, value, lowest, highest) is out of its range; None may be anything."""
    for name, value, low, high in options:
        if value is not None and not (low <= value and (high is None or value <= high)):
            raise RecipeError(
                f"{name} is {value}; it must be {low} or more" + ("" if high is None else f", at most {high}")
            )


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


def fill(kind: type[Options], data: dict[str, Any], where: str, prefix: str | None = None) -> Options:
    """A dataclass from nested plain data; an option that is a dataclass itself is filled from a mapping.

    Args:
        kind: the dataclass.
        data: values by the names of its options.
        where: what it is called in messages.
        prefix: what stands before its options in messages; by default `where` and a dot.

    Raises:
        UnknownNameError: an option that `kind` does not have, with the nearest that it has.
        RecipeError: a value of another type than the option takes.
    """
    prefix = f"{where}." if prefix is None else prefix
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, value in data.items():
        if name not in hints:
            raise UnknownNameError(f"option in {where}", str(name), hints)
        part = next((one for one in _kinds(hints[name]) if is_dataclass(one)), None)
        path = prefix + name
        values[name] = fill(part, value, path) if part and isinstance(value, dict) else _typed(hints[name], value, path)
    return kind(**values)


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if isinstance(hint, UnionType) else (hint,)


def _typed(hint: Any, value: Any, where: str) -> Any:
    """The value, if it is of the kind that the option takes."""
    kinds = _kinds(hint)
    for kind in kinds:
        if get_origin(kind) is Literal:
            if value in get_args(kind):
                return value
        elif kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
            with suppress(ValueError):  # YAML reads 1e-3 as text.
                return float(value)
        elif type(value) is (get_origin(kind) or kind):
            return value
    choices = " or ".join(_named(kind) for kind in kinds)
    raise RecipeError(f"{where} is {value!r}; it must be {choices}")


def _named(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(map(repr, get_args(kind)))
    return {NoneType: "null", str: "text", int: "a whole number", float: "a number", bool: "true or false"}.get(
        kind, "a mapping of options"
    )
