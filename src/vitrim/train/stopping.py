"""Signals that ask a run to stop, and how it says that it did."""

import signal
import threading
from types import FrameType
from typing import Self


class Stopped(SystemExit):
    """The run was asked to stop and has saved its state; `code` is that of the signal, as a shell counts."""

    def __init__(self, number: int, where: str) -> None:
        super().__init__(128 + number)
        self.where, self.name = where, signal.Signals(number).name

    def __str__(self) -> str:
        return f"stopped by {self.name} at {self.where}; the state is saved, repeat the same command to continue"


class StopSignals:
    """Notes SIGTERM and Ctrl-C while it is entered, so that the run can stop where its state is whole."""

    number = 0

    def __enter__(self) -> Self:
        # Python lets the main thread alone handle signals; elsewhere the caller must see to it.
        here = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGTERM, signal.SIGINT) if here else ()
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.number and kind is None:  # It arrived after the last place at which the run could have stopped.
            raise Stopped(self.number, "the end of the run")

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
