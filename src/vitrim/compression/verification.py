"""Measure the statements of a certificate again, here, and say of each one whether it holds."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.batches import Images
from ..elastic.chain import hash_of
from ..errors import CheckpointError, DataError, VitrimError
from ..heartbeat import heartbeat
from ..measure.cost import cost
from ..models import attached, find_adapter, load, num_classes
from ..models.compiling import check_compiler
from ..models.files.description import parse
from ..models.files.rebuild import rebuild
from ..models.foreign_macs import num_parameters
from ..models.shapes_only import shapes_only
from ..text import counted
from .certificate import Certificate, Line
from .fidelity import Fidelity
from .findings import COUNTED, TIMES, Verified, findings
from .images import LEAST, MOST_UNSEEN, Pictures, gather
from .measured_lines import compared_lines, time_lines
from .request import device_named
from .timing import sessions


def open_certified(folder: str | Path) -> tuple[nn.Module, Certificate]:
    """The model in a folder and its certificate.

    Raises:
        CheckpointError: one of them is missing or damaged, or the certificate is of other weights.
    """
    certificate = Certificate.read(folder)
    model = load(folder)
    if hash_of(model) != certificate.weights:
        raise CheckpointError(
            f"the certificate in {folder} belongs to other weights than those in that folder; run vitrim compress again"
        )
    return model, certificate


def verify(
    folder: str | Path,
    images: Images | Pictures | None = None,
    original: nn.Module | None = None,
    *,
    device: str | torch.device | None = None,
    notes: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> Verified:
    """Measure the statements of the certificate in a folder again.

    Args:
        folder: what `Compressed.save` or `vitrim compress` wrote.
        images: to compare on, in any form that `compress` takes, none of which the search used; with classes where
            accuracies are to be compared. At most 5,000 of them are used. None: nothing is compared.
        original: the given model. None: one of its description with random weights, which takes the same time.
        device: where to measure; by default as in the certificate, or the CPU where there is none such.
        notes: sentences about the images, for the reader of the table.
        say: called with lines for the user.

    Raises:
        CheckpointError: no certificate, a damaged one, or one of other weights.
        VitrimError: the given model is another one than that of the certificate.
        DataError: fewer than 16 images, images of another size than the model takes, or labels that are not classes of
            it.
    """
    model, certificate = open_certified(folder)
    if original is not None:
        check_original(original, certificate, folder)
    pictures = images if images is None or isinstance(images, Pictures) else _pictures(images, model)
    check_enough(pictures)
    settings = dict(certificate.settings)
    place = torch.device(settings.get("device", "cpu")) if device is None else device_named(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        say("the certificate was measured on CUDA, which is not available; times are those of the CPU")
        place = torch.device("cpu")
    found: dict[str, Line] = {line.key: line for line in _counted(model, certificate)}
    if pictures is not None and original is not None:
        say(f"comparing with the given model on {counted(len(pictures), 'image')}")
        with heartbeat("comparing with the given model", say):
            found |= {line.key: line for line in _compared(model.to(place), original.to(place), pictures, place)}
    reasons: dict[str, str] = {}
    if settings.get("compile"):
        try:
            check_compiler(place)
        except VitrimError as error:
            reasons = dict.fromkeys(TIMES, f"compiled there, but {error}")
    if not reasons and (whole := described(certificate) if original is None else original) is not None:
        say("measuring the time in fresh rounds")
        with heartbeat("measuring the time", say):
            found |= {line.key: line for line in _timed(whole, model, settings, place)}
    return Verified(certificate, findings(certificate, found, pictures, original, **reasons), notes)


def check_enough(pictures: Pictures | None) -> None:
    """Raise `DataError` for so few images that any statement would hold on them."""
    if pictures is not None and len(pictures) < LEAST:
        few = "1 image is" if len(pictures) == 1 else f"{len(pictures)} images are"
        raise DataError(f"{few} too few to compare models on; give {LEAST} or more")


def _pictures(images: Images, model: nn.Module) -> Pictures:
    """Images for a comparison, with their classes where they have some that the model can predict."""
    size, classes = find_adapter(model).geometry(model).input_size, num_classes(model)
    return gather(images, size, MOST_UNSEEN, classes=classes if classes > 1 else None, needed=False)


def is_original(model: nn.Module, certificate: Certificate) -> bool:
    """Whether this is the given model of a certificate.

    The weights alone do not say so: a model of which only tokens were removed has those of the given one.
    """
    return attached(model) is None and hash_of(model) == certificate.original


def check_original(original: nn.Module, certificate: Certificate, place: str | Path) -> None:
    """Raise `VitrimError` unless this is the given model of a certificate, which lies in `place`."""
    if not is_original(original, certificate):
        raise VitrimError(f"the certificate in {place} compares with another model than this; give the one compressed")


def described(certificate: Certificate) -> nn.Module | None:
    """A model like the given one with random weights; None where the certificate does not describe it."""
    text = certificate.source.get("description")
    if not isinstance(text, str):
        return None
    record = parse(text, "the certificate")
    with shapes_only():
        size = num_parameters(rebuild(record))
    # Before memory is taken for what may be any size.
    if "params" not in certificate or size != certificate["params"].of:
        raise CheckpointError("the certificate describes another model than the one it compares with; compress again")
    return rebuild(record).eval()


def _counted(model: nn.Module, certificate: Certificate) -> list[Line]:
    found = cost(model)
    return [Line(key, getattr(found, key), asked=certificate[key].asked) for key in COUNTED if key in certificate]


def _compared(model: nn.Module, original: nn.Module, images: Pictures, device: torch.device) -> list[Line]:
    fidelity = Fidelity(original, images, device)
    return compared_lines(fidelity, fidelity.compare(model))


def _timed(original: nn.Module, model: nn.Module, settings: Mapping[str, Any], device: torch.device) -> list[Line]:
    return time_lines(sessions(
        original, model, batch_size=int(settings.get("batch_size", 32)), device=device,
        dtype=str(settings.get("dtype", "float32")), compile=bool(settings.get("compile", False)),
    ))  # fmt: skip
