"""Let a cheaper model learn from the given one for some epochs, by a recipe of `vitrim train`."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..data.specs import AugmentSpec, DataSpec
from ..errors import VitrimError
from ..models import attach, attached, load, num_classes
from ..models.build import split_spec
from ..models.store import saved_folder
from ..train.checkpoint import RunFolder
from ..train.loop import train
from ..train.recipe import Recipe
from ..train.specs import FinetuneSpec, ModelSpec, OptimSpec


def recipe_for(spec: FinetuneSpec, student: str | Path, teacher: str, data: DataSpec) -> Recipe:
    """The recipe: predictions of the given model are the only goal, so that labels are not used.

    Images are cropped at random and mirrored, since a model is so sure of its own training images that they teach
    little.

    Args:
        spec: for how long.
        student: folder of the cheaper model, whose reduction acts from the start.
        teacher: the given model, as the command takes it.
        data: the images.
    """
    folder = saved_folder(teacher)
    name, weights, size = (str(folder), None, None) if folder is not None else split_spec(teacher)
    given = ModelSpec(
        name, weights == "pretrained", None if weights == "pretrained" else weights, None if size is None else [*size]
    )
    optim = OptimSpec(lr=spec.lr, min_lr=spec.lr / 100, warmup_epochs=0.1)
    return Recipe(
        ModelSpec(str(student)), replace(data, image_size=None), AugmentSpec(crop="resized", scale=0.3, flip=True),
        optim=optim, distill="Logits(temperature=1.0)", teacher=given, epochs=spec.epochs, batch_size=spec.batch_size,
    )  # fmt: skip


def finetune(
    model: nn.Module, recipe: Recipe, out: str | Path, *, command: str = "", report: Callable[..., Any] | None = None
) -> nn.Module:
    """Train the model that the recipe names; the one that learnt, reduced as `model` is.

    Args:
        model: the cheaper model.
        recipe: of `recipe_for`.
        out: folder of the run, which the same call continues.
        command: kept with the run.
        report: see `train.loop.train`.

    Raises:
        VitrimError: the model has no classifier to learn from, or training fails.
    """
    if num_classes(model) == 0:
        raise VitrimError("fine-tuning learns from predictions, but this model has no classifier; leave it out")
    train(recipe, out, command=command, report=report)
    learnt, handle = load(RunFolder(Path(out)).model_path), attached(model)
    if handle is not None:
        if (own := attached(learnt)) is not None:
            own.remove()
        attach(learnt, handle.reduction, cls_only=handle.cls_only)
    return learnt.eval()
