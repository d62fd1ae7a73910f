"""Training of a super-network as a task of the loop: PIAD's losses, growth, and figures at three sizes.

Units are put in order (WPAC) before the first step, on training images that are not varied; the chain grows on the
same images at the start of each of the first epochs.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..data.seeding import permutation
from ..data.splits import Splits
from ..data.streams import Stream, make_loader
from ..data.transforms import transforms_for
from ..distill import Distilled, Outputs, Teacher
from ..elastic import SuperNet
from ..elastic.chain import give_rules
from ..elastic.piad import Piad, Stratifier, imitation_loss
from ..elastic.probing import is_headless, output_of
from ..elastic.sampler import RULES, narrowed
from ..elastic.wpac import wpac
from ..errors import DistillError, VitrimError
from ..measure.accuracy import Figures
from ..models import adapter_of, attached
from ..models.input_format import InputFormat
from .checkpoint import RunFolder
from .figures import held_out_loss
from .learner import cross_entropy, prepare_teacher
from .recipe import Recipe
from .state import Stateful
from .task import Evaluate, Tick

log = logging.getLogger(__name__)
BATCH = 64
"""Images at a time while importance is judged."""


class Stratification:
    """See `Task`. All networks of a chain learn together; the full one and the chain are kept.

    Epochs are judged by the mean held-out accuracy of the full, a middle and the smallest network: a super-network is
    as good as what is cut out of it, at any size. One whose chain has not grown to its end is another super-network,
    so that any later one is better.

    Args:
        recipe: with `elastic`.
        student: the network to train; its units are put in order in place.
        splits: its images.
        accelerator: places and shares the work.
        fresh: there is no checkpoint, whose units would be in order already.

    Raises:
        UnsupportedModelError: no adapter knows the model, or a part of it forbids changing widths.
        VitrimError: tokens are reduced in the model, or nothing could teach a model without classifier.
    """

    learner: nn.Module
    extra: nn.Module | None
    part: Stateful | None

    def __init__(
        self, recipe: Recipe, student: nn.Module, splits: Splits, accelerator: Accelerator, *, fresh: bool
    ) -> None:
        assert recipe.elastic is not None
        self.recipe, self.student, self.accelerator = recipe, student.to(accelerator.device), accelerator
        if attached(student) is not None:
            raise VitrimError(f"{recipe.model.name} is reduced already; name the dense model that it was made from")
        self.classifies = not is_headless(student)
        if not self.classifies and recipe.teacher is None:
            raise VitrimError("a model without classifier learns from a teacher; set teacher.name")
        self.learner, self.extra, self.terms = _Output(student), None, list(RULES[recipe.elastic.rule])
        self.teacher = self._make_teacher(splits.classes if self.classifies else None)
        self.probe = self._make_probe(splits)
        spec = recipe.elastic
        if fresh:
            wpac(
                student, self.probe, num_images=spec.images, labels=self.classifies,
                width_multiple=spec.width_multiple, say=log.info,
            )  # fmt: skip
        config = Piad(
            grow_epochs=spec.grow_epochs, max_saving=spec.max_saving, rule=spec.rule, distill=spec.distill,
            temperature=spec.temperature, num_images=spec.images, probe_images=max(1, spec.images // 4),
            labels=self.classifies, seed=recipe.seed, width_multiple=spec.width_multiple,
        )  # fmt: skip
        criterion = partial(cross_entropy, smoothing=recipe.augment.smoothing)
        self.part = self.stratifier = Stratifier(student, config, teacher=self.teacher, criterion=criterion)

    def start(self, learner: nn.Module, network: nn.Module) -> None:
        """See `Task`."""
        self.wrapped, self.network = learner, network

    def start_epoch(self, epoch: int) -> None:
        """Let the chain grow as this epoch asks."""
        self.stratifier.start_epoch(epoch, self.probe)

    def train_mode(self) -> None:
        """See `Task`."""
        self.wrapped.train()

    def follow(self, epoch: int, passed: float, history: Sequence[Mapping[str, Any]]) -> None:
        """No tokens are reduced."""

    def strength(self) -> dict[str, Any]:
        """No tokens are reduced."""
        return {}

    def losses(
        self, images: Tensor, targets: Tensor, known: Outputs | None, *, progress: float, update: int
    ) -> Iterator[Distilled]:
        """One loss for every network that this update draws; processes exchange gradients at the last one."""
        hold = partial(self.accelerator.no_sync, self.wrapped)
        labels = targets if self.classifies else None
        for number, term in enumerate(self.stratifier.losses(images, labels, update, model=self.wrapped, hold=hold)):
            logits = term.out if number == 0 and self.classifies else None
            yield Distilled(term.loss, {term.part: term.loss.detach()}, logits)

    def record(self, folder: RunFolder, epoch: int, updates: range) -> None:
        """Write which networks of the chain each update has trained, by the part they played."""
        drawn = [self.stratifier.drawn(update) for update in updates]
        parts = {part: [one[part] for one in drawn] for part in self.terms}
        folder.write_draws(epoch, {"networks": len(self.stratifier.chain), "first_update": updates.start} | parts)

    def hold_out(self, stream: Stream, evaluate: Evaluate, tick: Tick) -> dict[str, Any]:
        """Figures of the full network without a name of their own, of the two others with theirs, and the mean."""
        networks = self._networks(self.network)
        if not self.classifies:
            judge = _Imitation(networks, self.teacher)
            return self._reach() | held_out_loss(judge, stream, [*networks], self.recipe, self.accelerator, tick)
        found = evaluate(networks, stream)
        mean = sum(one.accuracy for one in found.values()) / len(found)
        return self._reach() | _named("val", found) | {"val_accuracy_mean": mean}

    def rank(self, figures: Mapping[str, Any]) -> tuple[float, ...]:
        """What makes an epoch better: a longer chain, then the mean accuracy, then the mean loss of the networks."""
        assert self.recipe.elastic is not None
        grown = min(figures["epoch"] + 1, self.recipe.elastic.grow_epochs)
        if not self.classifies:
            return grown, 0.0, -figures["val_loss"]
        losses = [figures[name] for name in ("val_loss", "val_loss_middle", "val_loss_smallest")]
        return grown, figures["val_accuracy_mean"], -sum(losses)

    def keep(self, folder: RunFolder, classes: Sequence[str]) -> None:
        """Write the super-network of this epoch in place of the one that was the best before."""
        folder.save_model(SuperNet(self.network, self.stratifier.chain).save, classes)

    def result(self, model: nn.Module, best: Mapping[str, Any], stream: Stream, evaluate: Evaluate) -> dict[str, Any]:
        """Figures of the three networks on the test images."""
        if not self.classifies:
            return self._reach() | {"val_loss": best.get("val_loss")}
        found = evaluate(self._networks(model), stream)
        rest = {"test_images": found["full"].num_images, "val_accuracy": best.get("val_accuracy")}
        return self._reach() | _named("test", found) | rest

    def _reach(self) -> dict[str, Any]:
        """How far the chain goes: its length, and the share of the MACs that the smallest network saves."""
        chain = self.stratifier.chain
        return {"networks": len(chain), "saving": 1 - chain.macs_at(-1) / chain.macs}

    def _networks(self, model: nn.Module) -> dict[str, nn.Module]:
        """The full network, the one half-way down in MACs, and the smallest."""
        chain = self.stratifier.chain
        give_rules(model, chain)
        middle = chain.largest("macs", (chain.macs + chain.macs_at(-1)) / 2)
        places = {"full": 0, "middle": middle, "smallest": -1}
        return {name: _Narrowed(model, chain.widths(index)) for name, index in places.items()}

    def _make_teacher(self, classes: Sequence[str] | None) -> Callable[[Tensor], Tensor] | None:
        spec, student = self.recipe.teacher, self.student
        if spec is None:
            return None
        seen, predicts = InputFormat.of(student, self.recipe.data.image_size), classes is not None
        teacher: Teacher = prepare_teacher(spec, seen, classes, predicts=predicts)
        theirs, ours = (adapter_of(model).output_width(model) for model in (teacher.model, student))
        if is_headless(teacher.model) != is_headless(student) or theirs != ours:
            raise DistillError(f"the teacher {spec.name} gives {theirs} numbers, the student {ours}; both must agree")
        teacher.to(self.accelerator.device)

        def ask(images: Tensor) -> Tensor:
            with self.accelerator.autocast():
                return output_of(teacher.model, teacher.prepare(images)).float()

        return ask

    def _make_probe(self, splits: Splits) -> DataLoader[Any]:
        """This process's share of the training images to judge by, as they are; together always the same ones."""
        train, recipe, accelerator = splits.train, self.recipe, self.accelerator
        assert recipe.elastic is not None
        order = permutation(len(train), "probe", recipe.seed)
        chosen = [train.indices[place] for place in order[: recipe.elastic.images]]
        own = chosen[accelerator.process_index :: accelerator.num_processes]
        plain = transforms_for(self.student, recipe.data)
        stream = Stream(train.images, plain, indices=own, seed=recipe.seed, skip=train.skip)
        return make_loader(stream, BATCH, recipe.data.workers)[0]


