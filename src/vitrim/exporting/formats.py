"""The formats of files, one function each that writes a program."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.onnx.errors import OnnxExporterError

from ..errors import UnsupportedModelError, VitrimError
from ..measure.served import AOTI, KEY, MISSING, ONNX, PROGRAM
from ..models.compiling import check_compiler
from ..text import reason_of
from .program import INPUT

About = Mapping[str, Any]
ONE_FILE = 1_900_000_000
"""Bytes of weights from which an ONNX file keeps them in a second file: protobuf holds at most 2 GiB."""
_CHATTY = ("onnxscript", "onnx_ir", "torch.onnx", "torch._inductor", "torch.utils.cpp_extension")


@dataclass(frozen=True)
class Format:
    """A format.

    suffix: of its files.
    check: raises `VitrimError` where what it needs is missing.
    write: writes a program and the description of the model to a file in an empty folder.
    runtime: what runs its files, see `ServedFile`.
    """

    suffix: str
    check: Callable[[], None]
    write: Callable[[ExportedProgram, About, Path], None]
    runtime: str


def quantise(source: Path, target: Path) -> None:
    """Write an ONNX file whose matrices are int8; activations are quantised for each batch."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        # A patch embedding is a convolution, for which many processors have no int8 kernel.
        quantize_dynamic(
            source, target, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"],
            use_external_data_format=source.with_name(f"{source.name}.data").exists(),
        )  # fmt: skip


def _check_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise VitrimError(MISSING) from None


def _write_onnx(program: ExportedProgram, about: About, path: Path) -> None:
    try:
        # As the program was made: with gradients, attention under a learnt bias is another kernel of other strides.
        with _quiet(), torch.no_grad():
            made = torch.onnx.export(
                program, (), input_names=[INPUT], output_names=[about["output"]["name"]], dynamo=True, verbose=False
            )
    except OnnxExporterError as error:
        reason = reason_of(error.__cause__ if isinstance(error.__cause__, Exception) else error)
        raise UnsupportedModelError(f"this model cannot be written as ONNX: {reason}; use format torch") from error
    assert made is not None
    _name_batch(made.model)
    made.model.metadata_props[KEY] = json.dumps(about)
    weights = sum(value.nbytes for value in program.state_dict.values())
    made.save(path, external_data=weights > ONE_FILE)


def _name_batch(model: Any) -> None:
    """Call the first dimension of the images "batch", wherever torch's own symbol for it stands alone."""
    own = model.graph.inputs[0].shape[0]
    for value in (*model.graph.inputs, *model.graph.outputs, *(one for node in model.graph for one in node.outputs)):
        for axis, dim in enumerate(value.shape or ()):
            if dim == own:
                value.shape[axis] = "batch"


def _write_program(program: ExportedProgram, about: About, path: Path) -> None:
    torch.export.save(program, path, extra_files={f"{KEY}.json": json.dumps(about)})


def _write_aoti(program: ExportedProgram, about: About, path: Path) -> None:
    from torch._inductor.exc import CppCompileError

    try:
        with _quiet(), torch.no_grad():
            torch._inductor.aoti_compile_and_package(
                program,
                package_path=str(path),
                inductor_configs={"aot_inductor.metadata": {KEY: json.dumps(about)}},
            )
    except CppCompileError as error:
        last = next((line for line in str(error).splitlines() if "error" in line), "it gives no reason")[:200]
        raise VitrimError(f"the C++ compiler cannot compile this model ({last}); name another in CXX") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress what exporters print and log below errors: they fail with an exception."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


FORMATS: dict[str, Format] = {
    "onnx": Format(".onnx", _check_onnx, _write_onnx, ONNX),
    "torch": Format(".pt2", lambda: None, _write_program, PROGRAM),
    "aoti": Format(".pt2", partial(check_compiler, "cpu", "take format torch"), _write_aoti, AOTI),
}
"""By name: ONNX; a program of torch.export; that program compiled to C++ by AOTInductor."""
