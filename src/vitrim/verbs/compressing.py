"""The verb that turns one budget into a cheaper model with a certificate."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ..data.specs import DataSpec
from ..errors import DataError, VitrimError
from ..options import Range
from ..train.specs import FinetuneSpec
from ..verb_options import Without
from .delivery import Count, Device, check_used, command_line, say
from .images import (
    check_dense,
    images_of,
    knows_classes,
    measured_on,
    test_stream,
    training_stream,
)

UNUSED = ("holdout",)
"""Options of `DataSpec` that do not concern images of which none is held out."""
TRIED_ON = 16
"""Images on which a dry run measures the time of a forward pass."""

if TYPE_CHECKING:
    from ..compression import Compressed
    from ..compression.finetune import Finetuning
    from ..compression.images import Sizes
    from ..compression.job import Job
    from ..data.streams import Stream


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

    The exit code is 1 where what was asked is not met; the model and its certificate are written all the same.

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
    from ..compression.dry_run import out_of_reach
    from ..compression.finetune import Finetuning
    from ..compression.goal import Goal, check_using
    from ..compression.images import MOST_UNSEEN, divide, read
    from ..compression.job import Job
    from ..compression.request import Request, check_model
    from ..compression.searched import searched
    from ..measure.accelerator import make_accelerator
    from ..models import check_place, has_weights, open_model
    from ..models.files.classes import kept_classes

    if out is None and not dry_run:
        raise VitrimError("a folder for the model is needed; give --out DIR, or --dry_run to see what would be tried")
    further = FinetuneSpec(**finetune)
    if out is not None:
        check_place(out, overwrite=overwrite)
    goal = Goal.of(macs, params, latency)
    request = Request(goal, check_using(using, goal), batch_size, dtype, compile, num_images, trials)
    check_used("compress", data, UNUSED, "training and test images")
    spec = images_of([model], data)
    network = open_model(model, spec.image_size)
    check_dense(network, model, "compress")
    check_model(network, goal)
    network.to(make_accelerator(cpu=device == "cpu").device)
    request.check_device(next(network.parameters()).device)
    if not has_weights(model):
        say(
            "vitrim compress: weights are random, so that closeness to the model says nothing; write "
            f"{model}@pretrained or {model}@FILE",
            error=True,
        )
    learning = Finetuning(further, model, spec, Path(out or "."), overwrite or out is None) if further.epochs else None
    if learning is not None:
        learning.check(network)
    train, test = training_stream(network, spec), test_stream(network, spec)
    labelled = test is not None and knows_classes(network, model, test)
    if max_drop is not None and not labelled:
        raise DataError("max_drop needs test images whose classes are those of the model; leave it out or change data")
    width, most = "width" in request.using, min(len(train), num_images, spec.limit or num_images)
    most_unseen = None if test is None else min(len(test), num_test_images or MOST_UNSEEN)
    planned = _planned(train, most, width, most_unseen)
    if dry_run:
        some = read(train, min(TRIED_ON, most), spec.workers, labelled=False)
        lessons = further.epochs * (spec.limit or len(train))
        print(list_plan(network, request, planned, some.images, lessons).table.text())
        for line in out_of_reach(network, request, some):
            say(line)
        return
    unseen = None if test is None else read(test, planned.unseen, spec.workers, labelled=labelled)
    pictures = read(train, most, spec.workers, labelled=False)
    parts = divide(pictures, width, unseen)
    options = {
        "using": [*request.using], "num_images": num_images, "num_test_images": num_test_images, "trials": trials,
        "batch_size": batch_size, "dtype": dtype, "compile": compile, "max_drop": max_drop,
    }  # fmt: skip
    source = {"model": model, "data": asdict(spec), "options": options}
    source["measured"] = measured_on(test or train, len(parts.unseen), test=test is not None)
    if test is None:
        source["searched"] = searched(train, len(parts.fit) + len(parts.judge) + most - len(pictures))
    job = Job(network, request, parts, next(network.parameters()).device, say, source)
    assert out is not None
    if learning is None:
        found = job.run(max_drop, labelled=labelled)
    else:
        found = _learnt(job, learning, kept_classes(model), max_drop, labelled)
    found.save(out, overwrite=overwrite, **kept_classes(model))
    print(found.certificate.in_folder(out).table().text())
    say(f"written to {out}")
    if not found.certificate.met:
        raise SystemExit(1)


def _planned(train: "Stream", most: int, width: bool, unseen: int | None) -> "Sizes":
    """The sizes of the parts; too few images are refused before any is read, unless they are all that there are.

    Then one that cannot be read is named first: another one in its place may be enough.
    """
    from ..compression.images import sizes

    try:
        return sizes(most, width, unseen)
    except DataError:
        if most == len(train):
            for row in range(most):
                _ = train[row]
        raise


def _learnt(
    job: "Job", learning: "Finetuning", classes: dict[str, Any], max_drop: float | None, labelled: bool
) -> "Compressed":
    """The answer after it has learnt from the given model; an interrupted call goes on where it was."""
    from ..showing.progress import live

    found = learning.found(job.original, str(job.request.goal), job.source)
    if found is None:
        found = job.run(max_drop, labelled=labelled)
        learning.keep(found, **classes)
    else:
        say(f"the answer of the search is in {learning.start} already")
    with live() as report:
        learnt = learning.learnt(found, command=command_line(), report=report)
    return job.learnt(found, learnt.to(job.device), learning.spec.epochs, max_drop, labelled=labelled)
