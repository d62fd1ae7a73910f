"""Processes that read images: they leave signals to the process that made them, and end when that one says so.

Ctrl-C, `timeout` and batch systems signal every process of a run, which needs its readers until its state is saved.
"""

import os
import signal
import threading
from typing import Any

from torch.utils.data import DataLoader, Dataset


def batches_of(dataset: Dataset[Any], batch_size: int, workers: int, **options: Any) -> DataLoader[Any]:
    """A loader whose worker processes obey the process that makes it, and no other.

    Args:
        dataset: see `torch.utils.data.DataLoader`, as for `batch_size` and `options`.
        batch_size: items in a batch.
        workers: processes that read; 0 reads in the calling process.
        options: what else `DataLoader` takes.
    """
    return DataLoader(dataset, batch_size, num_workers=workers, worker_init_fn=_obey_parent_alone, **options)


def _obey_parent_alone(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Python, at its end, sends SIGTERM to its children and waits for them, so that it must not be ignored altogether.
    # macOS and Windows cannot tell who sent it; there torch's own handler stays, and any SIGTERM ends a reader.
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
