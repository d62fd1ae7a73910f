"""Evaluate models and methods together on the same images: accuracy, time, tokens and cost."""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..data.data_sets import open_images
from ..data.specs import DataSpec
from ..data.splits import plain_stream
from ..data.streams import Stream
from ..errors import DataError, VitrimError
from ..measure.accelerator import make_accelerator
from ..measure.accuracy import Figures, evaluate_all
from ..measure.columns import columns
from ..measure.cost import Cost, cost_of_any
from ..measure.environment import environment
from ..measure.intervals import of_difference
from ..measure.table import Table
from ..models import attached, num_classes, open_model, own_method, variant
from ..models.evaluating import evaluating
from ..models.files.classes import other_classes
from ..models.input_format import InputFormat

ModelData = DataSpec | Mapping[str, DataSpec]
"""The images: one set for all models, or one by the name of each."""
ImageSet = tuple[str, str | None, str | None]
"""Name, folder and test split of the test images."""
Variant = tuple[str, str]
"""Model and method."""
Row = dict[str, Any]
"""The figures of one variant, by the keys in `ROW_KEYS`."""

COLUMNS = columns(
    "model", "method", "accuracy", "gain", "entropy", "seconds", "speed", "images_per_second", "gmacs", "macs_ratio",
    "tokens",
)  # fmt: skip
ROW_KEYS = (
    "model", "method", "accuracy", "loss", "entropy", "divergence", "seconds", "images_per_second", "gmacs",
    "gmacs_linear_only", "params", "tokens", "num_images", "unreadable", "speed", "macs_ratio", "gain", "gain_low",
    "gain_high",
)  # fmt: skip
GAIN_NOTE = (
    "Accuracy gained is over the first row with the same images; the 95 % interval is paired by image, and says what "
    "other images would change, not what another training would."
)
CLS_ONLY_NOTE = (
    "Under a reduction, the last block computes only CLS where the head reads nothing else (same logits, so 1 token "
    "leaves it); the method dense+cls_only shows that saving without a reduction."
)


def data_for(name: str, data: ModelData) -> DataSpec:
    """The images of the model with this name."""
    return data if isinstance(data, DataSpec) else data[name]


def image_set(data: DataSpec) -> ImageSet:
    """Equal for options that name the same test images, however these are cropped and read."""
    return data.name, data.root, data.test_split


def compare(
    models: Sequence[str],
    data: DataSpec,
    methods: Sequence[str] | None = None,
    *,
    batch_size: int = 128,
    device: str = "auto",
    tick: Callable[[int, int], None] | None = None,
) -> Table:
    """Evaluate every model under every method on the test images of `data`, at `data.image_size` if it is set.

    Without methods, each model is evaluated as it is: "own" where a reduction is attached, else "dense", which is the
    model as its own library runs it. The first model and method are the reference of the ratios. Reduced models leave
    out what the head does not read.

    Raises:
        DataError: a model has another number of classes, or other classes, than the images.
        VitrimError: a model that cannot be opened or reduced, or a name given twice.
    """
    opened = {name: open_model(name, data.image_size) for name in models}
    images = open_images(data, False)
    classes = images.classes
    for name, model in opened.items():
        if num_classes(model) != len(classes):
            raise DataError(
                f"{name} has {num_classes(model)} classes, but the images have {len(classes)}; give images of its "
                "classes, or train it on these"
            )
        if fault := other_classes(name, classes):
            raise DataError(fault)
    if len({*(methods or ())}) < len(methods or ()) or len({*models}) < len(models):
        raise VitrimError("a model or a method is named twice; every row needs its own")
    variants = {
        (name, method): variant(model, method)
        for name, model in opened.items()
        for method in methods or [own_method(model)]
    }
    found = evaluate_variants(variants, data, batch_size=batch_size, device=device, tick=tick)
    rows = [{key: value for key, value in (row | gain([row])).items() if key in ROW_KEYS} for row in found]
    title = f"{data.name} test images, {rows[0]['num_images']} of them"
    return Table(
        title, COLUMNS, rows, notes=[*_notes(rows, [*variants.values()]), *images.notes], environment=environment()
    )


