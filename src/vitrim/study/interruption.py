"""A study or sweep stops between its runs too: SIGTERM raises there, so that everything around it can end in order."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ..train.stopping import Stopped


@contextmanager
def stopping_on_sigterm(where: str = "this point of the study") -> Iterator[None]:
    """Raise `Stopped` on SIGTERM within this context. A run inside replaces the handler and saves its state first."""
    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread only.
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number, where)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
