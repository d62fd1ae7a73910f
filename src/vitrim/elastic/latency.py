"""The largest network of a chain that is fast enough, found by measurement.

Times vary from call to call and need not fall with the size. So networks are timed in turns with the full one, which
cancels most of what slows the machine down, and every result is measured again, together with networks at growing
distances from it, so that one wrong measurement does no harm.
"""

import re
from collections.abc import Callable
from functools import partial
from statistics import median
from timeit import Timer

import torch
from torch import Tensor, nn
from torch.utils import benchmark

from ..budgets import is_positive
from ..errors import VitrimError
from ..models import find_adapter
from ..models.evaluating import evaluating
from ..text import short

Clock = Callable[..., Tensor]
"""(models) -> times of one forward pass in milliseconds (rounds, models), measured in turns."""
ROUNDS, CALLS, SECONDS = 9, 20, 0.02
"""Rounds in which every network is timed, its calls in a round at most, and the seconds that these should take."""


def parse(latency: float | str) -> tuple[float, bool]:
    """A latency budget, and whether it is a fraction of the full network's time: 0.5 is, "0.5ms" and "0.5s" are not.

    Raises:
        VitrimError: it is not positive, or text in another form.
    """
    text = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+) ?(m?)s", latency.strip()) if isinstance(latency, str) else None
    most: object = float(text[1]) * (1 if text[2] else 1000) if text else latency
    if not is_positive(most):
        raise VitrimError(
            "latency is a fraction in (0, 1], milliseconds above 1, or text with a unit such as 0.5ms, not "
            f"{short(latency)}"
        )
    return float(most), most <= 1 and text is None


def fastest_enough(
    latency: float | str, model: nn.Module, cut: Callable[[int], nn.Module], size: int, clock: Clock | None = None
) -> int:
    """The largest of `size` networks that meets this budget.

    Args:
        latency: see `parse`.
        model: the full network, which is number 0.
        cut: gives network `index` as a model of its own.
        size: how many there are.
        clock: default: `milliseconds`.

    Raises:
        VitrimError: not even the smallest network is fast enough.
    """
    (most, fraction), clock = parse(latency), clock or milliseconds
    if fraction and most == 1:
        return 0

    def measure(index: int) -> float:
        """Milliseconds, or the fraction of the full network's time; new at every call."""
        if fraction:
            times = clock(model, cut(index))
            return (times[:, 1] / times[:, 0]).median().item()
        return clock(cut(index) if index else model)[:, 0].median().item()

    if not fraction and max(measure(0), measure(0)) <= most:
        return 0
    if (least := min(measure(size - 1), measure(size - 1))) > most:
        unit = "of the time of the full network" if fraction else "ms"
        raise VitrimError(f"no sub-network takes {most:.3g} {unit} or less; the smallest takes {least:.3g} {unit}")
    return search(lambda index: measure(index) <= most, size)


def search(meets: Callable[[int], bool], size: int) -> int:
    """The smallest index that meets the budget; 0 does not, the last one does, and answers may be wrong."""
    found = _between(meets, 0, size - 1)
    while True:  # A wrong "no" on the way has hidden all larger networks.
        places = _outwards(found, 0)[::-1]
        better = next((number for number, place in enumerate(places) if meets(place)), None)
        if better is None:
            break
        found = _between(meets, places[better - 1] if better else 0, places[better])
    while found < size - 1 and not meets(found):  # A wrong "yes".
        enough = next((place for place in _outwards(found, size - 1) if meets(place)), size - 1)
        found = _between(meets, found, enough)
    return found


def _between(meets: Callable[[int], bool], slow: int, enough: int) -> int:
    while enough - slow > 1:
        middle = (slow + enough) // 2
        slow, enough = (slow, middle) if meets(middle) else (middle, enough)
    return enough


def _outwards(start: int, end: int) -> list[int]:
    """Places at distances of 1, 2, 4, ... from `start` towards `end`, which is left out."""
    sign, length = (1, end - start) if end > start else (-1, start - end)
    return [start + sign * 2**power for power in range(length.bit_length()) if 2**power < length]


@torch.inference_mode()
def milliseconds(*models: nn.Module, batch_size: int = 1) -> Tensor:
    """Times of one forward pass of each model in eval mode where it is, taken in turns: (rounds, models)."""
    timers: list[Timer] = []
    for model in models:
        parameter = next(model.parameters())
        adapter = find_adapter(model)
        size = adapter.geometry(model).input_size
        images = torch.randn(batch_size, *size, device=parameter.device, dtype=parameter.dtype)
        # torch's clock waits for the accelerator; timeit switches garbage collection off.
        timers.append(Timer(partial(model, *adapter.inputs(model, images)), timer=benchmark.timer))
    with evaluating(*models):
        first = [min(timer.repeat(2, 1)) for timer in timers]
        calls = max(1, min(CALLS, round(SECONDS / max(first))))
        turns = [[median(timer.repeat(calls, 1)) for timer in timers] for _ in range(ROUNDS)]
    return 1e3 * torch.tensor(turns, dtype=torch.float64)
