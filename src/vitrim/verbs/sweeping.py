"""The verb that tries one method, or one recipe, at many settings."""

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ..errors import RecipeError, VitrimError
from ..options import Range
from ..variables import DATABASE
from .delivery import TRAINING_ONLY, Count, Device, TestImages, check_table, check_used, deliver, say
from .images import images_of

if TYPE_CHECKING:
    from ..measure.table import Table
    from ..study.sweep_plan import Place, Plan


def sweep(
    model: list[str],
    data: TestImages,
    vary: dict[str, list[float | str]],
    method: str | None = None,
    search: Literal["grid", "tpe", "nsga2"] = "grid",
    trials: Count = 20,
    objectives: list[Literal["accuracy", "macs", "time"]] = ["accuracy", "macs", "time"],  # noqa: B006 (never changed)
    stop_early: bool | None = None,
    seed: Annotated[int, Range(0, 10**9)] = 0,
    batch_size: Count = 128,
    device: Device = "auto",
    database: str | None = None,
    name: str | None = None,
    workers: Annotated[int, Range(1, 256)] = 1,
    runs: str | None = None,
    out: str | None = None,
) -> None:
    """Try one method, or one recipe, at many settings; with --out or --database, the same command continues.

    Args:
        model: timm names, NAME@FILE (with weights from a file), folders written by vitrim or transformers, hf:NAME, or
            run folders: the method is tried at test time. Or one recipe (.yaml), which is trained at every setting.
        data: the test images; by default those of the first model, if it is a run folder or one written by
            vitrim compress. For a recipe, they are laid over its own.
        vary: values for each name, such as '{"r_max": [0.5, 0.7], "alpha": [1, 2]}'; in a search, the lowest and the
            highest number, or texts to choose from. Of a recipe any option, such as optim.lr, and names in its
            reduction.
        method: a reduction with names in braces, such as "TopK() @ PowerLaw({r_max}, {alpha})"; of a recipe, in place
            of its own.
        search: "grid" tries all; "tpe" (Bayesian) and "nsga2" (evolution of a population) search the frontier of the
            objectives with a number of trials.
        trials: number of settings that a search tries for each model.
        objectives: what the frontier is made of; "time" is measured in interleaved rounds with the dense network.
        stop_early: end trials that can hardly reach the frontier; by default in a search, not in a grid.
        seed: seed of the search.
        batch_size: images at a time.
        device: where to run.
        database: URL of a database for the trials, such as postgresql://USER:PASSWORD@HOST/NAME, which all processes
            and machines with the same command share. Without it, VITRIM_DATABASE, or else the SQLite file OUT.db.
            optuna-dashboard opens it.
        name: name of the sweep in the database; by default the method.
        workers: processes to start here; they share the trials.
        runs: folder for the runs of a recipe; by default OUT.runs.
        out: file to write the table to (.md, .csv, .json or .html).
    """
    check_table(out)
    from ..study.sweep_plan import Place, Plan
    from ..study.sweep_recipe import is_recipe

    recipe = any(map(is_recipe, model))
    runs = runs or (f"{out}.runs" if out is not None else None)
    if recipe and len(model) > 1:
        raise RecipeError(f"a recipe is swept alone; name {model[0]} or the others")
    if recipe and runs is None:
        raise RecipeError("a recipe is trained at every setting; say where to: --out TABLE or --runs FOLDER")
    if recipe and device != "auto":
        raise RecipeError("a recipe is trained on the best device there is; leave --device out")
    if not recipe:
        check_used("sweep", data, TRAINING_ONLY, "the test images")
    if not recipe and method is None:
        raise VitrimError("missing: --method, a reduction with names in braces such as 'TopK() @ KeepRate({r})'")
    plan = Plan(search, trials, objectives, stop_early, seed)
    plan.check()
    place = _database(database, out)
    if workers > 1 and place is None:
        raise VitrimError("workers share their trials in a database; add --out TABLE or --database URL")
    options = {"method": method, "vary": vary, "name": name, "batch_size": batch_size, "device": device}
    words = _words(model, data, plan, {**options, "runs": runs if recipe else None})
    with _helpers(workers, words, out, place):
        kept = Place(place, name, lambda line: say(line, error=True))
        table = _run(model, data, vary, method, plan, kept, batch_size, device, runs if recipe else None)
    deliver(table, out)


def _run(
    model: list[str], data: dict[str, Any], vary: dict[str, Any], method: str | None, plan: "Plan", place: "Place",
    batch_size: int, device: str, runs: str | None,
) -> "Table":  # fmt: skip
    """Try the settings, together with other workers."""
    from ..study.interruption import stopping_on_sigterm
    from ..study.sweep import sweep as at_test_time
    from ..study.sweep_recipe import sweep_recipe

    with stopping_on_sigterm("this point of the sweep"):
        if runs is not None:
            return sweep_recipe(
                model[0], vary, runs, plan, place, method=method, data=data, batch_size=batch_size
            )  # fmt: skip
        images = images_of(model, data)
        return at_test_time(model, images, method or "", vary, plan, place, batch_size=batch_size, device=device)


def _database(given: str | None, out: str | None) -> str | None:
    """Where trials are kept; None for memory."""
    if url := given or os.environ.get(DATABASE):
        return url
    if out is None:
        return None
    from ..study.database_url import file_url

    Path(out).parent.mkdir(parents=True, exist_ok=True)
    return file_url(f"{out}.db")


def _helpers(number: int, words: list[str], out: str | None, database: str | None) -> Any:
    """Further processes for the same trials, which print their tables to files."""
    from ..study.local_workers import processes

    if number == 1 or database is None:
        return nullcontext()
    return processes(number, words, Path(f"{out or 'sweep'}.worker"), database)


def _words(model: list[str], data: dict[str, Any], plan: "Plan", options: dict[str, Any]) -> list[str]:
    """The command for a further worker, which writes no table."""
    given = {**options, **{f"data.{one}": value for one, value in data.items()}}
    given |= {"search": plan.search, "trials": plan.trials, "stop_early": plan.stops, "seed": plan.seed}
    words = ["sweep", *model]
    for one, value in given.items():
        words += [] if value is None else [f"--{one}", value if isinstance(value, str) else json.dumps(value)]
    return [*words, "--objectives", *plan.objectives]
