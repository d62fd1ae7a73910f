"""The trials of a sweep, kept in a file as they finish, so that the same command continues after a kill."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import BusyError, RecipeError
from ..output import replacing
from .compare import Row

_PATIENCE = 2.0  # Seconds that the children of a killed process may hold its lock.

Step = list[Row]
"""The rows of networks that were evaluated together, the dense one first."""


class Trials:
    """The finished steps of a sweep, by model.

    Args:
        path: the file, replaced after every step of the sweep; None keeps the steps in memory.
        settings: everything that decides the result, as plain data. A file of other settings is refused.

    Raises:
        RecipeError: the file holds trials of other settings, or is damaged.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self._path, self._settings = path, json.loads(json.dumps(settings))
        self._steps: dict[str, list[Step]] = {}
        if path is not None and path.exists():
            self._read(path)

    def steps(self, model: str) -> list[Step]:
        """The finished steps of a model, in order."""
        return self._steps.setdefault(model, [])

    def add(self, model: str, step: Step) -> None:
        """Keep a finished step."""
        self.steps(model).append(step)
        if self._path is not None:
            lines = [{"settings": self._settings}]
            lines += [{"model": name, "rows": rows} for name, steps in self._steps.items() for rows in steps]
            with replacing(self._path) as part:
                part.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def _read(self, path: Path) -> None:
        try:
            first, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            known = dict(first["settings"])
            for line in lines:
                self.steps(line["model"]).append([dict(row) for row in line["rows"]])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise RecipeError(f"{path} is damaged; remove it to start the sweep again") from None
        changed = [name for name in {**known, **self._settings} if known.get(name) != self._settings.get(name)]
        if changed:
            raise RecipeError(
                f"{path} holds trials of a sweep with another {', '.join(changed)}; choose another --out, or remove "
                "the file to lose them"
            )


@contextmanager
def kept_trials(out: str | Path | None) -> Iterator[Path | None]:
    """A file for the trials of a sweep whose table goes to `out`; None where it goes to no file.

    Write the table inside the block: the trials are removed when it ends without an exception.

    Raises:
        BusyError: another process is running this sweep.
    """
    if out is None:
        yield None
        return
    path = Path(f"{out}.trials.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=_PATIENCE)
    except Timeout:
        raise BusyError(f"another process runs the sweep of {out}; let it finish, or choose another --out") from None
    with lock:
        yield path
        path.unlink(missing_ok=True)
        Path(lock.lock_file).unlink(missing_ok=True)
