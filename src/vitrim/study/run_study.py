"""Run a study: train every run, then test all of them together and tabulate mean and standard deviation."""

import statistics
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..data.specs import DataSpec
from ..measure.columns import columns
from ..measure.environment import environment
from ..measure.table import Table
from ..models import DENSE, num_classes, open_model, variant
from ..train.checkpoint import RunFolder, write_atomic
from ..train.loop import train
from ..train.state import Report
from .compare import CLS_ONLY_NOTE, GAIN_NOTE, different_images_note, evaluate_variants, mean_over_seeds
from .curve_points import measure_curve
from .database_url import file_url
from .interruption import stopping_on_sigterm
from .leases import GRACE
from .published import add_published_columns
from .study import Study, run_folder
from .study_check import TRIALS, check_study
from .study_folder import check_study_folder, mark_folder
from .sweep import sweep
from .sweep_plan import Place
from .workers import join_study, run_once, train_shared

_TABULATED = ".tabulated"

RunKey = tuple[str, int]
"""Row and seed."""
Figures = dict[str, Any]

COLUMNS = columns(
    "row", "test", "accuracy", "accuracy_std", "n", "gain", "entropy", "seconds", "speed", "gmacs", "macs_ratio",
    "params", "images_per_second", "train_seconds", "tokens",
)  # fmt: skip


def run_study(
    file: str | Path,
    out: str | Path,
    *,
    scale: str = "full",
    root: str | None = None,
    database: str | None = None,
    grace: float = GRACE,
    command: str = "",
    report: Report | None = None,
) -> Table:
    """Train every row with every seed, then test all of them together; returns the table, which is in `out` too.

    Each run has the folder `out/ROW-sSEED`. Finished runs are not repeated, interrupted ones continue.

    Args:
        file: the study file.
        out: the study folder.
        scale: one of the file's.
        root: folder of the images, in place of the file's.
        database: URL of a database through which workers with the same arguments share the runs; and the folder.
        grace: seconds without a heartbeat after which a worker counts as dead.
        command: what the user typed; written to the folders.
        report: called as training goes on.

    Raises:
        RecipeError: the study was edited under runs that exist already, or the folder holds something else.
        BusyError: another process, which is not a worker of this study, is writing to one of the runs.
        VitrimError: the database cannot be used.
        Stopped: SIGTERM arrived; the same call continues.
    """
    check_study_folder(out)
    study, out, report = Study.read(file, scale, root), Path(out), report or _silent
    check_study(study, out)
    with stopping_on_sigterm():
        leases = join_study(database, out, report, grace) if database is not None else None
        if leases is None:
            mark_folder(out)
        else:
            train_shared(study, out, leases, report, command=command)
        finished: dict[RunKey, Figures] = {}
        for seed in study.seeds:
            for row in study.order():
                recipe, folder = study.recipe(row, seed, out), run_folder(out, row, seed)
                if RunFolder(folder).result is None:
                    report("run", {"name": folder.name})
                finished[row, seed] = train(recipe, folder, command=command, report=report)
        state, written = _fingerprint(study, scale, finished), out / _TABULATED
        if leases is None:
            return _write_tables(study, scale, out, finished, command, state)
        done = lambda: (out / "table.json").exists() and written.exists() and written.read_text() == state  # noqa: E731
        run_once(leases, "table", done, lambda: _write_tables(study, scale, out, finished, command, state))
        return Table.read(out / "table.json")


def _silent(event: str, figures: Mapping[str, Any]) -> None:
    """Report nothing."""


def _write_tables(
    study: Study, scale: str, out: Path, finished: dict[RunKey, Figures], command: str, state: str
) -> Table:
    """Test all models, and write all tables of the study."""
    found = {seed: _test(study, out, seed) for seed in study.seeds}
    table = _tabulate(study, scale, out, found, finished)
    table.write_all(out / "table")
    write_atomic(out / "command.txt", command + "\n")
    if study.sweep is not None:
        seed = study.seeds[0]
        tested = {run_folder(out, row, seed): row for row in dict.fromkeys(row["row"] for row in table.rows)}
        data = {str(folder): study.recipe(row, seed, out).data for folder, row in tested.items()}
        kept = out / TRIALS
        place = Place(file_url(kept))
        swept = sweep([*data], data, study.sweep.method or "", study.sweep.vary, place=place)
        names = {folder.name: row for folder, row in tested.items()}
        study.sweep.add_published(swept, names).write_all(out / "sweep")
        kept.unlink(missing_ok=True)
    if study.curve is not None:
        data = {row: study.recipe(row, study.seeds[0], out).data for row in study.rows}
        runs = {seed: {row: run_folder(out, row, seed) for row in study.rows} for seed in study.seeds}
        longer = _trained_on(study, out)
        curve = measure_curve(study.curve, study.title, runs, data, trained_on=longer)
        curve.write_all(out / "curve")
    write_atomic(out / _TABULATED, state)
    return table


