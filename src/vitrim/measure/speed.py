"""How fast models and files run, measured side by side in interleaved rounds (see `rounds`)."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UnknownNameError, VitrimError
from ..models import open_model, own_method, variant
from ..models.compiling import check_compiler
from ..models.wrapped import check_is_model
from .bench_table import BenchRow, BenchTable, ratios
from .environment import environment
from .rounds import Trial, interleave
from .served import ServedFile, is_file, open_file
from .timed import Size, size_for, timed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CALLS_AT_BATCH_1 = 10  # A single image is over too soon for one call per round, and p95 wants many.


def bench(
    models: Mapping[str, nn.Module | str] | str | nn.Module | Sequence[str | nn.Module],
    methods: str | Sequence[str] | None = None,
    *,
    batch_sizes: Sequence[int] = (32,),
    input_size: Size | int | None = None,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    compile: bool = False,
    graphs: bool = False,
    threads: int | None = None,
    rounds: int = 10,
    warmup: int = 2,
    seed: int = 0,
    references: Mapping[str, str] | None = None,
) -> BenchTable:
    """Time forward passes of several models in interleaved rounds. The models given are left as they are.

    Args:
        models: one or several modules, or anything that `open_model` takes: run folders, folders of saved models, timm
            names (random weights: speed does not depend on them); or files (.onnx, .pt2), which run as they are. A
            mapping also names the rows, {"mine": model}.
        methods: "dense", "dense+cls_only", "own" (what is attached already), or reductions such as
            "TopK() @ KeepRate(0.7)", each on its own copy of every model. Reductions run with the last block on prefix
            tokens alone where the head reads nothing else. By default each model runs as it is.
        batch_sizes: images per forward pass, each measured on its own.
        input_size: (channels, height, width), or the side in pixels; by default each model's own.
        dtype: "float32", "bfloat16" or "float16", of weights and images.
        device: by default CUDA if there is one.
        compile: run every model through torch.compile, one static shape per batch size.
        graphs: replay every model as a CUDA graph, so that the time of Python between kernels is left out.
        threads: of torch on the CPU; by default as they are.
        rounds: timed rounds. warmup: rounds before them, not counted.
        seed: of the images and of the order within rounds.
        references: the row each one is compared with, by names of rows; by default, of several methods, the first one
            of the same model, and else the first row of all.

    Raises:
        VitrimError: an unknown model or method, nothing to measure, a number below 1, a model whose input size is not
            known, or a file that does not take such images.
    """
    _check(batch_sizes, dtype, rounds, threads)
    given, own = _rows(models, methods, input_size if isinstance(input_size, int) else None, threads)
    references = dict.fromkeys(given, next(iter(given))) | own | dict(references or {})
    for reference in references.values():
        if reference not in given:
            raise UnknownNameError("model", reference, given)
    entries = {name: timed(model) for name, model in given.items()}
    files = {name: entry.runtime for name, entry in entries.items() if entry.runtime is not None}
    device = torch.device(device or ("cuda" if torch.cuda.is_available() and not files else "cpu"))
    if files and (dtype != "float32" or device.type != "cpu"):
        raise VitrimError("files are run in float32 on the CPU; use --dtype float32 --device cpu, or name models alone")
    if graphs and device.type != "cuda":
        raise VitrimError(f"graphs are those of CUDA, but models run on {device.type}; leave graphs out")
    if compile and len(files) < len(entries):
        check_compiler(device)
    sizes = {name: size_for(entry, input_size) for name, entry in entries.items()}
    for name, entry in entries.items():
        for batch_size in batch_sizes:
            entry.check(batch_size, sizes[name])
    macs = {name: entry.macs_at(sizes[name]) for name, entry in entries.items()}
    rows: list[BenchRow] = []
    with _threads(threads), torch.inference_mode():
        ready = {name: entry.prepared(device, DTYPES[dtype]) for name, entry in entries.items()}
        for batch_size in batch_sizes:
            trials = {
                name: Trial(
                    model,
                    entries[name].compiled(model) if compile else model,
                    _images(batch_size, sizes[name], seed).to(device, DTYPES[dtype]),
                    graph=graphs,
                )
                for name, model in ready.items()
            }
            calls = _CALLS_AT_BATCH_1 if batch_size == 1 else 1
            times = interleave(trials, calls, rounds, warmup, random.Random(seed))
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
        settings = {"dtype": dtype, "device": device.type, "compile": compile, "graphs": graphs}
        settings |= {"rounds": rounds, "seed": seed}
        settings |= {name: f"by {runtime}" for name, runtime in files.items()}
        return BenchTable.of(rows, environment(), settings)


def _rows(
    models: Mapping[str, nn.Module | str] | str | nn.Module | Sequence[str | nn.Module],
    methods: str | Sequence[str] | None,
    side: int | None,
    threads: int | None,
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """What each row runs, by its name, and the first method of the same model where there are several, see `bench`."""
    methods = [methods] if isinstance(methods, str) else methods
    named = isinstance(models, Mapping)
    given = list(models.items()) if named else [(_name_of(model), model) for model in _several(models)]
    if not given or (methods is not None and not methods):
        raise VitrimError("nothing to measure; give at least one model and one method")
    rows: dict[str, nn.Module] = {}
    references: dict[str, str] = {}
    for name, model in given:
        if isinstance(model, str):
            model = open_file(model, threads) if is_file(model) else open_model(model, side)
        check_is_model(model)
        if isinstance(model, ServedFile) or (named and methods is None):
            _enter(rows, name, model)
            continue
        prefix = f"{name}: " if len(given) > 1 else ""
        own = list(methods or [own_method(model)])
        for method in own:
            _enter(rows, prefix + method, variant(model, method))
            references[prefix + method] = prefix + own[0]
    several = methods is not None and len(methods) > 1 and len(references) == len(rows)
    return rows, references if several else {}


def _several(models: Any) -> list[Any]:
    """One model, or each of several."""
    return list(models) if isinstance(models, list | tuple) else [models]


def _name_of(model: object) -> str:
    if isinstance(model, ServedFile):
        return model.path
    return model if isinstance(model, str) else type(model).__name__


def _enter(models: dict[str, nn.Module], name: str, model: nn.Module) -> None:
    if name in models:
        raise VitrimError(f"{name!r} is named twice; every row needs its own name")
    models[name] = model


def _ratio(over: int | None, under: int | None) -> float | None:
    return over / under if over and under else None


def _percentiles(times: Sequence[Sequence[float]]) -> tuple[float, float]:
    p50, p95 = np.percentile(times, (50, 95)) * 1e3
    return float(p50), float(p95)


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


def _check(batch_sizes: Sequence[int], dtype: str, rounds: int, threads: int | None) -> None:
    if not batch_sizes:
        raise VitrimError("nothing to measure; give at least one batch size")
    for what, number in (
        ("rounds", rounds),
        ("threads", 1 if threads is None else threads),
        ("batch size", min(batch_sizes)),
    ):
        if number < 1:
            raise VitrimError(f"{what} is 1 or more, not {number}")
    if dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, DTYPES)
