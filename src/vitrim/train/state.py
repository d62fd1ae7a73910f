"""The state of a run: what is reported of it, what a checkpoint holds, and how training continues from one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any, Protocol

from torch.utils.data import Subset

from ..data.fingerprint import fingerprint
from ..data.streams import Stream
from ..errors import CheckpointError, RecipeError
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


class SameImages:
    """The part of a checkpoint by which a run continues on the images that it began with, and on no others."""

    def __init__(self, *streams: Stream) -> None:
        self.streams = streams

    @cached_property
    def _hash(self) -> str:
        found = (fingerprint(Subset(one.images.source, one.indices), 8, sizes=False) for one in self.streams)
        return sha256(" ".join(found).encode()).hexdigest()

    def state_dict(self) -> str:
        """A hash of which images these are; their files are not touched."""
        return self._hash

    def load_state_dict(self, state_dict: str) -> None:
        """Raise `RecipeError` unless these images are those of the checkpoint."""
        if state_dict != self.state_dict():
            raise RecipeError(
                "the training images are not those with which this run began: files were added, removed or renamed, or "
                "data.root is another folder from here; put them back, or choose another folder with --out"
            )


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
        if missing := [name for name, part in parts.items() if part is not None and name not in state]:
            raise CheckpointError(
                f"{folder.state_path} lacks {missing[0]}, as one of another version does; remove it to start again"
            )
        for name in vars(self):
            setattr(self, name, state[name])
        meter.restore(state["sums"], state["unreadable"])
        for name, part in parts.items():
            if part is not None:
                part.load_state_dict(state[name])
