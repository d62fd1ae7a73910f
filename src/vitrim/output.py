"""Where results go is looked at before the work that makes them; a file is replaced whole, or not at all."""

import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from safetensors import SafetensorError

from .errors import OutputError, VitrimError

_FREE = "free some space, then repeat"
_ADVICE = {
    None: _FREE,  # As torch tells it.
    errno.ENOSPC: _FREE,
    errno.EDQUOT: _FREE,
    errno.EFBIG: "allow larger files (ulimit -f), or choose another folder",
}
FULL = frozenset(_ADVICE)
"""Numbers of the errors that say that there is no room."""
PART = ".part"
"""How the names of unfinished files end, which only a crash leaves behind."""


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


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` in one step once it is whole and on the disk.

    A reader, or a crash, meets the old content or the new, never a part. The folder must exist.

    Raises:
        OutputError: it could not be written (full disk); the one before is still there.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    with told(path):
        try:
            yield part
            with part.open("rb") as written:
                os.fsync(written.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def told(path: str | Path, *also: type[Exception]) -> Iterator[None]:
    """Tell a failed write of this file in one line.

    Args:
        path: the file; where it exists, it is whole, as it was before.
        also: what else the writer raises on a full disk.

    Raises:
        OutputError: no room, no permission, a limit.
    """
    try:
        yield
    except (OSError, SafetensorError, *also) as error:
        number = _number(error)
        reason = os.strerror(number) if number else str(error).splitlines()[0]
        kept = "; the one before is kept" if Path(path).exists() else ""
        advice = _ADVICE.get(number, "choose another folder")
        raise OutputError(f"cannot write {path} ({reason}){kept}; {advice}") from None


def _number(error: Exception) -> int | None:
    """The system's number of an error; libraries that are not written in Python tell it in words, or not at all."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None
