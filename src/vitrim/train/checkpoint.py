"""The folder a run leaves behind: complete, resumable, never overwritten silently.

`recipe.yaml`, `command.txt`, `environment.json`, `metrics.jsonl` (one line per epoch), `checkpoint/state.pt`,
`model/` (the chosen weights, for `vitrim.load`) and `result.json` once the run is finished.
"""

import json
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, RecipeError
from .recipe import Recipe


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file in one step: a reader, or a crash, meets the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class RunFolder:
    """One run on disk. `open` starts it or continues it; only the main process writes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def open(self, recipe: Recipe, command: str, environment: Mapping[str, Any]) -> None:
        """Start the run, or check that the folder holds this very recipe.

        Raises:
            RecipeError: the folder belongs to another recipe, or to something else.
        """
        written = self.path / "recipe.yaml"
        if written.exists():
            changed = Recipe.read(written).differences(recipe)
            if changed:
                raise RecipeError(
                    f"{self.path} holds a run of another recipe ({'; '.join(changed[:3])}); "
                    "choose another folder with --out, or remove this one"
                )
            return
        if self.path.exists() and any(self.path.iterdir()):
            raise RecipeError(f"{self.path} is not empty and holds no run; choose another folder with --out")
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path / "command.txt", command + "\n")
        write_atomic(self.path / "environment.json", json.dumps(environment, indent=2))
        write_atomic(written, recipe.to_yaml())

    @property
    def result(self) -> dict[str, Any] | None:
        """The final figures, None while the run is unfinished."""
        path = self.path / "result.json"
        return json.loads(path.read_text()) if path.exists() else None

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
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def state_path(self) -> Path:
        """Where the state of training is kept."""
        return self.path / "checkpoint" / "state.pt"

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint in one step.

        Raises:
            CheckpointError: it could not be written (full disk); the one before is still there.
        """
        part = self.state_path.with_suffix(".part")
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            torch.save(dict(state), part)
            os.replace(part, self.state_path)
        except (OSError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
            kept = "the one before is kept" if self.state_path.exists() else "there is none yet"
            raise CheckpointError(
                f"cannot write the checkpoint in {part.parent} ({reason}); {kept}; free some space, then repeat"
            ) from None
        finally:
            part.unlink(missing_ok=True)

    def load_state(self) -> dict[str, Any] | None:
        """The latest checkpoint, None if there is none. Holds tensors and plain data only; code is refused."""
        if not self.state_path.exists():
            return None
        try:
            return torch.load(self.state_path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise CheckpointError(f"{self.state_path} cannot be read ({str(error).splitlines()[0]})") from None
