"""`vitrim --import FILE`: Python files of the user that add scores, reducers, curricula, terms or model families.

Only the command line can name such a file; no recipe, study, model or other file that vitrim reads can import anything.
"""

import sys
import traceback
from collections.abc import Iterable, Sequence
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from .errors import VitrimError

OPTION = "--import"
HELP = (
    f"{OPTION} FILE  run this Python file of yours first: it may add scores, reducers, terms, curricula\n"
    "                 or model families; may be given several times"
)
_imported: dict[Path, ModuleType] = {}


def split_imports(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of a command without `--import FILE`, wherever it stands, and those files.

    >>> split_imports(["train", "--import", "a.py", "--epochs", "3", "--import=b.py"])
    (['train', '--epochs', '3'], ['a.py', 'b.py'])
    """
    rest: list[str] = []
    files: list[str] = []
    following = iter(words)
    for word in following:
        if word == OPTION:
            files.append(next(following, ""))
        elif word.startswith(f"{OPTION}="):
            files.append(word.removeprefix(f"{OPTION}="))
        else:
            rest.append(word)
    return rest, files


def import_files(files: Iterable[str]) -> None:
    """Import each file once.

    Raises:
        VitrimError: a file is missing or fails, or its name is that of another module.
    """
    for file in files:
        _import(file)


def import_options() -> list[str]:
    """The options by which another process of this command imports the same files."""
    return [word for path in _imported for word in (OPTION, str(path))]


def _import(file: str) -> None:
    if not file or file.startswith("-"):
        raise VitrimError(f"{OPTION} needs the path of a Python file, such as {OPTION} mine.py")
    path = Path(file).resolve()
    if path in _imported:
        return
    if path.suffix != ".py" or not path.is_file():
        raise VitrimError(f"{OPTION} {file}: there is no Python file (.py) of that name")
    # It is an ordinary module, so that a process which a data loader starts can import it by its name.
    name = path.stem
    if "." in name or _taken(name, path):
        raise VitrimError(f"{OPTION} {file}: there is another module named {name!r}; rename the file")
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise VitrimError(f"{OPTION} {file}{_line_of(error, path)}: {_reason(error)}") from error
    _imported[path] = module


def _taken(name: str, path: Path) -> bool:
    """Whether importing that name gives something else than this file."""
    if name in sys.modules:
        return True
    try:
        spec = find_spec(name)
    except ValueError:
        return True
    return spec is not None and (spec.origin is None or Path(spec.origin).resolve() != path)


def _line_of(error: Exception, path: Path) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines.append(error.lineno)
    return f", line {lines[-1]}" if lines else ""


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, VitrimError) else f"{type(error).__name__}: {text}"
