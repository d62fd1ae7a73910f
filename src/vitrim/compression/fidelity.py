"""How close a cheaper model is to the given one, image by image: KL divergence and the same top class.

For a model without a classifier, one minus the cosine of the features takes the place of the divergence: of the pooled
ones, or of those at each place of the map of a backbone, on average over the places.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..elastic.importance import probe_loss
from ..elastic.probing import is_headless, output_of
from ..errors import VitrimError
from ..models import num_classes
from ..models.evaluating import evaluating
from ..tokens.precision import exact
from .images import BATCH, Pictures


@dataclass(frozen=True)
class Closeness:
    """Of each image (N,): the divergence from the given model, and whether the top class is the same.

    same: None without classes to compare. outputs: of the compared model, (N, K) or maps (N, C, ...).
    """

    divergence: Tensor
    same: Tensor | None
    outputs: Tensor

    @property
    def mean(self) -> float:
        """The mean divergence."""
        return self.divergence.mean().item()

    @property
    def typical(self) -> float:
        """The divergence of a typical image, by which candidates are ranked: the power mean of exponent 1/3.

        Divergences of images differ by orders of magnitude. A few images decide their mean, so that of many candidates
        on few images the one with the least mean was lucky.
        """
        return self.divergence.pow(1 / 3).mean().pow(3).item()

    @property
    def agreement(self) -> float | None:
        """The share of images with the same top class."""
        return None if self.same is None else self.same.double().mean().item()


class Fidelity:
    """Compares models with the given one on the same images.

    measure: what the divergence is called.

    Args:
        original: the given model, in eval mode.
        pictures: the images, in the model's format.
        device: where to run; images are moved there batch by batch.

    Raises:
        VitrimError: the outputs of the given model are not finite.
    """

    def __init__(self, original: nn.Module, pictures: Pictures, device: torch.device) -> None:
        self.pictures, self.device = pictures, device
        self._loss = probe_loss(original, False)
        self._classes = not is_headless(original) and num_classes(original) > 1
        self.measure = "KL" if self._classes else "1 - cosine" if is_headless(original) else "squared difference"
        self.reference = self._run(original, 0, len(pictures))
        if not self.reference.isfinite().all():
            raise VitrimError("the outputs of the given model are not finite; check its weights and the images")

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def one_class(self) -> bool:
        """Whether the given model has the same top class for every image, so that agreement says nothing."""
        return self._classes and len(self) > 1 and len(self.reference.argmax(1).unique()) == 1

    def compare(self, model: nn.Module, start: int = 0, stop: int | None = None) -> Closeness:
        """Compare a model on images `start` to `stop`."""
        stop = len(self) if stop is None else min(stop, len(self))
        return self.judged(self._run(model, start, stop), start)

    def judged(self, out: Tensor, start: int = 0) -> Closeness:
        """Compare outputs (n, K), features or maps of images from `start` on, wherever they come from."""
        full = self.reference[start : start + len(out)]
        same = (out.argmax(1) == full.argmax(1)) if self._classes else None
        found = self._loss(out, None, full)
        # A model with outputs that are not finite is the worst of all; NaN could not be ranked.
        return Closeness(torch.where(found.isfinite(), found.clamp_min(0.0), torch.inf), same, out)

    def right(self, outputs: Tensor) -> Tensor | None:
        """Which images these outputs (N, K) put into the right class; None without labels or classes."""
        known = self.pictures.classes
        return None if known is None or not self._classes else outputs.argmax(1) == known.to(outputs.device)

    @torch.inference_mode()
    def _run(self, model: nn.Module, start: int, stop: int) -> Tensor:
        dtype = next(model.parameters()).dtype
        with evaluating(model):
            parts = [
                exact(output_of(model, self.pictures.images[at : min(at + BATCH, stop)].to(self.device, dtype))).cpu()
                for at in range(start, stop, BATCH)
            ]
        return torch.cat(parts)


def joined(parts: Sequence[Closeness]) -> Closeness:
    """What was found on several ranges of images, in order."""
    same = [part.same for part in parts if part.same is not None]
    return Closeness(
        torch.cat([part.divergence for part in parts]),
        torch.cat(same) if same else None,
        torch.cat([part.outputs for part in parts]),
    )
