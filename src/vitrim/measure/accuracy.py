"""Accuracy, loss, entropy and speed of models on images."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.streams import Share, Stream, make_loader
from ..errors import DataError, DivergedError
from ..models import adapter_of, attached_instead, find_adapter
from ..models.evaluating import evaluating
from ..tokens import KeepRate, Reduction, TopK
from .accelerator import make_accelerator


@dataclass(frozen=True)
class Figures:
    """Results of one evaluation.

    accuracy: top-1, a fraction.
    loss: mean cross-entropy in nats.
    seconds: time in the model, without reading images.
    entropy: mean entropy of the predictions on correctly classified images, in nats; None if there are none.
    divergence: mean KL(original || this) in nats, for a model made from another; None without an original.
    unreadable: names of the images that could not be read; they enter no other figure.
    right: whether each of the other images, in their order, is put into its class (N,).
    """

    accuracy: float
    loss: float
    seconds: float
    images_per_second: float
    num_images: int
    entropy: float | None = None
    divergence: float | None = None
    unreadable: tuple[str, ...] = ()
    right: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool), compare=False, repr=False)

    def checked(self, name: str) -> "Figures":
        """These figures of the model with this name, whose outputs must be finite: the class of a NaN means nothing.

        Raises:
            DivergedError: they are not.
        """
        if not math.isfinite(self.loss):
            raise DivergedError(f"the outputs of {name} are not finite; check its weights and in which dtype it runs")
        return self


def evaluate(model: nn.Module, stream: Stream, **options: Any) -> Figures:
    """Evaluate one model; options as in `evaluate_all`."""
    return evaluate_all({"model": model}, stream, **options)["model"]


def evaluate_all(
    models: Mapping[str, nn.Module],
    streams: Stream | Mapping[str, Stream],
    *,
    originals: Mapping[str, str] | None = None,
    batch_size: int = 128,
    workers: int = 0,
    accelerator: Accelerator | None = None,
    tick: Callable[[int, int], None] | None = None,
    watch: Callable[[str, int, int], None] | None = None,
) -> dict[str, Figures]:
    """Evaluate models on the same images, batch by batch in turns, so that a busy machine slows all of them alike.

    The mode of every module and the global random generators are the same afterwards as before.

    Args:
        models: each gives logits (B, classes), as a tensor or as its library returns them, with the reductions that
            are attached to it.
        streams: images with their classes: one stream for all models, or one per model where input formats differ.
        originals: model -> the one among `models`, on the same images, to which its predictions are compared.
        batch_size: images per batch, over all processes.
        workers: processes that read images; 0 reads them in this process.
        accelerator: device and processes; by default one process on the best device.
        tick: called with (batches done, number of batches).
        watch: called after each batch with (model, right answers, images) so far; what it raises ends the evaluation.

    Raises:
        DataError: there is no image, or one cannot be read and the stream does not skip it.
    """
    accelerator = accelerator or make_accelerator()
    device = accelerator.device
    own = streams if isinstance(streams, Mapping) else dict.fromkeys(models, streams)
    loaders = {id(stream): make_loader(stream, batch_size, workers)[0] for stream in own.values()}
    # `accelerator.prepare` would keep each loader, with its workers, until the accelerator itself is deleted.
    ready = [
        prepare_data_loader(one, device, split_batches=True, put_on_device=True, non_blocking=True)
        for one in loaders.values()
    ]
    which = {name: list(loaders).index(id(stream)) for name, stream in own.items()}
    tallies = {name: _Tally() for name in models}
    for model in models.values():  # Outside of inference mode: weights that are moved in it cannot be trained later.
        model.to(device)
    names = list(models)
    predict = {name: partial(adapter_of(model).predict, model) for name, model in models.items()}
    with evaluating(*models.values()):
        for done, batches in enumerate(zip(*ready, strict=True), 1):
            if done == 1 and device.type != "cpu":  # The first pass on a GPU loads its kernels and is not timed.
                for name in names:
                    with torch.inference_mode(), accelerator.autocast():
                        predict[name](batches[which[name]][0])
            found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
            for name in names[done % len(names) :] + names[: done % len(names)]:
                images, targets, index = batches[which[name]]
                start = _clock(device)
                with torch.inference_mode(), accelerator.autocast():
                    logits = predict[name](images)
                tallies[name].seconds += _clock(device) - start
                with torch.inference_mode():
                    gathered: Any = accelerator.gather_for_metrics((logits.float(), targets, index))
                found[name] = gathered
            for name in names:
                original = found[originals[name]][0] if originals and name in originals else None
                with torch.inference_mode():
                    tallies[name].add(*found[name], original)
                if watch is not None:
                    watch(name, tallies[name].hits, tallies[name].seen)
            if tick is not None:
                tick(done, len(ready[0]))
    return {name: tally.figures(own[name]) for name, tally in tallies.items()}


@torch.inference_mode()
def mean_loss(
    learner: nn.Module,
    stream: Stream,
    *,
    terms: Sequence[str] = (),
    batch_size: int,
    workers: int,
    accelerator: Accelerator,
    tick: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Mean over a stream of the objective, and of these terms of it, in eval mode and with its final weights.

    Each process evaluates its share of the images, so that the figures do not depend on the number of processes. All
    of them call the learner equally often, since a teacher in shards exchanges weights at every call. The teacher's
    outputs come with the images where they are cached. Images that cannot be read are left out. `tick` is called with
    (batches done, number of batches).
    """
    share = Share(stream, accelerator.process_index, accelerator.num_processes)
    names = ["loss", *terms]
    sums = torch.zeros(1 + len(names), device=accelerator.device)
    loader = make_loader(share, batch_size, workers)[0] if len(share) else ()
    with evaluating(learner):
        for done, (images, targets, index, *known) in enumerate(loader, 1):
            counted = index >= 0
            number = int(counted.sum())
            used = counted if number else torch.arange(len(index)) == 0  # A call needs at least one image.
            rows = partial(_rows, where=used, device=accelerator.device)
            images, targets, *known = recursively_apply(rows, [images, targets, *known])
            with accelerator.autocast():
                found = learner(images, targets, *known, progress=1.0)
            if number:
                means = torch.stack([found.loss, *(found.terms[name] for name in names[1:])]).float()
                sums += number * torch.cat([torch.ones_like(means[:1]), means])
            if tick is not None:
                tick(done, len(loader))
    number, *totals = accelerator.reduce(sums).tolist()
    if number == 0:
        raise DataError("there is no image to evaluate on")
    return {name: total / number for name, total in zip(names, totals, strict=True)}


