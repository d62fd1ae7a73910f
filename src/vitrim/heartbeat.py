"""Steps that take long and cannot count their work: a line from time to time says that they go on."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY = 30.0
"""Seconds between two lines."""


@contextmanager
def heartbeat(what: str, say: Callable[[str], None], every: float = EVERY) -> Iterator[None]:
    """While the block lasts, say from time to time what is being done, and for how long it has been.

    Args:
        what: is being done.
        say: called with the line, from another thread.
        every: seconds between two lines; a block that is shorter says nothing.

    >>> with heartbeat("reading images", print):
    ...     pass
    """
    start, over = time.monotonic(), threading.Event()

    def beat() -> None:
        while not over.wait(every):
            say(f"{what}: {time.monotonic() - start:,.0f} s so far")

    thread = threading.Thread(target=beat, name="vitrim-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
