"""Writing results: places are checked before the work, and files are replaced whole or not at all.

New files are written into a hidden folder next to the old ones (its name starts with `MARK`) and renamed into place
once they are whole. A process that is killed leaves that folder behind; the next write into the same place finishes
or removes it. Nothing else is ever removed.
"""

import errno
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from .errors import BusyError, OutputError

try:
    import fcntl
except ImportError:  # Windows has no locks on folders.
    fcntl = None

MARK = ".vitrim-part-"
"""How the names of folders with unfinished files start, which only a killed process leaves behind."""
LOCK = ".vitrim-lock"
"""The file in a folder that a process locks for as long as it works there."""
_WHOLE = f"{MARK}whole-"  # All files are written, and some of them may have been renamed into place already.
_PATIENCE = 300.0  # Seconds to wait for another process that writes into the same folder.

_FREE = "free some space, then repeat"
_ADVICE = {
    None: _FREE,  # torch reports a full disk without the system's number.
    errno.ENOSPC: _FREE,
    errno.EDQUOT: _FREE,
    errno.EFBIG: "allow larger files (ulimit -f), or choose another folder",
}
FULL = frozenset(_ADVICE)
"""Error numbers that mean that there is no room."""


def check_file(path: str | Path, suffixes: Iterable[str], overwrite: bool = False) -> None:
    """Raise `OutputError` unless a file of this name and kind can be made; an existing one needs `overwrite`."""
    path, suffixes = Path(path), tuple(suffixes)
    if path.suffix not in suffixes:
        raise OutputError(f"{path} should end in {', '.join(suffixes)}")
    check_folder(path.parent)
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists; choose another name or remove it")


def check_folder(path: str | Path) -> None:
    """Raise `OutputError` unless this folder exists or can be made, and takes files; leaves nothing behind."""
    path = Path(path).absolute()
    try:
        # Permissions say too little (root, read-only file systems, /proc), so a nameless file is tried.
        tempfile.TemporaryFile(dir=next(folder for folder in (path, *path.parents) if folder.exists())).close()
    except NotADirectoryError:
        raise OutputError(f"{path} cannot be a folder, there is a file of this name; choose another place") from None
    except OSError as error:
        raise OutputError(f"cannot write to {path} ({error.strerror}); choose another place") from None


@contextmanager
def replacing(path: str | Path, *, overwrite: bool = True) -> Iterator[Path]:
    """A path to write to; what is written there takes the place of `path` in one step once it is whole.

    A reader, or a crash, meets the old content or the new, never a part. The folder must exist.

    Args:
        path: the file. It gets the permissions of the one that it replaces, or those of any new file.
        overwrite: False refuses a file that exists, also one that another process has made in the meantime.

    Raises:
        OutputError: it could not be written (full disk); the one before is still there.
        BusyError: another process keeps writing into the same folder.
    """
    path = Path(path)
    with write_errors(path), _alone_in(path.parent):
        if not overwrite and path.exists():
            raise OutputError(f"{path} exists; choose another name or remove it")
        with _staging(path.parent) as staged:
            yield staged / path.name
            _finish(staged, path.parent)
            os.replace(staged / path.name, path)


@contextmanager
def replacing_files(folder: str | Path) -> Iterator[Path]:
    """A folder to write several files to; together they take the places of those in `folder`, all of them or none.

    Other files in `folder` stay as they are. An empty file stands for one to remove. Until the block ends, no other
    process replaces files in `folder`, so a check made inside it still holds when the files are put into place.
    Readers call `recover` first. The folder must exist.

    Raises:
        OutputError: they could not be written (full disk); the ones before are still there.
        BusyError: another process keeps writing into the same folder.
    """
    folder = Path(folder)
    with write_errors(folder), _alone_in(folder), _staging(folder) as staged:
        yield staged
        _finish(staged, folder)
        # From this rename on the new files count: whoever comes next finishes what a kill interrupts.
        whole = folder / f"{_WHOLE}{staged.name.removeprefix(MARK)}"
        os.rename(staged, whole)
        _put_into_place(whole)


