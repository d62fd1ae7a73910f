"""Bounded, seeded fuzzing: every altered input is accepted or refused in one line, in little time and memory.

A fuzzer is one test per surface:

    def test_altered_recipes():
        fuzz(lambda rng: Recipe.parse(altered_text(TEXT, rng)))

`fuzz` calls it with `VITRIM_FUZZ` (default 200, `make fuzz`: 10,000) generators. Each must return, after checking with
`assert` that the result is right, or raise a `VitrimError` of one line under 500 characters. Failures are collected
and reported with the number of the input; `VITRIM_FUZZ_ONLY=NUMBER` runs that input alone, with its traceback.
"""

import os
import random
import resource
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from vitrim.errors import VitrimError

COUNT = int(os.environ.get("VITRIM_FUZZ", "200"))
MAX_CHARS = 500
CPU_SECONDS, SECONDS = 10.0, 120.0
"""Per input. Only time on the processor is short, since others may keep it busy; waiting for ever is caught too."""
MAX_BYTES = 1 << 30
"""What one surface may take beyond what the process has."""


class TooSlow(BaseException):
    """Not an `Exception`, so that nothing under test catches it."""


def fuzz(surface: Callable[[random.Random], Any], *, seed: int = 0, count: int | None = None) -> Counter[str]:
    """Run `surface` on many seeded generators; returns how many inputs were accepted and refused.

    Raises:
        AssertionError: lists the first failures, each with the number of its input.
    """
    only = os.environ.get("VITRIM_FUZZ_ONLY")
    if only is not None:
        surface(random.Random(f"{seed}/{only}"))
        return Counter()
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    with _little_memory():
        for number in range(COUNT if count is None else count):
            fault = _fault(surface, random.Random(f"{seed}/{number}"), outcomes)
            if fault:
                failures.append(f"input {number}: {fault[:300]}")
    if failures:
        pytest.fail(
            f"{len(failures)} failures of {sum(outcomes.values())}:\n" + "\n".join(failures[:10]), pytrace=False
        )
    return outcomes


def _fault(surface: Callable[[random.Random], Any], rng: random.Random, outcomes: Counter[str]) -> str:
    try:
        with _little_time():
            surface(rng)
    except VitrimError as error:
        outcomes["refused"] += 1
        return fault_of(str(error))
    except TooSlow as error:
        outcomes["failed"] += 1
        return f"too slow: {error}"
    except Exception as error:
        outcomes["failed"] += 1
        return f"{type(error).__name__}: {error}"
    outcomes["accepted"] += 1
    return ""


def fault_of(message: str) -> str:
    """What is wrong with the text of an error; empty if it is one short line of printable characters."""
    if not message.strip():
        return "refused without a word"
    if len(message.splitlines()) > 1:
        return f"refused in several lines: {message!r}"
    if len(message) > MAX_CHARS:
        return f"refused in {len(message)} characters: {message!r}"
    return "" if message.isprintable() else f"refused with control characters: {message!r}"


@contextmanager
def _little_time() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise TooSlow(f"{CPU_SECONDS} s on the processor" if number == signal.SIGPROF else f"{SECONDS} s")

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, CPU_SECONDS), signal.SIGALRM: (signal.ITIMER_REAL, SECONDS)}
    before = {number: signal.signal(number, stop) for number in timers}
    try:
        for timer, seconds in timers.values():
            signal.setitimer(timer, seconds)
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


@contextmanager
def _little_memory() -> Iterator[None]:
    """Let large allocations fail, and fail the test where the memory in use has grown."""
    peak = _peak()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 2 * MAX_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    grown = _peak() - peak
    assert grown < MAX_BYTES, f"the memory in use grew by {grown >> 20} MiB"


def _peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def altered_bytes(content: bytes, rng: random.Random) -> bytes:
    """The content with one to three bits flipped, ranges removed, repeated, overwritten, or its end cut off."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice((1, 2, 8, 64, 1024)))
        match rng.randrange(6):
            case 0 if start < len(data):
                data[start] ^= 1 << rng.randrange(8)
            case 1:
                del data[start:end]
            case 2:
                data[start:start] = data[start:end]
            case 3:
                data[start:end] = rng.randbytes(end - start)
            case 4:
                del data[start:]
            case _:
                data[start:start] = rng.randbytes(rng.choice((1, 8)))
    return bytes(data)


def altered_text(text: str, rng: random.Random) -> str:
    """The text with bytes altered, or with lines or words removed, repeated, exchanged or set to odd values."""
    if rng.random() < 0.4:
        return altered_bytes(text.encode(), rng).decode("utf-8", errors="replace")
    cut = "\n" if "\n" in text and rng.random() < 0.5 else rng.choice((" ", ":", "=", ",", "(", ")", "@"))
    parts = text.split(cut)
    one, other = rng.randrange(len(parts)), rng.randrange(len(parts))
    match rng.randrange(4):
        case 0:
            del parts[one]
        case 1:
            parts.insert(other, parts[one])
        case 2:
            parts[one], parts[other] = parts[other], parts[one]
        case _:
            parts[one] = str(odd_value(rng))
    return cut.join(parts)


def altered_value(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON document in which one place is removed, renamed, repeated, or replaced by an odd value."""
    places = list(_places(value))
    path = rng.choice(places)
    return _altered_at(value, path, rng)


def odd_value(rng: random.Random) -> Any:
    """A JSON value that few readers expect: another type, out of range, very large or very deep."""
    deep: Any = 0
    for _ in range(rng.choice((3, 90, 900))):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    return rng.choice((
        None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e-320, 1e300, float("nan"),
        float("inf"), "", "x", "0", "None", "../../etc/passwd", "/dev/zero", "os.system", "\x00\x1b[31m", "é" * 3,
        "x" * 100_000, [], [1], [[]], [None] * 50, {}, {"class_path": "os.system", "init_args": {"command": "false"}},
        {"": None}, deep,
    ))  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from _places(part, (*path, key))


def _altered_at(value: Any, path: tuple[Any, ...], rng: random.Random) -> Any:
    if not path:
        number = isinstance(value, int | float) and rng.random() < 0.3
        return value * rng.choice((-1, 0, 2, 1000)) + rng.choice((0, 1)) if number else odd_value(rng)
    key, *rest = path
    copy = dict(value) if isinstance(value, dict) else list(value)
    if rest or rng.random() < 0.6:
        copy[key] = _altered_at(value[key], tuple(rest), rng)
    elif isinstance(copy, list):
        copy[key : key + 1] = rng.choice(([], [value[key]] * 2, [value[key]] * 500))
    else:
        part = copy.pop(key)
        if rng.random() < 0.4:
            copy[f"{key}{rng.choice(('', 's', '_', '.'))}"] = part
            copy[rng.choice(("extra", "args", "path", "__class__"))] = odd_value(rng)
    return copy
