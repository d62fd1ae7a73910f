"""The folder of a study. A hidden file in it marks it as one, and holds the name by which workers know the study."""

import os
import re
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from ..errors import RecipeError
from ..output import check_folder
from ..train.checkpoint import write_atomic

MARK = ".study"


def check_study_folder(out: str | Path) -> None:
    """Refuse a folder that holds something else than a study, apart from hidden files; changes nothing.

    Raises:
        RecipeError: it holds a run, or anything that no study has written.
        VitrimError: it takes no files.
    """
    check_folder(out)
    out = Path(out)
    if not out.is_dir() or is_marked(out):
        return
    if (out / MARK).exists():
        raise RecipeError(f"{out / MARK} was not written by a study; choose another folder with --out")
    if (out / "recipe.yaml").exists():
        raise RecipeError(f"{out} holds a run, which a study would overwrite; choose another folder with --out")
    if found := sorted(path.name for path in out.iterdir() if not path.name.startswith(".")):
        raise RecipeError(f"{out} is not empty and holds no study ({found[0]}); choose another folder with --out")


def is_marked(out: Path) -> bool:
    """Whether a study has marked this folder as its own."""
    try:
        return re.fullmatch(r"[0-9a-f]{32}", (out / MARK).read_text()) is not None
    except (OSError, UnicodeDecodeError):
        return False


def mark_folder(out: Path) -> None:
    """Mark the folder as that of a study."""
    if not is_marked(out):
        write_atomic(out / MARK, uuid4().hex)


def study_id(out: Path) -> str:
    """The name of the study in this folder, the same wherever workers mount it; the first worker marks the folder."""
    path, mine = out / MARK, uuid4().hex
    part = path.with_name(f"{MARK}-{mine}")
    part.write_text(mine)
    try:
        with suppress(FileExistsError):
            os.link(part, path)  # In one step, so that no worker reads half a name.
    finally:
        part.unlink()
    return path.read_text()
