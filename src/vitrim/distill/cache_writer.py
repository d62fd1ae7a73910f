"""How a teacher cache is laid out and filled: rows in any order, by one process at a time, stopped and continued."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.data import Dataset

from ..data.readers import batches_of
from ..data.streams import Stream
from ..errors import DistillError
from ..models.outputs import Wanted
from ..output import FULL, LOCK, is_free, replacing_files, write_errors
from .manifest import MANIFEST, Manifest
from .teacher import Teacher

DONE = "done"
FLUSH_EVERY = 32  # Batches that can be lost when the power fails.
LOOK_EVERY = 0.5  # Seconds.

Tick = Callable[[int, int], None]
Arrays = dict[str, np.ndarray]


def missing_rows(folder: Path, manifest: Manifest) -> np.ndarray:
    """Rows that are still to be computed."""
    return np.flatnonzero(open_arrays(folder, manifest, [DONE])[DONE] == 0)


def open_arrays(folder: Path, manifest: Manifest, names: Iterable[str], mode: Literal["r", "r+"] = "r") -> Arrays:
    """These arrays of a cache, mapped; `DONE` is one of them.

    Raises:
        DistillError: one is missing, cut short, or not of the shape that the manifest says.
    """
    arrays: Arrays = {}
    for name in names:
        path = folder / f"{name}.npy"
        kind, *shape = manifest.fields[name] if name != DONE else ("uint8",)
        try:
            array = np.load(path, mmap_mode=mode)
        except FileNotFoundError:
            array, fault = None, "is missing"
        except Exception:  # NumPy's words for damaged bytes are many.
            array, fault = None, "is damaged or cut short"
        else:
            fault = "does not fit the manifest" if (array.dtype, array.shape) != (kind, (manifest.rows, *shape)) else ""
        if array is None or fault:
            raise DistillError(f"{path} {fault}; remove {folder} and build the cache again")
        arrays[name] = array
    return arrays


def write_rows(
    folder: Path, manifest: Manifest, teacher: Teacher, stream: Stream, batch_size: int, workers: int, tick: Tick
) -> None:
    """Compute what the folder, new or begun, lacks of a cache; wait where another process is doing so.

    Raises:
        DistillError: the folder holds something else; not enough space; features beyond the range of float16.
    """
    if folder.exists() and not (folder / MANIFEST).exists() and not is_free(folder):
        raise DistillError(f"{folder} is not empty and holds no teacher cache; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder, tick):
        if not (folder / MANIFEST).exists():
            first = teacher(stream[0][0].unsqueeze(0).to(teacher.scale.device), manifest.wanted(), manifest.grid)
            rows = _encode(first, manifest.wanted(), manifest.top_k)
            _create(folder, manifest.with_fields({name: value.cpu().numpy() for name, value in rows.items()}))
        kept = Manifest.read(folder)
        kept.check_serves(manifest, folder)
        _compute(folder, kept, teacher, stream, batch_size, workers, tick)


def _compute(
    folder: Path, kept: Manifest, teacher: Teacher, stream: Stream, batch_size: int, workers: int, tick: Tick
) -> None:
    missing = missing_rows(folder, kept)
    arrays = open_arrays(folder, kept, [DONE, *kept.fields], "r+")
    done = arrays.pop(DONE)
    wanted = kept.wanted()
    finished, pending = kept.rows - len(missing), list[np.ndarray]()

    def flush() -> None:
        # Rows first, then the marks that say they are complete.
        for array in arrays.values():
            array.flush()
        for rows in pending:
            done[rows] = 1
        done.flush()
        pending.clear()

    loader = batches_of(_Rows(stream, missing.tolist()), batch_size, workers)
    try:
        for batch, (images, rows) in enumerate(loader, 1):
            found = teacher(images.to(teacher.scale.device), wanted, kept.grid)
            for name, values in _encode(found, wanted, kept.top_k).items():
                arrays[name][rows.numpy()] = values.cpu().numpy()
            pending.append(rows.numpy())
            if batch % FLUSH_EVERY == 0:
                flush()
            finished += len(rows)
            tick(finished, kept.rows)
    finally:  # Whoever stops the work in `tick` finds all of it kept.
        flush()


@contextmanager
def _alone(folder: Path, tick: Tick) -> Iterator[None]:
    """One process at a time; the system frees the lock of one that died. Others tell how far that one has come."""
    lock = FileLock(folder / LOCK)
    while not lock.is_locked:
        try:
            lock.acquire(timeout=LOOK_EVERY)
        except Timeout:
            if (folder / MANIFEST).exists():
                kept = Manifest.read(folder)
                tick(kept.rows - len(missing_rows(folder, kept)), kept.rows)
        except (OSError, NotImplementedError):  # A file system without locks, where two do the same work.
            break
    try:
        yield
    finally:
        lock.release()


class _Rows(Dataset[tuple[Tensor, int]]):
    def __init__(self, stream: Stream, rows: list[int]) -> None:
        self.stream, self.rows = stream, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        row = self.rows[position]
        return self.stream[row][0], row


def _encode(found: Mapping[str, Tensor], wanted: Wanted, top_k: int) -> dict[str, Tensor]:
    """What is kept of a batch of teacher outputs."""
    kept: dict[str, Tensor] = {}
    for name, value in found.items():
        if name != "logits":
            kept[name] = value.half() if value.is_floating_point() else value
            if not kept[name].isfinite().all():
                raise DistillError(f"the teacher's {name} go beyond the range of float16; distil from the live teacher")
    if wanted.predicts:
        logits = found["logits"].float()
        if logits.shape[1] <= top_k:
            return {**kept, "logits": logits}
        order = logits.sort(dim=1, descending=True, stable=True)
        kept |= {"top": order.values[:, :top_k], "index": order.indices[:, :top_k].int()}
        for temperature in sorted(wanted.temperatures):
            kept[f"rest@{temperature:g}"] = (order.values[:, top_k:] / temperature).logsumexp(1)
    return kept


def _create(folder: Path, manifest: Manifest) -> None:
    """Lay out empty arrays and the manifest; however the process ends, all of them are there or none is."""
    need, free = manifest.num_bytes, shutil.disk_usage(folder).free
    if need > free:
        raise DistillError(
            f"the teacher cache needs {_size(need)} in {folder}, where {_size(free)} are free; free some, or choose "
            "another cache.folder"
        )
    with replacing_files(folder) as staged:
        for name, (kind, *shape) in {DONE: ("uint8",), **manifest.fields}.items():
            with write_errors(folder / f"{name}.npy"):
                _lay_out(staged / f"{name}.npy", kind, (manifest.rows, *shape))
        (staged / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _size(num_bytes: int) -> str:
    step = min(3, max(0, len(str(num_bytes)) - 1) // 3)
    return f"{num_bytes / 1000**step:.{min(step, 1)}f} {('B', 'kB', 'MB', 'GB')[step]}"


def _lay_out(path: Path, kind: str, shape: tuple[int, ...]) -> None:
    """An array of zeros whose room on the disk is taken: a mapped file that meets a full one kills the process."""
    np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=shape)
    if not hasattr(os, "posix_fallocate"):
        return
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if error.errno in FULL:
                raise
            # Any other: a file system that cannot do it.
