"""The work on the trials of a sweep, and the rows that they become."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from ..errors import BusyError, DivergedError
from ..train.stopping import RunAbandoned
from .compare import Row
from .hopeless import Hopeless, Rival, Watch
from .in_training import HISTORY
from .objectives import costs_of
from .proposals import Proposer
from .space import Space, key_of
from .subject import Subject
from .sweep_plan import Place, Plan
from .trials import CLAIM, POLL_SECONDS, WHY, Trials

_STATES = {TrialState.PRUNED: " (stopped)", TrialState.FAIL: " (failed)"}


def swept(subject: Subject, space: Space, plan: Plan, place: Place, name: str) -> list[Row]:
    """Try settings until all have been tried, together with other workers; the rows of all trials.

    Raises:
        RecipeError: the database has another sweep of this name.
        VitrimError: the database does not answer any more, or a network cannot be changed like that.
    """
    settings = {**subject.identity(), **plan.settings(space.vary)}
    kept = Trials(place.database, name, plan.objectives, settings, space, place.say, place.grace)
    reference = kept.once("reference", subject.reference)
    propose = Proposer(plan.search, space, plan.directions, plan.trials, plan.seed)
    while (trial := kept.claim(propose)) is not None:
        with kept.held(trial) as lost:
            row = subject.cost(trial.params)
            rivals = _rivals(kept, plan, reference) if plan.stops else ()
            watch = Watch(costs_of(row, plan.objectives), rivals, lost)
            found = _work(kept, subject, trial, row, watch)
        place.say(f"{subject.name}, trial {trial.number + 1} of {propose.most}: {found}")
    return [*([{"model": subject.name, **reference}] if reference else []), *_rows(kept, subject, propose)]


def notes_of(rows: Sequence[Row]) -> list[str]:
    """What a reader must know of marked rows."""
    counts = {mark: sum(str(row["model"]).endswith(mark) for row in rows) for mark in (" *", *_STATES.values())}
    notes = ["*: no other setting beats it in everything that was looked for."] if counts[" *"] else []
    if number := counts[" (stopped)"]:
        notes.append(f"Stopped before the end, since another network costs no more and is more accurate: {number}.")
    if number := counts[" (failed)"]:
        notes.append(f"Failed, since the loss, the weights or the outputs were not finite: {number}.")
    return notes


def _work(kept: Trials, subject: Subject, trial: FrozenTrial, row: Row, watch: Watch) -> str:
    """Carry a trial out, keep what was found, and say it in a line."""
    setting = ", ".join(f"{name} {v if isinstance(v, str) else format(v, '.4g')}" for name, v in trial.params.items())
    try:
        row |= subject.accuracy(trial.params, watch)
    except Hopeless as why:
        kept.stop(trial, row, str(why))
        return f"{setting}: stopped early, {why}"
    except DivergedError as error:
        kept.fail(trial, str(error))
        return f"{setting}: failed, {error}"
    except (RunAbandoned, BusyError) as error:
        time.sleep(POLL_SECONDS)
        return f"{setting}: left to the other worker that is at it{f' ({error})' if str(error) else ''}"
    kept.finish(trial, row)
    return f"{setting}: accuracy {row['accuracy']:.2%}, {row['gmacs']:.4f} GMACs, speed ratio {row['speed']:.2f}"


def _rivals(kept: Trials, plan: Plan, reference: Row) -> list[Rival]:
    """The networks that are finished."""
    found = [("the dense network", reference)] if reference else []
    found += [(f"trial {t.number}", t.user_attrs) for t in kept.all() if t.state == TrialState.COMPLETE]
    return [Rival(name, costs_of(row, plan.objectives), row["accuracy"], row.get(HISTORY, ())) for name, row in found]


def _rows(kept: Trials, subject: Subject, propose: Proposer) -> list[Row]:
    """The rows of all trials: of a grid in its order, else by number; marked where there is something to say."""
    trials, best = kept.all(), kept.best() if propose.search != "grid" else set[int]()
    if propose.search == "grid":
        place = {key_of(setting): number for number, setting in enumerate(propose.grid)}
        trials = sorted(trials, key=lambda trial: place.get(key_of(trial.params), len(place)))
    return [
        {**_figures(trial.user_attrs), **trial.params, "model": subject.name + _mark(trial, best)} for trial in trials
    ]


def _figures(attributes: Mapping[str, Any]) -> Row:
    return {key: value for key, value in attributes.items() if key not in (CLAIM, WHY, HISTORY)}


def _mark(trial: FrozenTrial, best: set[int]) -> str:
    return " *" if trial.number in best else _STATES.get(trial.state, "")
