"""Models side by side on the same images: accuracy, time, tokens and cost."""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..data.images import open_images
from ..data.specs import DataSpec
from ..data.splits import plain_stream
from ..data.streams import Stream
from ..errors import DataError, VitrimError
from ..measure.accelerator import make_accelerator
from ..measure.accuracy import Figures, evaluate_all
from ..measure.cost import cost
from ..measure.environment import environment
from ..measure.table import Column, Table
from ..models import open_model, variant
from ..models.classes import other_classes
from ..models.evaluating import evaluating
from ..models.input_format import InputFormat
from ..train.recipe import Recipe

ModelData = DataSpec | Mapping[str, DataSpec]
"""The images: one set for all models, or by the name of each."""
ImageSet = tuple[str, str | None, str | None]
Variant = tuple[str, str]
"""Model, method."""

COLUMNS = (
    Column("model", "model"),
    Column("method", "method"),
    Column("accuracy", "accuracy", ".2%"),
    Column("entropy", "entropy if correct", ".3f"),
    Column("seconds", "time [s]", ".2f"),
    Column("speed", "speed ratio", ".2f"),
    Column("images_per_second", "images/s", ".0f"),
    Column("gmacs", "GMACs", ".4f"),
    Column("macs_ratio", "MACs ratio", ".2f"),
    Column("tokens", "tokens leaving each block"),
)


CLS_ONLY_NOTE = (
    "Under a reduction, the last block computes CLS alone where the head reads nothing else (same logits, so 1 token "
    "leaves it); the method dense+cls_only shows that saving by itself."
)


def data_of(models: Sequence[str], given: Mapping[str, Any]) -> DataSpec:
    """The images that the first run learnt with, where the first model is a run folder, with `given` laid over them.

    `given` holds options of `DataSpec`. Where it names another data set, place and splits are not the run's.
    """
    path = Path(models[0]) / "recipe.yaml"
    return override_data(Recipe.read(path).data if path.exists() else DataSpec(), given)


def override_data(own: DataSpec, given: Mapping[str, Any]) -> DataSpec:
    """These images with the `given` options in place; see `data_of`."""
    new = DataSpec()
    if given.get("name", own.name) != own.name:
        own = replace(own, root=new.root, download=new.download, train_split=new.train_split, test_split=new.test_split)
    return replace(own, **given)


def data_for(name: str, data: ModelData) -> DataSpec:
    """The images of the model of that name."""
    return data if isinstance(data, DataSpec) else data[name]


def image_set(data: DataSpec) -> ImageSet:
    """What two data options have in common where their test images are the same, however they are cut and read."""
    return data.name, data.root, data.test_split


def compare(
    models: Sequence[str],
    data: DataSpec,
    methods: Sequence[str],
    *,
    batch_size: int = 128,
    device: str = "auto",
    tick: Callable[[int, int], None] | None = None,
) -> Table:
    """Evaluate every model under every method on the test images of `data`.

    The first model and method are the baseline of the ratios. Exact savings are on for reduced models; "dense"
    is the model as timm runs it.

    Raises:
        DataError: a model's number of classes is not that of the data.
    """
    opened = {name: open_model(name) for name in models}
    classes = open_images(data, False).classes
    for name, model in opened.items():
        if model.num_classes != len(classes):
            raise DataError(
                f"{name} tells {model.num_classes} classes apart, but the images have {len(classes)}; "
                "train it on them first"
            )
        if fault := other_classes(name, classes):
            raise DataError(fault)
    if len({*methods}) < len(methods) or len({*models}) < len(models):
        raise VitrimError("a model or a method is named twice; every row needs its own")
    variants = {(name, method): variant(model, method) for name, model in opened.items() for method in methods}
    rows = evaluate_variants(variants, data, batch_size=batch_size, device=device, tick=tick)
    title = f"{data.name} test images, {rows[0]['num_images']} of them"
    return Table(title, COLUMNS, rows, notes=_notes(rows), environment=environment())


