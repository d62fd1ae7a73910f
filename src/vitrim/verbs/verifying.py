"""The verb that measures the statements of a certificate again, of a folder or of an exported file."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.specs import DataSpec
from ..errors import DataError, VitrimError
from ..places import where_made
from .delivery import TRAINING_ONLY, Count, Device, TestImages, check_used, say
from .images import (
    images_of,
    known_images,
    knows_classes,
    measured_on,
    names_images,
    override_data,
    own_images,
    recorded_images,
    test_stream,
    training_stream,
)

if TYPE_CHECKING:
    from torch import nn

    from ..compression import Certificate
    from ..compression.images import Pictures
    from ..compression.searched import Searched
    from ..measure.served import ServedFile


def verify(
    folder: str,
    data: TestImages,
    original: str | None = None,
    num_images: Count | None = None,
    device: Device = "auto",
    out: str | None = None,
) -> None:
    """Measure the statements of a certificate again, here, and say for each one whether it holds.

    Args:
        folder: folder written by vitrim compress, or an exported file (.onnx, .pt2; a .pt2 file is a program, so name
            none that you do not trust). A file without a certificate gets one.
        data: the images to compare on; by default those of the certificate, where they are here.
        original: the model that was compressed; by default it is opened from where it was then.
        num_images: images to compare on at most; by default 5000 test images, or 1024 where there is no test split.
        device: where to measure; auto takes the kind of device of the certificate where it is here.
        out: file to write the table to (.md, .csv, .json or .html).
    """
    from ..compression.remarks import images_note
    from ..compression.searched import Searched
    from ..measure.served import is_file, open_file
    from .delivery import check_table, deliver

    check_table(out)
    check_used("verify", data, TRAINING_ONLY, "the test images")
    served = open_file(folder) if is_file(folder) and not os.path.isdir(folder) else None
    if served is not None and device == "cuda":
        raise VitrimError(f"{folder} runs on the CPU; leave --device out")
    certificate = _certificate(folder, served)
    if certificate is None:
        assert served is not None
        _certify(served, original, data, num_images, out)
        return
    recorded = own_images(folder) if served is None else recorded_images(certificate)
    if recorded is None and data and not names_images(data):
        raise DataError(f"the certificate in {folder} names no images; add --data.root FOLDER")
    spec = override_data(recorded or DataSpec(), data) if recorded or data else None
    size = None if recorded is None else recorded.image_size
    given = _original(original, certificate, size, None if served is not None else where_made(folder))
    pictures, notes = None, ()
    if given is not None and spec is not None:
        name = folder if served is None else original or certificate.source["model"]
        try:
            pictures, measured, notes = _pictures(given, name, Searched.of(certificate), spec, num_images)
            notes = (images_note(measured), *notes)
        except DataError as error:
            if data:
                raise
            notes = (f"The images of the certificate cannot be read here: {error}",)  # They may be elsewhere.
    found = _measured(folder, served, certificate, pictures, given, device, notes)
    deliver(found.table(), out)
    if not found.holds:
        raise SystemExit(1)


def _certificate(folder: str, served: "ServedFile | None") -> "Certificate | None":
    """That of a folder, or of a file if it has one."""
    from ..compression.files import certificate_of
    from ..compression.verification import open_certified

    return open_certified(folder)[1] if served is None else certificate_of(served)


def _measured(
    folder: str, served: "ServedFile | None", certificate: "Certificate", pictures: "Pictures | None",
    given: "nn.Module | None", device: str, notes: Sequence[str],
) -> Any:  # fmt: skip
    from ..compression.files import verify_file
    from ..compression.verification import verify as run

    if served is not None:
        return verify_file(served, certificate, pictures, given, notes=notes)
    return run(folder, pictures, given, device=None if device == "auto" else device, notes=notes)


def _certify(
    served: "ServedFile", original: str | None, data: dict[str, Any], most: int | None, out: str | None
) -> None:
    """Make a certificate for a file that has none, and print it."""
    from dataclasses import asdict

    from ..compression.files import SUFFIX, certify_file, write_certificate
    from ..models import open_model

    if original is None:
        raise VitrimError(
            f"{served.path} holds no certificate; name the model it was made from with --original, and one is made"
        )
    spec = known_images(original, data) or images_of([original], data)
    given = open_model(original, spec.image_size)
    pictures, measured, _ = _pictures(given, original, None, spec, most)
    source = {"model": original, "data": asdict(spec), "measured": measured}
    found = certify_file(served, pictures, given, source=source)
    print(found.table().text())
    if out is None:
        say(f"to keep it, add --out {served.path}{SUFFIX}, where vitrim verify looks for it")
        return
    write_certificate(found, out)
    say(f"written to {out}")


def _pictures(
    network: "nn.Module", folder: str, used: "Searched | None", spec: DataSpec, most: int | None
) -> tuple["Pictures", dict[str, Any], Sequence[str]]:
    """Images to compare on, without those that a search used as far as these are known.

    With the record of where they are, and with what to say about them.
    """
    from ..compression.images import MOST_UNSEEN, read
    from ..compression.request import MOST_IMAGES
    from ..compression.searched import NOT_KNOWN

    test = test_stream(network, spec)
    if test is not None:
        labelled = knows_classes(network, folder, test)
        notes = () if used is None else (used.elsewhere,)
        found = read(test, most or MOST_UNSEEN, spec.workers, labelled=labelled)
        return found, measured_on(test, len(found), test=True), notes
    train = training_stream(network, spec)
    start, note = (0, NOT_KNOWN) if used is None else used.among(train)
    found = read(train, most or MOST_IMAGES, spec.workers, labelled=False, start=start)
    return found, measured_on(train, len(found), test=False), (note,)


def _original(
    given: str | None, certificate: "Certificate", size: int | None, base: Path | None = None
) -> "nn.Module | None":
    """The model that was compressed, at its image size; None where it is not here any more and none was named.

    A relative path in the certificate begins at `base`.
    """
    from ..compression.verification import is_original
    from ..models import open_model
    from ..models.files.build import split_spec

    recorded: Any = certificate.source.get("model")
    if isinstance(recorded, str) and base is not None and os.path.exists(base / recorded):
        recorded = str(base / recorded)
    # A model that only a file names is opened from this machine alone: a file never starts a download.
    if given is None and not (isinstance(recorded, str) and os.path.exists(split_spec(recorded)[1] or recorded)):
        return None
    try:
        model = open_model(given or recorded, size)
    except VitrimError:
        if given is not None:
            raise
        return None
    if is_original(model, certificate):
        return model
    if given is not None:
        raise VitrimError(f"{given} is another model than the one that was compressed; name that one")
    return None
