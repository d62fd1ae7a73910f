"""What a run learns, by which figures its epochs are judged, and what it leaves: all in which kinds of training differ.

The loop asks a task for the losses of a step and sends them backwards one by one. `Task` learns by the terms of a
recipe, labels alone where it has none: one loss per step. Other kinds derive from it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..data.splits import Splits
from ..data.streams import Stream
from ..distill import Distilled, Distiller, Outputs
from ..measure.accuracy import Figures, mean_loss
from ..models import attached, detached, save
from ..tokens import Figure
from .caching import with_cache
from .checkpoint import RunFolder
from .figures import measure_figures
from .learner import prepare_learner, with_student
from .recipe import Recipe
from .state import Report, Stateful

Evaluate = Callable[[Mapping[str, nn.Module], Stream], dict[str, Figures]]
"""Evaluates networks side by side as this run does: its batch size, workers and processes."""


class Task:
    """One network that learns by the terms of a recipe.

    learner: the module that is optimised, wrapped for several processes, and kept in checkpoints.
    extra: further modules that learn at the full rate.
    terms: names of the parts of the loss that are told beside it.
    classifies: whether accuracy means anything.
    part: what checkpoints hold of the task beside the learner, None where there is nothing.

    Args:
        recipe: of the run.
        student: the network to train.
        splits: its images.
        accelerator: places and shares the work.
        fresh: no checkpoint will bring other weights.
    """

    learner: nn.Module
    extra: nn.Module | None
    part: Stateful | None = None

    def __init__(
        self, recipe: Recipe, student: nn.Module, splits: Splits, accelerator: Accelerator, *, fresh: bool
    ) -> None:
        self.recipe, self.student, self.accelerator = recipe, student, accelerator
        learner = prepare_learner(recipe, student, splits.classes)
        self.learner, self.extra = learner, learner.projections
        self.terms = [term.name for term in learner.terms.terms] if recipe.distill is not None else []
        self.classifies = learner.classifies

    def cache_teacher(self, splits: Splits, device: torch.device, report: Report) -> None:
        """Let images bring the teacher's outputs along; see `with_cache`."""
        assert isinstance(self.learner, Distiller)
        with_cache(self.recipe, self.learner, splits, device, report)

    def start(self, learner: nn.Module, network: nn.Module) -> None:
        """Take what the run has made of the parts.

        Args:
            learner: the learner as it must be called from now on: wrapped, in several processes.
            network: what is evaluated and kept: the student, or the moving average of its weights.
        """
        self.wrapped, self.network = learner, network
        assert isinstance(self.learner, Distiller)
        if self.recipe.shard_teacher and self.accelerator.num_processes > 1 and self.learner.teacher is not None:
            self.learner.teacher.shard()
        self.judge = self.learner if self.classifies else with_student(self.learner, network)

    def start_epoch(self, epoch: int) -> None:
        """Prepare what this epoch, from 0, learns; the same call after a resumption changes nothing."""

    def train_mode(self) -> None:
        """Put everything into the mode in which it learns."""
        self.wrapped.train()
        if self.recipe.optim.freeze:  # A frozen network computes what it computes at evaluation.
            self.student.eval()

    def follow(self, epoch: int, passed: float, history: Sequence[Mapping[str, Any]]) -> None:
        """Move the reductions to the strength of this moment.

        Args:
            epoch: from 0.
            passed: fraction of it that has passed, for curricula that move at every step.
            history: figures of the epochs before.
        """
        for model in {self.student, self.network}:
            handle = attached(model)
            if handle is not None and handle.reduction is not None:
                handle.set_epoch(epoch + (passed if handle.reduction.curriculum.per_step else 0), history)

    def strength(self) -> dict[str, Any]:
        """How many tokens each block leaves in training, where a reduction acts."""
        if (handle := attached(self.student)) is None:
            return {}
        self.train_mode()
        return {"strength": handle.strength, "tokens": list(handle.token_counts)}

    def losses(
        self, images: Tensor, targets: Tensor, known: Outputs | None, *, progress: float, update: int
    ) -> Iterator[Distilled]:
        """The losses of a step; each is to be sent backwards before the next is asked for.

        Args:
            images: (B, channels, H, W), mixed.
            targets: classes (B,), or their shares (B, K) where images are mixed.
            known: what the teacher says of these images, where it is cached.
            progress: fraction of training that has passed, in [0, 1].
            update: counts the updates of weights; the same for all batches that are accumulated into one.
        """
        learnt: Distilled = self.wrapped(images, targets, known, progress=progress)
        yield learnt._replace(terms={name: learnt.terms[name] for name in self.terms})

    def record(self, folder: RunFolder, epoch: int, updates: range) -> None:
        """Write what else is to be told of an epoch that has ended, and of its updates of weights; one process does."""

    def hold_out(self, stream: Stream, evaluate: Evaluate) -> dict[str, Any]:
        """Figures by which the epoch is chosen: of the classes, or of the objective where no classes are learnt."""
        if self.classifies:
            found = evaluate({"network": self.network}, stream)["network"]
            figures = {"val_accuracy": found.accuracy, "val_loss": found.loss}
        else:
            figures = self._objective(self.judge, stream, self.terms)
        if any(figure.name not in figures for figure in self._curriculum_reads):
            images = stream.sample(64).to(self.accelerator.device)
            figures |= measure_figures(self.network, self._curriculum_reads, images)
        return figures

    def rank(self, figures: Mapping[str, Any]) -> tuple[float, ...]:
        """What makes an epoch better: accuracy on held-out images, and at equal accuracy a lower loss.

        Before them counts the strength of the reduction: an epoch in which it has not grown to its end belongs to
        another network.
        """
        strength = figures.get("strength", 0.0) if self.recipe.phase != "train" else 0.0
        return strength, figures["val_accuracy"] if self.classifies else 0.0, -figures["val_loss"]

    def keep(self, folder: RunFolder, classes: Sequence[str]) -> None:
        """Write the network of this epoch in place of the one that was the best before.

        A reduction that acts in training alone is no part of it.
        """
        handle = attached(self.network)
        whole = handle is None or handle.reduction is None or handle.reduction.phase != "train"
        with nullcontext() if whole else detached(self.network):
            folder.save_model(partial(save, self.network), classes)

    def result(self, model: nn.Module, best: Mapping[str, Any], stream: Stream, evaluate: Evaluate) -> dict[str, Any]:
        """Figures of the network that was kept, on the test images.

        Args:
            model: that network, read again from disk.
            best: the figures of its epoch.
            stream: test images.
            evaluate: as in `hold_out`.
        """
        if not self.classifies:
            return {"val_loss": best.get("val_loss")}
        found = evaluate({"network": model}, stream)["network"]
        return {
            "test_accuracy": found.accuracy,
            "test_loss": found.loss,
            "test_images": found.num_images,
            "val_accuracy": best.get("val_accuracy"),
        }

    def _objective(self, judge: nn.Module, stream: Stream, terms: Sequence[str]) -> dict[str, Any]:
        sizes = {"batch_size": self.recipe.batch_size, "workers": self.recipe.data.workers}
        means = mean_loss(judge, stream, terms=terms, **sizes, accelerator=self.accelerator)
        return {f"val_{name}": value for name, value in means.items()}

    @property
    def _curriculum_reads(self) -> tuple[Figure, ...]:
        handle = attached(self.student)
        return handle.reduction.curriculum.reads if handle and handle.reduction else ()
