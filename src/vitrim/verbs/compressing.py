"""Verbs that turn one budget into a cheaper model with a certificate, and that check the certificate."""

import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ..data.specs import DataSpec
from ..errors import DataError, VitrimError
from ..options import Range
from ..train.specs import FinetuneSpec
from .delivery import Count, DataOptions, Device, check_used, command_line
from .images import images_of, recorded_images, training_images, unseen_images

START, RUN = "start", "finetune"
"""Folders in that of a model which was fine-tuned after the search: the model before that, and the run."""

if TYPE_CHECKING:
    from torch import nn

    from ..compression import Compressed


def compress(
    model: str,
    data: DataOptions,
    finetune: Annotated[dict[str, Any], FinetuneSpec],
    out: str | None = None,
    macs: float | None = None,
    params: float | None = None,
    latency: float | str | None = None,
    max_drop: Annotated[float, Range(0, 1)] | None = None,
    using: list[Literal["tokens", "width"]] = ["tokens", "width"],  # noqa: B006 (shown as the default; never changed)
    num_images: Count = 1024,
    trials: Annotated[int, Range(0, 10_000)] = 12,
    batch_size: Count = 32,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    compile: bool = False,
    dry_run: bool = False,
    overwrite: bool = False,
    device: Device = "auto",
) -> None:
    """Make a model cheaper within one budget, without training, and certify what that costs.

    Args:
        model: a timm name with weights (NAME@FILE), a folder written by vitrim, or a run folder.
        data: the images; training images for the search, test images for the certificate. Without the folder of
            a training split in data.root, all images below it are used, without classes.
        finetune: learn from the model afterwards, on the training images.
        out: folder for the model and its certificate.
        macs: budget of MACs per image; a number up to 1 is a fraction of those of the model.
        params: budget of parameters; a number up to 1 is a fraction. Width alone is cut then.
        latency: budget of milliseconds for one batch, measured on the device; a number up to 1 is a fraction, so write
            0.5ms for half a millisecond.
        max_drop: largest loss of accuracy on the test images, such as 0.01; only the certificate depends on it.
        using: what may be reduced.
        num_images: images for the search at most.
        trials: candidates that the sampler proposes after the first rounds.
        batch_size: images per forward pass where times are measured.
        dtype: number format where times are measured.
        compile: compile the models where times are measured.
        dry_run: list what would be tried and how long it would take, and stop.
        overwrite: replace an existing model.
        device: where to search and to measure.
    """
    from ..compression.dry_run import dry_run as list_plan
    from ..compression.goal import Goal, check_using
    from ..compression.images import divide
    from ..compression.job import Job
    from ..compression.request import Request, check_model
    from ..measure.accelerator import make_accelerator
    from ..models import check_place, has_weights, open_model
    from ..models.classes import kept_classes

    if out is None and not dry_run:
        raise VitrimError("a folder for the model is needed; give --out DIR, or --dry_run to see what would be tried")
    further = FinetuneSpec(**finetune)
    if out is not None:
        for place in (out, *([f"{out}/{START}"] if further.epochs else [])):
            check_place(place, overwrite=overwrite)
    goal = Goal.of(macs, params, latency)
    request = Request(goal, check_using(using, goal), batch_size, dtype, compile, num_images, trials)
    check_used("compress", data, ("holdout",), "training and test images")
    spec = images_of([model], data)
    network = open_model(model, spec.image_size)
    check_model(network)
    network.to(make_accelerator(cpu=device == "cpu").device)
    if not has_weights(model):
        print(
            "vitrim compress: weights are random, so that closeness to the model says nothing; write "
            f"{model}@pretrained or {model}@FILE",
            file=sys.stderr,
        )
    fits, unseen = training_images(network, spec, num_images), unseen_images(network, model, spec)
    labelled = unseen is not None and unseen.classes is not None
    if max_drop is not None and not labelled:
        raise DataError("max_drop needs test images whose classes are those of the model; leave it out or change data")
    parts = divide(fits, "width" in request.using, unseen)
    if dry_run:
        print(list_plan(network, request, parts).table.text())
        return
    source = {"model": model, "data": asdict(spec)}
    job = Job(network, request, parts, next(network.parameters()).device, print, source)
    found = job.run(max_drop, labelled=labelled)
    assert out is not None
    if further.epochs:
        note = f"Learnt from the given model after the search, epochs: {further.epochs}."
        learnt = _learnt(found, further, model, spec, out, kept_classes(model), overwrite)
        found = job.again(learnt.to(job.device), found.certificate, note, max_drop, labelled=labelled)
    found.save(out, overwrite=overwrite, **kept_classes(model))
    print(found.certificate.in_folder(out).table().text())
    print(f"written to {out}")


def verify(
    folder: str, data: DataOptions, original: str | None = None, device: Device = "auto", out: str | None = None
) -> None:
    """Measure the statements of a certificate again, here, and say for each one whether it holds.

    Args:
        folder: folder written by vitrim compress.
        data: the images to compare on; by default those of the certificate, where they are here.
        original: the model that was compressed; by default it is opened from where it was then.
        device: where to measure; auto takes the kind of device of the certificate where it is here.
        out: file to write the table to (.md, .csv, .json or .html).
    """
    from .delivery import check_table, deliver

    check_table(out)
    from ..compression.verification import open_certified
    from ..compression.verification import verify as run

    _, certificate = open_certified(folder)
    check_used("verify", data, ("train_split", "holdout", "limit"), "the test images")
    given = _original(original, certificate.source.get("model"), certificate.original)
    pictures, spec = None, None
    if given is not None:
        spec = images_of([], data) if data else recorded_images(certificate)
    if given is not None and spec is not None:
        try:
            pictures = unseen_images(given, folder, spec) or training_images(given, spec, 1024)
        except DataError:
            if data:
                raise  # The images of the certificate may be on another machine.
    found = run(folder, pictures, given, device=None if device == "auto" else device)
    deliver(found.table(), out)
    if not found.holds:
        raise SystemExit(1)


def _learnt(
    found: "Compressed", spec: Any, model: str, data: DataSpec, out: str, classes: dict[str, Any], overwrite: bool
) -> "nn.Module":
    """The answer after it has learnt from the given model; its start and its run are kept in the folder."""
    from ..compression.finetune import finetune, recipe_for
    from ..show.progress import live

    start = found.save(f"{out}/{START}", overwrite=overwrite, **classes)
    recipe = recipe_for(spec, start, model, data)
    with live() as report:
        return finetune(found.model, recipe, f"{out}/{RUN}", command=command_line(), report=report)


def _original(given: str | None, recorded: Any, weights: str) -> "nn.Module | None":
    """The model that was compressed; None where it is not here any more and none was named."""
    from ..elastic.chain import hash_of
    from ..models import open_model
    from ..models.build import split_spec

    # A model that only a file names is opened from this machine alone: a file never starts a download.
    if given is None and not (isinstance(recorded, str) and os.path.exists(split_spec(recorded)[1] or recorded)):
        return None
    try:
        model = open_model(given or recorded)
    except VitrimError:
        if given is not None:
            raise
        return None
    if hash_of(model) == weights:
        return model
    if given is not None:
        raise VitrimError(f"{given} is another model than the one that was compressed; name that one")
    return None