def evaluate_variants(
    variants: Mapping[Variant, nn.Module], data: ModelData, *, originals: Mapping[Variant, Variant] | None = None,
    batch_size: int = 128, device: str = "auto", tick: Callable[[int, int], None] | None = None,
) -> list[Row]:  # fmt: skip
    """One row of figures per (model, method), each on its own images in its own input format.

    Variants on the same test images are evaluated together, batch by batch; ratios are to the first of them.
    `originals` names, for some variants, another one on the same images; their divergence from it is computed.
    The key "differences" of a row holds, image by image, what is right here and wrong in the original or else the first
    (1), and the other way round (-1); None for the first itself.
    """
    accelerator = make_accelerator(cpu=device == "cpu")
    costs = {key: _cost(model) for key, model in variants.items()}  # Before the long pass, since it may be refused.
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
    rows: list[Row] = []
    first: dict[ImageSet, tuple[Variant, Row]] = {}
    for name, method in variants:
        figures, spent = found[name, method].checked(f"{name} under {method!r}"), costs[name, method]
        rows.append({
            "model": Path(name).name if short[Path(name).name] == 1 else name, "method": method,
            "accuracy": figures.accuracy, "loss": figures.loss, "entropy": figures.entropy,
            "divergence": figures.divergence,
            "seconds": figures.seconds, "images_per_second": figures.images_per_second,
            "gmacs": spent.macs / 1e9, "gmacs_linear_only": spent.macs_linear_only / 1e9, "params": spent.params,
            "tokens": list(spent.token_counts),
            "num_images": figures.num_images, "unreadable": list(figures.unreadable),
        })  # fmt: skip
        one, base = first.setdefault(image_set(data_for(name, data)), ((name, method), rows[-1]))
        one = (originals or {}).get((name, method), one)
        right = figures.right.astype(float) - found[one].right
        rows[-1]["differences"] = None if one == (name, method) else right
        rows[-1]["speed"] = base["seconds"] / figures.seconds
        rows[-1]["macs_ratio"] = base["gmacs"] / rows[-1]["gmacs"]
    return rows


def _cost(model: nn.Module) -> Cost:
    with evaluating(model):
        return cost_of_any(model)


def gain(per_seed: Sequence[Row]) -> Row:
    """How much accuracy one row has over another, on average over seeds, with its interval paired by image."""
    differences = [row["differences"] for row in per_seed]
    if any(each is None for each in differences):
        return {}
    found = of_difference(np.mean(differences, axis=0))
    return {"gain": found.value, "gain_low": found.low, "gain_high": found.high}


def mean_over_seeds(per_seed: Sequence[Row], *means: str) -> Row:
    """Accuracy of one model trained with several seeds, also over another row; and the mean of other keys."""
    accuracies = [figures["accuracy"] for figures in per_seed]
    return {
        "accuracy": statistics.fmean(accuracies),
        "accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "n": len(accuracies),
        **gain(per_seed),
        **{name: statistics.fmean(figures[name] for figures in per_seed) for name in means},
    }


def different_images_note(data: Mapping[str, DataSpec]) -> list[str]:
    """A note on models that were tested on different images; empty where all had the same."""
    models_of: dict[ImageSet, list[str]] = {}
    for name, spec in data.items():
        models_of.setdefault(image_set(spec), []).append(name)
    if len(models_of) == 1:
        return []
    sets = "; ".join(f"{' '.join(filter(None, images))}: {', '.join(names)}" for images, names in models_of.items())
    return [
        f"Test images are not the same ({sets}). Compare models on the same images only: they were timed together, "
        "and ratios are to the first of them."
    ]


def _notes(rows: list[Row], models: Sequence[nn.Module]) -> list[str]:
    notes = ["Time is that inside the model; models were timed in turns, batch by batch. Ratios are to the first row."]
    notes += [GAIN_NOTE] if len(rows) > 1 else []
    if any(handle.cls_only for handle in map(attached, models) if handle is not None):
        notes.append(CLS_ONLY_NOTE)
    if names := rows[0]["unreadable"]:
        notes.append(f"{len(names)} images could not be read and were left out: {', '.join(names[:3])}.")
    return notes
