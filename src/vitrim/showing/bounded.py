"""Read files that anybody may have written or damaged: within bounds, with a note instead of an error. No torch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..text import printable, shortened

MOST_BYTES = 64 << 20
"""Of a file; a larger one is not read."""
MOST_ENTRIES, MOST_LETTERS, MOST_LEVELS, MOST_DIGITS = 10_000, 10_000, 12, 18
"""Of lists and mappings, of a text, of nesting, of a whole number; more is cut off."""

Note = Callable[[str], None]
"""Called with one line about what could not be read."""


def read_bytes(path: Path, note: Note) -> bytes:
    """The content of a regular file; empty where there is none, or with a note where it cannot be read."""
    try:
        if not path.is_file():
            return b""
        if path.stat().st_size > MOST_BYTES:
            note(f"{path} cannot be read (more than {MOST_BYTES >> 20} MiB)")
            return b""
        return path.read_bytes()
    except OSError as error:
        note(f"{path} cannot be read ({error.strerror})")
        return b""


def read_text(path: Path, note: Note) -> str:
    """The text of a file, what is not printable in it as escapes; see `read_bytes`."""
    return printable("\n".join(_decoded(path, note).splitlines()), keep="\n\t")


def _decoded(path: Path, note: Note) -> str:
    return read_bytes(path, note).decode("utf-8", errors="replace")


def read_json(path: Path, note: Note) -> dict[str, Any]:
    """The mapping in a JSON file, within bounds; another value goes by the name "value"."""
    text = _decoded(path, note)
    try:
        value = bounded(json.loads(text)) if text else {}
    except (ValueError, RecursionError):
        note(f"{path} cannot be read (not JSON)")
        return {}
    return value if isinstance(value, dict) else {"value": value}


def read_json_lines(path: Path, note: Note) -> list[dict[str, Any]]:
    """The mappings in a file of one JSON value per line, within bounds."""
    found: list[dict[str, Any]] = []
    for number, line in enumerate(_decoded(path, note).split("\n"), 1):
        if not line.strip() or len(found) >= MOST_ENTRIES:
            continue
        try:
            value = bounded(json.loads(line))
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            found.append(value)
        else:
            note(f"{path}, line {number} cannot be read")
    return found


def bounded(value: Any, levels: int = MOST_LEVELS) -> Any:
    """A JSON value in which everything has a size that can be shown, and every text is printable."""
    if isinstance(value, str):
        return shortened(printable(value, keep="\n"), MOST_LETTERS)
    if isinstance(value, dict | list) and levels == 0:
        return "…"
    if isinstance(value, dict):
        items = list(value.items())[:MOST_ENTRIES]
        return {bounded(name, levels): bounded(entry, levels - 1) for name, entry in items}
    if isinstance(value, list):
        return [bounded(entry, levels - 1) for entry in value[:MOST_ENTRIES]]
    if isinstance(value, int) and abs(value) >= 10**MOST_DIGITS:
        return f"a number of {len(str(abs(value)))} digits"
    return value
