"""Trials that are stopped before they have seen all images or epochs, because they can hardly reach the frontier.

optuna prunes trials of one objective only. Here a trial is hopeless if another network costs no more in anything that
was asked for, and is more accurate than this one can be expected to become: the 99.9 % interval of its accuracy on the
images that it has seen lies below the accuracy of the other. Of two that are trained, the intervals after the same
epoch are compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Event

from scipy import stats

from ..train.stopping import RunAbandoned

LEVEL = 0.999
"""Of the intervals: they are looked at after every batch, so that they must be right more often than once in twenty."""
LEAST = 32
"""Images before which nothing is said."""


class Hopeless(Exception):
    """A trial that is stopped; its text is the reason."""


@dataclass(frozen=True)
class Rival:
    """A network that another one must not be worse than.

    name: what it is called in a reason. costs: everything that is to be small. accuracy: a fraction. history: accuracy
    on held-out images after each epoch, where it was trained.
    """

    name: str
    costs: tuple[float, ...]
    accuracy: float
    history: Sequence[float] = ()


@dataclass(frozen=True)
class Watch:
    """Stops a trial that is dominated.

    costs: of the trial. rivals: the networks that are finished. lost: set once another worker has the trial.
    """

    costs: tuple[float, ...]
    rivals: Sequence[Rival]
    lost: Event = field(default_factory=Event)

    def check_lease(self) -> None:
        """Raise `RunAbandoned` where this worker gave no sign of life for so long that another one has taken over."""
        if self.lost.is_set():
            raise RunAbandoned

    def check(self, hits: int, seen: int, of: int) -> None:
        """Look at a trial after so many right answers (`hits`) on so many images (`seen`), drawn at random `of` all.

        Raises:
            Hopeless: another network costs no more and is more accurate.
            RunAbandoned: see `check_lease`.
        """
        self.check_lease()
        if LEAST <= seen < of:
            high = _interval(hits, seen)[1]
            self._compare(high, f"{hits / seen:.1%} on {seen} images", [one.accuracy for one in self.rivals])

    def check_epoch(self, epoch: int, accuracy: float, images: int) -> None:
        """Look at a trial after an epoch, counted from 0, by its accuracy on so many held-out images.

        Raises:
            Hopeless: another network costs no more and was more accurate after the same epoch.
        """
        if images >= LEAST:
            high = _interval(round(accuracy * images), images)[1]
            before = [one.history[epoch] if epoch < len(one.history) else 0.0 for one in self.rivals]
            lows = [_interval(round(found * images), images)[0] for found in before]
            self._compare(high, f"{accuracy:.1%} after epoch {epoch + 1}", lows)

    def _compare(self, high: float, found: str, others: Sequence[float]) -> None:
        for rival, other in zip(self.rivals, others, strict=True):
            if other > high and all(a <= b for a, b in zip(rival.costs, self.costs, strict=True)):
                raise Hopeless(
                    f"accuracy {found}, at most {high:.1%} to be expected; {rival.name} costs no more and has "
                    f"{other:.1%} or more"
                )


def _interval(hits: int, number: int) -> tuple[float, float]:
    found = stats.binomtest(hits, number).proportion_ci(LEVEL, method="wilson")
    return float(found.low), float(found.high)
