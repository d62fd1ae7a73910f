"""Tables of block times in the user's cache folder, each under what its times depend on."""

import hashlib
import json
import os
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import OutputError
from ..measure.environment import environment
from ..models import find_adapter, widths_of
from ..output import replacing
from .block_times import BlockTimes

SCHEMA = 3


def cache_folder() -> Path:
    """Where tables are kept: `vitrim` in the user's cache folder, which XDG_CACHE_HOME or LOCALAPPDATA may name."""
    named = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else None)
    return (Path(named) if named else Path.home() / ".cache") / "vitrim" / "block-times"


def circumstances(model: nn.Module, batch_size: int, device: torch.device, dtype: str) -> dict[str, Any]:
    """What the times of the blocks of a model depend on; the date is left out."""
    geometry, widths = find_adapter(model).geometry(model), widths_of(model)[0]
    shapes = {name: list(p.shape) for name, p in find_adapter(model).blocks(model)[0].named_parameters()}
    here = {name: value for name, value in environment().items() if name not in ("date", "vitrim")}
    return {
        "schema": SCHEMA, "block": type(find_adapter(model).blocks(model)[0]).__name__, "shapes": shapes,
        "depth": geometry.depth, "tokens": geometry.num_patches + geometry.num_prefix,
        "input": list(geometry.input_size), "head_dim": widths.head_dim, "hidden": widths.hidden,
        "batch_size": batch_size, "device": device.type, "dtype": dtype, "environment": here,
    }  # fmt: skip


def read_table(where: dict[str, Any], folder: Path | None = None) -> BlockTimes | None:
    """The table that was measured under these circumstances; None where there is none, or it cannot be read."""
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        raw = json.loads(_path(where, folder).read_text(encoding="utf-8"))
        if raw["circumstances"] == where:
            table = BlockTimes(**raw["times"])
            sizes = len(table.tokens), len(table.head_dims), len(table.hiddens)
            shapes = {len(row) for row in (*table.attention, *table.mlp)}
            if shapes == {sizes[0]} and (len(table.attention), len(table.mlp)) == sizes[1:] and table.dense > 0:
                return table
    return None


def write_table(table: BlockTimes, where: dict[str, Any], folder: Path | None = None) -> None:
    """Keep a table; where the folder cannot be written to, it is measured again the next time."""
    path = _path(where, folder)
    with suppress(OSError, OutputError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_text(json.dumps({"circumstances": where, "times": asdict(table)}, indent=1), encoding="utf-8")


def _path(where: dict[str, Any], folder: Path | None) -> Path:
    digest = hashlib.sha256(json.dumps(where, sort_keys=True).encode()).hexdigest()
    return (folder or cache_folder()) / f"{digest[:32]}.json"
