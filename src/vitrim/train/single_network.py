"""One network that learns by the terms of a recipe: from labels, from a teacher, or from both."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from ..data.splits import Splits
from ..data.streams import Stream
from ..distill import Distilled, Distiller, Outputs
from ..models import attached, detached, save
from ..tokens import Figure
from .caching import with_cache
from .checkpoint import RunFolder
from .figures import held_out_loss, measure_figures
from .learner import classes_of_student, prepare_learner, with_student
from .recipe import Recipe
from .state import Report, Stateful
from .task import Evaluate, Tick


class SingleNetwork:
    """See `Task`. Epochs are judged by accuracy, and by the objective where no classes are learnt.

    Args:
        recipe: of the run.
        student: the network to train.
        splits: its images.
        accelerator: places and shares the work.
        report: called while the teacher's outputs are computed ahead, where the recipe has a cache for them.
    """

    learner: nn.Module
    extra: nn.Module | None
    part: Stateful | None = None

    def __init__(
        self, recipe: Recipe, student: nn.Module, splits: Splits, accelerator: Accelerator, report: Report
    ) -> None:
        self.recipe, self.student, self.accelerator = recipe, student, accelerator
        learner = prepare_learner(recipe, student, splits.classes)
        self.learner, self.extra = learner, learner.projections
        self.terms = [term.name for term in learner.terms.terms] if recipe.distill is not None else []
        self.classifies = learner.classifies
        if recipe.cache is not None:
            with_cache(recipe, learner, splits, accelerator.device, report)

    def start(self, learner: nn.Module, network: nn.Module) -> None:
        """See `Task`; from now on each process keeps its share of the teacher alone, where the recipe says so."""
        self.wrapped, self.network = learner, network
        assert isinstance(self.learner, Distiller)
        if self.recipe.shard_teacher and self.accelerator.num_processes > 1 and self.learner.teacher is not None:
            self.learner.teacher.shard()
        self.judge = self.learner if self.classifies else with_student(self.learner, network)

    def start_epoch(self, epoch: int) -> None:
        """Nothing changes from epoch to epoch."""

    def train_mode(self) -> None:
        """See `Task`."""
        self.wrapped.train()
        if self.recipe.optim.freeze:  # A frozen network computes what it computes at evaluation.
            self.student.eval()

    def follow(self, epoch: int, passed: float, history: Sequence[Mapping[str, Any]]) -> None:
        """Move the reduction of the student, and of the average of its weights."""
        for model in {self.student, self.network}:
            handle = attached(model)
            if handle is not None and handle.reduction is not None:
                handle.set_epoch(epoch + (passed if handle.reduction.curriculum.per_step else 0), history)

    def strength(self) -> dict[str, Any]:
        """See `Task`."""
        if (handle := attached(self.student)) is None:
            return {}
        self.train_mode()
        return {"strength": handle.strength, "tokens": list(handle.token_counts)}

    def losses(
        self, images: Tensor, targets: Tensor, known: Outputs | None, *, progress: float, update: int
    ) -> Iterator[Distilled]:
        """One loss: the weighted sum of the terms."""
        learnt: Distilled = self.wrapped(images, targets, known, progress=progress)
        yield learnt._replace(terms={name: learnt.terms[name] for name in self.terms})

    def record(self, folder: RunFolder, epoch: int, updates: range) -> None:
        """Nothing else belongs to an epoch."""

    def hold_out(self, stream: Stream, evaluate: Evaluate, tick: Tick) -> dict[str, Any]:
        """Accuracy and loss, or the objective where no classes are learnt, and what the curriculum reads."""
        if self.classifies:
            found = evaluate({"network": self.network}, stream)["network"]
            figures = {"val_accuracy": found.accuracy, "val_loss": found.loss}
        else:
            figures = held_out_loss(self.judge, stream, self.terms, self.recipe, self.accelerator, tick)
        if any(figure.name not in figures for figure in self._curriculum_reads):
            images = stream.sample(64).to(self.accelerator.device)
            figures |= measure_figures(self.network, self._curriculum_reads, images)
        return figures

    def rank(self, figures: Mapping[str, Any]) -> tuple[float, ...]:
        """What makes an epoch better: accuracy on held-out images, and at equal accuracy a lower loss.

        Before them counts how near the strength of the reduction is to that of the last epoch: an epoch with another
        strength belongs to another network. Where the curriculum follows the run, the last strength is not known
        before, and the last epoch is the best.
        """
        handle = attached(self.student)
        reduction = None if handle is None or self.recipe.phase == "train" else handle.reduction
        if reduction is not None and reduction.curriculum.reads:
            return (figures["epoch"],)
        lacks = 0.0
        if reduction is not None:
            last = reduction.curriculum.strength(self.recipe.epochs - 1 + reduction.curriculum.per_step)
            lacks = abs(figures["strength"] - last)
        return -lacks, figures["val_accuracy"] if self.classifies else 0.0, -figures["val_loss"]

    def keep(self, folder: RunFolder, classes: Sequence[str]) -> None:
        """Write the network of this epoch in place of the one that was the best before.

        A reduction that acts in training alone is not part of it.
        """
        handle = attached(self.network)
        whole = handle is None or handle.reduction is None or handle.reduction.phase != "train"
        with nullcontext() if whole else detached(self.network):
            folder.save_model(partial(save, self.network), classes_of_student(self.recipe, classes))

    def result(self, model: nn.Module, best: Mapping[str, Any], stream: Stream, evaluate: Evaluate) -> dict[str, Any]:
        """See `Task`."""
        if not self.classifies:
            return {"val_loss": best.get("val_loss")}
        found = evaluate({"network": model}, stream)["network"]
        return {
            "test_accuracy": found.accuracy,
            "test_loss": found.loss,
            "test_images": found.num_images,
            "val_accuracy": best.get("val_accuracy"),
        }

    @property
    def _curriculum_reads(self) -> tuple[Figure, ...]:
        handle = attached(self.student)
        return handle.reduction.curriculum.reads if handle and handle.reduction else ()
