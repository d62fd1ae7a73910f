"""One method at many settings, at test time only: a grid, or a Bayesian search along the accuracy-cost frontier."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ..data.specs import DataSpec
from ..errors import RecipeError, ScheduleError, UnknownNameError, VitrimError
from ..measure.environment import environment
from ..measure.table import Column, Table
from ..models import DENSE, open_model, variant
from ..options import fill
from ..tokens import Reduction
from .compare import CLS_ONLY_NOTE, COLUMNS, ModelData, data_for, different_images_note, evaluate_variants
from .published import add_published_columns, read_published

Settings = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Sweep:
    """The part `sweep` of a study.

    method: a reduction with names in braces, see `sweep`.
    vary: the values of each name.
    published: figures by row and setting, such as "dense, alpha 1.5", to print beside.
    """

    method: str | None = None
    vary: dict[str, Any] = field(default_factory=dict)
    published: dict[str, Any] | None = None

    @classmethod
    def parse(cls, data: dict[str, Any]) -> "Sweep":
        """Read what stands in the file.

        Raises:
            RecipeError: an option of the wrong kind.
            UnknownNameError: an option that there is not.
        """
        part = fill(cls, data, "sweep")
        return replace(part, published=read_published(part.published, "sweep.published"))

    def check(self, rows: Sequence[str]) -> None:
        """Look at all settings before anything is trained.

        Args:
            rows: of the study, those that are tested.

        Raises:
            RecipeError: no method, or values that are no numbers.
            ScheduleError: as `check_sweep`.
            UnknownNameError: a published figure of a row, a setting or a kind that the table does not have.
        """
        if self.method is None:
            raise RecipeError("the sweep of the study has no method; give one, such as TopK() @ KeepRate({r})")
        for name, values in self.vary.items():
            if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
                raise RecipeError(f"sweep.vary.{name} is {values!r}; it must list numbers, such as [0.5, 0.7]")
        check_sweep(self.method, self.vary)
        known = [self._point(row, setting) for row in rows for setting in ({}, *_settings(self.vary))]
        keys = [column.key for column in COLUMNS]
        for name, figures in (self.published or {}).items():
            if name not in known:
                raise UnknownNameError("row and setting in sweep.published", str(name), known)
            for key in figures.known:
                if key not in keys:
                    raise UnknownNameError(f"column of a sweep in published {name!r}", key, keys)

    def add_published(self, table: Table, rows: Mapping[str, str]) -> Table:
        """The table of this sweep with published figures; `rows` are those of the study by the names of models."""
        points = [self._point(rows[row["model"]], row) for row in table.rows]
        return add_published_columns(table, [(self.published or {}).get(point) for point in points])

    def _point(self, row: str, setting: Mapping[str, Any]) -> str:
        """What a row of the table goes by among published figures; the dense one by its row alone."""
        return ", ".join([row, *(f"{name} {setting[name]:g}" for name in self.vary if name in setting)])


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
) -> Table:
    """Evaluate `method` at many settings on the test images of `data`; the first row of each model is dense.

    Args:
        models: as in `compare`.
        data: the images, for all models or by name.
        method: a reduction with names in braces, such as `TopK() @ PowerLaw(0.6, {alpha})`.
        vary: the values of each name; for "tpe" its lowest and highest value.
        search: "grid" tries every combination, all side by side; "tpe" asks optuna's sampler for `trials` settings
            with high accuracy and few MACs, one after another; where an option counts, in whole numbers.
        trials: settings that "tpe" tries.
        seed: of the sampler.
        batch_size: images at a time.
        device: "auto", "cpu" or "cuda".
        tick: called with (batches done, batches in all).
    """
    check_sweep(method, vary)
    if trials < 1:
        raise ScheduleError(f"trials is 1 or more, not {trials}")
    rows: list[dict[str, Any]] = []
    for spec in models:
        model = open_model(spec)
        options: dict[str, Any] = {"batch_size": batch_size, "device": device, "tick": tick}
        if search == "grid":
            rows += _grid(spec, model, data_for(spec, data), method, vary, options)
        else:
            rows += _bayes(spec, model, data_for(spec, data), method, vary, trials, seed, options)
    columns = (COLUMNS[0], *(Column(name, name, ".3g") for name in vary), *COLUMNS[2:])
    notes = ["Test time only: weights are those of the named model. Ratios are to the dense row of the same model."]
    notes += [CLS_ONLY_NOTE, *different_images_note({spec: data_for(spec, data) for spec in models})]
    shown = method.format(**{name: f"{{{name}}}" for name in vary})
    return Table(f"{shown} over {', '.join(vary)}", columns, rows, notes=notes, environment=environment())


def check_sweep(method: str, vary: Settings) -> None:
    """Raise `ScheduleError` where a name has no values or is not in the method, or a value is impossible."""
    if not vary:
        raise ScheduleError("there is nothing to vary; give values for a name, such as {alpha: [1.0, 2.0]}")
    for name, values in vary.items():
        if f"{{{name}}}" not in method:
            raise ScheduleError(f"{method!r} does not use {{{name}}}")
        if not values:
            raise ScheduleError(f"there are no values for {name}; give at least one")
    methods_of(method, vary)


def methods_of(method: str, vary: Settings) -> list[str]:
    """The reduction at every setting of a grid."""
    return [_fill(method, setting) for setting in _settings(vary)]


def _settings(vary: Settings) -> list[dict[str, float]]:
    return [dict(zip(vary, values, strict=True)) for values in product(*vary.values())]


def _fill(method: str, setting: Mapping[str, float]) -> str:
    try:
        # Whole numbers as such, because some options count tokens: ConstantR(13), not 13.0.
        text = method.format(**{name: int(v) if float(v).is_integer() else v for name, v in setting.items()})
    except (KeyError, IndexError, ValueError):
        raise ScheduleError(f"{method!r} names a setting that is not varied; give values for it") from None
    Reduction.parse(text)  # So that a mistake is told before anything runs.
    return text


def _counts(method: str, vary: Settings, name: str) -> bool:
    """Whether an option takes whole numbers alone: it refuses the middle of two that it takes."""
    if not all(float(value).is_integer() for value in vary[name]):
        return False
    setting = {other: values[0] for other, values in vary.items()}
    try:
        _fill(method, {**setting, name: min(vary[name]) + 0.5})
    except VitrimError:
        return True
    return False


def _grid(
    spec: str, model: nn.Module, data: DataSpec, method: str, vary: Settings, options: dict[str, Any]
) -> list[dict[str, Any]]:
    settings = _settings(vary)
    texts = methods_of(method, vary)
    variants: dict[tuple[str, str], nn.Module] = {(spec, DENSE): variant(model, DENSE)}
    variants |= {(spec, text): variant(model, text) for text in texts}
    rows = evaluate_variants(variants, data, **options)
    return [rows[0], *({**row, **setting} for row, setting in zip(rows[1:], settings, strict=True))]


def _bayes(
    spec: str, model: nn.Module, data: DataSpec, method: str, vary: Settings, trials: int, seed: int,
    options: dict[str, Any],
) -> list[dict[str, Any]]:  # fmt: skip
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rows: list[dict[str, Any]] = []
    counts = {name for name in vary if _counts(method, vary, name)}

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        setting = {
            name: trial.suggest_int(name, int(min(values)), int(max(values)))
            if name in counts
            else trial.suggest_float(name, min(values), max(values))
            for name, values in vary.items()
        }
        text = _fill(method, setting)
        pair = {(spec, DENSE): variant(model, DENSE), (spec, text): variant(model, text)}
        found = evaluate_variants(pair, data, **options)
        if not rows:
            rows.append(found[0])
        rows.append({**found[1], **setting})
        return found[1]["accuracy"], found[1]["gmacs"]

    study = optuna.create_study(directions=["maximize", "minimize"], sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(objective, n_trials=trials)
    best = {id(rows[trial.number + 1]) for trial in study.best_trials}
    return [row if id(row) not in best else {**row, "model": f"{Path(spec).name} *"} for row in rows]
