"""How kinds of training differ: what a run learns, which figures its epochs are judged by, and what it keeps.

The loop asks a task for the losses of a step and computes the gradients of one after the other. `SingleNetwork` learns
by the terms of a recipe, `Stratification` trains a super-network.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from ..data.streams import Stream
from ..distill import Distilled, Outputs
from ..measure.accuracy import Figures
from .checkpoint import RunFolder
from .state import Stateful

Evaluate = Callable[[Mapping[str, nn.Module], Stream], dict[str, Figures]]
"""Evaluates several networks on the same images, with the batch size, workers and processes of this run."""

Tick = Callable[[int, int], None]
"""Called with (batches done, number of batches)."""


class Task(Protocol):
    """One kind of training.

    learner: the module that is optimised, wrapped for several processes, and kept in checkpoints.
    extra: further modules that learn at the full rate.
    terms: names of the parts of the loss that are reported.
    classifies: whether accuracy means anything.
    part: what else of the task checkpoints hold, None where there is nothing.
    """

    learner: nn.Module
    extra: nn.Module | None
    terms: list[str]
    classifies: bool
    part: Stateful | None

    def start(self, learner: nn.Module, network: nn.Module) -> None:
        """Take what the run has made of the parts.

        Args:
            learner: the learner as it must be called from now on: wrapped, in several processes.
            network: what is evaluated and kept: the student, or the moving average of its weights.
        """
        ...

    def start_epoch(self, epoch: int) -> None:
        """Prepare what this epoch, from 0, learns; the same call after a resumption changes nothing."""
        ...

    def train_mode(self) -> None:
        """Put everything into the mode in which it learns."""
        ...

    def follow(self, epoch: int, passed: float, history: Sequence[Mapping[str, Any]]) -> None:
        """Move the reductions to the strength of this moment.

        Args:
            epoch: from 0.
            passed: fraction of it that has passed, for curricula that move at every step.
            history: figures of the epochs before.
        """
        ...

    def strength(self) -> dict[str, Any]:
        """How many tokens each block leaves in training; empty where no reduction acts."""
        ...

    def losses(
        self, images: Tensor, targets: Tensor, known: Outputs | None, *, progress: float, update: int
    ) -> Iterator[Distilled]:
        """The losses of a step; the gradients of each are to be computed before the next is asked for.

        Args:
            images: (B, channels, H, W), mixed.
            targets: classes (B,), or their shares (B, K) where images are mixed.
            known: the teacher's outputs for these images, where they are cached.
            progress: fraction of training that has passed, in [0, 1].
            update: counts the updates of weights; the same for all batches that are accumulated into one.
        """
        ...

    def record(self, folder: RunFolder, epoch: int, updates: range) -> None:
        """Write what else belongs to an epoch that has ended, and to its updates of weights; one process calls it."""
        ...

    def hold_out(self, stream: Stream, evaluate: Evaluate, tick: Tick) -> dict[str, Any]:
        """Figures on held-out images, by which the epoch is chosen.

        Args:
            stream: these images.
            evaluate: for networks with classes; it reports how far it is.
            tick: where the task evaluates on its own, called with (batches done, number of batches).
        """
        ...

    def rank(self, figures: Mapping[str, Any]) -> tuple[float, ...]:
        """What makes an epoch better: the first of these numbers in which two epochs differ decides."""
        ...

    def keep(self, folder: RunFolder, classes: Sequence[str]) -> None:
        """Write the network of this epoch in place of the one that was the best before."""
        ...

    def result(self, model: nn.Module, best: Mapping[str, Any], stream: Stream, evaluate: Evaluate) -> dict[str, Any]:
        """Figures of the network that was kept, on the test images.

        Args:
            model: that network, read again from disk.
            best: the figures of its epoch.
            stream: test images.
            evaluate: as in `hold_out`.
        """
        ...
