"""Where results go is looked at before the work that makes them, not after it."""

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryFile

from .errors import VitrimError


def check_file(path: str | Path, suffixes: Iterable[str], overwrite: bool = False) -> None:
    """Raise `VitrimError` unless a file of this name and kind can be made, a new one if not `overwrite`."""
    path, suffixes = Path(path), tuple(suffixes)
    if path.suffix not in suffixes:
        raise VitrimError(f"{path} should end in {', '.join(suffixes)}")
    check_folder(path.parent)
    if path.exists() and not overwrite:
        raise VitrimError(f"{path} exists; choose another name or remove it")


def check_folder(path: str | Path) -> None:
    """Raise `VitrimError` unless this folder is there or can be made, and takes files; leaves nothing behind."""
    path = Path(path).absolute()
    try:
        # Permissions say too little (root, read-only file systems, /proc), so that a nameless file is tried.
        TemporaryFile(dir=next(folder for folder in (path, *path.parents) if folder.exists())).close()
    except NotADirectoryError:
        raise VitrimError(f"{path} cannot be a folder, there is a file of this name; choose another place") from None
    except OSError as error:
        raise VitrimError(f"cannot write to {path} ({error.strerror}); choose another place") from None
