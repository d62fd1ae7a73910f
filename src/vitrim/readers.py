"""Processes that read images: a signal to all processes of a run leaves them at work, the end of their parent does not.

Ctrl-C, `timeout` and batch systems signal a run's every process, and the run needs its readers until its state is
saved. So they ignore such signals, and with them the one by which Python, at its end, ends the children that it then
waits for.
"""

import functools
import multiprocessing
import os
import signal
import time
from multiprocessing.util import Finalize
from typing import Any

from torch.utils.data import DataLoader, Dataset

_PATIENCE = 0.5  # Seconds that children of other makers get to end by themselves.


def batches_of(dataset: Dataset[Any], batch_size: int, workers: int, **options: Any) -> DataLoader[Any]:
    """A loader whose worker processes leave signals to the process that makes it.

    Args:
        dataset: see `torch.utils.data.DataLoader`, as for `batch_size` and `options`.
        batch_size: items in a batch.
        workers: processes that read; 0 reads in the calling process.
        options: what else `DataLoader` takes.
    """
    if workers:
        _end_readers_with(os.getpid())
    return DataLoader(dataset, batch_size, num_workers=workers, worker_init_fn=_leave_signals_to_parent, **options)


def _leave_signals_to_parent(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@functools.cache  # Once in each process: a forked one starts without the finalizers of its parent.
def _end_readers_with(process: int) -> None:
    # Not `atexit`, which a process started by multiprocessing leaves out.
    Finalize(None, _end_daemons, exitpriority=0)


def _end_daemons() -> None:
    """End the children that Python is about to end and wait for, also those that will not listen."""
    children = [child for child in multiprocessing.active_children() if child.daemon]
    for child in children:
        child.terminate()
    until = time.monotonic() + _PATIENCE
    for child in children:
        child.join(max(0.0, until - time.monotonic()))
        if child.is_alive():
            child.kill()
