"""One text notation for every configuration: `TopK(norm) @ KeepRate(0.7)`, `Logits(0.7, temperature=4) + Cls()`.

Parts are frozen dataclasses in tables, joined by one operator. The same text serves the command line, recipes, saved
models and reports: what `render` prints, `Notation.parse` reads. A name without quotes inside an expression is a
string, so that a shell needs only one pair of quotes; true and false are those of YAML.
"""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, cast

from .errors import UnknownNameError, VitrimError

_BOOLEANS = {"true": True, "false": False}
SHOWN = {"shown": True}
"""Metadata of a field without which its part says too little, even at its default: `KeepRate(rate=0.7)`."""


@dataclass(frozen=True)
class Notation:
    """How one kind of configuration is written.

    Args:
        kind: what the parts are, for errors: "reducer, schedule or curriculum".
        tables: the parts by name; a part entered later is known too.
        operator: what joins the parts, `ast.MatMult` or `ast.Add`.
        error: the exception for text that cannot be read.
        example: a correct expression, for errors.
    """

    kind: str
    tables: Sequence[Mapping[str, type]]
    operator: type[ast.operator]
    error: type[VitrimError]
    example: str

    def parse(self, text: str) -> list[Any]:
        """The parts of an expression, from left to right; errors say what is wrong and what is known."""
        try:
            tree = ast.parse(text.strip(), mode="eval").body
        except SyntaxError as error:
            raise self.error(f"cannot read {text!r}: {error.msg}; for example {self.example}") from None
        parts: list[Any] = []
        while isinstance(tree, ast.BinOp) and isinstance(tree.op, self.operator):
            parts.insert(0, self._build(tree.right, text))
            tree = tree.left
        return [self._build(tree, text), *parts]

    def _build(self, node: ast.expr, text: str) -> object:
        if isinstance(node, ast.Name):
            node = ast.Call(func=node, args=[], keywords=[])
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            raise self.error(f"cannot read {ast.unparse(node)!r} in {text!r}; for example {self.example}")
        known = {name: part for table in self.tables for name, part in table.items()}
        if node.func.id not in known:
            raise UnknownNameError(self.kind, node.func.id, known)
        part = known[node.func.id]
        args = [self._value(arg, text) for arg in node.args]
        options = {word.arg or "**": self._value(word.value, text) for word in node.keywords}
        try:
            return part(*args, **options)
        except VitrimError:
            raise
        except (TypeError, ValueError) as error:
            names = ", ".join(option.name for option in fields(part))
            raise self.error(f"{ast.unparse(node)}: {error}; options are {names}") from None

    def _value(self, node: ast.expr, text: str) -> object:
        if isinstance(node, ast.Name):
            return _BOOLEANS.get(node.id, node.id)
        if isinstance(node, ast.Call):
            return self._build(node, text)
        try:
            value: object = ast.literal_eval(node)
        except ValueError:
            raise self.error(f"cannot read {ast.unparse(node)!r} in {text!r}; for example {self.example}") from None
        return tuple(cast("list[object]", value)) if isinstance(value, list) else value


def render(part: Any) -> str:
    """The shortest clear expression that makes this part: options that differ from their defaults, or are `SHOWN`."""
    shown: list[str] = []
    for option in sorted(fields(part), key=lambda option: option.kw_only):  # What all parts share comes last.
        value = getattr(part, option.name)
        default = option.default_factory() if option.default_factory is not MISSING else option.default
        if value != default or option.metadata.get("shown"):
            shown.append(f"{option.name}={render(value) if is_dataclass(value) else repr(value)}")
    return f"{type(part).__name__}({', '.join(shown)})"
