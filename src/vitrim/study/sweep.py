"""One method at many settings, at test time only: a grid, or a Bayesian search along the accuracy-cost frontier."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ..data.specs import DataSpec
from ..elastic.chain import hash_of
from ..errors import ScheduleError, VitrimError
from ..measure.environment import environment
from ..measure.table import Column, Table
from ..models import DENSE, open_model, variant
from .compare import CLS_ONLY_NOTE, COLUMNS, ModelData, Row, data_for, different_images_note, evaluate_variants
from .template import Setting, Settings, check_sweep, fill_template, settings_of
from .trials import Trials

TOGETHER = 4
"""Settings of a grid that are evaluated together with the dense network; a kill loses at most these."""

Evaluate = Callable[[Sequence[str]], list[Row]]
"""Methods -> the row of the dense network, and one row for each method."""


def sweep(
    models: Sequence[str],
    data: ModelData,
    method: str,
    vary: Settings,
    *,
    search: Literal["grid", "tpe"] = "grid",
    trials: int = 20,
    seed: int = 0,
    batch_size: int = 128,
    device: str = "auto",
    tick: Callable[[int, int], None] | None = None,
    kept: Path | None = None,
) -> Table:
    """Evaluate `method` at many settings on the test images of `data`; the first row of each model is dense.

    Args:
        models: as in `compare`.
        data: the images, for all models or by name.
        method: a reduction with names in braces, such as `TopK() @ PowerLaw(0.6, {alpha})`.
        vary: the values of each name; for "tpe" its lowest and highest value.
        search: "grid" tries every combination; "tpe" tries `trials` settings that optuna's sampler proposes, looking
            for high accuracy and few MACs, one after another; an option that counts gets whole numbers.
        trials: number of settings that "tpe" tries.
        seed: of the sampler.
        batch_size: images per forward pass.
        device: "auto", "cpu" or "cuda".
        tick: called with (batches done, batches in all).
        kept: file in which finished trials are kept; a call with the same arguments continues after them.

    Raises:
        ScheduleError: see `check_sweep`.
        RecipeError: `kept` holds trials of another sweep.
        VitrimError: a model that cannot be opened or reduced, or that is named twice.
    """
    check_sweep(method, vary)
    if trials < 1:
        raise ScheduleError(f"trials is 1 or more, not {trials}")
    if len({*models}) < len(models):
        raise VitrimError("a model is named twice; every row needs its own")
    opened = {name: open_model(name, data_for(name, data).image_size) for name in models}
    finished = Trials(kept, {
        "method": method, "vary": {name: list(values) for name, values in vary.items()}, "search": search,
        "seed": seed if search == "tpe" else None, "batch size": batch_size, "device": device,
        "model": {name: hash_of(model) for name, model in opened.items()},
        "data": {name: _images(data_for(name, data)) for name in models},
    })  # fmt: skip
    rows: list[Row] = []
    for name, model in opened.items():

        def evaluate(methods: Sequence[str], name: str = name, model: nn.Module = model) -> list[Row]:
            variants = {(name, one): variant(model, one) for one in (DENSE, *methods)}
            own = data_for(name, data)
            return evaluate_variants(variants, own, batch_size=batch_size, device=device, tick=tick)

        if search == "grid":
            rows += _grid(name, evaluate, method, vary, finished)
        else:
            rows += _search(name, evaluate, method, vary, trials, seed, finished)
    shown = (COLUMNS[0], *(Column(name, name, ".3g") for name in vary), *COLUMNS[2:])
    notes = [
        "Test time only: weights are those of the named model. Ratios are to the dense network of the same model, "
        f"timed together with the setting (at most {TOGETHER if search == 'grid' else 1} at a time).",
        CLS_ONLY_NOTE,
        *different_images_note({name: data_for(name, data) for name in models}),
    ]
    title = fill_template(method, {name: f"{{{name}}}" for name in vary})
    return Table(f"{title} over {', '.join(vary)}", shown, rows, notes=notes, environment=environment())


def _images(data: DataSpec) -> list[Any]:
    """What identifies the test images and how they are read."""
    folder = data.root and str(Path(data.root).resolve())
    return [data.name, folder, data.test_split, data.image_size, data.crop_pct, data.on_corrupt]


def methods_of(method: str, vary: Settings) -> list[str]:
    """The reduction at every setting of a grid."""
    return [fill_template(method, setting) for setting in settings_of(vary)]


def _grid(name: str, evaluate: Evaluate, method: str, vary: Settings, finished: Trials) -> list[Row]:
    settings, steps = settings_of(vary), finished.steps(name)
    for start in range(len(steps) * TOGETHER, len(settings), TOGETHER):
        part = settings[start : start + TOGETHER]
        dense, *rows = evaluate([fill_template(method, setting) for setting in part])
        finished.add(name, [dense, *({**row, **setting} for row, setting in zip(rows, part, strict=True))])
    return [steps[0][0], *(row for _, *rows in steps for row in rows)]


def _search(
    name: str, evaluate: Evaluate, method: str, vary: Settings, trials: int, seed: int, finished: Trials
) -> list[Row]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    ranges: dict[str, Any] = {}
    for option, values in vary.items():
        low, high = min(values), max(values)
        if _counts(method, vary, option):
            ranges[option] = optuna.distributions.IntDistribution(int(low), int(high))
        else:
            ranges[option] = optuna.distributions.FloatDistribution(low, high)
    study = optuna.create_study(directions=["maximize", "minimize"])
    steps = finished.steps(name)
    for _, row in steps[:trials]:
        params = {option: row[option] for option in vary}
        values = [row["accuracy"], row["gmacs"]]
        study.add_trial(optuna.trial.create_trial(params=params, distributions=ranges, values=values))
    for number in range(len(study.trials), trials):
        # Each trial has a sampler of its own, so that a search which continues proposes what it would have proposed.
        study.sampler = optuna.samplers.TPESampler(seed=seed * 100_003 + number)
        trial = study.ask(ranges)
        dense, row = evaluate([fill_template(method, trial.params)])
        finished.add(name, [dense, {**row, **trial.params}])
        study.tell(trial, [row["accuracy"], row["gmacs"]])
    best = {trial.number for trial in study.best_trials}
    rows = [row for _, row in steps[:trials]]
    starred = [{**row, "model": f"{row['model']} *"} if at in best else row for at, row in enumerate(rows)]
    return [steps[0][0], *starred]


def _counts(method: str, vary: Settings, name: str) -> bool:
    """Whether an option takes whole numbers only: it refuses a number between two that it takes."""
    if not all(float(value).is_integer() for value in vary[name]):
        return False
    setting: Setting = {other: values[0] for other, values in vary.items()}
    try:
        fill_template(method, {**setting, name: min(vary[name]) + 0.5}, check=True)
    except VitrimError:
        return True
    return False
