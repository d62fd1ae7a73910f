"""One method at many settings: a grid, or a search along the frontier of accuracy, MACs and measured time."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..errors import VitrimError
from ..measure.columns import columns
from ..measure.environment import environment
from ..measure.table import Column, Table
from ..models import open_model
from .at_test_time import AtTestTime
from .compare import CLS_ONLY_NOTE, ModelData, Row, data_for, different_images_note
from .space import Space
from .subject import ROUNDS
from .sweep_plan import Place, Plan
from .sweep_run import notes_of, swept
from .template import Settings, check_sweep, fill_template, settings_of

COLUMNS = columns(
    "accuracy", "entropy", "speed", "images_per_second", "gmacs", "macs_ratio", "train_seconds", "tokens"
)  # fmt: skip


def sweep(
    models: Sequence[str],
    data: ModelData,
    method: str,
    vary: Settings,
    plan: Plan = Plan(),  # noqa: B008 (it cannot be changed)
    place: Place = Place(),  # noqa: B008
    *,
    batch_size: int = 128,
    device: str = "auto",
) -> Table:
    """Evaluate `method` at many settings on the test images of `data`; the first row of each model is dense.

    Args:
        models: as in `compare`.
        data: the images, for all models or by name.
        method: a reduction with names in braces, such as `TopK() @ PowerLaw(0.6, {alpha})`.
        vary: the values of each name; for a search its lowest and highest number, or texts to choose from. An option
            that counts gets whole numbers.
        plan: which settings are tried.
        place: where trials are kept.
        batch_size: images per forward pass.
        device: "auto", "cpu" or "cuda".

    Raises:
        ScheduleError: see `check_sweep` and `Plan.check`.
        RecipeError: the database has another sweep of this name.
        VitrimError: a model that cannot be opened or reduced, or that is named twice; a database that does not answer.
    """
    check_sweep(method, vary)
    plan.check()
    if len({*models}) < len(models):
        raise VitrimError("a model is named twice; every row needs its own")
    space = Space(vary, lambda setting: fill_template(method, setting, check=True))
    opened = {name: open_model(name, data_for(name, data).image_size) for name in models}
    short = Counter(Path(name).name for name in models)
    rows: list[Row] = []
    for name, model in opened.items():
        shown = Path(name).name if short[Path(name).name] == 1 else name
        subject = AtTestTime(shown, model, data_for(name, data), method, batch_size, device)
        kept_as = place.name or method
        rows += swept(subject, space, plan, place, kept_as if len(models) == 1 else f"{kept_as}, {name}")
    notes = [
        "Test time only: weights are those of the named model. Ratios are to the dense network of the same model; "
        f"speed is the median over {ROUNDS} rounds in which both were timed in turns.",
        CLS_ONLY_NOTE,
        *different_images_note({name: data_for(name, data) for name in models}),
    ]
    return table_of(fill_template(method, {name: f"{{{name}}}" for name in vary}), vary, rows, notes)


def table_of(title: str, vary: Settings, rows: Sequence[Row], notes: Sequence[str]) -> Table:
    """The table of a sweep, with a column for each name that is varied."""
    own = [
        Column(name, name, "" if any(isinstance(v, str) for v in values) else ".3g") for name, values in vary.items()
    ]
    shown = (*columns("model"), *own, *COLUMNS)
    title = f"{title} over {', '.join(vary)}"
    return Table(title, shown, rows, notes=[*notes, *notes_of(rows)], environment=environment())


def methods_of(method: str, vary: Settings) -> list[str]:
    """The reduction at every setting of a grid."""
    return [fill_template(method, setting) for setting in settings_of(vary)]