def _named(split: str, found: Mapping[str, Figures]) -> dict[str, Any]:
    """Accuracy and loss of the three networks; those of the full one carry no name."""
    figures: dict[str, Any] = {}
    for name, one in found.items():
        suffix = "" if name == "full" else f"_{name}"
        figures |= {f"{split}_accuracy{suffix}": one.accuracy, f"{split}_loss{suffix}": one.loss}
    return figures


class _Output(nn.Module):
    """The network in the form that several processes wrap: it returns logits or features at any width."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> Tensor:
        return output_of(self.student, images)


class _Narrowed(nn.Module):
    """A network of the chain, for evaluation: the weights are those of the super-network."""

    def __init__(self, model: nn.Module, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.model, self.widths = model, widths
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        with narrowed(self.model, self.widths):
            return output_of(self.model, images)


class _Imitation(nn.Module):
    """How far networks without a classifier are from their teacher."""

    def __init__(self, networks: Mapping[str, nn.Module], teacher: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.networks, self.teacher = nn.ModuleDict(networks), teacher

    def forward(self, images: Tensor, targets: Tensor, progress: float) -> Distilled:
        assert self.teacher is not None
        taught = self.teacher(images)
        losses = {name: imitation_loss(one(images), taught, 1.0, True) for name, one in self.networks.items()}
        return Distilled(torch.stack(list(losses.values())).mean(), losses, None)
