"""Times of several models in interleaved rounds: every round runs every model once, in a new random order.

A machine drifts (clocks, neighbours, caches). Timing one model after the other turns drift into a difference
between models; ratios within short interleaved rounds cancel it.
"""

import random
from collections.abc import Callable, Mapping
from timeit import Timer

import torch
from torch import Tensor, nn
from torch.utils import benchmark

from ..errors import VitrimError
from ..models import adapter_of


class Trial:
    """One model and its images, ready to be timed.

    Args:
        model: holds the weights.
        run: what is timed: the model, or its compiled form.
        images: one batch.
        graph: replay the work of the device, recorded as a CUDA graph, without the time that Python takes.
    """

    def __init__(self, model: nn.Module, run: Callable[..., object], images: Tensor, *, graph: bool = False) -> None:
        self.model, self.images = model, images
        inputs = adapter_of(model).inputs(model, images)
        self.run: Callable[[], object] = lambda: run(*inputs)
        if graph:
            self.run = recorded(self.run)
        # torch's clock waits for the accelerator; timeit switches garbage collection off.
        self._timer = Timer(self.run, timer=benchmark.timer)

    def seconds(self, calls: int) -> list[float]:
        """Time of each of so many single calls."""
        return self._timer.repeat(calls, 1)

    def peak_mib(self, device: torch.device) -> float | None:
        """Weights, images and activations at the peak of one call, whatever else lies on the device."""
        if device.type != "cuda":
            return None
        own = (*self.model.parameters(), *self.model.buffers(), self.images)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        self.run()
        torch.cuda.synchronize(device)
        grown = torch.cuda.max_memory_allocated(device) - before
        return (grown + sum(tensor.numel() * tensor.element_size() for tensor in own)) / 2**20


def recorded(run: Callable[[], object]) -> Callable[[], object]:
    """Replays, by a CUDA graph, what the device does in `run`; its inputs stay where they are.

    Raises:
        VitrimError: it copies from the CPU or waits for the device, which cannot be recorded.
    """
    for _ in range(3):  # Compiles, and chooses kernels, which cannot be recorded.
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = run()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise VitrimError(f"a model cannot be recorded as a CUDA graph ({reason}); leave graphs out") from None

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def interleave(
    trials: Mapping[str, Trial], calls: int, rounds: int, warmup: int, dice: random.Random
) -> dict[str, list[list[float]]]:
    """Times of each model: one list of single calls per round; the first `warmup` rounds are not counted."""
    times: dict[str, list[list[float]]] = {name: [] for name in trials}
    order = list(trials)
    for number in range(warmup + rounds):
        dice.shuffle(order)
        for name in order:
            seconds = trials[name].seconds(calls)
            if number >= warmup:
                times[name].append(seconds)
    return times
