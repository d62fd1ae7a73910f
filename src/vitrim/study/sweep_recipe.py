"""One recipe at many settings, each of which is trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import RecipeError, VitrimError
from ..measure.table import Table
from ..options import merge
from ..places import read_recipe
from .in_training import InTraining
from .space import Space
from .subject import ROUNDS
from .sweep import table_of
from .sweep_plan import Place, Plan
from .sweep_run import swept
from .template import Settings, check_values, settings_of

SUFFIXES = (".yaml", ".yml")
CORNERS = 64
"""Combinations of lowest and highest values that are checked before a search."""


def is_recipe(model: str) -> bool:
    """Whether this names a recipe, not a model."""
    return model.endswith(SUFFIXES)


def sweep_recipe(
    file: str, vary: Settings, runs: str | Path, plan: Plan = Plan(), place: Place = Place(), *,  # noqa: B008
    method: str | None = None, data: Mapping[str, Any] | None = None, batch_size: int = 128,
) -> Table:  # fmt: skip
    """Train a recipe at many settings and compare accuracy on held-out images, MACs and measured time.

    Args:
        file: the recipe.
        vary: values by name: an option of the recipe, such as `optim.lr`, or a name in braces in its reduction.
        runs: folder of the runs. A run that is there is continued, or not repeated.
        plan: which settings are tried.
        place: where trials are kept.
        method: reduction in place of the recipe's.
        data: options of its images in place of the recipe's.
        batch_size: images per forward pass where times are measured.

    Raises:
        ScheduleError: see `check_values` and `Plan.check`.
        UnknownNameError: a name that the recipe does not have.
        RecipeError: a setting that is impossible, or that learns no classes; another sweep of this name.
        VitrimError: the database does not answer any more, or a run cannot be made.
    """
    check_values(vary)
    plan.check()
    options = merge(read_recipe(file), {"data": dict(data)} if data else {})
    options |= {} if method is None else {"reduction": method}
    name = Path(file).stem
    subject = InTraining(name, options, Path(runs), batch_size)
    subject.check_names(vary)
    space = Space(vary, subject.recipe)
    ends = {one: values if plan.search == "grid" else (values[0], values[-1]) for one, values in _sorted(vary).items()}
    for setting in settings_of(ends)[: None if plan.search == "grid" else CORNERS]:
        try:
            subject.recipe(space.typed(setting))
        except VitrimError as error:
            at = ", ".join(f"{one} {value}" for one, value in setting.items())
            raise RecipeError(f"{file} at {at}: {error}") from None
    rows = swept(subject, space, plan, place, place.name or f"{name}, {', '.join(vary)}")
    notes = [
        "Each setting was trained; accuracy is that on held-out training images, which choose between settings. Ratios "
        f"are to the same network without a reduction; speed is the median over {ROUNDS} rounds in which both were "
        "timed in turns, with weights before training. Test accuracy is in the result.json of each run."
    ]
    return table_of(name, vary, rows, notes)


def _sorted(vary: Settings) -> Settings:
    """Numbers from the lowest to the highest."""
    return {
        one: values if any(isinstance(v, str) for v in values) else sorted(values, key=float)
        for one, values in vary.items()
    }
