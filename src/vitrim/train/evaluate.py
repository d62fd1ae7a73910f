"""Accuracy, loss and speed of a model on images it has not learnt from."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from ..measure.cost import Cost, cost
from ..models import attached_instead, find_adapter
from ..tokens import KeepRate, Reduction, TopK
from .data import Stream, make_loader


@dataclass(frozen=True)
class Figures:
    """What one evaluation found. `seconds` is time inside the model alone; `accuracy` a fraction."""

    accuracy: float
    loss: float
    seconds: float
    images_per_second: float
    num_images: int
    unreadable: int

    def prefixed(self, prefix: str) -> dict[str, float]:
        """The figures as a flat mapping for a metrics file."""
        return {f"{prefix}_accuracy": self.accuracy, f"{prefix}_loss": self.loss}


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    stream: Stream,
    *,
    batch_size: int = 128,
    workers: int = 0,
    accelerator: Accelerator | None = None,
    tick: Callable[[int, int], None] | None = None,
) -> Figures:
    """Run the model over a stream in eval mode and put its mode back.

    Args:
        model: returns logits (B, classes); whatever is attached to it acts.
        stream: images with their classes.
        batch_size: images at a time, all processes together.
        workers: processes that read images.
        accelerator: places and shares the work; by default one process on the best device.
        tick: called with (batches done, batches in all).
    """
    accelerator = accelerator or Accelerator()
    loader, _ = make_loader(stream, batch_size, workers)
    prepared: Any = accelerator.prepare_data_loader(loader) if accelerator.num_processes > 1 else loader
    device, was_training = accelerator.device, model.training
    model.eval().to(device)
    hits = seen = unreadable = 0
    loss = seconds = 0.0
    for done, (images, targets, index) in enumerate(prepared, 1):
        images, targets, index = images.to(device), targets.to(device), index.to(device)
        start = _clock(device)
        with accelerator.autocast():
            logits = model(images)
        seconds += _clock(device) - start
        logits, targets, index = _gather(accelerator, logits.float(), targets, index)
        valid = index >= 0
        logits, targets = logits[valid], targets[valid]
        hits += int((logits.argmax(1) == targets).sum())
        loss += float(F.cross_entropy(logits, targets, reduction="sum"))
        seen += len(targets)
        unreadable += int((~valid).sum())
        if tick is not None:
            tick(done, len(loader))
    model.train(was_training)
    return Figures(hits / max(seen, 1), loss / max(seen, 1), seconds, seen / max(seconds, 1e-9), seen, unreadable)


def evaluate_under(
    model: nn.Module, reduction: Reduction | str | None, stream: Stream, **options: Any
) -> tuple[Figures, Cost]:
    """Evaluate with this reduction in place of whatever is attached (None: dense), with every exact saving on.

    The model comes back as it was.
    """
    with attached_instead(model.eval(), reduction, cls_only=reads_prefix_only(model)):
        return evaluate(model, stream, **options), cost(model)


def reads_prefix_only(model: nn.Module) -> bool:
    """Whether the head reads prefix tokens alone, so that the last block need not compute patch tokens."""
    return find_adapter(model).geometry(model).head == "prefix"


@torch.inference_mode()
def attention_entropy(model: nn.Module, images: Tensor) -> float:
    """Entropy of CLS attention over the patches in the middle block, as a fraction of its maximum: 1 = uniform."""
    middle = find_adapter(model).geometry(model).depth // 2
    was_training = model.training
    # A cut records the scores on which it was decided; those of the middle block are not touched by the cut itself.
    with attached_instead(model.eval(), Reduction(TopK("cls_attention"), KeepRate(0.5, at=(middle,)))) as handle:
        model(images)
        score = handle.states[middle].score
    model.train(was_training)
    share = score / score.sum(1, keepdim=True)
    entropy = torch.special.entr(share).sum(1) / math.log(share.shape[1])
    return float(entropy.mean())


def _gather(accelerator: Accelerator, *tensors: Tensor) -> tuple[Tensor, ...]:
    if accelerator.num_processes == 1:
        return tensors
    return tuple(accelerator.gather_for_metrics(tensors))


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
