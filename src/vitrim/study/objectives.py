"""What a sweep looks for: high accuracy, and little of what it costs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ScheduleError, UnknownNameError

Direction = Literal["maximize", "minimize"]


@dataclass(frozen=True)
class Objective:
    """A figure of a row that is to be high or low; `label` is its name in optuna-dashboard."""

    direction: Direction
    label: str
    value: Callable[[Mapping[str, Any]], float]


OBJECTIVES: dict[str, Objective] = {
    "accuracy": Objective("maximize", "accuracy", lambda row: row["accuracy"]),
    "macs": Objective("minimize", "GMACs", lambda row: row["gmacs"]),
    "time": Objective("minimize", "time ratio to dense", lambda row: 1 / row["speed"]),
}


def check_objectives(names: Sequence[str]) -> None:
    """Raise `ScheduleError` for objectives without accuracy, or given twice; `UnknownNameError` for others."""
    for name in names:
        if name not in OBJECTIVES:
            raise UnknownNameError("objective", name, OBJECTIVES)
    if len({*names}) < len(names):
        raise ScheduleError(f"objectives {' '.join(names)} name one twice; give each once")
    if "accuracy" not in names:
        raise ScheduleError("objectives without accuracy have one answer, the strongest reduction; add accuracy")


def costs_of(row: Mapping[str, Any], names: Sequence[str]) -> tuple[float, ...]:
    """Those that are to be low."""
    return tuple(OBJECTIVES[name].value(row) for name in names if OBJECTIVES[name].direction == "minimize")
