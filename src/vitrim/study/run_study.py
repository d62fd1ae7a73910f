"""Carrying a study out: every run trained, then all tested side by side and tabulated with mean and deviation."""

import statistics
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..measure.environment import environment
from ..measure.table import Column, Table
from ..models import open_model, variant
from ..train.checkpoint import RunFolder, write_atomic
from ..train.loop import train
from ..train.state import Report
from .compare import CLS_ONLY_NOTE, different_images_note, evaluate_variants, mean_over_seeds
from .curve_points import measure_curve
from .leases import GRACE
from .published import add_published_columns
from .study import Study, run_folder
from .study_check import check_study
from .study_folder import check_study_folder, mark_folder
from .sweep import sweep
from .workers import join_study, run_once, train_shared

_TABULATED = ".tabulated"

COLUMNS = (
    Column("row", "model"),
    Column("test", "at test"),
    Column("accuracy", "accuracy", ".2%"),
    Column("accuracy_std", "std", ".2%"),
    Column("n", "n", "d"),
    Column("entropy", "entropy if correct", ".3f"),
    Column("seconds", "test time [s]", ".2f"),
    Column("speed", "speed ratio", ".2f"),
    Column("gmacs", "GMACs", ".4f"),
    Column("macs_ratio", "MACs ratio", ".2f"),
    Column("params", "parameters", ",d"),
    Column("images_per_second", "images/s", ".0f"),
    Column("train_seconds", "training [s]", ".0f"),
    Column("tokens", "tokens leaving each block"),
)


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
    """Train every row with every seed, then test all of them side by side; returns the table, written to `out`.

    Runs lie in `out/ROW-sSEED`. Finished ones are not repeated, interrupted ones continue.

    Args:
        file: the study file.
        out: the study folder.
        scale: one of the file's.
        root: folder of the images, in place of the file's.
        database: URL of the database in which several workers, called alike, claim runs; they share the folder too.
        grace: seconds without a sign of life after which a worker counts as dead.
        command: what the user typed, for the record.
        report: called as training goes on.

    Raises:
        RecipeError: the study was edited under runs that are there already, or the folder holds something else.
        BusyError: another process, which is no worker of this study, is at one of the runs.
        VitrimError: the database cannot be used.
    """
    check_study_folder(out)
    study, out = Study.read(file, scale, root), Path(out)
    check_study(study, out)
    leases = join_study(database, out, grace) if database is not None else None
    if leases is None:
        mark_folder(out)
    else:
        train_shared(study, out, leases, command=command, report=report)
    finished: dict[tuple[str, int], dict[str, Any]] = {}
    for seed in study.seeds:
        for row in study.order():
            recipe, folder = study.recipe(row, seed, out), run_folder(out, row, seed)
            if report is not None and RunFolder(folder).result is None:
                report("run", {"name": folder.name})
            finished[row, seed] = train(recipe, folder, command=command, report=report)
    state, written = _state(study, scale, finished), out / _TABULATED
    if leases is None:
        return _write_tables(study, scale, out, finished, command, state)
    done = lambda: (out / "table.json").exists() and written.exists() and written.read_text() == state  # noqa: E731
    run_once(leases, "table", done, lambda: _write_tables(study, scale, out, finished, command, state))
    return Table.read(out / "table.json")


def _write_tables(
    study: Study, scale: str, out: Path, finished: dict[tuple[str, int], dict[str, Any]], command: str, state: str
) -> Table:
    """Test what was learnt, and write all tables of the study."""
    found = {seed: _test(study, out, seed) for seed in study.seeds}
    table = _tabulate(study, scale, out, found, finished)
    table.write_all(out / "table")
    write_atomic(out / "command.txt", command + "\n")
    if study.sweep is not None:
        seed = study.seeds[0]
        tested = {run_folder(out, row, seed): row for row in dict.fromkeys(row["row"] for row in table.rows)}
        data = {str(folder): study.recipe(row, seed, out).data for folder, row in tested.items()}
        swept = sweep([*data], data, study.sweep.method or "", study.sweep.vary)
        study.sweep.add_published(swept, {folder.name: row for folder, row in tested.items()}).write_all(out / "sweep")
    if study.curve is not None:
        first = study.recipe(next(iter(study.rows)), study.seeds[0], out)
        data = {row: study.recipe(row, study.seeds[0], out).data for row in study.rows}
        runs = {seed: {row: run_folder(out, row, seed) for row in study.rows} for seed in study.seeds}
        longer = _trained_on(study, out)
        curve = measure_curve(study.curve, study.title, runs, data, trained_on=longer, batch_size=first.batch_size)
        curve.write_all(out / "curve")
    write_atomic(out / _TABULATED, state)
    return table


def _trained_on(study: Study, out: Path) -> list[str]:
    """Rows whose networks start from those of other rows."""
    seed = study.seeds[0]
    models = {str(RunFolder(run_folder(out, row, seed)).model_path) for row in study.rows}
    starts = {row: study.recipe(row, seed, out).model for row in study.rows}
    return [row for row, spec in starts.items() if models & {spec.name, spec.checkpoint}]


def _state(study: Study, scale: str, finished: dict[tuple[str, int], dict[str, Any]]) -> str:
    """What the tables follow from, in short, so that workers can tell whether they are written."""
    return sha256(repr((study, scale, list(finished.values()))).encode()).hexdigest()


def _test(study: Study, out: Path, seed: int) -> dict[tuple[str, str], dict[str, Any]]:
    """Figures of all rows under all methods, one seed, side by side."""
    opened = {row: open_model(str(run_folder(out, row, seed))) for row in study.rows}
    models = {row: model for row, model in opened.items() if model.num_classes}
    pairs = [(row, test) for row in models for test in study.test]
    variants = {(row, test): variant(models[row], study.test[test]) for row, test in pairs}
    recipes = {row: study.recipe(row, seed, out) for row in models}
    data = {row: recipe.data for row, recipe in recipes.items()}
    rows = evaluate_variants(variants, data, batch_size=next(iter(recipes.values())).batch_size)
    return dict(zip(pairs, rows, strict=True))


def _tabulate(
    study: Study, scale: str, out: Path, found: dict[int, dict[tuple[str, str], dict[str, Any]]],
    finished: dict[tuple[str, int], dict[str, Any]],
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
        f"Scale {scale}: {_span(recipe.epochs for recipe in recipes.values())} epochs on "
        f"{_span(result['train_images'] for result in results)} images "
        f"({_span(result['test_images'] for result in results)} test images), "
        f"{len(study.seeds)} seed{'s' if len(study.seeds) > 1 else ''}. "
        "The epoch is chosen on held-out training images; test images are read once.",
        "Test time is spent inside the model; rows took turns batch by batch. Ratios are to the first row.",
        CLS_ONLY_NOTE,
        *different_images_note({row: recipe.data for row, recipe in recipes.items()}),
    ]
    table = Table(study.title, COLUMNS, rows, notes=notes, environment=environment())
    return add_published_columns(table, [study.published.get(f"{row['row']}, {row['test']}") for row in rows])


def _span(numbers: Iterable[int]) -> str:
    """The lowest and the highest of some numbers, or the one that all of them are."""
    known = sorted(set(numbers))
    return " to ".join(map(str, dict.fromkeys((known[0], known[-1]))))
