"""One call from a model to a file: exported, written to a place of its own, compared, and only then put in place."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import OutputError, UnknownNameError, VitrimError
from ..measure.served import ServedFile, check_name, open_file
from ..models.copying import copied
from ..output import check_file, replacing_files, write_errors
from .comparison import Agreement, check_images, compare
from .formats import FORMATS, quantise
from .program import described, make_program, prepared


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    path: the file. about: the description in it. agreement: with the model.
    int8: whether its matrices are int8, so that it only comes close to the model.
    """

    path: Path
    about: dict[str, Any]
    agreement: Agreement
    int8: bool = False

    def text(self) -> str:
        """What a person wants to know of it, in a few lines."""
        about = self.about
        macs = "" if about["macs"] is None else f"{about['macs'] / 1e9:.3f} GMACs, "
        acts = "" if about["reduction"] is None else f", {about['reduction']}"
        channels, height, width = about["input"]["size"]
        weights = Path(f"{self.path}.data")
        parts = [self.path, *([weights] if self.path.suffix == ".onnx" and weights.exists() else [])]
        size = sum(part.stat().st_size for part in parts) / 1e6
        return (
            f"written to {' and '.join(map(str, parts))} ({size:.1f} MB): {macs}{about['params'] / 1e6:.2f} M "
            f"parameters{acts}; takes {about['input']['name']} (batch, {channels}, {height}, {width}), gives "
            f"{about['output']['name']}\n" + self.agreement.text(self.int8)
        )


def check_place(file: str | Path, format: str, int8: bool = False) -> None:
    """Before the work, raise `VitrimError` where `export` could not write such a file."""
    if format not in FORMATS:
        raise UnknownNameError("format", format, FORMATS)
    if int8 and format != "onnx":
        raise VitrimError(f"int8 is for --format onnx, not {format}; docs/export.md shows torchao for the others")
    check_file(file, [FORMATS[format].suffix])
    check_name(file)
    if format == "onnx" and (weights := Path(f"{file}.data")).exists():
        raise OutputError(f"{weights} exists, where the weights of {file} would lie; choose another name or remove it")
    FORMATS[format].check()


def export(
    model: nn.Module,
    images: Tensor,
    file: str | Path,
    *,
    format: Literal["onnx", "torch", "aoti"] = "onnx",
    method: str | None = None,
    int8: bool = False,
    classes: Sequence[str] | None = None,
    more: Mapping[str, Any] | None = None,
) -> Exported:
    """Write a model as a file that another runtime runs, with a batch of any size, in float32, for the CPU.

    Args:
        model: dense, reduced, cut out of a super-network, or compressed; it is left as it is.
        images: (N, channels, height, width) in its input format, at least 2; real ones, on which outputs are compared.
        file: to write, `.onnx` or `.pt2`; an existing one is never replaced.
        format: "onnx", "torch" (a program of torch.export) or "aoti" (compiled to C++ by AOTInductor).
        method: reduction in place of the model's own, or "dense".
        int8: quantise the matrices of an ONNX file; how closely it agrees is measured and not judged.
        classes: their names, for the description in the file.
        more: further entries of that description, such as a certificate.

    Raises:
        OutputError: the file exists, or cannot be written.
        VitrimError: the model cannot be exported, something is missing, or the file computes something else; then
            there is no file.
    """
    check_place(file, format, int8)
    ready = prepared(_plain(model), method)
    about = {**described(ready, classes), "format": format, "int8": int8, **(more or {})}
    check_images(ready, images)
    program = make_program(ready)
    with tempfile.TemporaryDirectory(prefix="vitrim-export-") as folder:
        made = Path(folder) / Path(file).name
        # Nothing but a full disk is expected to go wrong here.
        with write_errors(made):
            FORMATS[format].write(program, about, made)
        agreement = compare(ready, open_file(str(made)), images)
        if int8:
            exact, made = made, Path(folder) / "int8" / made.name
            made.parent.mkdir()
            with write_errors(made):
                quantise(exact, made)
            agreement = compare(ready, open_file(str(made)), images, exact=False)
        _put(made.parent, Path(file))
    return Exported(Path(file), about, agreement, int8)


def open_as(model: nn.Module, runtime: str, folder: str | Path) -> ServedFile:
    """The model as a file of the format that a runtime runs, in a folder, opened; its outputs are not compared.

    Raises:
        VitrimError: the model cannot be exported, or something is missing.
    """
    name, form = next((name, form) for name, form in FORMATS.items() if form.runtime == runtime)
    form.check()
    ready = prepared(_plain(model))
    path = Path(folder) / f"given{form.suffix}"
    with write_errors(path):
        form.write(make_program(ready), {**described(ready, None), "format": name, "int8": False}, path)
    return open_file(str(path))


def _plain(model: nn.Module) -> nn.Module:
    """The model itself, or a copy where it is not in float32 on the CPU."""
    tensors = (*model.parameters(), *model.buffers())
    if all(one.device.type == "cpu" and (not one.is_floating_point() or one.dtype == torch.float32) for one in tensors):
        return model
    return copied(model).cpu().float()


def _put(folder: Path, file: Path) -> None:
    """Copy the file, and one with its weights where there is one, next to the others in its folder."""
    with write_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    made = sorted(path for path in folder.iterdir() if path.is_file())
    with replacing_files(file.parent) as staged:
        for path in made:
            if (file.parent / path.name).exists():
                raise OutputError(f"{file.parent / path.name} exists; choose another name or remove it")
            shutil.copyfile(path, staged / path.name)
