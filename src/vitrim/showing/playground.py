"""What the playground shows of one image: tokens, predictions, MACs and time, with all tokens and with fewer."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from ..elastic.probing import is_headless, output_of
from ..errors import ScheduleError, VitrimError
from ..measure.bench_table import Quartiles
from ..measure.cost import cost
from ..measure.speed import bench
from ..models import attached, find_adapter, has_weights, open_model, variant
from ..models.files.classes import class_labels
from ..models.variants import DENSE, OWN
from ..tokens.precision import exact
from . import choices
from .choices import Choice
from .figures import format_figure
from .sheet import sheet, wrap_rows
from .view import View

TOP = 5
"""Classes of a prediction that are shown."""
ROUNDS = 5
"""Rounds of a measurement, each of ten single images."""


@dataclass(frozen=True)
class Subject:
    """A model that is looked at.

    network: as it was opened. whole: the same weights with all tokens. labels: a text for each class. trained: whether
    the weights are not random.
    """

    spec: str
    network: nn.Module
    whole: nn.Module
    labels: list[str]
    trained: bool

    @classmethod
    def open(cls, spec: str, image_size: int | None = None, device: torch.device | str = "cpu") -> "Subject":
        """A model by any name that the commands take; `UnsupportedModelError` where no tokens of it can be reduced."""
        network = open_model(spec, image_size).to(device).eval()
        find_adapter(network)
        return cls(spec, network, variant(network, DENSE), class_labels(spec, network), has_weights(spec))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.network.parameters()).device

    def first_choice(self) -> Choice:
        """What the page begins with: the model's own reduction, else the first that it takes; half of the MACs."""
        own, *others = choices.reducers()
        known = [own] if attached(self.network) is not None else others
        found = [
            Choice(reducer, score, choices.shapes()[0], 0.5)
            for reducer in known
            for score in choices.scores(reducer) or [None]
        ]
        return next((choice for choice in found if self._takes(choice)), found[0])

    def _takes(self, choice: Choice) -> bool:
        try:
            self.reduced(choice)
        except VitrimError:  # A score that this model has not, say.
            return False
        return True

    def reduced(self, choice: Choice) -> nn.Module:
        """The model under the chosen method, with the same weights.

        Raises:
            VitrimError: the model has no reduction of its own, or cannot take this one.
        """
        if choice.reducer == OWN:
            network = variant(self.network, OWN)
            if (handle := attached(network)) is None or handle.reduction is None:
                raise VitrimError(f"{self.spec} reduces no tokens by itself; choose a reducer")
            return network
        geometry = find_adapter(self.network).geometry(self.network)
        return variant(self.network, str(choice.reduction(geometry.depth, geometry.num_patches)))


@dataclass(frozen=True)
class Sight:
    """One image under one method.

    picture: the tokens after every cut. method: in the notation. before, after: the most
    likely classes and their probabilities, with all tokens and with fewer; empty without a classifier. remarks: what a
    person must know about them.
    """

    picture: Image.Image
    method: str
    before: dict[str, float]
    after: dict[str, float]
    remarks: tuple[str, ...]


def sight(subject: Subject, image: str | Path, choice: Choice) -> Sight:
    """Draw the tokens of an image, and predict its class with all tokens and with fewer.

    Raises:
        DataError: the image cannot be read.
        VitrimError: the model cannot take this method.
    """
    network = subject.reduced(choice)
    handle = attached(network)
    if handle is None or handle.reduction is None:
        raise ScheduleError("nothing is reduced; choose a reducer")
    view = View(network, handle)
    source = view.sources([image])[0]
    batch = source.load()[None]
    with torch.inference_mode():
        tiles, heat = next(view.draw(batch, subject.device, None, False, side=192))
        batch = batch.to(subject.device, next(network.parameters()).dtype)
        before, after = (exact(output_of(model, batch)[0]) for model in (subject.whole, network))
    if not (before.isfinite().all() and after.isfinite().all()):
        raise VitrimError(f"the outputs of {subject.spec} are not finite; check its weights")
    picture = sheet(wrap_rows(tiles, heat), source.name)
    return Sight(
        picture, str(handle.reduction), _top(subject, before), _top(subject, after), _remarks(subject, before, after)
    )


def _top(subject: Subject, logits_K: Tensor) -> dict[str, float]:
    if not subject.labels:
        return {}
    share = logits_K.softmax(0).topk(min(TOP, len(logits_K)))
    return {subject.labels[at]: value for value, at in zip(share.values.tolist(), share.indices.tolist(), strict=True)}


def _remarks(subject: Subject, before: Tensor, after: Tensor) -> tuple[str, ...]:
    lines: list[str] = []
    if is_headless(subject.network):
        cosine = torch.cosine_similarity(before, after, dim=0).item()
        lines.append(f"no classifier; cosine of the features with fewer tokens to those with all: {cosine:.4f}")
    if not subject.trained:
        lines.append(f"weights are random, so predictions mean nothing; write {subject.spec}@pretrained or @FILE")
    return tuple(lines)


@dataclass(frozen=True)
class Figures:
    """Cost of one image with all tokens and with fewer.

    macs: of both. token_counts: leaving each block. ms, speedup: None where they were not measured.
    """

    macs: tuple[int, int]
    token_counts: tuple[int, ...]
    ms: tuple[Quartiles, Quartiles] | None = None
    speedup: Quartiles | None = None

    def markdown(self) -> str:
        """A small table."""
        before, after = (format_figure("macs", number) for number in self.macs)
        times = ("", "") if self.ms is None else tuple(f"{one.median:.2f} ms" for one in self.ms)
        rows = [
            "| | all tokens | reduced | ratio |",
            "|---|---:|---:|---:|",
            f"| MACs | {before} | {after} | {self.macs[0] / self.macs[1]:.2f} |",
            f"| time | {times[0] or 'measuring'} | {times[1]} | {self.speedup or ''} |",
        ]
        counts = f"One image. Tokens leaving each block: {' '.join(map(str, self.token_counts))}"
        return "\n".join([*(re.sub(r"(?<=\w) (?=\w)", "\u00a0", row) for row in rows), "", counts])


def figures(subject: Subject, choice: Choice, *, timed: bool = False) -> Figures:
    """MACs with all tokens and with fewer; with `timed` also the times of single images, in interleaved rounds."""
    models = {"all tokens": subject.whole, "reduced": subject.reduced(choice)}
    before, after = (cost(model, training=False) for model in models.values())
    found = Figures((before.macs, after.macs), after.token_counts)
    if not timed:
        return found
    rows = bench(models, batch_sizes=(1,), rounds=ROUNDS, warmup=1, device=subject.device).measured
    return replace(found, ms=(rows[0].ms, rows[1].ms), speedup=rows[1].speedup)
