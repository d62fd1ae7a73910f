"""Files that other runtimes run, opened as modules: what `vitrim export` wrote, or an ONNX file from anywhere.

A `.pt2` file is a program: open only files that you trust.
"""

import json
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, VitrimError
from ..text import reason_of

SUFFIXES = (".onnx", ".pt2")
KEY = "vitrim"
"""Where a file holds its description: in the metadata of ONNX and AOTInductor, and as vitrim.json in torch.export."""
MISSING = "ONNX files need further packages; run: pip install 'vitrim[export]'"

ONNX, PROGRAM, AOTI = "ONNX Runtime", "torch.export", "AOTInductor"
"""What runs files."""

Run = Callable[[Tensor], Tensor]
Dims = tuple[int | None, ...]
"""(batch, channels, height, width) of the images that a file takes; None where any number will do."""


class ServedFile(nn.Module):
    """A file that is run on images (B, channels, height, width) in float32, on the CPU.

    Args:
        path: the file.
        runtime: what runs it: "ONNX Runtime", "torch.export" or "AOTInductor".
        run: the function of the file.
        dims: of the images that it takes.
        about: the description that `vitrim export` put into it; empty in other files.
    """

    def __init__(self, path: str, runtime: str, run: Run, dims: Dims, about: Mapping[str, Any]) -> None:
        super().__init__()
        self.path, self.runtime, self.dims, self.about = path, runtime, dims, about
        self._run = run

    def forward(self, images: Tensor) -> Tensor:
        """What the file computes."""
        return self._run(images)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # It holds no state.

    @property
    def macs(self) -> int | None:
        """MACs per image; None where the file does not say them."""
        return self.about.get("macs")

    @property
    def size(self) -> tuple[int, int, int] | None:
        """(channels, height, width) of its images; None where it takes several."""
        channels, height, width = self.dims[1:]
        return None if channels is None or height is None or width is None else (channels, height, width)

    @property
    def kind(self) -> str:
        """What it is called in messages."""
        return self.runtime

    def macs_at(self, size: tuple[int, int, int]) -> int | None:
        """MACs per image; the file takes images of one size alone."""
        return self.macs

    def prepared(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The file itself, which always runs in float32 on the CPU."""
        return self

    def compiled(self, model: nn.Module) -> Run:
        """The file itself, which is a program already."""
        return self

    def check(self, batch_size: int, size: tuple[int, int, int]) -> None:
        """Raise `VitrimError` unless it takes batches of so many images of this size."""
        batch, *own = self.dims
        if batch not in (None, batch_size):
            raise VitrimError(
                f"{self.path} takes batches of {batch} only, not of {batch_size}; use --batch_size {batch}"
            )
        if any(one not in (None, other) for one, other in zip(own, size, strict=True)):
            wanted = " x ".join("any" if one is None else str(one) for one in own)
            raise VitrimError(f"{self.path} takes images of {wanted}, not of {' x '.join(map(str, size))}")


def is_file(spec: object) -> bool:
    """Whether this text names such a file."""
    return isinstance(spec, str) and spec.endswith(SUFFIXES)


def check_name(path: str | Path) -> None:
    """Raise `CheckpointError` for a name with bytes that are no UTF-8, which no runtime opens."""
    if any("\udc80" <= letter <= "\udcff" for letter in str(path)):
        raise CheckpointError(f"{path} has a name that is not UTF-8, which no runtime opens; rename it")


def open_file(path: str, threads: int | None = None) -> ServedFile:
    """Open a file.

    Args:
        path: an ONNX file, or a `.pt2` file of torch.export or AOTInductor.
        threads: for ONNX Runtime; by default as many as PyTorch uses.

    Raises:
        CheckpointError: there is none, it is damaged, or it takes something else than images.
        VitrimError: a package that it needs is missing.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"there is no file {path}")
    check_name(path)
    try:
        if path.endswith(".onnx"):
            return _open_onnx(path, threads or torch.get_num_threads())
        with zipfile.ZipFile(path) as archive:
            compiled = any("/data/aotinductor/" in name for name in archive.namelist())
        return _open_aoti(path) if compiled else _open_program(path)
    except VitrimError:
        raise
    except Exception as error:  # Readers of foreign bytes fail in many ways.
        raise CheckpointError(f"{path} cannot be opened ({reason_of(error)}); export it again") from error


def _open_onnx(path: str, threads: int) -> ServedFile:
    try:
        import onnxruntime
    except ImportError:
        raise VitrimError(MISSING) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Else its threads wait busily for a while after each call, which slows what is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = session.get_inputs()
    if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) != 4:
        found = ", ".join(f"{one.type} {one.shape}" for one in inputs)
        raise CheckpointError(f"{path} takes {found}; one input of images (batch, channels, height, width) is needed")
    name, first = inputs[0].name, session.get_outputs()[0].name
    dims = tuple(one if isinstance(one, int) else None for one in inputs[0].shape)
    about = _parsed(session.get_modelmeta().custom_metadata_map.get(KEY))
    return ServedFile(path, ONNX, lambda x: torch.from_numpy(session.run([first], {name: x.numpy()})[0]), dims, about)


def _open_program(path: str) -> ServedFile:
    texts = {f"{KEY}.json": ""}
    program = torch.export.load(path, extra_files=texts)
    names = program.graph_signature.user_inputs
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    if len(values) != 1 or not isinstance(values[0], Tensor) or values[0].ndim != 4:
        raise CheckpointError(f"{path} takes something else than images (batch, channels, height, width)")
    dims = tuple(one if isinstance(one, int) else None for one in values[0].shape)
    module = program.module()
    return ServedFile(path, PROGRAM, lambda x: module(x), dims, _parsed(texts[f"{KEY}.json"]))


def _open_aoti(path: str) -> ServedFile:
    module = torch._inductor.aoti_load_package(path)
    about = _parsed(module.get_metadata().get(KEY))
    if not about:  # Compiled code checks nothing, so that the size of its images must be known.
        raise CheckpointError(f"{path} does not say which images it takes; write it with vitrim export")
    return ServedFile(path, AOTI, lambda x: module(x), (None, *about["input"]["size"]), about)


def _parsed(text: str | bytes | None) -> dict[str, Any]:
    return json.loads(text) if text else {}
