"""YAML as plain data: text, numbers, lists and mappings. No tag, date or class is ever built from a file.

Files come from strangers, so that size, nesting and aliases are bounded before anything is built from them.
"""

import re
from typing import Any

import yaml

from .errors import RecipeError

MAX_CHARS = 200_000
MAX_DEPTH = 40
MAX_VALUES = 20_000
"""Limits of one file: its length, how deep values may be nested, and how many values it holds once aliases (`*name`)
are replaced by what they repeat. The longest study of this project uses a twentieth of each."""

_FLOAT = (
    r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_INT = r"[-+]?[0-9]+|0x[0-9a-fA-F]+"
_LONGEST_INT = 100
_DIGITS = list("-+0123456789.")


class _BoundsError(Exception):
    """Text that is YAML, but more than this reader takes."""


class _Loader(yaml.SafeLoader):
    """Refuses a name that a mapping gives twice, of which YAML would take the last without a word.

    Numbers are those of YAML 1.2: 1e-3 is a number, 010 is ten, 1:30 and dates are text.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._count = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth, self._count = self._depth + 1, self._count + 1
        if self._depth > MAX_DEPTH:
            raise _BoundsError(f"it is nested more than {MAX_DEPTH} levels deep")
        alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if not alias:
            self._sizes[id(node)] = self._size(node)
        elif id(node) not in self._sizes:
            raise _BoundsError("an alias in it repeats itself without end")
        if max(self._count, self._sizes[id(node)]) > MAX_VALUES:
            raise _BoundsError(f"it holds more than {MAX_VALUES:,} values")
        return node

    def _size(self, node: Any) -> int:
        """The values in a node, aliases replaced; its parts have been composed before it."""
        if isinstance(node, yaml.ScalarNode):
            return 1
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        return 1 + sum(self._sizes[id(part)] for part in parts)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise _BoundsError(
                        f"line {key.start_mark.line + 1}: {key.value[:80]!r} is given twice; remove or rename one"
                    )
                seen.add((key.tag, key.value))
        return node

    def construct_yaml_int(self, node: Any) -> int:
        value = self.construct_scalar(node)
        if len(value) > _LONGEST_INT:
            raise ValueError(f"a number of {len(value):,} digits")
        return int(value, 16) if "x" in value else int(value)


class _Dumper(yaml.SafeDumper):
    """Quotes all text that the reader would take for something else, and repeats values instead of naming them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _resolvers(kept: dict[str, list[tuple[str, Any]]], without: set[str]) -> dict[str, list[tuple[str, Any]]]:
    tags = {f"tag:yaml.org,2002:{tag}" for tag in without}
    return {first: [pair for pair in pairs if pair[0] not in tags] for first, pairs in kept.items()}


_Loader.yaml_implicit_resolvers = _resolvers(yaml.SafeLoader.yaml_implicit_resolvers, {"int", "float", "timestamp"})
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(f"^(?:{_INT})$"), _DIGITS)
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^(?:{_FLOAT})$"), _DIGITS)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.yaml_constructors = {
    tag: maker
    for tag, maker in _Loader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
}


def parse_yaml(text: str, where: str) -> Any:
    """The plain data that this text describes; `where` names the text in messages.

    Raises:
        RecipeError: it is not YAML, is too large, holds other than plain data, or gives a name twice.
    """
    if len(text) > MAX_CHARS:
        raise RecipeError(f"{where} is too long: it has {len(text):,} characters, {MAX_CHARS:,} are read")
    try:
        return yaml.load(text, _Loader)  # A safe one.
    except _BoundsError as error:
        at = "," if str(error).startswith("line ") else " cannot be read:"
        raise RecipeError(f"{where}{at} {error}") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise RecipeError(f"{where} is not YAML: {reason[:200]}") from None


def dump_yaml(data: Any) -> str:
    """Plain data as text that `parse_yaml` reads back to the same, options in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
