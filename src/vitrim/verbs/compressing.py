"""Verbs that turn one budget into a cheaper model with a certificate, and that check the certificate."""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ..data.specs import DataSpec
from ..errors import DataError, VitrimError
from ..options import Range
from ..train.specs import FinetuneSpec
from ..verb_options import Without
from .delivery import TRAINING_ONLY, Count, Device, TestImages, check_used, command_line
from .images import (
    images_of,
    knows_classes,
    names_images,
    override_data,
    recorded_images,
    test_stream,
    training_stream,
)

START, RUN = "start", "finetune"
"""Folders in that of a model which was fine-tuned after the search: the model before that, and the run."""

UNUSED = ("holdout",)
"""Options of `DataSpec` that do not concern images of which none is held out."""
TRIED_ON = 16
"""Images on which a dry run measures the time of a forward pass."""

if TYPE_CHECKING:
    from torch import nn

    from ..compression import Certificate, Compressed
    from ..compression.images import Pictures


def compress(
    model: str,
    data: Annotated[dict[str, Any], DataSpec, Without(UNUSED)],
    finetune: Annotated[dict[str, Any], FinetuneSpec],
    out: str | None = None,
    macs: float | None = None,
    params: float | None = None,
    latency: float | str | None = None,
    max_drop: Annotated[float, Range(0, 1)] | None = None,
    using: list[Literal["tokens", "width"]] = ["tokens", "width"],  # noqa: B006 (shown as the default; never changed)
    num_images: Count = 1024,
    num_test_images: Count | None = None,
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
        model: a timm name with weights (NAME@FILE), a folder written by vitrim or transformers, hf:NAME, or a run
            folder.
        data: the images; training images for the search, test images for the certificate. Without the folder of
            a training split in data.root, all images below it are used, without classes.
        finetune: let the compressed model learn from the original one afterwards, on the training images.
        out: folder for the model and its certificate.
        macs: budget of MACs per image; a number up to 1 is a fraction of those of the model.
        params: budget of parameters; a number up to 1 is a fraction. Width alone is cut then.
        latency: budget of milliseconds for one batch, measured on the device; a number up to 1 is a fraction, so write
            0.5ms for half a millisecond.
        max_drop: largest loss of accuracy on the test images, such as 0.01; only the certificate depends on it.
        using: what may be reduced.
        num_images: images for the search at most.
        num_test_images: test images for the certificate at most; by default 5000.
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
    from ..compression.images import divide, read, sizes
    from ..compression.job import Job
    from ..compression.request import Request, check_model
    from ..compression.run import MOST_UNSEEN
    from ..compression.searched import searched
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
    check_used("compress", data, UNUSED, "training and test images")
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
    train, test = training_stream(network, spec), test_stream(network, spec)
    labelled = test is not None and knows_classes(network, model, test)
    if max_drop is not None and not labelled:
        raise DataError("max_drop needs test images whose classes are those of the model; leave it out or change data")
    width, most = "width" in request.using, min(len(train), num_images, spec.limit or num_images)
    most_unseen = None if test is None else min(len(test), num_test_images or MOST_UNSEEN)
    planned = sizes(most, width, most_unseen)  # Refuses too few before any is read.
    if dry_run:
        some = read(train, min(TRIED_ON, most), spec.workers, labelled=False)
        print(list_plan(network, request, planned, some.images).table.text())
        return
    unseen = None if test is None else read(test, planned.unseen, spec.workers, labelled=labelled)
    pictures = read(train, most, spec.workers, labelled=False)
    parts = divide(pictures, width, unseen)
    source = {"model": model, "data": asdict(spec)}
    if test is None:
        source["searched"] = searched(train, len(parts.fit) + len(parts.judge) + most - len(pictures))
    job = Job(network, request, parts, next(network.parameters()).device, print, source)
    found = job.run(max_drop, labelled=labelled)
    assert out is not None
    if further.epochs:
        learnt = _learnt(found, further, model, spec, out, kept_classes(model), overwrite)
        found = job.learnt(found, learnt.to(job.device), further.epochs, max_drop, labelled=labelled)
    found.save(out, overwrite=overwrite, **kept_classes(model))
    print(found.certificate.in_folder(out).table().text())
    print(f"written to {out}")


def verify(
    folder: str,
    data: TestImages,
    original: str | None = None,
    num_images: Count | None = None,
    device: Device = "auto",
    out: str | None = None,
) -> None:
    """Measure the statements of a certificate again, here, and say for each one whether it holds.

    Args:
        folder: folder written by vitrim compress.
        data: the images to compare on; by default those of the certificate, where they are here.
        original: the model that was compressed; by default it is opened from where it was then.
        num_images: images to compare on at most; by default 5000 test images, or 1024 where there is no test split.
        device: where to measure; auto takes the kind of device of the certificate where it is here.
        out: file to write the table to (.md, .csv, .json or .html).
    """
    from .delivery import check_table, deliver

    check_table(out)
    from ..compression.verification import open_certified
    from ..compression.verification import verify as run

    _, certificate = open_certified(folder)
    check_used("verify", data, TRAINING_ONLY, "the test images")
    recorded = recorded_images(certificate)
    if recorded is None and data and not names_images(data):
        raise DataError(f"the certificate in {folder} names no images; add --data.root FOLDER")
    spec = override_data(recorded or DataSpec(), data) if recorded or data else None
    size = None if recorded is None else recorded.image_size
    given = _original(original, certificate.source.get("model"), certificate.original, size)
    pictures, notes = None, ()
    if given is not None and spec is not None:
        try:
            pictures, notes = _pictures(given, folder, certificate, spec, num_images)
        except DataError:
            if data:
                raise  # The images of the certificate may be on another machine.
    found = run(folder, pictures, given, device=None if device == "auto" else device, notes=notes)
    deliver(found.table(), out)
    if not found.holds:
        raise SystemExit(1)


def _pictures(
    network: "nn.Module", folder: str, certificate: "Certificate", spec: DataSpec, most: int | None
) -> tuple["Pictures", Sequence[str]]:
    """Images to compare on, without those that the search used as far as these are known; and what to say about it."""
    from ..compression.images import read
    from ..compression.request import MOST_IMAGES
    from ..compression.run import MOST_UNSEEN
    from ..compression.searched import NOT_KNOWN, Searched

    used, test = Searched.of(certificate), test_stream(network, spec)
    if test is not None:
        labelled = knows_classes(network, folder, test)
        notes = () if used is None else (used.elsewhere,)
        return read(test, most or MOST_UNSEEN, spec.workers, labelled=labelled), notes
    train = training_stream(network, spec)
    start, note = (0, NOT_KNOWN) if used is None else used.among(train)
    return read(train, most or MOST_IMAGES, spec.workers, labelled=False, start=start), (note,)


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


def _original(given: str | None, recorded: Any, weights: str, size: int | None) -> "nn.Module | None":
    """The model that was compressed, at its image size; None where it is not here any more and none was named."""
    from ..elastic.chain import hash_of
    from ..models import open_model
    from ..models.build import split_spec

    # A model that only a file names is opened from this machine alone: a file never starts a download.
    if given is None and not (isinstance(recorded, str) and os.path.exists(split_spec(recorded)[1] or recorded)):
        return None
    try:
        model = open_model(given or recorded, size)
    except VitrimError:
        if given is not None:
            raise
        return None
    if hash_of(model) == weights:
        return model
    if given is not None:
        raise VitrimError(f"{given} is another model than the one that was compressed; name that one")
    return None
