"""How much of a search is done, and how long the rest takes, in units of one image in the given model."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..heartbeat import heartbeat

EVERY = 15.0
"""Seconds between two lines."""


class Progress:
    """Counts work that is done and work that is planned.

    Args:
        total: units of work in all, as far as they are known.
        say: called with lines for the user.
        clock: seconds.
    """

    def __init__(self, total: float, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.done, self._say, self._clock = total, 0.0, say, clock
        self._start = self._last = clock()

    def line(self, text: str) -> None:
        """A line that is always shown."""
        self._say(text)

    @contextmanager
    def step(self, text: str, units: float = 0.0) -> Iterator[None]:
        """A line about a step that cannot count its work; while it lasts, lines say from time to time that it does.

        Args:
            text: the line.
            units: about how much work it is; counted as done at its end.
        """
        self.line(text)
        start, left = self._clock(), self.left()

        def say(line: str) -> None:
            rest = left - (self._clock() - start)
            self._say(f"{line}, about {duration(rest)} left" if rest > 0 else line)

        with heartbeat(text, say):
            yield
        self.done += units
        self.total = max(self.total, self.done)

    def add(self, units: float, what: str) -> None:
        """Count work as done; a line about it at most every `EVERY` seconds."""
        self.done += units
        self.total = max(self.total, self.done)
        now = self._clock()
        if now - self._last >= EVERY:
            self._last = now
            self._say(f"{what}: {self.done / self.total:.0%} of all, {duration(self.left())} left")

    def left(self) -> float:
        """Seconds that the rest takes at the speed so far."""
        spent = self._clock() - self._start
        return spent * (self.total - self.done) / self.done if self.done else 0.0


def duration(seconds: float) -> str:
    """A length of time in words.

    >>> duration(75)
    '1 min 15 s'
    """
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"
