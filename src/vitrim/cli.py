"""The command: verbs and options to plain functions, nothing else."""

import argparse
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from io import TextIOWrapper
from typing import NoReturn

from . import __version__
from .arguments import UsageError, parse_words
from .errors import VitrimError
from .output import FULL
from .text import printable, shortened
from .train.stopping import Stopped
from .user_files import HELP, import_files, split_imports
from .variables import check_variables
from .verbs import VERBS

LONGEST = 480
"""Characters of a message: more of it would bury what matters."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb; user mistakes are one line and exit code 2."""
    warnings.filterwarnings("ignore", module="torch|timm|accelerate|PIL")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # It looks for a compiler nobody needs.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # A terminal may lack letters that names and tables hold.
            stream.reconfigure(errors="backslashreplace")
    words, user_files = split_imports(sys.argv[1:] if argv is None else argv)
    verb = _verb(words)
    try:
        check_variables()
        import_files(user_files)
        options = parse_words(VERBS[verb], f"vitrim {verb}", words[1:], f"with every verb: {' '.join(HELP.split())}")
        if options.get("device") == "cuda":
            _expect_cuda()
        VERBS[verb](**options)
    except UsageError as error:
        _leave(verb, f"{error} (see vitrim {verb} --help)", 2)
    except VitrimError as error:  # A worker process wraps it in a traceback, of which it is the last line.
        line = str(error).strip().splitlines()[-1].removeprefix("vitrim.errors.")
        _leave(verb, re.sub(r"^\w+Error: ", "", line), 2)
    except Stopped as stopped:
        _leave(verb, str(stopped), stopped.code)
    except KeyboardInterrupt:
        _leave(verb, "interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # The interpreter flushes it once more.
        raise SystemExit(0) from None
    except OSError as error:
        if error.filename is None and error.errno not in FULL:
            raise  # It is not about a file, so that no advice can be given.
        _leave(verb, f"{error.filename or 'cannot write'}: {error.strerror}", 2)
    except (MemoryError, RuntimeError) as error:
        if (line := _short_of_memory(error)) is None:
            raise
        _leave(verb, line, 2)


def _short_of_memory(error: Exception) -> str | None:
    """What to do about this exception, if it says that there is not enough memory."""
    text = str(error)
    if "DataLoader worker" in text and ("shared memory" in text or "Killed" in text):
        return "the processes that read images ran out of memory; lower --data.workers, or give them more (/dev/shm)"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "t allocate memory" in text:
        return (
            "there is not enough memory for this; lower --batch_size (in training, optim.accumulate keeps its effect), "
            "or take smaller images or a smaller model"
        )
    return None


def _verb(words: Sequence[str]) -> str:
    """The verb that the first word names; `--help` and `--version` print and exit."""
    parser = argparse.ArgumentParser(
        prog="vitrim",
        usage="vitrim verb [options]",
        description="Make any Vision Transformer cheaper, and say exactly what it costs.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"verbs:\n{_listed()}\n\nwith every verb:\n  {HELP}\n\nvitrim verb --help explains its options.",
    )
    parser.add_argument("--version", action="version", version=f"vitrim {__version__}")
    first = words[0] if words else ""
    if first in ("-h", "--help", "--version"):
        parser.parse_args([first])
    if first in VERBS:
        return first
    near = get_close_matches(first[:60], VERBS, n=3, cutoff=0.5)
    line = f"unknown verb {first}" + (f"; did you mean {' or '.join(near)}?" if near else "")
    if not first or first.startswith("-"):
        line = f"missing: one of {', '.join(VERBS)}"
    _leave("", f"{line} (see vitrim --help)", 2)


def _listed() -> str:
    lines = {name: (function.__doc__ or "").strip().splitlines()[0] for name, function in VERBS.items()}
    return "\n".join(f"  {name:10}{line}" for name, line in lines.items())


def _expect_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise VitrimError("there is no CUDA device here; use --device cpu")


def _leave(verb: str, line: str, code: int | str | None) -> NoReturn:
    """Print one line that a terminal can show, and exit."""
    line = shortened(printable(line), LONGEST)
    print(f"vitrim {verb}: {line}" if verb else f"vitrim: {line}", file=sys.stderr)
    raise SystemExit(code) from None


if __name__ == "__main__":
    main()
