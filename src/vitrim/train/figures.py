"""Validation figures: the objective itself, and what a curriculum reads beyond the figures that every run has."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..data.streams import Stream
from ..errors import RecipeError
from ..measure.accuracy import attention_entropy, mean_loss
from ..models import find_adapter
from ..tokens import Figure
from .recipe import Recipe

ALWAYS = ("val_loss", "val_accuracy")
_MEASURES: Mapping[str, Callable[[nn.Module, Tensor], float]] = {"attention_entropy": attention_entropy}


def held_out_loss(
    judge: nn.Module, stream: Stream, terms: Sequence[str], recipe: Recipe, accelerator: Accelerator,
    tick: Callable[[int, int], None],
) -> dict[str, float]:  # fmt: skip
    """The mean of an objective and of its terms over all images of a stream, as "val_loss" and "val_" + term."""
    means = mean_loss(
        judge, stream, terms=terms, batch_size=recipe.batch_size, workers=recipe.data.workers,
        accelerator=accelerator, tick=tick,
    )  # fmt: skip
    return {f"val_{name}": value for name, value in means.items()}


def check_figures(model: nn.Module, figures: Iterable[Figure]) -> None:
    """Measure every figure once, on one blank image, so that one which the model cannot supply is refused now.

    Raises:
        RecipeError: nothing measures a figure.
        VitrimError: the model cannot supply it.
    """
    size = find_adapter(model).geometry(model).input_size
    device = next(model.parameters()).device
    measure_figures(model, figures, torch.zeros(1, *size, device=device))


def measure_figures(model: nn.Module, figures: Iterable[Figure], images: Tensor) -> dict[str, Any]:
    """The values of those figures that are not always there, on images (B, channels, H, W)."""
    return {figure.name: _measure(figure)(model, images) for figure in figures if figure.name not in ALWAYS}


def _measure(figure: Figure) -> Callable[[Any, Any], float]:
    measure = figure.measure or _MEASURES.get(figure.name)
    if measure is None:
        known = ", ".join((*ALWAYS, *_MEASURES))
        raise RecipeError(f"nothing measures the figure {figure.name!r}; give it `measure`, or read one of {known}")
    return measure
