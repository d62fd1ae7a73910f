"""Signals that ask a run to stop, and the exceptions by which it ends early."""

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Self

SAID = "stopping after this step; press Ctrl-C again to leave without saving\n"
SAME_PRESS = 0.5
"""Seconds within which a launcher may pass one Ctrl-C on that the terminal has sent as well."""


class Stopped(SystemExit):
    """The run was asked to stop and has saved its state; `code` is that of the signal, as a shell counts."""

    def __init__(self, number: int, where: str) -> None:
        super().__init__(128 + number)
        self.where, self.name = where, signal.Signals(number).name

    def __str__(self) -> str:
        return f"stopped by {self.name} at {self.where}; the state is saved, repeat the same command to continue"


class RunAbandoned(Exception):
    """A report function raises it to leave the run as it is, for example to another process."""


class StopSignals:
    """Notes SIGTERM and Ctrl-C within its context, so that the run can stop where its state is whole.

    number: the signal that has arrived, 0 if none has.

    A signal that no one has acted on by the end of the context raises `Stopped` there, also after `RunAbandoned`, so
    that a caller with more to do stops too. Other exceptions have precedence, since they end the caller as well.
    The first signal is acknowledged by a line at once; a second Ctrl-C raises `KeyboardInterrupt` where it arrives.
    """

    number, _last = 0, 0.0

    def __enter__(self) -> Self:
        # Python lets only the main thread handle signals; elsewhere the caller must do it.
        here = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGTERM, signal.SIGINT) if here else ()
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: one that Python cannot know.
        if self.number and (kind is None or issubclass(kind, RunAbandoned)):
            raise Stopped(self.number, "the end of the run" if kind is None else "this point of the run") from None

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number and number == signal.SIGINT and now - self._last > SAME_PRESS:
            raise KeyboardInterrupt
        one = int(os.environ.get("RANK", 0)) == 0  # Of processes that a launcher started.
        if one and not self.number:
            with suppress(OSError):
                os.write(2, SAID.encode())  # What the signal interrupts may be in the middle of printing.
        self.number, self._last = number, now
