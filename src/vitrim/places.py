"""Where a command ran: what it wrote names files and folders as they were given, so relative to that place."""

import os
from pathlib import Path
from typing import Any

from .options import read_yaml

FILE, RECIPE = "folder.txt", "recipe.yaml"
"""In the folder of a run or of a compressed model: the place, and the recipe whose paths begin there."""
PLACES = ("data.root", "model.name", "model.checkpoint", "teacher.name", "teacher.checkpoint")
"""Options of a recipe that may name a file or folder."""
SURE = ("data.root",)
"""Those that name nothing else: a model may have the name of an architecture."""


def here() -> str:
    """The content of `FILE`."""
    return f"{os.getcwd()}\n"


def where_made(folder: str | Path) -> Path | None:
    """The place where the command ran that wrote this folder; None where it is this one, or not known."""
    try:
        text = (Path(folder) / FILE).read_text(encoding="utf-8", errors="surrogateescape").removesuffix("\n")
        if not os.path.isabs(text) or (os.path.isdir(text) and os.path.samefile(text, os.getcwd())):
            return None
    except (OSError, ValueError):
        return None
    return Path(text)


def read_recipe(file: str | Path) -> dict[str, Any]:
    """The options in a YAML file; those of a run with its files and folders as paths that are right anywhere.

    Raises:
        RecipeError: see `options.read_yaml`.
    """
    options = read_yaml(file)
    base = where_made(Path(file).parent) if Path(file).name == RECIPE else None
    return options if base is None else located(options, base)


def located(options: dict[str, Any], base: Path) -> dict[str, Any]:
    """The options of a recipe with what they name relative to `base` as absolute paths."""
    found = dict(options)
    for name in PLACES:
        group, _, option = name.partition(".")
        inner = found.get(group)
        if isinstance(inner, dict) and isinstance(path := inner.get(option), str):
            there = os.path.normpath(base / path)
            if not os.path.isabs(path) and (name in SURE or os.path.exists(there)):
                found[group] = {**inner, option: there}
    return found
