"""Settings of a recipe that are tried by training: any of its options, and names in braces in its notation."""

from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from ..data.data_sets import open_images
from ..distill import Terms
from ..errors import RecipeError, UnknownNameError
from ..measure.accelerator import make_accelerator
from ..models import DENSE, attach, attached, own_method, variant
from ..options import flatten, merge
from ..tokens import Constant
from ..train.checkpoint import RunFolder
from ..train.learner import prepare_model, reduction_of
from ..train.loop import train
from ..train.recipe import NOTATION, WITHOUT_EFFECT, Recipe
from ..train.stopping import RunAbandoned
from .compare import Row
from .hopeless import Hopeless, Watch
from .space import key_of
from .subject import cost_row
from .template import Setting, fill_template, names_in

HISTORY = "val_accuracies"
"""The attribute with the accuracy on held-out images after each epoch."""


class InTraining:
    """A recipe, each setting of which is trained in a folder of its own. See `Subject`.

    Accuracy is that on held-out training images: a setting that was chosen by test images would look better than it is.

    Args:
        name: what rows call it.
        options: the recipe as plain data, with names in braces in its reduction or its objective.
        folder: of the runs.
        batch_size: images per forward pass where times are measured.
    """

    def __init__(self, name: str, options: Mapping[str, Any], folder: Path, batch_size: int) -> None:
        self.name, self._options, self._folder, self._batch_size = name, dict(options), folder, batch_size

    def check_names(self, names: Mapping[str, Any]) -> None:
        """Raise `UnknownNameError` for a name that is neither an option nor in braces, or that is not varied."""
        known = [*flatten(Recipe().to_dict()), *flatten(self._options)]
        braces = [one for text in self._texts(names).values() for one in names_in(text)]
        for name in names:
            if name not in known and name not in braces and not name.startswith("model.args."):
                raise UnknownNameError("option of the recipe, or name in braces,", name, [*known, *braces])
        for name in braces:
            if name not in names:
                raise RecipeError(f"the recipe names {{{name}}}, which is not varied; give values for {name}")

    def recipe(self, setting: Setting) -> Recipe:
        """The recipe at a setting, checked.

        Raises:
            VitrimError: the setting is impossible.
        """
        options = merge({}, self._options)
        for name, text in self._texts(setting).items():
            options[name] = fill_template(text, {one: setting[one] for one in names_in(text)})
        for name, value in setting.items():
            if not any(name in names_in(text) for text in self._texts(setting).values()):
                options = merge(options, _nested(name, value))
        recipe = Recipe.from_dict(options)
        recipe.check()
        reduction_of(recipe)
        if recipe.distill is not None:
            Terms.parse(recipe.distill)
        if recipe.elastic is not None:
            raise RecipeError("a sweep trains single networks; leave elastic out of the recipe")
        if recipe.data.holdout == 0:
            raise RecipeError(
                "a sweep compares accuracy on held-out training images; set data.holdout in the recipe, such as 0.1"
            )
        return recipe

    def identity(self) -> Mapping[str, Any]:
        """See `Subject`."""
        flat = flatten(self._options)
        return {"recipe": {name: value for name, value in flat.items() if name not in WITHOUT_EFFECT}}

    def reference(self) -> Row:
        """See `Subject`; each setting is another network, so that there is none."""
        return {}

    def cost(self, setting: Mapping[str, Any]) -> Row:
        """See `Subject`: of the network as it will be after training, next to the same network without a reduction."""
        recipe = self.recipe(setting)
        classes = open_images(recipe.data, train=True).classes
        model = variant(prepare_model(recipe.model, len(classes), recipe.data.image_size), None)
        dense, reduction = variant(model, DENSE), reduction_of(recipe)
        if reduction is not None:
            if (brought := attached(model)) is not None:
                brought.remove()
            if reduction.active(training=False):
                attach(model, replace(reduction, curriculum=Constant(), phase="both"))
        own = dense if own_method(model) == DENSE else model
        return {"method": recipe.reduction or DENSE, **cost_row(dense, own, self._batch_size, _device())}

    def accuracy(self, setting: Mapping[str, Any], watch: Watch) -> Row:
        """See `Subject`: train, or continue where a worker has died. A stopped run keeps its folder."""
        recipe, folder = (
            self.recipe(setting),
            self._folder / f"trial-{sha256(key_of(setting).encode()).hexdigest()[:10]}",
        )
        held_out, hopeless = 0, list[Hopeless]()

        def report(event: str, figures: Mapping[str, Any]) -> None:
            nonlocal held_out
            watch.check_lease()
            held_out = figures.get("held_out", held_out)
            if event != "epoch" or not 2 * (figures["epoch"] + 1) >= recipe.epochs > figures["epoch"] + 1:
                return
            try:
                watch.check_epoch(figures["epoch"], figures.get("val_accuracy", 1.0), held_out)
            except Hopeless as why:
                hopeless.append(why)
                raise RunAbandoned from None

        try:
            result = train(recipe, folder, command=f"vitrim sweep: {key_of(setting)}", report=report)
        except RunAbandoned:
            if hopeless:
                raise hopeless[0] from None
            raise
        if result.get("val_accuracy") is None:
            raise RecipeError("a sweep compares accuracy, but this recipe learns no classes; add Labels() to distill")
        history = [line["val_accuracy"] for line in RunFolder(folder).metrics]
        return {
            "accuracy": result["val_accuracy"], "train_seconds": result["train_seconds"], "run": str(folder),
            "best_epoch": result["best_epoch"], HISTORY: history,
        }  # fmt: skip

    def _texts(self, names: Mapping[str, Any]) -> dict[str, str]:
        """The options in notation that hold one of these names in braces."""
        texts = {name: self._options.get(name) for name in NOTATION}
        return {
            name: text for name, text in texts.items()
            if isinstance(text, str) and any(f"{{{one}}}" in text for one in names)
        }  # fmt: skip


def _nested(name: str, value: float | str) -> dict[str, Any]:
    """The option of this dotted name alone."""
    first, _, rest = name.partition(".")
    whole = int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else value
    return {first: _nested(rest, value) if rest else whole}


def _device() -> torch.device:
    return make_accelerator().device