def evaluate_variants(
    variants: Mapping[Variant, nn.Module], data: ModelData, *, originals: Mapping[Variant, Variant] | None = None,
    batch_size: int = 128, device: str = "auto", tick: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row of figures per (model, method), each on its images as it wants them.

    Those on the same test images are evaluated side by side; ratios are to the first on the same images. `originals`
    names variants, on the same images too, from which the predictions of others should not diverge.
    """
    accelerator = make_accelerator(cpu=device == "cpu")
    together: dict[ImageSet, dict[Variant, nn.Module]] = {}
    for (name, method), model in variants.items():
        together.setdefault(image_set(data_for(name, data)), {})[name, method] = model
    found: dict[Variant, Figures] = {}
    for group in together.values():
        specs = [data_for(name, data) for name, _ in group]
        number_of = {key: f"{number}" for number, key in enumerate(group)}
        named = {number_of[key]: model for key, model in group.items()}
        whole = {number_of[key]: number_of[one] for key, one in (originals or {}).items() if key in group}
        by_form: dict[Any, Stream] = {}
        streams: dict[str, Stream] = {}
        for (number, model), spec in zip(named.items(), specs, strict=True):
            form = InputFormat.of(model, spec.image_size), spec.crop_pct, spec.on_corrupt
            streams[number] = by_form[form] = by_form.get(form) or plain_stream(model, spec)
        figures = evaluate_all(
            named, streams, originals=whole, batch_size=batch_size, workers=specs[0].workers,
            accelerator=accelerator, tick=tick,
        )  # fmt: skip
        found |= zip(group, figures.values(), strict=True)
    short = Counter(Path(name).name for name in {name for name, _ in variants})
    rows: list[dict[str, Any]] = []
    first: dict[ImageSet, dict[str, Any]] = {}
    for (name, method), model in variants.items():
        with evaluating(model):
            figures, spent = found[name, method], cost(model)
        rows.append({
            "model": Path(name).name if short[Path(name).name] == 1 else name, "method": method,
            "accuracy": figures.accuracy, "loss": figures.loss, "entropy": figures.entropy,
            "divergence": figures.divergence,
            "seconds": figures.seconds, "images_per_second": figures.images_per_second,
            "gmacs": spent.macs / 1e9, "gmacs_linear_only": spent.macs_linear_only / 1e9, "params": spent.params,
            "tokens": list(spent.token_counts),
            "num_images": figures.num_images, "unreadable": list(figures.unreadable),
        })  # fmt: skip
        base = first.setdefault(image_set(data_for(name, data)), rows[-1])
        rows[-1]["speed"] = base["seconds"] / figures.seconds
        rows[-1]["macs_ratio"] = base["gmacs"] / rows[-1]["gmacs"]
    return rows


def mean_over_seeds(per_seed: Sequence[Mapping[str, Any]], *means: str) -> dict[str, Any]:
    """Mean accuracy of one model trained with several seeds, its standard deviation, their number, and `means`."""
    accuracies = [figures["accuracy"] for figures in per_seed]
    return {
        "accuracy": statistics.fmean(accuracies),
        "accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "n": len(accuracies),
        **{name: statistics.fmean(figures[name] for figures in per_seed) for name in means},
    }


def different_images_note(data: Mapping[str, DataSpec]) -> list[str]:
    """A note on models that were tested on images of their own, none where all had the same."""
    told: dict[ImageSet, list[str]] = {}
    for name, spec in data.items():
        told.setdefault(image_set(spec), []).append(name)
    if len(told) == 1:
        return []
    sets = "; ".join(f"{' '.join(filter(None, images))}: {', '.join(names)}" for images, names in told.items())
    return [
        f"Test images are not the same ({sets}). Only models on the same images compare: they took turns, and ratios "
        "are to the first of them."
    ]


def _notes(rows: list[dict[str, Any]]) -> list[str]:
    notes = ["Time is spent inside the model; models took turns batch by batch. Ratios are to the first row."]
    notes.append(CLS_ONLY_NOTE)
    if rows[0]["unreadable"]:
        names = rows[0]["unreadable"]
        notes.append(f"{len(names)} images could not be read and were left out: {', '.join(names[:3])}.")
    return notes