def recover(folder: str | Path) -> None:
    """Finish a replacement of several files that was interrupted by a kill; where there is none, do nothing."""
    _tidy(Path(folder), _WHOLE)


def remove_leftovers(folder: str | Path) -> None:
    """Finish or remove what killed processes left unfinished in this folder and below; nothing else is touched."""
    for path in [Path(folder), *Path(folder).rglob("*")]:
        if path.is_dir() and not path.is_symlink():
            _tidy(path, MARK)


def _tidy(folder: Path, mark: str) -> None:
    with suppress(OSError):  # A folder that cannot be written to is left, or read, as it is.
        if any(is_leftover(path) and path.name.startswith(mark) for path in folder.iterdir()):
            with _alone_in(folder):
                pass


def is_free(folder: Path) -> bool:
    """Whether a folder holds nothing but what a process of vitrim leaves behind that is killed before it has begun."""
    return all(path.name == LOCK or is_leftover(path) for path in folder.iterdir())


def is_leftover(path: Path) -> bool:
    """Whether this is a folder of unfinished files, which the next write removes."""
    return path.name.startswith(MARK) and path.is_dir() and not path.is_symlink()


@contextmanager
def write_errors(path: str | Path, *also: type[Exception]) -> Iterator[None]:
    """Turn a failed write of this file or folder into one line.

    Args:
        path: the file or folder; where it exists, it is whole, as it was before.
        also: further exceptions by which the writer reports a full disk.

    Raises:
        OutputError: no room, no permission, a limit.
    """
    try:
        yield
    except (OSError, SafetensorError, *also) as error:
        number = _number(error)
        reason = os.strerror(number) if number else (str(error) or type(error).__name__).splitlines()[0][:200]
        kept = "; the one before is kept" if Path(path).is_file() else ""
        advice = _ADVICE.get(number, "choose another folder")
        raise OutputError(f"cannot write {path} ({reason}){kept}; {advice}") from None


def _number(error: Exception) -> int | None:
    """The system's error number; libraries that are not written in Python report it in words, or not at all."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes and threads from replacing files in this folder; leftovers are then of dead ones."""
    held = _lock(folder)
    try:
        for path in [path for path in folder.iterdir() if is_leftover(path)]:
            if path.name.startswith(_WHOLE):
                _put_into_place(path)
            elif held is not None:
                shutil.rmtree(path, ignore_errors=True)
        yield
    finally:
        if held is not None:
            os.close(held)


def _lock(folder: Path) -> int | None:
    """A lock on the folder itself, which leaves no file and ends with the process; None where there are no such."""
    if fcntl is None:
        return None
    held = os.open(folder, os.O_RDONLY)
    end = time.monotonic() + _PATIENCE
    try:
        while True:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return held
            except BlockingIOError:
                if time.monotonic() > end:
                    raise BusyError(f"another process keeps writing to {folder}; let it finish, then repeat") from None
                time.sleep(0.01)
    except OSError:  # A network file system without locks.
        os.close(held)
        return None
    except BaseException:
        os.close(held)
        raise


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    staged = Path(tempfile.mkdtemp(prefix=MARK, dir=folder))
    try:
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _finish(staged: Path, folder: Path) -> None:
    """Give the staged files the permissions that they should have (some libraries write 0600), and flush them."""
    probe = staged / f"{MARK}mode"
    probe.touch()  # As the umask, or the folder, wants it.
    usual = probe.stat().st_mode
    probe.unlink()
    for path in staged.iterdir():
        present = folder / path.name
        path.chmod((present.stat().st_mode if present.exists() else usual) & 0o7777)
        with path.open("rb") as written:
            os.fsync(written.fileno())


def _put_into_place(whole: Path) -> None:
    """Rename the files of a folder of whole ones into the folder around it; others may be at it too, or have been."""
    with suppress(FileNotFoundError):
        for path in whole.iterdir():
            if path.stat().st_size:
                os.replace(path, whole.parent / path.name)
            else:
                (whole.parent / path.name).unlink(missing_ok=True)
                path.unlink()
        whole.rmdir()