@dataclass
class _Tally:
    hits: int = 0
    seen: int = 0
    loss: float = 0.0
    entropy: float = 0.0
    divergence: float | None = None
    seconds: float = 0.0
    unreadable: set[int] = field(default_factory=set)
    right: dict[int, bool] = field(default_factory=dict)

    def add(self, logits: Tensor, targets: Tensor, index: Tensor, original: Tensor | None) -> None:
        valid = index >= 0  # In place of an unreadable image comes another one, under a negative index.
        if original is not None:
            log_q, log_p = logits[valid].log_softmax(1), original[valid].log_softmax(1)
            new = float(F.kl_div(log_q, log_p, reduction="sum", log_target=True))
            self.divergence = new + (self.divergence or 0.0)
        logits, targets = logits[valid], targets[valid]
        correct = logits.argmax(1) == targets
        self.right |= zip(index[valid].tolist(), correct.tolist(), strict=True)
        self.hits += int(correct.sum())
        self.entropy += float(torch.special.entr(logits[correct].softmax(1)).sum())
        self.loss += float(F.cross_entropy(logits, targets, reduction="sum"))
        self.seen += len(targets)
        self.unreadable |= {-1 - i for i in index[~valid].tolist()}

    def figures(self, stream: Stream) -> Figures:
        if self.seen == 0:
            raise DataError("there is no image to evaluate on")
        names = tuple(sorted(stream.images.name(index) for index in self.unreadable))
        return Figures(
            accuracy=self.hits / self.seen,
            loss=self.loss / self.seen,
            seconds=self.seconds,
            images_per_second=self.seen / self.seconds,
            num_images=self.seen,
            entropy=self.entropy / self.hits if self.hits else None,
            divergence=None if self.divergence is None else self.divergence / self.seen,
            unreadable=names,
            right=np.array([right for _, right in sorted(self.right.items())]),
        )


@torch.inference_mode()
def attention_entropy(model: nn.Module, images: Tensor) -> float:
    """Entropy of CLS attention over the patches in the middle block, as a fraction of its maximum: 1 = uniform."""
    adapter = find_adapter(model)
    middle = adapter.geometry(model).depth // 2
    # A cut records the scores that it used. Those of the first cut come from attention over all patches.
    first_cut = Reduction(TopK("cls_attention"), KeepRate(0.5, at=(middle,)))
    with evaluating(model), attached_instead(model, first_cut) as handle:
        adapter.predict(model, images)
        score = handle.states[middle].score
    assert score is not None  # TopK always records it.
    share = score / score.sum(1, keepdim=True)
    entropy = torch.special.entr(share).sum(1) / math.log(share.shape[1])
    return float(entropy.mean())


def _rows(part: Tensor, where: Tensor, device: torch.device) -> Tensor:
    return part[where].to(device)


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
