"""The trials of a sweep: an optuna study in a database, which optuna-dashboard opens, shared by workers.

Of two workers none repeats a setting: one at a time looks at all trials, and adds the next one. A trial belongs to the
worker that holds its lease. Where a worker has died, another one takes its trial over, under the same number.
"""

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from threading import Event
from typing import Any, Protocol, TypeVar
from uuid import uuid4

import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from ..errors import RecipeError, VitrimError
from .leases import GRACE, Leases, cannot_be_used
from .objectives import OBJECTIVES, Direction
from .proposals import Proposal
from .space import Space
from .trial_database import check_settings, open_storage

T = TypeVar("T")
SETTINGS, CLAIM, WHY = "sweep", "claim", "why"
"""Attributes: what decides the result of a sweep; which request made a trial; why a trial has no accuracy."""
POLL_SECONDS = 1.0
"""Between two looks at what the other workers do."""
_SOON = 0.05


class Trials:
    """The trials of one model.

    Args:
        database: URL; None keeps them in memory, for one worker.
        name: of the study in the database.
        objectives: names in `OBJECTIVES`.
        settings: everything that decides the result, as plain data. A study of other settings is refused.
        space: what is varied.
        report: called with a line when the database does not answer.
        grace: seconds without a sign of life after which a worker counts as dead.

    Raises:
        RecipeError: the database has a study of this name that is another sweep's.
        VitrimError: the database cannot be used.
    """

    def __init__(
        self, database: str | None, name: str, objectives: Sequence[str], settings: Mapping[str, Any], space: Space,
        report: Callable[[str], None] = lambda line: None, grace: float = GRACE,
    ) -> None:  # fmt: skip
        if len(name) > 250:
            raise RecipeError(f"the name {name[:40]}... of the sweep is too long; give --name with 250 letters at most")
        self.name, self.objectives, self.space = name, [*objectives], space
        identity = sha256(name.encode()).hexdigest()[:32]
        self._leases: _Leases = _Alone() if database is None else Leases(database, identity, grace, report)
        with self._alone("open"):
            self._storage = self._ask(lambda: open_storage(database, self._leases.place))
            self._study = self._ask(lambda: self._opened(json.loads(json.dumps(settings))))

    def all(self) -> list[FrozenTrial]:
        """All trials, by number."""
        return self._ask(lambda: self._study.get_trials(deepcopy=False))

    def best(self) -> set[int]:
        """Numbers of the trials that no other one beats in everything."""
        return {trial.number for trial in self._ask(lambda: self._study.best_trials)}

    def once(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What one of the workers makes, and all of them use."""
        while (found := self._ask(lambda: self._study.user_attrs).get(key)) is None:
            if not self._leases.acquire(key):
                time.sleep(POLL_SECONDS)
                continue
            with self._leases.held(key):
                if key not in self._ask(lambda: self._study.user_attrs):
                    made = make()
                    self._ask(lambda: self._study.set_user_attr(key, made))  # noqa: B023
        return found

    def claim(self, propose: Callable[[Sequence[FrozenTrial]], Proposal | None]) -> FrozenTrial | None:
        """The next trial of this worker: one whose worker has died, or a new one; None where all are finished."""
        while True:
            with self._alone("next"):
                trials = self.all()
                for trial in trials:
                    if trial.state == TrialState.RUNNING and self._take_over(trial):
                        return trial
                if (proposal := propose(trials)) is not None:
                    trial = self._added(proposal)
                    if self._leases.acquire(_lease(trial)):
                        return trial
            if all(trial.state.is_finished() for trial in trials):
                return None
            time.sleep(POLL_SECONDS)

    @contextmanager
    def held(self, trial: FrozenTrial) -> Iterator[Event]:
        """Work on a claimed trial within this context; whatever ends it, the trial can be claimed again.

        The event is set once the lease is lost, so that another worker may have taken the trial over.
        """
        with self._leases.held(_lease(trial)) as self._lost:
            yield self._lost

    def finish(self, trial: FrozenTrial, row: Mapping[str, Any]) -> None:
        """Keep the figures of a trial."""
        values = [OBJECTIVES[name].value(row) for name in self.objectives]
        self._close(trial, row, TrialState.COMPLETE, values)

    def stop(self, trial: FrozenTrial, row: Mapping[str, Any], why: str) -> None:
        """Keep what is known of a trial that was stopped early."""
        self._close(trial, {**row, WHY: why}, TrialState.PRUNED, None)

    def fail(self, trial: FrozenTrial, why: str) -> None:
        """Keep that a trial has no result."""
        self._close(trial, {WHY: why}, TrialState.FAIL, None)

    def _close(
        self, trial: FrozenTrial, row: Mapping[str, Any], state: TrialState, values: list[float] | None
    ) -> None:  # fmt: skip
        if self._lost.is_set() and not self._leases.acquire(_lease(trial)):
            return  # This worker gave no sign of life for so long that another one has taken the trial over.

        def write() -> None:
            for key, value in row.items():
                self._storage.set_trial_user_attr(trial._trial_id, key, value)
            self._storage.set_trial_state_values(trial._trial_id, state, values)

        if not self._current(trial).state.is_finished():
            self._ask(write)

    def _current(self, trial: FrozenTrial) -> FrozenTrial:
        return self._ask(lambda: self._storage.get_trial(trial._trial_id))

    def _take_over(self, trial: FrozenTrial) -> bool:
        if not self._leases.acquire(_lease(trial)):
            return False
        if self._current(trial).state == TrialState.RUNNING:
            return True
        self._leases.release(_lease(trial))  # Its worker has finished it in the meantime.
        return False

    def _added(self, proposal: Proposal) -> FrozenTrial:
        claim = uuid4().hex
        template = optuna.trial.create_trial(
            state=TrialState.RUNNING, params=self.space.typed(proposal.setting),
            distributions={**self.space.distributions}, user_attrs={CLAIM: claim}, system_attrs=proposal.memory,
        )  # fmt: skip

        def mine() -> FrozenTrial | None:
            return next((one for one in self._study.get_trials(False) if one.user_attrs.get(CLAIM) == claim), None)

        def add() -> FrozenTrial:
            if (before := mine()) is not None:  # Made by an earlier request whose answer was lost.
                return before
            self._study.add_trial(template)
            made = mine()
            assert made is not None
            return made

        return self._ask(add)

    def _opened(self, settings: Mapping[str, Any]) -> optuna.Study:
        """The study of this name, made where there is none."""
        directions: list[Direction] = [OBJECTIVES[name].direction for name in self.objectives]
        known = {one.study_name for one in self._storage.get_all_studies()}
        if self.name not in known:
            study = optuna.create_study(storage=self._storage, study_name=self.name, directions=directions)
        else:
            study = optuna.load_study(storage=self._storage, study_name=self.name)
            if study.user_attrs.get(SETTINGS) is not None or study.get_trials(False):
                check_settings(self.name, study.user_attrs.get(SETTINGS), settings)
                return study
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([OBJECTIVES[name].label for name in self.objectives])
        study.set_user_attr(SETTINGS, settings)
        return study

    @contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        """Within this context no other worker does the same."""
        while not self._leases.acquire(what):
            time.sleep(_SOON)
        with self._leases.held(what):
            yield

    def _ask(self, request: Callable[[], T]) -> T:
        """What the database answers; it is asked again while it does not."""
        return self._leases.repeat_until_answered(lambda: self._asked(request))

    def _asked(self, request: Callable[[], T]) -> T:
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.CRITICAL)
        try:
            return request()
        except optuna.exceptions.StorageInternalError as error:
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            raise cannot_be_used(self._leases.place, cause) from None
        except SQLAlchemyError as error:
            raise cannot_be_used(self._leases.place, error) from None
        except (KeyError, optuna.exceptions.OptunaError) as error:
            reason = next(iter(str(error).strip("'\"").splitlines()), type(error).__name__)
            raise VitrimError(f"the database {self._leases.place} lost the sweep {self.name!r} ({reason})") from None
        finally:
            optuna.logging.set_verbosity(verbosity)


class _Leases(Protocol):
    place: str

    def acquire(self, run: str) -> bool: ...
    def release(self, run: str) -> None: ...
    def held(self, run: str) -> Any: ...
    def repeat_until_answered(self, request: Callable[[], T]) -> T: ...


class _Alone:
    """The leases of the only worker."""

    place = "memory"

    def acquire(self, run: str) -> bool:
        return True

    def release(self, run: str) -> None:
        pass

    @contextmanager
    def held(self, run: str) -> Iterator[Event]:
        yield Event()

    def repeat_until_answered(self, request: Callable[[], T]) -> T:
        return request()


def _lease(trial: FrozenTrial) -> str:
    return f"trial-{trial.number}"
