"""Let a cheaper model learn from the given one for some epochs, by a recipe of `vitrim train`."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ..data.seeding import restored_generators
from ..data.specs import AugmentSpec, DataSpec
from ..errors import CheckpointError, VitrimError
from ..models import attach, attached, check_place, load, num_classes
from ..models.files.build import split_spec
from ..models.files.store import WEIGHTS, saved_folder
from ..output import is_free
from ..train.checkpoint import RunFolder
from ..train.loop import train
from ..train.prepared import PreparedRun
from ..train.recipe import Recipe
from ..train.specs import FinetuneSpec, ModelSpec, OptimSpec
from .compressed import Compressed
from .verification import is_original, open_certified

START, RUN = "start", "finetune"
"""Folders in that of a model which was fine-tuned after the search: the model before that, and the run."""


@dataclass(frozen=True)
class Finetuning:
    """What a cheaper model learns after the search, and the two folders that are kept of it.

    spec: for how long. teacher: the given model, as the command takes it. data: the images. out: folder of the cheaper
    model. overwrite: whether what is there may be replaced.
    """

    spec: FinetuneSpec
    teacher: str
    data: DataSpec
    out: Path
    overwrite: bool = False

    @property
    def start(self) -> Path:
        """Folder of the answer of the search."""
        return self.out / START

    @property
    def run(self) -> RunFolder:
        """Folder of the run."""
        return RunFolder(self.out / RUN)

    @property
    def recipe(self) -> Recipe:
        """See `recipe_for`."""
        return recipe_for(self.spec, self.start, self.teacher, self.data)

    def check(self, model: nn.Module) -> None:
        """Before a search that takes long, raise what learning would raise after it.

        Args:
            model: the given model.

        Raises:
            VitrimError: it has no classifier to learn from, has learnt nothing, or cannot be trained on these images.
            RecipeError: there is a run of another recipe.
        """
        if num_classes(model) == 0:
            raise VitrimError(
                "fine-tuning learns from predictions, but this model has no classifier; leave finetune.epochs out"
            )
        if not self.overwrite:
            self.run.check(self.recipe)
        recipe = replace(self.recipe, model=self.recipe.teacher or ModelSpec())
        recipe.check()
        with restored_generators():
            PreparedRun(recipe, self.run, "", lambda event, figures: None)

    def found(self, original: nn.Module, asked: str, source: Mapping[str, Any]) -> Compressed | None:
        """The answer of the same search, where an earlier call was interrupted after it; None without any.

        Args:
            original: the given model.
            asked: the budget in words.
            source: where model and images come from, and the options of the search, as the certificate holds them.

        Raises:
            CheckpointError: what is in the folder comes from another search.
        """
        if self.overwrite:
            return None
        if not (self.start / WEIGHTS).is_file():
            if self.run.path.is_dir() and not is_free(self.run.path):
                raise CheckpointError(f"{self.run.path} holds a run whose start is gone; choose another folder")
            return None
        model, certificate = open_certified(self.start)
        same = all(certificate.source.get(name) == source[name] for name in ("model", "data", "options"))
        if not same or certificate.asked != asked or not is_original(original, certificate):
            raise CheckpointError(
                f"{self.start} holds the answer of another search; choose another folder, or replace it by --overwrite"
            )
        return Compressed(model, certificate)

    def keep(self, found: Compressed, **extra: Any) -> None:
        """Write the answer of the search, in place of the one before and of its run where that is allowed."""
        check_place(self.start, overwrite=self.overwrite)
        if self.overwrite and (self.run.path / "recipe.yaml").is_file():
            shutil.rmtree(self.run.path)
        found.save(self.start, overwrite=self.overwrite, **extra)

    def learnt(self, found: Compressed, *, command: str, report: Callable[..., Any]) -> nn.Module:
        """The answer after it has learnt, see `finetune`."""
        return finetune(found.model, self.recipe, self.run.path, command=command, report=report)


def recipe_for(spec: FinetuneSpec, student: str | Path, teacher: str, data: DataSpec) -> Recipe:
    """The recipe: predictions of the given model are the only goal, so that images of any classes, or of none, do.

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
        name, weights == "pretrained", None if weights == "pretrained" else weights, None if size is None else [*size],
        args={} if data.image_size is None else {"img_size": data.image_size},
    )  # fmt: skip
    optim = OptimSpec(lr=spec.lr, min_lr=spec.lr / 100, warmup_epochs=0.1)
    return Recipe(
        ModelSpec(str(student)), replace(data, image_size=None), AugmentSpec(crop="resized", scale=0.3, flip=True),
        optim=optim, distill="Logits(temperature=1.0)", labels=False, teacher=given, epochs=spec.epochs,
        batch_size=spec.batch_size,
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
        VitrimError: training fails.
    """
    train(recipe, out, command=command, report=report)
    learnt, handle = load(RunFolder(Path(out)).model_path), attached(model)
    if handle is not None:
        if (own := attached(learnt)) is not None:
            own.remove()
        attach(learnt, handle.reduction, cls_only=handle.cls_only)
    return learnt.eval()
