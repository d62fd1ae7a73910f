"""A whole reduction in one line: `TopK(cls_attention) @ KeepRate(0.7, at=(3, 6, 9)) @ Delayed(5)`.

The same notation serves the command line, recipes, saved models and tables: what `str` prints, `parse` reads.
Names without quotes inside an expression are strings, so that a shell needs only one pair of quotes.
"""

import ast
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Literal, cast

from ..errors import ScheduleError, UnknownNameError, VitrimError
from .curricula import CURRICULA, Constant, Curriculum, Polynomial
from .reducers import REDUCERS, Reducer
from .schedules import SCHEDULES, KeepRate, Schedule

Phase = Literal["both", "train", "eval"]
Part = Reducer | Schedule | Curriculum


@dataclass(frozen=True)
class Reduction:
    """Which tokens go (reducer), how many and where (schedule), when in training (curriculum), and in which phase."""

    reducer: Reducer
    schedule: Schedule
    curriculum: Curriculum = field(default_factory=Constant)
    phase: Phase = "both"

    def __post_init__(self) -> None:
        if self.phase not in ("both", "train", "eval"):
            raise ScheduleError(f"phase is 'both', 'train' or 'eval', not {self.phase!r}")
        curriculum, schedule = self.curriculum, self.schedule
        if isinstance(curriculum, Polynomial) and isinstance(schedule, KeepRate) and curriculum.final != 1:  # noqa: SIM102
            if abs(1 - schedule.rate - curriculum.final) > 1e-9:
                raise ScheduleError(
                    f"Polynomial ends at drop ratio {curriculum.final}, but KeepRate({schedule.rate}) drops "
                    f"{1 - schedule.rate:.4g}; make them agree or leave `final` out"
                )

    def active(self, training: bool) -> bool:
        """Whether tokens are reduced in this mode of the model."""
        return self.phase == "both" or (self.phase == "train") == training

    def __str__(self) -> str:
        parts = [render(self.reducer), render(self.schedule)]
        if self.curriculum != Constant():
            parts.append(render(self.curriculum))
        return " @ ".join(parts)

    @classmethod
    def parse(cls, text: str, phase: Phase = "both") -> "Reduction":
        """Read `reducer @ schedule` or `reducer @ schedule @ curriculum`; errors say what is wrong and known."""
        try:
            tree = ast.parse(text.strip(), mode="eval").body
        except SyntaxError as error:
            raise ScheduleError(f"cannot read {text!r} as a reduction: {error.msg}; {_EXAMPLE}") from None
        parts: list[object] = []
        while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.MatMult):
            parts.insert(0, _build(tree.right, text))
            tree = tree.left
        parts.insert(0, _build(tree, text))
        kinds = (Reducer, Schedule, Curriculum)
        if not 2 <= len(parts) <= 3 or not all(isinstance(p, k) for p, k in zip(parts, kinds, strict=False)):
            raise ScheduleError(
                f"{text!r} is not `reducer @ schedule` or `reducer @ schedule @ curriculum`; {_EXAMPLE}"
            )
        return cls(*parts, phase=phase)  # pyright: ignore[reportArgumentType]


_EXAMPLE = "for example TopK(cls_attention) @ KeepRate(0.7, at=(3, 6, 9))"


def render(part: Part) -> str:
    """The shortest expression that makes this part: only options that differ from their defaults."""
    shown: list[str] = []
    for option in fields(part):
        value = getattr(part, option.name)
        default = option.default_factory() if option.default_factory is not MISSING else option.default
        if value != default:
            text = render(value) if isinstance(value, Reducer | Schedule | Curriculum) else repr(value)
            shown.append(f"{option.name}={text}")
    return f"{type(part).__name__}({', '.join(shown)})"


def _build(node: ast.expr, text: str) -> Part:
    tables: dict[str, type[Part]] = {**REDUCERS, **SCHEDULES, **CURRICULA}
    if isinstance(node, ast.Name):
        node = ast.Call(func=node, args=[], keywords=[])
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ScheduleError(f"cannot read {ast.unparse(node)!r} in {text!r}; {_EXAMPLE}")
    if node.func.id not in tables:
        raise UnknownNameError("reducer, schedule or curriculum", node.func.id, tables)
    args = [_value(arg, text) for arg in node.args]
    options = {word.arg or "**": _value(word.value, text) for word in node.keywords}
    try:
        return tables[node.func.id](*args, **options)  # type: ignore[arg-type]
    except VitrimError:
        raise
    except (TypeError, ValueError) as error:
        known = ", ".join(option.name for option in fields(tables[node.func.id]))
        raise ScheduleError(f"{ast.unparse(node)}: {error}; options are {known}") from None


def _value(node: ast.expr, text: str) -> object:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Call):
        return _build(node, text)
    try:
        value: object = ast.literal_eval(node)
    except ValueError:
        raise ScheduleError(f"cannot read {ast.unparse(node)!r} in {text!r}; {_EXAMPLE}") from None
    if isinstance(value, list):
        return tuple(cast("list[object]", value))
    return dict(cast("Mapping[object, object]", value)) if isinstance(value, dict) else value
