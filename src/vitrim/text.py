"""Text from outside (file names, options, messages of libraries) in a form that is safe to print and to write."""

from collections.abc import Sized
from dataclasses import fields, is_dataclass
from typing import Any

LONGEST_LINE = 480
"""Characters of a line in a message; a longer one loses its middle."""


def printable(text: object, keep: str = "") -> str:
    r"""The text with every character that is not printable as an escape: control characters, broken UTF-8.

    Args:
        text: anything; `str` of it is taken.
        keep: characters to leave as they are, such as a newline.

    >>> printable("red\x1b[31m")
    'red\\x1b[31m'
    """
    text = str(text)
    bad = [letter for letter in {*text} - {*keep} if not letter.isprintable()]  # Few, also in a page of megabytes.
    return text.translate({ord(letter): ascii(letter)[1:-1].replace("\\udc", "\\x") for letter in bad})


def shortened(text: str, most: int) -> str:
    """The text with at most so many characters; what is too much is taken out of the middle.

    >>> shortened("a rather long name", 9)
    'a ra…name'
    """
    if len(text) <= most:
        return text
    head = most // 2
    return f"{text[:head]}…{text[len(text) - (most - head - 1) :]}"


def short(value: object, most: int = 80) -> str:
    """A value as a message shows it: its `repr`, without the middle if it is long."""
    try:
        return shortened(repr(value), most)
    except (ValueError, RecursionError):  # Python writes no whole number of thousands of digits, and nothing so deep.
        return f"a {type(value).__name__} that is too long to show"


def message(text: object) -> str:
    """A message for the terminal: lines stay lines, and each is printable and of bounded length."""
    return "\n".join(shortened(printable(line), LONGEST_LINE) for line in str(text).split("\n"))


def outline(value: Any) -> str:
    """A dataclass in one line for its `repr`: tensors by type and shape, long collections by their length.

    >>> outline((1, 2))
    '(1, 2)'
    >>> outline([0] * 99)
    '99 items'
    """
    if is_dataclass(value) and not isinstance(value, type):
        parts = (f"{each.name}={outline(getattr(value, each.name))}" for each in fields(value) if each.repr)
        return f"{type(value).__name__}({', '.join(parts)})"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')}{[*value.shape]}"
    if isinstance(value, Sized) and not isinstance(value, str) and (len(value) > 8 or len(repr(value)) > 100):
        return f"{len(value)} items"
    return shortened(repr(value), 200)


def short_name(text: object, most: int = 80) -> str:
    """A name from outside for one place in a message: printable, on one line, and short.

    >>> short_name("two\\nlines")
    'two\\\\nlines'
    """
    return shortened(printable(text), most)


def counted(number: int, what: str) -> str:
    """A number of things.

    >>> counted(1, "image"), counted(1200, "image")
    ('1 image', '1200 images')
    """
    return f"{number} {what}{'' if number == 1 else 's'}"


def reason_of(error: Exception) -> str:
    """The first line of an exception from outside, for a message of ours; its class where it says nothing."""
    return short_name((str(error).strip() or type(error).__name__).splitlines()[0], 200)


def with_written(page: str, kind: str, text: str, by: str = "make docs") -> str:
    """A page of documentation with this text between its marks for what a command writes, such as "methods"."""
    start, end = f"<!-- {kind}, written by `{by}` -->\n", f"<!-- end of {kind} -->"
    if start not in page or end not in page:
        return page
    before, _, rest = page.partition(start)
    return f"{before}{start}\n{text}\n{end}{rest.partition(end)[2]}"