def _trained_on(study: Study, out: Path) -> list[str]:
    """Rows whose networks start from those of other rows."""
    seed = study.seeds[0]
    models = {str(RunFolder(run_folder(out, row, seed)).model_path) for row in study.rows}
    starts = {row: study.recipe(row, seed, out).model for row in study.rows}
    return [row for row, spec in starts.items() if models & {spec.name, spec.checkpoint}]


def _fingerprint(study: Study, scale: str, finished: dict[RunKey, Figures]) -> str:
    """A hash of everything that the tables depend on, by which workers know whether they are written."""
    return sha256(repr((study, scale, list(finished.values()))).encode()).hexdigest()


def _test(study: Study, out: Path, seed: int) -> dict[tuple[str, str], dict[str, Any]]:
    """Figures of all rows under all methods with one seed, evaluated together."""
    opened = {row: open_model(str(run_folder(out, row, seed))) for row in study.rows}
    models = {row: model for row, model in opened.items() if num_classes(model)}
    pairs = [(row, test) for row in models for test in study.test]
    variants = {(row, test): variant(models[row], study.test[test]) for row, test in pairs}
    recipes = {row: study.recipe(row, seed, out) for row in models}
    data = {row: recipe.data for row, recipe in recipes.items()}
    rows = evaluate_variants(variants, data)
    return dict(zip(pairs, rows, strict=True))


def _tabulate(
    study: Study, scale: str, out: Path, found: dict[int, dict[tuple[str, str], dict[str, Any]]],
    finished: dict[RunKey, Figures],
) -> Table:  # fmt: skip
    rows: list[dict[str, Any]] = []
    for row, test in found[study.seeds[0]]:
        per_seed = [found[seed][row, test] for seed in study.seeds]
        entropies = [figures["entropy"] for figures in per_seed if figures["entropy"] is not None]
        rows.append({
            "row": row,
            "test": test,
            **mean_over_seeds(per_seed, "seconds", "speed", "images_per_second", "gmacs", "macs_ratio"),
            "entropy": statistics.fmean(entropies) if entropies else None,
            "params": round(statistics.fmean(figures["params"] for figures in per_seed)),
            "train_seconds": statistics.fmean(finished[row, seed]["train_seconds"] for seed in study.seeds),
            "tokens": per_seed[0]["tokens"],
        })  # fmt: skip
    recipes = {row["row"]: study.recipe(row["row"], study.seeds[0], out) for row in rows}
    results = [finished[row, study.seeds[0]] for row in recipes]
    notes = [
        f"Scale {scale}, images of {_image_sets(recipe.data for recipe in recipes.values())}: "
        f"{_span(recipe.epochs for recipe in recipes.values())} epochs on "
        f"{_span(result['train_images'] for result in results)} images "
        f"({_span(result['test_images'] for result in results)} test images), "
        f"{len(study.seeds)} seed{'s' if len(study.seeds) > 1 else ''}. "
        f"{_choice_of_epoch(recipe.data.holdout for recipe in recipes.values())}; test images are read once.",
        "Test time is that inside the model; rows were timed in turns, batch by batch. Ratios are to the first row.",
        *([GAIN_NOTE] if len(rows) > 1 else []),
        *([CLS_ONLY_NOTE] if any(study.test[row["test"]] != DENSE for row in rows) else []),
        *different_images_note({row: recipe.data for row, recipe in recipes.items()}),
    ]
    table = Table(study.title, COLUMNS, rows, notes=notes, environment=environment())
    return add_published_columns(table, [study.published.get(f"{row['row']}, {row['test']}") for row in rows])


def _image_sets(specs: Iterable[DataSpec]) -> str:
    """What the images are called, in words."""
    return " and ".join(dict.fromkeys(Path(spec.root).name if spec.root else spec.name for spec in specs))


def _choice_of_epoch(holdouts: Iterable[float]) -> str:
    """How the epoch that is tested was chosen, in words."""
    held_out = [bool(holdout) for holdout in holdouts]
    if all(held_out):
        return "The epoch is chosen on held-out training images"
    rest = "the last epoch is tested" if not any(held_out) else "in rows without any, the last epoch is tested"
    return f"The epoch is chosen on held-out training images; {rest}" if any(held_out) else rest.capitalize()


def _span(numbers: Iterable[int]) -> str:
    """The lowest and the highest of some numbers, or the one number if all are equal."""
    known = sorted(set(numbers))
    return " to ".join(map(str, dict.fromkeys((known[0], known[-1]))))
