"""Teacher outputs on disk: computed once for fixed augmentations, then read by the data loader's workers.

A folder holds `manifest.json`, one array per output with a row for every (view, image), and `done.npy`, which marks the
rows that are written. Arrays are memory-mapped, and the workers that read the images read the rows too, so a step
costs no more than the student. Features are float16. Of many classes only the k largest logits are kept, and with them,
for each temperature of the terms, the logsumexp of all the others, so that the probabilities still sum to one.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.streams import Stream
from ..errors import DistillError
from ..models.outputs import Wanted
from ..output import recover
from .cache_writer import Arrays, Tick, missing_rows, open_arrays, write_rows
from .manifest import MANIFEST, Manifest
from .objective import Terms
from .teacher import Grid, Teacher


class TeacherCache:
    """The outputs of one teacher for one data set in all its views; made by `build`, opened again by `open`.

    Item `view * images + index` holds the teacher's outputs for that image, on the CPU.
    """

    def __init__(self, folder: Path, manifest: Manifest, wanted: Wanted) -> None:
        self.folder, self.info, self.rows = folder, manifest.info, manifest.rows
        self.names = [name for name in manifest.fields if _serves(name, wanted)]
        self.manifest = manifest
        self._arrays = self._map()

    @classmethod
    def build(
        cls,
        folder: str | Path,
        teacher: Teacher,
        stream: Stream,
        terms: Terms | str,
        *,
        grid: Grid | None = None,
        top_k: int = 128,
        batch_size: int = 64,
        workers: int = 0,
        tick: Tick | None = None,
    ) -> "TeacherCache":
        """Compute the missing rows, and open the cache. An interrupted call is continued by the same call.

        Several processes may call it at once: one works, the others wait. A finished cache is only read.

        Args:
            folder: new, empty, or of the same teacher, data, augmentation and terms.
            teacher: on the device where it runs.
            stream: the images, with a limited number of views. Set its `known` to the cache, and its items end with the
                teacher's outputs.
            terms: the objective whose outputs of the teacher are kept.
            grid: the student's (rows, columns) of patch tokens, for terms on tokens; see `student_grid`.
            top_k: logits kept of each image; all of them where there are no more classes than that.
            tick: called with (rows done, rows in all), also while another process does them; what it raises ends the
                call, and nothing that was done is lost.

        Raises:
            DistillError: the folder holds another cache, or a damaged one; not enough space; features beyond the
                range of float16.
        """
        folder, wanted = Path(folder), Terms.parse(terms).wanted(of_teacher=True)
        manifest = Manifest.of(teacher, stream, wanted, grid, top_k)
        recover(folder)
        kept = Manifest.read(folder) if (folder / MANIFEST).exists() else None
        if kept is not None:
            kept.check_serves(manifest, folder)
        if kept is None or len(missing_rows(folder, kept)):
            write_rows(folder, manifest, teacher, stream, batch_size, workers, tick or (lambda done, rows: None))
        return cls(folder, Manifest.read(folder), wanted)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        teacher: Teacher,
        stream: Stream,
        terms: Terms | str,
        *,
        grid: Grid | None = None,
        top_k: int = 128,
    ) -> "TeacherCache":
        """A finished cache, after a check that it belongs to this teacher, data and augmentation, and serves the terms.

        Raises:
            DistillError: it is missing, damaged, unfinished, or belongs to others.
        """
        folder, wanted = Path(folder), Terms.parse(terms).wanted(of_teacher=True)
        recover(folder)
        kept = Manifest.read(folder)
        kept.check_serves(Manifest.of(teacher, stream, wanted, grid, top_k), folder)
        if missing := len(missing_rows(folder, kept)):
            raise DistillError(
                f"the teacher cache in {folder} lacks {missing} of {kept.rows} rows; build it to the end"
            )
        return cls(folder, kept, wanted)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        if not self._arrays:
            self._arrays = self._map()
        return {name: torch.from_numpy(np.array(array[row])) for name, array in self._arrays.items()}

    def _map(self) -> Arrays:
        return open_arrays(self.folder, self.manifest, self.names)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_arrays": {}}  # Every worker maps the files itself.


def _serves(name: str, wanted: Wanted) -> bool:
    # Instead of `logits` there may be `top`, `index` and every `rest@T`.
    logits = name in ("logits", "top", "index") or name.startswith("rest@")
    return wanted.predicts if logits else name in wanted.keys
