"""A study: rows x seeds under one recipe, each row tested under several methods, tabulated with mean and deviation.

A study file holds `title`, `base` (recipe options), `rows` (name: changes), `test` (name: method), `seeds`, optionally
`sweep` (method, vary), `published` (figures to print beside) and `scales`, whose entries are laid over all of it.
`{row:NAME}` in an option is the model that the row of that name has learnt with the same seed: a teacher, or weights to
start from. Rows without a classifier serve others in this way and are in no table.
"""

import re
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import product
from pathlib import Path
from typing import Any

from ..distill import Terms
from ..errors import RecipeError, UnknownNameError
from ..measure.environment import environment
from ..measure.table import Column, Table
from ..models import DENSE, OWN, open_model, variant
from ..models.variants import DENSE_CLS_ONLY
from ..output import check_folder
from ..tokens import Reduction
from ..train.checkpoint import RunFolder, write_atomic
from ..train.loop import train
from ..train.recipe import Recipe, flatten, merge, read_yaml
from .compare import CLS_ONLY, figures_of
from .sweep import check_sweep, sweep

Report = Callable[[str, Mapping[str, Any]], None]
_ROW = re.compile(r"\{row:([^{}]+)\}")
_PARTS = {"title", "base", "rows", "test", "seeds", "sweep", "published", "scales"}

COLUMNS = (
    Column("row", "model"),
    Column("test", "at test"),
    Column("accuracy", "accuracy", ".2%"),
    Column("accuracy_std", "std", ".2%"),
    Column("n", "n", "d"),
    Column("published", "published", ".2%"),
    Column("entropy", "entropy if correct", ".3f"),
    Column("seconds", "test time [s]", ".2f"),
    Column("speed", "speed ratio", ".2f"),
    Column("gmacs", "GMACs", ".4f"),
    Column("macs_ratio", "MACs ratio", ".2f"),
    Column("images_per_second", "images/s", ".0f"),
    Column("train_seconds", "training [s]", ".0f"),
    Column("tokens", "tokens leaving each block"),
)


@dataclass(frozen=True)
class Study:
    """A study file at one scale."""

    title: str
    base: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    test: dict[str, str]
    seeds: list[int]
    sweep: dict[str, Any] | None
    published: dict[str, dict[str, float]]

    @classmethod
    def read(cls, path: str | Path, scale: str, root: str | None = None) -> "Study":
        """Read a study file; `root` takes the place of its image folder."""
        data = read_yaml(path)
        for name in data:
            if name not in _PARTS:
                raise UnknownNameError("part of a study", str(name), _PARTS)
        scales = data.pop("scales", {})
        if scale not in scales and scale != "full":
            raise UnknownNameError("scale", scale, [*scales, "full"])
        data = merge(data, scales.get(scale) or {})
        for name in ("base", "rows"):
            if not isinstance(data.get(name), dict):
                raise RecipeError(f"{path} has no {name!r} with options in it")
        for name in (*data["rows"], *(data.get("test") or ())):
            if not isinstance(name, str):
                raise RecipeError(f"{path}: YAML reads a name as {name!r}; put names such as off, yes or 1 in quotes")
        seeds = [0] if data.get("seeds") is None else data["seeds"]
        if not isinstance(seeds, list) or not seeds or any(type(seed) is not int for seed in seeds):
            raise RecipeError(f"{path}: seeds is {seeds!r}; it must list whole numbers, such as [0, 1, 2]")
        if len(set(seeds)) < len(seeds):
            raise RecipeError(f"{path}: seeds {seeds} name a seed twice, which would count one run as two")
        if root is not None:
            data["base"] = merge(data["base"], {"data": {"root": root}})
        return cls(
            title=data.get("title", Path(path).stem),
            base=data["base"],
            rows={name: changes or {} for name, changes in data["rows"].items()},
            test=data.get("test") or {OWN: OWN},
            seeds=seeds,
            sweep=data.get("sweep"),
            published=data.get("published") or {},
        )

    def recipe(self, row: str, seed: int, out: Path) -> Recipe:
        """The recipe of one run of the study in folder `out`."""
        folder = lambda name: str(RunFolder(run_folder(out, name, seed)).model_path)  # noqa: E731
        return Recipe.from_dict(merge(_with_rows(self._options(row), folder), {"seed": seed}))

    def order(self) -> list[str]:
        """Rows in the order of training: each after those whose models it asks for.

        Raises:
            UnknownNameError: a row asks for one that is not there.
            RecipeError: rows wait for each other.
        """
        needed = {row: [name for text in self._texts(row) for name in _ROW.findall(text)] for row in self.rows}
        for names in needed.values():
            for name in names:
                if name not in self.rows:
                    raise UnknownNameError("row", name, self.rows)
        try:
            return list(TopologicalSorter(needed).static_order())
        except CycleError as error:
            raise RecipeError(f"rows of the study wait for each other: {' -> '.join(error.args[1])}") from None

    def check(self, out: Path) -> None:
        """Build every recipe and read every method, so that all mistakes are told before the first training.

        Raises:
            VitrimError: names the row or the method.
        """
        folders: dict[Path, str] = {}
        for row in self.rows:
            if row.startswith(".") or {"/", "\\"} & set(row):
                raise RecipeError(f"row {row!r} cannot be a folder; names have no slash and no dot in front")
            if (other := folders.setdefault(run_folder(out, row, 0), row)) != row:
                raise RecipeError(f"rows {other!r} and {row!r} would share a folder; name them differently")
        for row, seed in product(self.order(), self.seeds):
            recipe = self.recipe(row, seed, out)
            recipe.check()
            RunFolder(run_folder(out, row, seed)).check(recipe)
            if recipe.reduction is not None:
                Reduction.parse(recipe.reduction, recipe.phase)
            if recipe.distill is not None:
                Terms.parse(recipe.distill)
        for method in self.test.values():
            if method not in (OWN, DENSE, DENSE_CLS_ONLY):
                Reduction.parse(method)
        if self.sweep is not None:
            if missing := {"method", "vary"} - set(self.sweep):
                raise RecipeError(f"the sweep of the study has no {' and no '.join(sorted(missing))}")
            check_sweep(self.sweep["method"], self.sweep["vary"])

    def _options(self, row: str) -> dict[str, Any]:
        return merge(self.base, self.rows[row])

    def _texts(self, row: str) -> list[str]:
        return [value for value in flatten(self._options(row)).values() if isinstance(value, str)]


