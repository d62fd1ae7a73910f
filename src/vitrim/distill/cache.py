"""Teacher outputs on disk: computed once for fixed augmentations, read by the data loader's workers ever after.

A folder holds `manifest.json`, one array per output with a row for every (view, image), and `done.npy`, which rows are
written. Arrays are memory-mapped and rows are read by the workers that read the images, so a step costs the student
alone. Features are float16. Of many classes the k largest logits are kept, and with them, for each temperature of the
terms, the logsumexp of all the others, so that no probability is lost or made up.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import DistillError
from .features import Wanted
from .manifest import MANIFEST, Manifest
from .objective import Terms
from .teacher import Grid, Teacher
from .views import Views

DONE = "done.npy"
FLUSH_EVERY = 32  # Batches that a power cut can cost.


class TeacherCache:
    """The outputs of one teacher for one data set in all its views; made by `build`, opened again by `open`.

    Item `view * images + index` holds the teacher's outputs for that image, on the CPU.
    """

    def __init__(self, folder: Path, manifest: Manifest, wanted: Wanted) -> None:
        self.folder, self.anatomy, self.rows = folder, manifest.anatomy, manifest.rows
        self.names = [name for name in manifest.fields if _serves(name, wanted)]
        self._arrays: dict[str, np.ndarray] = {}

    @classmethod
    def build(
        cls,
        folder: str | Path,
        teacher: Teacher,
        views: Views,
        terms: Terms | str,
        *,
        grid: Grid | None = None,
        top_k: int = 128,
        batch_size: int = 64,
        workers: int = 0,
        tick: Callable[[int, int], None] | None = None,
    ) -> "TeacherCache":
        """Compute what is missing, and open. An interrupted call is continued by the same call.

        Args:
            folder: new, empty, or of the same teacher, data, augmentation and terms.
            teacher: on the device where it shall run.
            views: all images in all their forms.
            terms: the objective whose questions the cache will answer.
            grid: the student's (rows, columns) of patch tokens, for terms on tokens; see `student_grid`.
            top_k: logits kept of each image; all of them where there are no more classes than that.
            tick: called with (rows done, rows in all).

        Raises:
            DistillError: the folder holds another cache; not enough space; features beyond the range of float16.
        """
        folder, wanted = Path(folder), Terms.parse(terms).wanted(of_teacher=True)
        device = teacher.scale.device
        manifest = Manifest.of(teacher, views, wanted, grid, top_k)
        if not (folder / MANIFEST).exists():
            first = _encode(teacher(views[0][0].unsqueeze(0).to(device), wanted, grid), wanted, top_k)
            _create(folder, manifest.with_fields({name: value.cpu().numpy() for name, value in first.items()}))
        kept = Manifest.read(folder)
        kept.check_serves(manifest, folder)
        done = np.load(folder / DONE, mmap_mode="r+")
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in kept.fields}
        missing = np.flatnonzero(done == 0)
        finished, pending = kept.rows - len(missing), list[np.ndarray]()

        def flush() -> None:
            # Rows first, then the marks that vouch for them.
            for array in arrays.values():
                array.flush()
            for rows in pending:
                done[rows] = 1
            done.flush()
            pending.clear()

        loader = DataLoader(_Rows(views, missing.tolist()), batch_size, num_workers=workers)
        for batch, (images, rows) in enumerate(loader, 1):
            found = _encode(teacher(images.to(device), kept.wanted, kept.grid), kept.wanted, kept.top_k)
            for name, values in found.items():
                arrays[name][rows.numpy()] = values.cpu().numpy()
            pending.append(rows.numpy())
            if batch % FLUSH_EVERY == 0:
                flush()
            finished += len(rows)
            if tick is not None:
                tick(finished, kept.rows)
        flush()
        return cls(folder, kept, wanted)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        teacher: Teacher,
        views: Views,
        terms: Terms | str,
        *,
        grid: Grid | None = None,
        top_k: int = 128,
    ) -> "TeacherCache":
        """A finished cache, after a check that it belongs to this teacher, data and augmentation, and serves the terms.

        Raises:
            DistillError: it is missing, unfinished, or belongs to others.
        """
        folder, wanted = Path(folder), Terms.parse(terms).wanted(of_teacher=True)
        kept = Manifest.read(folder)
        kept.check_serves(Manifest.of(teacher, views, wanted, grid, top_k), folder)
        missing = int((np.load(folder / DONE, mmap_mode="r") == 0).sum())
        if missing:
            raise DistillError(
                f"the teacher cache in {folder} lacks {missing} of {kept.rows} rows; build it to the end"
            )
        return cls(folder, kept, wanted)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        if not self._arrays:
            self._arrays = {name: np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in self.names}
        return {name: torch.from_numpy(np.array(array[row])) for name, array in self._arrays.items()}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_arrays": {}}  # Every worker maps the files itself.


class CachedViews(Dataset[tuple[Any, ...]]):
    """Views with the teacher's outputs as the last part of each item, to be collated and given as `known`."""

    def __init__(self, views: Views, cache: TeacherCache) -> None:
        self.plain, self.views, self.cache = views, views.views, cache

    def __len__(self) -> int:
        return len(self.plain)

    def __getitem__(self, key: int) -> tuple[Any, ...]:
        row = key % self.cache.rows
        return (*self.plain[row], self.cache[row])


class _Rows(Dataset[tuple[Tensor, int]]):
    def __init__(self, views: Views, rows: list[int]) -> None:
        self.views, self.rows = views, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        row = self.rows[position]
        return self.views[row][0], row


def _serves(name: str, wanted: Wanted) -> bool:
    if name in ("stages", "cls", "tokens"):
        return bool(getattr(wanted, name))
    return wanted.logits  # `logits`, or `top`, `index` and every `rest@T`.


def _encode(found: Mapping[str, Tensor], wanted: Wanted, top_k: int) -> dict[str, Tensor]:
    """What is kept of a batch of teacher outputs."""
    kept: dict[str, Tensor] = {}
    for name, value in found.items():
        if name != "logits":
            kept[name] = value.half()
            if not kept[name].isfinite().all():
                raise DistillError(f"the teacher's {name} go beyond the range of float16; distil from the live teacher")
    if wanted.logits:
        logits = found["logits"].float()
        if logits.shape[1] <= top_k:
            return {**kept, "logits": logits}
        order = logits.sort(dim=1, descending=True, stable=True)
        kept |= {"top": order.values[:, :top_k], "index": order.indices[:, :top_k].int()}
        for temperature in wanted.temperatures:
            kept[f"rest@{temperature:g}"] = (order.values[:, top_k:] / temperature).logsumexp(1)
    return kept


def _create(folder: Path, manifest: Manifest) -> None:
    """Lay out empty arrays. The manifest comes last, because it vouches for them."""
    if folder.exists() and any(folder.iterdir()) and not (folder / DONE).exists():
        raise DistillError(f"{folder} is not empty and holds no teacher cache; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    need, free = manifest.num_bytes, shutil.disk_usage(folder).free
    if need > free:  # A mapped file that meets a full disk kills the process.
        raise DistillError(
            f"the teacher cache needs {need / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free"
        )
    np.lib.format.open_memmap(folder / DONE, mode="w+", dtype=np.uint8, shape=(manifest.rows,))
    for name, (kind, *shape) in manifest.fields.items():
        np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=kind, shape=(manifest.rows, *shape))
    part = folder / f"{MANIFEST}.part"
    part.write_text(manifest.to_json())
    os.replace(part, folder / MANIFEST)
