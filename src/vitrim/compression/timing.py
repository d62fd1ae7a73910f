"""How much time the cheaper model takes, as a fraction of the given one's, in sessions of interleaved rounds.

Rounds of one session share the memory that the models were copied to, so that sessions differ by more than rounds do.
Each session copies both models again; the interval is over sessions, for another measurement of as many of them.
"""

import time
from typing import Any

import numpy as np
import torch
from torch import nn

from ..measure.intervals import Interval, of_times
from ..measure.speed import bench

SESSIONS, ROUNDS, WARMUP = 5, 6, 1
WORK = SESSIONS * (ROUNDS + WARMUP)
"""Batches of either model that are run in all, at most."""
LONG = 10.0
"""Seconds of a session after which the others have half as many rounds: the clock is exact where a batch takes long."""


def sessions(
    original: nn.Module, model: nn.Module, *, batch_size: int, device: str | torch.device, dtype: str, compile: bool,
    number: int = SESSIONS, rounds: int = ROUNDS,
) -> list[tuple[float, float, float]]:  # fmt: skip
    """Of each session: the median ratio of times within rounds, and both median times of one batch in milliseconds.

    Args:
        original: the given model.
        model: the cheaper one.
        batch_size, device, dtype, compile: see `measure.speed.bench`.
        number: of sessions.
        rounds: timed rounds of each session, at most.
    """
    found: list[tuple[float, float, float]] = []
    options: dict[str, Any] = {"batch_sizes": (batch_size,), "device": device, "dtype": dtype, "compile": compile}
    for session in range(number):
        start = time.perf_counter()
        table = bench({"given": original, "cheaper": model}, rounds=rounds, warmup=WARMUP, seed=session, **options)
        given, cheaper = (np.array(row.seconds) for row in table.measured)
        ms = 1e3 * float(np.median(given)), 1e3 * float(np.median(cheaper))
        found.append((float(np.median(cheaper / given)), *ms))
        if session == 0 and time.perf_counter() - start > LONG:
            rounds = max(1, rounds // 2)
    return found


def time_ratio(found: list[tuple[float, float, float]]) -> Interval:
    """The ratio of times, with the interval of another measurement."""
    return of_times([ratio for ratio, _, _ in found])


def milliseconds(found: list[tuple[float, float, float]]) -> tuple[Interval, float]:
    """Time of one batch of the cheaper model with its interval, and that of the given one."""
    return of_times([cheaper for _, _, cheaper in found]), of_times([given for _, given, _ in found]).value
