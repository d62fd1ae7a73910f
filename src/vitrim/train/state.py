"""The state of a run: what is reported of it, what a checkpoint holds, and how training continues from one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from .checkpoint import RunFolder
from .meter import Meter

Report = Callable[[str, Mapping[str, Any]], None]
"""Called with the name of an event and its figures during a run.

The events of a run: "cache", "start", "step", "evaluation", "epoch", "done". A study adds "run", "wait" and "outage".
"""


class Stateful(Protocol):
    """Anything with a state of its own: weights, an optimiser, a moving average."""

    def state_dict(self) -> Any:
        """Tensors and plain data."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Continue from what `state_dict` returned."""


@dataclass
class RunState:
    """Counters and figures of a run.

    epoch, step: the next to come, both from 0. update: how often weights have been changed.
    history: the figures of every epoch. best: those of the epoch that is kept.
    """

    epoch: int = 0
    step: int = 0
    update: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: RunFolder, meter: Meter, parts: Mapping[str, Stateful | None]) -> None:
        """Replace the checkpoint; all processes call this at the same step and one writes."""
        state = {
            **vars(self),
            "sums": meter.totals(),
            "unreadable": meter.all_unreadable(),
            **{name: part.state_dict() if part is not None else None for name, part in parts.items()},
        }
        if meter.accelerator.is_main_process:
            folder.save_state(state)
        meter.accelerator.wait_for_everyone()

    def restore(self, folder: RunFolder, meter: Meter, parts: Mapping[str, Stateful | None]) -> None:
        """Continue from the checkpoint, if there is one."""
        state = folder.load_state()
        if state is None:
            return
        for name in vars(self):
            setattr(self, name, state[name])
        meter.restore(state["sums"], state["unreadable"])
        for name, part in parts.items():
            if part is not None:
                part.load_state_dict(state[name])
