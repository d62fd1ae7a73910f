"""How a sweep looks for settings, and where it keeps its trials."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ScheduleError
from .leases import GRACE
from .objectives import OBJECTIVES, Direction, check_objectives
from .proposals import Search
from .template import Settings


@dataclass(frozen=True)
class Plan:
    """How settings are chosen.

    search: "grid" tries every combination; "tpe" (Bayesian) and "nsga2" (evolution of a population) try `trials`
        settings that optuna's sampler proposes. trials: of a search, for each model. objectives: what the frontier is
        made of, names in `OBJECTIVES`. stop_early: end trials that can hardly reach the frontier, see `hopeless`; by
        default in searches only. seed: of the sampler.
    """

    search: Search = "grid"
    trials: int = 20
    objectives: Sequence[str] = tuple(OBJECTIVES)
    stop_early: bool | None = None
    seed: int = 0

    def check(self) -> None:
        """Raise `ScheduleError` for a number of trials below 1, or for objectives without a frontier."""
        if self.trials < 1:
            raise ScheduleError(f"trials is 1 or more, not {self.trials}")
        check_objectives(self.objectives)

    @property
    def stops(self) -> bool:
        """Whether trials are stopped early."""
        return self.search != "grid" if self.stop_early is None else self.stop_early

    @property
    def directions(self) -> list[Direction]:
        """Of the objectives."""
        return [OBJECTIVES[name].direction for name in self.objectives]

    def settings(self, vary: Settings) -> Mapping[str, Any]:
        """What decides which settings are tried, as plain data."""
        return {
            "vary": {name: list(values) for name, values in vary.items()}, "search": self.search,
            "seed": None if self.search == "grid" else self.seed, "objectives": [*self.objectives],
            "stop_early": self.stops,
        }  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where trials are kept.

    database: URL of a database; calls with the same arguments share its trials, at once or one after another. None
        keeps them in memory. name: of the sweep in the database, by default the method. say: called with a line for
        each trial, and when the database does not answer. grace: seconds without a sign of life after which a worker
        counts as dead, and for which a database may be away.
    """

    database: str | None = None
    name: str | None = None
    say: Callable[[str], None] = lambda line: None
    grace: float = GRACE
