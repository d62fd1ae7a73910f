"""One text notation for every configuration: `TopK(norm) @ KeepRate(0.7)`, `Logits(0.7, temperature=4) + Cls()`.

Parts are frozen dataclasses in tables, joined by one operator. The same text is used on the command line, in recipes,
saved models and reports: `Notation.parse` reads what `render` writes. A name without quotes inside an expression is a
string, so that a shell needs only one pair of quotes; true and false are also read in YAML's spelling.
"""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, NoReturn, cast

from .errors import UnknownNameError, VitrimError
from .text import short

LONGEST = 20_000
"""Characters of an expression. What `render` writes of accepted options is always shorter."""
DEEPEST = 20
"""Levels of nesting in an expression."""
SHOWN = {"shown": True}
"""Metadata of a field that `render` writes even at its default value: `KeepRate(rate=0.7)`."""
_BOOLEANS = {"true": True, "false": False}


@dataclass(frozen=True)
class Notation:
    """How one kind of configuration is written.

    Args:
        kind: what the parts are, for errors: "reducer, schedule or curriculum".
        tables: the parts by name; parts that are entered later are known too.
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
        if len(text) > LONGEST:
            self._refuse(text, f"it has more than {LONGEST} characters")
        try:
            tree = ast.parse(text.strip(), mode="eval").body
        except SyntaxError as error:
            self._refuse(text, error.msg)
        except (ValueError, RecursionError, MemoryError):  # Null bytes, broken UTF-8; nested too deep for the parser.
            self._refuse(text, "it is not an expression")
        parts: list[ast.expr] = []
        while isinstance(tree, ast.BinOp) and isinstance(tree.op, self.operator):
            parts.insert(0, tree.right)
            tree = tree.left
        return [self._build(part, text) for part in (tree, *parts) if self._check_depth(part, text)]

    def _check_depth(self, tree: ast.expr, text: str) -> bool:
        level: list[ast.AST] = [tree]
        for _ in range(DEEPEST):
            level = [child for node in level for child in ast.iter_child_nodes(node)]
            if not level:
                return True
        self._refuse(text, f"it is nested more than {DEEPEST} levels deep")

    def _build(self, node: ast.expr, text: str) -> object:
        if isinstance(node, ast.Name):
            node = ast.Call(func=node, args=[], keywords=[])
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            self._refuse(text, "not a name with options in brackets", node)
        known = {name: part for table in self.tables for name, part in table.items()}
        if node.func.id not in known:
            raise UnknownNameError(self.kind, node.func.id[:80], known)
        part = known[node.func.id]
        args = [self._value(arg, text) for arg in node.args]
        options = {word.arg or "**": self._value(word.value, text) for word in node.keywords}
        if len(options) < len(node.keywords):
            self._refuse(text, "an option is given twice", node)
        try:
            return part(*args, **options)
        except VitrimError:
            raise
        except (TypeError, ValueError, OverflowError) as error:
            names = ", ".join(option.name for option in fields(part))
            reason = short(str(error), 160)[1:-1]
            raise self.error(f"{short(_source(node), 120)[1:-1]}: {reason}; options are {names}") from None

    def _value(self, node: ast.expr, text: str) -> object:
        if isinstance(node, ast.Name):
            return _BOOLEANS.get(node.id, node.id)
        if isinstance(node, ast.Call):
            return self._build(node, text)
        if isinstance(node, ast.Dict):
            keys = [_source(key) for key in node.keys if key is not None]
            if twice := next((key for key in keys if keys.count(key) > 1), None):
                self._refuse(text, f"{short(twice, 40)[1:-1]} is given twice", node)
        try:
            value: object = ast.literal_eval(node)
        except (ValueError, TypeError, OverflowError):
            self._refuse(text, "not a value", node)
        return tuple(cast("list[object]", value)) if isinstance(value, list) else value

    def _refuse(self, text: str, reason: str, node: ast.AST | None = None) -> NoReturn:
        """Raise the error for a text, or for one node of it."""
        what = short(text, 160) if node is None else f"{short(_source(node), 80)} in {short(text, 120)}"
        raise self.error(f"cannot read {what}: {reason}; for example {self.example}") from None


def _source(node: ast.AST) -> str:
    try:
        return ast.unparse(node)
    except (ValueError, RecursionError):  # Whole numbers of thousands of digits.
        return "a value"


def render(part: Any) -> str:
    """The shortest clear expression that makes this part: options that differ from their defaults, or are `SHOWN`."""
    shown: list[str] = []
    for option in sorted(fields(part), key=lambda option: option.kw_only is True):  # What all parts share comes last.
        value = getattr(part, option.name)
        default = option.default_factory() if option.default_factory is not MISSING else option.default
        if value != default or option.metadata.get("shown"):
            shown.append(f"{option.name}={render(value) if is_dataclass(value) else repr(value)}")
    return f"{type(part).__name__}({', '.join(shown)})"
