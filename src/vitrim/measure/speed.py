"""How fast models run, measured side by side: every round times every model once, in a new random order.

A machine drifts (clocks, neighbours, caches). Timing one model after the other turns drift into a difference
between models; ratios within short interleaved rounds cancel it.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from timeit import Timer
from typing import TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import benchmark

from ..errors import UncountableError, UnknownNameError, UnsupportedModelError, VitrimError
from ..models import adapter_of, find_adapter, open_model, variant, without_limit
from ..models.foreign_macs import counted
from ..models.wrapped import check_is_model
from .bench_table import BenchRow, BenchTable, ratios
from .cost import cost
from .environment import environment
from .served import ServedFile, check_files, is_file, open_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CALLS_AT_BATCH_1 = 10  # A single image is over too soon for one call per round, and p95 wants many.

Size = tuple[int, int, int]


class BenchOptions(TypedDict, total=False):
    """Options of `bench`, which explains them."""

    batch_sizes: Sequence[int]
    input_size: Size | int | None
    dtype: str
    device: str | torch.device | None
    compile: bool
    threads: int | None
    rounds: int
    warmup: int
    seed: int


def bench(
    models: Mapping[str, nn.Module],
    *,
    batch_sizes: Sequence[int] = (32,),
    input_size: Size | int | None = None,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    compile: bool = False,
    threads: int | None = None,
    rounds: int = 10,
    warmup: int = 2,
    seed: int = 0,
    references: Mapping[str, str] | None = None,
) -> BenchTable:
    """Time forward passes of several models in interleaved rounds. The models given are left as they are.

    Args:
        models: by name, reduced already where they are to be (`vitrim.attach`), or files (`open_file`).
        batch_sizes: images per forward pass, each measured on its own.
        input_size: (channels, height, width), or the side in pixels; by default each model's own.
        dtype: "float32", "bfloat16" or "float16", of weights and images.
        device: by default CUDA if there is one.
        compile: run every model through torch.compile, one static shape per batch size.
        threads: of torch on the CPU; by default as they are.
        rounds: timed rounds. warmup: rounds before them, not counted.
        seed: of the images and of the order within rounds.
        references: the model each one is compared with; by default the first of all.

    Raises:
        VitrimError: nothing to measure, a number below 1, a model whose input size is not known, or a file that does
            not take such images.
    """
    _check(models, batch_sizes, dtype, rounds, threads)
    references = dict.fromkeys(models, next(iter(models))) | dict(references or {})
    for reference in references.values():
        if reference not in models:
            raise UnknownNameError("model", reference, models)
    sizes = {name: _input_size(model, input_size) for name, model in models.items()}
    files = {name: model for name, model in models.items() if isinstance(model, ServedFile)}
    device = torch.device(device or ("cuda" if torch.cuda.is_available() and not files else "cpu"))
    check_files(files, sizes, batch_sizes, dtype, device)
    macs = {name: _macs(model, sizes[name]) for name, model in models.items()}
    rows: list[BenchRow] = []
    with _threads(threads), torch.inference_mode():
        ready = {name: deepcopy(model).to(device, DTYPES[dtype]).eval() for name, model in models.items()}
        for batch_size in batch_sizes:
            trials = {
                name: _Trial(model, _images(batch_size, sizes[name], seed).to(device, DTYPES[dtype]), compile)
                for name, model in ready.items()
            }
            calls = _CALLS_AT_BATCH_1 if batch_size == 1 else 1
            times = _interleave(trials, calls, rounds, warmup, random.Random(seed))
            seconds = {name: tuple(np.median(times[name], axis=1).tolist()) for name in trials}
            for name, trial in trials.items():
                base = references[name]
                rows.append(
                    BenchRow(
                        name,
                        base,
                        batch_size,
                        seconds[name],
                        ratios(seconds[base], seconds[name]),
                        _percentiles(times[name]) if batch_size == 1 else None,
                        macs[name],
                        _ratio(macs[base], macs[name]),
                        trial.peak_mib(device),
                    )
                )
        settings = {"dtype": dtype, "device": device.type, "compile": compile, "rounds": rounds, "seed": seed}
        settings |= {name: f"by {file.runtime}" for name, file in files.items()}
        return BenchTable.of(rows, environment(), settings)


def bench_methods(
    model: str | nn.Module | Sequence[str | nn.Module],
    methods: Sequence[str] = ("dense",),
    **options: Unpack[BenchOptions],
) -> BenchTable:
    """Compare methods on one or several models; each method gets its own copy of the model.

    Args:
        model: modules, or anything that `open_model` takes: run folders, folders of saved models, timm names (random
            weights: speed does not depend on them); or files (.onnx, .pt2), which run as they are. Where there are
            files, the first row of all is the reference of all others.
        methods: "dense", "dense+cls_only", "own" (what is attached already), or reductions such as
            "TopK() @ KeepRate(0.7)". Reductions run with the last block on prefix tokens alone where the head reads
            nothing else. The first is the reference of its model.
        options: of `bench`; models named by text are opened at `input_size`, if it is one number.
    """
    given = [model] if isinstance(model, (str, nn.Module)) else list(model)
    if not given or not methods:
        raise VitrimError("nothing to measure; name at least one model and one method")
    models: dict[str, nn.Module] = {}
    references: dict[str, str] = {}
    given = [open_file(one, options.get("threads")) if isinstance(one, str) and is_file(one) else one for one in given]
    files = any(isinstance(one, ServedFile) for one in given)
    for one in given:
        if isinstance(one, ServedFile):
            _enter(models, one.path, one)
            continue
        side = options.get("input_size")
        dense = open_model(one, side if isinstance(side, int) else None) if isinstance(one, str) else one
        prefix = f"{one if isinstance(one, str) else type(one).__name__}: " if len(given) > 1 else ""
        for method in methods:
            _enter(models, prefix + method, variant(dense, method))
            references[prefix + method] = prefix + methods[0]
    return bench(models, references={} if files else references, **options)


def _enter(models: dict[str, nn.Module], name: str, model: nn.Module) -> None:
    if name in models:
        raise VitrimError(f"{name!r} is named twice; every row needs its own name")
    models[name] = model


class _Trial:
    """One model and its images, ready to be timed."""

    def __init__(self, model: nn.Module, images: Tensor, compiled: bool) -> None:
        self.model = model
        self.images = images
        compiled = compiled and not isinstance(model, ServedFile)
        self.run = without_limit(torch.compile(model, dynamic=False)) if compiled else model
        # torch's clock waits for the accelerator; timeit switches garbage collection off.
        self._timer = Timer(lambda: self.run(self.images), timer=benchmark.timer)

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
        self.run(self.images)
        torch.cuda.synchronize(device)
        grown = torch.cuda.max_memory_allocated(device) - before
        return (grown + sum(tensor.numel() * tensor.element_size() for tensor in own)) / 2**20


def _interleave(
    trials: Mapping[str, _Trial], calls: int, rounds: int, warmup: int, dice: random.Random
) -> dict[str, list[list[float]]]:
    """Times of each model: one list of single calls per round."""
    times: dict[str, list[list[float]]] = {name: [] for name in trials}
    order = list(trials)
    for number in range(warmup + rounds):
        dice.shuffle(order)
        for name in order:
            seconds = trials[name].seconds(calls)
            if number >= warmup:
                times[name].append(seconds)
    return times


def _ratio(over: int | None, under: int | None) -> float | None:
    return over / under if over and under else None


def _percentiles(times: Sequence[Sequence[float]]) -> tuple[float, float]:
    p50, p95 = np.percentile(times, (50, 95)) * 1e3
    return float(p50), float(p95)


def _macs(model: nn.Module, size: Size) -> int | None:
    """MACs per image: vitrim's count where an adapter knows the model at this size, else PyTorch's on empty tensors."""
    if isinstance(model, ServedFile):
        return model.macs
    try:
        if find_adapter(model).geometry(model).input_size == size:
            return cost(model, training=False).macs  # As it is timed.
    except UnsupportedModelError:
        pass
    try:
        return counted(model, (1, *size)).total
    except UncountableError:
        return None


def _input_size(model: nn.Module, given: Size | int | None) -> Size:
    if isinstance(given, tuple):
        return given
    try:
        own = model.size if isinstance(model, ServedFile) else adapter_of(model).input_format(model).size
    except UnsupportedModelError:
        own = None
    if isinstance(given, int):
        return (own[0] if own else 3, given, given)
    if own is None:
        raise VitrimError(f"the input size of this {type(model).__name__} is not known; give input_size")
    channels, height, width = own
    return channels, height, width


def _images(batch_size: int, size: Size, seed: int) -> Tensor:
    return torch.randn(batch_size, *size, generator=torch.Generator().manual_seed(seed))


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check(
    models: Mapping[str, nn.Module],
    batch_sizes: Sequence[int],
    dtype: str,
    rounds: int,
    threads: int | None,
) -> None:
    if not isinstance(models, Mapping):
        raise VitrimError('bench takes models by name: {"mine": model}')
    for model in models.values():
        check_is_model(model)
    if not models or not batch_sizes:
        raise VitrimError("nothing to measure; give at least one model and one batch size")
    for what, number in (
        ("rounds", rounds),
        ("threads", 1 if threads is None else threads),
        ("batch size", min(batch_sizes)),
    ):
        if number < 1:
            raise VitrimError(f"{what} is 1 or more, not {number}")
    if dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, DTYPES)
