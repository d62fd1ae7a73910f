"""The verb that writes a model as a file for other runtimes."""

import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ..data.specs import DataSpec
from ..errors import CheckpointError, DataError
from ..heartbeat import heartbeat
from ..options import Range
from .delivery import TRAINING_ONLY, TestImages, check_used, say
from .images import images_to_compare, known_images, override_data

if TYPE_CHECKING:
    from torch import nn

EXACT, INT8 = 16, 256
"""Images to compare on: where outputs must be equal, and where it is measured how often the class is the same."""


def export(
    model: str,
    data: TestImages,
    out: str,
    format: Literal["onnx", "torch", "aoti"] = "onnx",
    method: str | None = None,
    int8: bool = False,
    num_images: Annotated[int, Range(2, 1_000_000)] | None = None,
) -> None:
    """Write a model as a file that other runtimes run; its outputs are compared before the file is kept.

    Args:
        model: a timm name, NAME@FILE (with weights from a file), a folder written by vitrim or transformers, hf:NAME,
            or a run folder.
        data: images to compare outputs on; by default those of the run or of the certificate in the folder, else the
            built-in digits.
        out: file to write, .onnx or .pt2; an existing one is never replaced.
        format: "onnx", "torch" (a program of torch.export, a .pt2 file), or "aoti" (compiled by AOTInductor for this
            kind of processor, a .pt2 file; needs a C++ compiler and minutes).
        method: reduction such as "TopK() @ KeepRate(0.7)" in place of the model's own; "dense" removes any.
        int8: quantise the matrices of an ONNX file; how closely it agrees with the model is measured and printed.
        num_images: images to compare on, the first alone and the others in batches of 32; by default 16, with int8 256.
    """
    from ..compression.files import KEY
    from ..exporting.run import check_place
    from ..exporting.run import export as write
    from ..models import has_weights, open_model
    from ..models.files.classes import classes_of

    check_place(out, format, int8)
    check_used("export", data, TRAINING_ONLY, "the test images")
    spec = known_images(model, data)
    if spec is None:
        if int8:
            raise DataError("how often an int8 file gives the same class depends on your images; give --data.root DIR")
        say("no images are named, so that outputs are compared on the built-in digits; --data.root DIR takes yours")
        spec = override_data(DataSpec(), data)
    network = open_model(model, spec.image_size)
    if not has_weights(model):
        say(
            f"vitrim export: weights are random, which will do for timing; write {model}@pretrained or {model}@FILE",
            error=True,
        )
    pictures = images_to_compare(network, spec, num_images or (INT8 if int8 else EXACT))
    with heartbeat("exporting", partial(print, file=sys.stdout)):  # Exporters are run with another standard output.
        found = write(
            network, pictures.images, out, format=format, method=method, int8=int8, classes=classes_of(model),
            more=None if method is not None else _certificate(model, network),
        )  # fmt: skip
    say(found.text())
    if KEY in found.about:
        say(f"the certificate of {model} is in the file; to measure it again: vitrim verify {out}")


def _certificate(model: str, network: "nn.Module") -> dict[str, Any] | None:
    """For the description of the file: the certificate of a folder, if it is that of these weights."""
    from ..compression.certificate import FILE, Certificate
    from ..compression.files import for_description
    from ..elastic.chain import hash_of

    if not os.path.isfile(Path(model) / FILE):
        return None
    certificate = Certificate.read(model)
    if hash_of(network) != certificate.weights:
        raise CheckpointError(
            f"the certificate in {model} belongs to other weights than those in that folder; remove {FILE} to export it"
        )
    return for_description(certificate)
