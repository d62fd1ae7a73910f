"""Worker processes that read images. They ignore signals that others send, and end with the process that made them.

Ctrl-C, `timeout` and batch systems signal every process of a run, but the run needs its workers until it has saved its
state.
"""

import multiprocessing
import os
import signal
import threading
import warnings
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset


def batches_of(dataset: Dataset[Any], batch_size: int, workers: int, **options: Any) -> DataLoader[Any]:
    """A loader whose worker processes are ended by the process that makes it and by no other.

    It draws nothing from the global random generators; each pass through a `DataLoader` otherwise draws a seed.

    Args:
        dataset: see `torch.utils.data.DataLoader`, as for `batch_size` and `options`.
        batch_size: items in a batch.
        workers: processes that read; 0 reads in the calling process.
        options: further options of `DataLoader`.
    """
    return DataLoader(
        dataset, batch_size, num_workers=workers, worker_init_fn=_start_worker, generator=torch.Generator(), **options
    )


def _start_worker(worker: int) -> None:
    warnings.filterwarnings("ignore", module="PIL")  # Of damaged metadata and of large images, which are read anyway.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # At its end Python sends SIGTERM to its children and waits for them, so it must not be ignored altogether.
    # macOS and Windows do not report the sender; there torch's own handler stays, and any SIGTERM ends a worker.
    made_by = multiprocessing.parent_process()  # Of the operating system, a fork server may be the parent.
    if hasattr(signal, "sigwaitinfo") and made_by is not None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(made_by.pid,), daemon=True).start()


def _end_with(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
