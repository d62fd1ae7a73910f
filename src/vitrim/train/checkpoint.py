"""The folder a run leaves behind: complete, resumable, never overwritten silently.

`recipe.yaml`, `folder.txt` (where its relative paths begin), `command.txt`, `environment.json`, `metrics.jsonl` (one
line per epoch), `checkpoint/state.pt`, `model/` (the chosen weights, for `vitrim.load`) and `result.json` once the run
is finished; of a super-network also `draws.jsonl`. `.vitrim-lock` is an empty file.
"""

import json
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ..errors import BusyError, CheckpointError, RecipeError
from ..models.files.store import WEIGHTS
from ..options import read_yaml
from ..output import LOCK, is_free, remove_leftovers, replacing, write_errors
from ..places import FILE as FOLDER
from ..places import here, where_made
from ..text import shortened
from .recipe import Recipe

_PATIENCE = 2.0  # Seconds that the children of a process that was killed may take to die.


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file in one step, see `replacing`; its folder is made. Names of files keep bytes that are no UTF-8.

    Raises:
        OutputError: it could not be written (full disk); the one before is still there.
    """
    with _written(path) as part:
        part.write_bytes(content.encode(errors="surrogateescape") if isinstance(content, str) else content)


class RunFolder:
    """One run on disk. `check` refuses a foreign folder, `start` writes what the run is; only one process writes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def check(self, recipe: Recipe) -> None:
        """Refuse a folder that holds another recipe, or something else; changes nothing.

        Raises:
            RecipeError: names the options that differ, or the cache of the recipe, which belongs outside of runs.
        """
        try:
            self.path.exists()
        except OSError as error:  # No folder can have this name.
            raise RecipeError(
                f"{shortened(str(self.path), 160)} cannot be a folder ({error.strerror}); choose another with --out"
            ) from None
        if recipe.cache is not None:
            place = Path(recipe.cache.folder)
            if place.resolve() == self.path.resolve() or os.path.exists(RunFolder(place)._recipe_path):
                raise RecipeError(f"cache.folder is {place}, the folder of a run; choose another for the cache")
        if os.path.exists(self._recipe_path):
            if changed := self._differences(recipe):
                more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
                raise RecipeError(
                    f"{self.path} holds a run of another recipe ({'; '.join(changed[:4])}{more}); "
                    "choose another folder with --out, or remove this one"
                )
        elif os.path.exists(self.path) and not self.path.is_dir():
            raise RecipeError(f"{self.path} is a file; choose a folder with --out")
        elif os.path.exists(self.path) and not is_free(self.path):
            raise RecipeError(f"{self.path} is not empty and holds no run; choose another folder with --out")

    def _differences(self, recipe: Recipe) -> list[str]:
        """In what the recipe of this folder differs, wherever the command is repeated."""
        base = where_made(self.path)
        if base is None:
            return Recipe.read(self._recipe_path).differences(recipe)
        if not base.is_dir():  # The run was moved with its images, which are compared when it goes on.
            return Recipe.from_dict(read_yaml(self._recipe_path)).differences(recipe)
        return Recipe.read(self._recipe_path).differences(recipe.located(Path.cwd()))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing here within this context; the lock dies with its process.

        Raises:
            BusyError: another process is writing.
        """
        with write_errors(self._recipe_path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                held = FileLock(self.path / LOCK).acquire(timeout=_PATIENCE)
            except Timeout:
                raise BusyError(
                    f"another process is writing to {self.path}; let it finish, or choose another folder with --out"
                ) from None
        with held:
            yield

    def start(self, recipe: Recipe, command: str, environment: Mapping[str, Any]) -> None:
        """Write what the run is, the recipe first, so that a folder with anything in it is known as a run."""
        remove_leftovers(self.path)
        if (base := where_made(self.path)) is not None and not base.is_dir():
            (self.path / FOLDER).unlink()
        for path, content in (
            (self._recipe_path, recipe.to_yaml()),
            (self.path / FOLDER, here()),
            (self.path / "command.txt", command + "\n"),
            (self.path / "environment.json", json.dumps(environment, indent=2)),
        ):
            if not path.exists():
                write_atomic(path, content)

    @property
    def result(self) -> dict[str, Any] | None:
        """The final figures, None while the run is unfinished."""
        path = self.path / "result.json"
        if not os.path.exists(path):
            return None
        found = _parsed(path, path.read_text(encoding="utf-8"))
        if "best_epoch" not in found:
            raise CheckpointError(f"{path} is not the result of a run; choose another folder with --out")
        return found

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Mark the run as finished."""
        write_atomic(self.path / "result.json", json.dumps(result, indent=2))

    def write_metrics(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Write the figures of all epochs so far."""
        write_atomic(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The figures of all epochs so far."""
        path = self.path / "metrics.jsonl"
        return [_parsed(path, line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def write_draws(self, epoch: int, line: Mapping[str, Any]) -> None:
        """Write which networks of a super-network the steps of this epoch have trained, below the epochs before it."""
        path = self.path / "draws.jsonl"
        before = path.read_text(encoding="utf-8").splitlines()[:epoch] if path.exists() else []
        write_atomic(path, "".join(f"{one}\n" for one in [*before, json.dumps({"epoch": epoch, **line})]))

    @property
    def model_path(self) -> Path:
        """Where the chosen weights are kept."""
        return self.path / "model"

    def save_model(self, write: Callable[..., Path], classes: Sequence[str] | None) -> None:
        """Replace the chosen weights; the names of the classes go with them.

        Args:
            write: `vitrim.save` of a model, or the `save` of a super-network.
            classes: names, in the order of the model's head; None where they are not known.

        Raises:
            OutputError: they could not be written (full disk); the ones before are still there.
        """
        with write_errors(self.model_path / WEIGHTS):
            write(self.model_path, overwrite=True, **({} if classes is None else {"classes": list(classes)}))

    @property
    def state_path(self) -> Path:
        """Where the state of training is kept."""
        return self.path / "checkpoint" / "state.pt"

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint in one step.

        Raises:
            OutputError: it could not be written (full disk); the one before is still there.
        """
        with _written(self.state_path) as part:
            torch.save(dict(state), part)

    def load_state(self) -> dict[str, Any] | None:
        """The latest checkpoint, None if there is none. Holds tensors and plain data only; code is refused."""
        if not self.state_path.exists():
            return None
        try:
            return torch.load(self.state_path, map_location="cpu", weights_only=True)
        except Exception as error:  # Readers of foreign bytes fail in many ways; all of them mean the same.
            code = isinstance(error, pickle.UnpicklingError) and "unsupported global" in str(error).lower()
            reason = "it holds code" if code else "it is damaged or cut short"
            raise CheckpointError(f"{self.state_path} cannot be read ({reason}); remove it to start again") from None

    @property
    def _recipe_path(self) -> Path:
        return self.path / "recipe.yaml"


def _parsed(path: Path, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
        if isinstance(found, dict):
            return found
    except (ValueError, RecursionError):
        pass
    raise CheckpointError(f"{path} is damaged or cut short; remove it and repeat the command") from None


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    with write_errors(path, RuntimeError):  # By which torch reports a full disk.
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            yield part