def run_study(
    file: str | Path,
    out: str | Path,
    *,
    scale: str = "full",
    root: str | None = None,
    command: str = "",
    report: Report | None = None,
) -> Table:
    """Train every row with every seed, then test all of them side by side; returns the table, written to `out`.

    Runs lie in `out/ROW-sSEED`. Finished ones are not repeated, interrupted ones continue.

    Raises:
        RecipeError: the study was edited under runs that are there already.
    """
    check_folder(out)
    study, out = Study.read(file, scale, root), Path(out)
    study.check(out)
    finished: dict[tuple[str, int], dict[str, Any]] = {}
    for seed in study.seeds:
        for row in study.order():
            recipe, folder = study.recipe(row, seed, out), run_folder(out, row, seed)
            finished[row, seed] = train(recipe, folder, command=command, report=report)
    found = {seed: _test(study, out, seed) for seed in study.seeds}
    table = _tabulate(study, scale, out, found, finished)
    for suffix in (".md", ".csv", ".json"):
        table.write(out / f"table{suffix}", overwrite=True)
    write_atomic(out / "command.txt", command + "\n")
    if study.sweep is not None:
        tested, seed = list(dict.fromkeys(row["row"] for row in table.rows)), study.seeds[0]
        models, data = [str(run_folder(out, row, seed)) for row in tested], study.recipe(tested[0], seed, out).data
        swept = sweep(models, data, study.sweep["method"], study.sweep["vary"])
        for suffix in (".md", ".csv", ".json"):
            swept.write(out / f"sweep{suffix}", overwrite=True)
    return table


def run_folder(out: Path, row: str, seed: int) -> Path:
    """Where the run of a row and seed lies."""
    return out / f"{row.replace(' ', '-')}-s{seed}"


def _test(study: Study, out: Path, seed: int) -> dict[tuple[str, str], dict[str, Any]]:
    """Figures of all rows under all methods, one seed, side by side."""
    opened = {row: open_model(str(run_folder(out, row, seed))) for row in study.rows}
    models = {row: model for row, model in opened.items() if model.num_classes}
    if not models:
        raise RecipeError("no row of the study learns classes, so there is nothing to test")
    pairs = [(row, test) for row in models for test in study.test]
    variants = {(row, test): variant(models[row], study.test[test]) for row, test in pairs}
    recipe = study.recipe(next(iter(models)), seed, out)
    rows = figures_of(variants, recipe.data, batch_size=recipe.batch_size)
    return dict(zip(pairs, rows, strict=True))


def _tabulate(
    study: Study, scale: str, out: Path, found: dict[int, dict[tuple[str, str], dict[str, Any]]],
    finished: dict[tuple[str, int], dict[str, Any]],
) -> Table:  # fmt: skip
    rows: list[dict[str, Any]] = []
    for row, test in found[study.seeds[0]]:
        per_seed = [found[seed][row, test] for seed in study.seeds]
        accuracies = [figures["accuracy"] for figures in per_seed]
        entropies = [figures["entropy"] for figures in per_seed if figures["entropy"] is not None]
        numbers = ("seconds", "speed", "images_per_second", "gmacs", "macs_ratio")
        rows.append({
            "row": row,
            "test": test,
            "accuracy": statistics.fmean(accuracies),
            "accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
            "n": len(accuracies),
            "published": study.published.get(f"{row}, {test}", {}).get("accuracy"),
            "entropy": statistics.fmean(entropies) if entropies else None,
            **{name: statistics.fmean(figures[name] for figures in per_seed) for name in numbers},
            "train_seconds": statistics.fmean(finished[row, seed]["train_seconds"] for seed in study.seeds),
            "tokens": per_seed[0]["tokens"],
        })  # fmt: skip
    lengths = [study.recipe(row["row"], study.seeds[0], out).epochs for row in rows]
    epochs = " to ".join(map(str, sorted({min(lengths), max(lengths)})))
    result = finished[rows[0]["row"], study.seeds[0]]
    notes = [
        f"Scale {scale}: {epochs} epochs on {result['train_images']} images "
        f"({result['test_images']} test images), {len(study.seeds)} seed{'s' if len(study.seeds) > 1 else ''}. "
        "The epoch is chosen on held-out training images; test images are read once.",
        "Test time is spent inside the model; all rows took turns batch by batch. Ratios are to the first row.",
        CLS_ONLY,
    ]
    return Table(study.title, COLUMNS, rows, notes=notes, environment=environment())


def _with_rows(options: Any, folder: Callable[[str], str]) -> Any:
    """Options with the model folder in place of each `{row:NAME}`."""
    if isinstance(options, dict):
        return {name: _with_rows(value, folder) for name, value in options.items()}
    return _ROW.sub(lambda found: folder(found[1]), options) if isinstance(options, str) else options
