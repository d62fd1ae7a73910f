"""Certificates of exported files: measured again in the file's own runtime, or made for a file that has none.

A certificate lies in the description of the file, where the model was exported from a folder with a certificate, or
next to it as NAME.certificate.json. Times are compared within one runtime: the given model is exported in the same
format.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..elastic.chain import hash_of
from ..errors import CheckpointError, VitrimError
from ..exporting.run import open_as
from ..heartbeat import heartbeat
from ..measure.cost import cost
from ..measure.environment import environment
from ..measure.served import ServedFile
from ..output import replacing
from .certificate import Certificate, Line
from .fidelity import Fidelity
from .findings import COUNTED, Verified, findings
from .images import BATCH, Pictures
from .measured_lines import compared_lines, time_lines
from .timing import sessions
from .verification import check_enough, check_original, described

KEY, SUFFIX = "certificate", ".certificate.json"
BATCH_SIZE = 32
"""Images per batch where times are measured, unless a certificate or the file says another number."""


def for_description(certificate: Certificate) -> dict[str, Any]:
    """What the description of a file holds of a certificate: all but what was tried and how the folder is loaded."""
    return {KEY: json.loads(replace(certificate, tried=(), load=()).to_json())}


def certificate_of(served: ServedFile) -> Certificate | None:
    """The certificate of a file: the one that lies next to it, else the one in it; None without any.

    Raises:
        CheckpointError: it is damaged, or belongs to another file.
    """
    beside = Path(served.path + SUFFIX)
    if beside.is_file():
        found = Certificate.from_json(beside.read_text(encoding="utf-8", errors="replace"), beside)
        if found.weights != hash_file(served.path):
            raise CheckpointError(f"{beside} belongs to another file than {served.path}; remove it, or make it again")
        return found
    inside = served.about.get(KEY)
    return None if inside is None else Certificate.from_json(json.dumps(inside), f"the certificate in {served.path}")


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file, and of the one with its weights where they lie next to it."""
    digest = hashlib.sha256()
    for part in (Path(path), Path(f"{path}.data")):
        if part.is_file():
            with part.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def verify_file(
    served: ServedFile,
    certificate: Certificate,
    images: Pictures | None = None,
    original: nn.Module | None = None,
    *,
    notes: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> Verified:
    """Measure the statements of a certificate again for a file, in its own runtime, on the CPU.

    Args:
        served: the file, opened.
        certificate: of it, see `certificate_of`.
        images, original, notes, say: see `verification.verify`.

    Raises:
        VitrimError: the given model is another one than that of the certificate, or the file gives other outputs.
    """
    if original is not None:
        check_original(original, certificate, served.path)
    check_enough(images)
    found: dict[str, Line] = {}
    reasons: dict[str, str] = dict.fromkeys(COUNTED, "counted when the file was exported")
    if images is not None and original is not None:
        found |= {line.key: line for line in _compared(served, original, images, say)}
    whole = described(certificate) if original is None else original
    if whole is not None:
        timed, reason = _timed(served, whole, int(certificate.settings.get("batch_size", BATCH_SIZE)), say)
        found |= {line.key: line for line in timed}
        reasons |= dict.fromkeys(("time", "ms"), reason)
    return Verified(
        certificate, findings(certificate, found, images, original, **reasons), [*notes, _about_times(served)]
    )


def certify_file(
    served: ServedFile,
    images: Pictures,
    original: nn.Module,
    *,
    source: dict[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> Certificate:
    """A certificate for a file that has none: how close it is to the given model, and its time.

    Args:
        served: the file, opened.
        images: to compare on, with classes where accuracies are to be compared.
        original: the given model, on the CPU.
        source: what it and the images were opened from.
        say: called with lines for the user.
    """
    size = served.dims[0] or BATCH_SIZE
    spent = cost(original)
    given = {"macs": spent.macs, "params": spent.params}
    counted = {key: served.about.get(key) for key in COUNTED}
    lines = [Line(key, value, of=given[key]) for key, value in counted.items() if isinstance(value, int)]
    lines += _compared(served, original, images, say)
    timed, reason = _timed(served, original, size, say)
    return Certificate(
        asked="no budget", lines=[*lines, *timed], weights=hash_file(served.path), original=hash_of(original),
        reduction=served.about.get("reduction"), source=source or {}, environment=environment(),
        settings={
            "batch_size": size, "device": "cpu", "dtype": "float32", "compile": False,
            "threads": torch.get_num_threads(),
        },
        notes=[_about_times(served), *([f"Its time was not measured: {reason}."] if reason else [])],
    )  # fmt: skip


def write_certificate(certificate: Certificate, file: str | Path) -> None:
    """Write a certificate as JSON, or as a table where the name says so (.md, .csv, .html)."""
    if Path(file).suffix != ".json":
        certificate.table().write(file)
        return
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with replacing(file, overwrite=False) as staged:
        staged.write_text(certificate.to_json() + "\n", encoding="utf-8")


def outputs_of(served: ServedFile, images: Tensor) -> Tensor:
    """What a file gives for images (N, channels, height, width); the last batch is filled where it takes one size."""
    only = served.dims[0]
    found: list[Tensor] = []
    with torch.inference_mode():
        for part in images.split(only or BATCH):
            missing = (only or len(part)) - len(part)
            full = torch.cat([part, part[:1].expand(missing, -1, -1, -1)]) if missing else part
            found.append(served(full.contiguous())[: len(part)].float())
    return torch.cat(found)


def _compared(served: ServedFile, original: nn.Module, images: Pictures, say: Callable[[str], None]) -> list[Line]:
    say(f"comparing with the given model on {len(images)} images")
    channels, height, width = images.images.shape[1:]
    served.check(served.dims[0] or len(images), (channels, height, width))
    with heartbeat("comparing with the given model", say):
        fidelity = Fidelity(original, images, torch.device("cpu"))
        found = outputs_of(served, images.images)
    if found.shape != fidelity.reference.shape:
        gives, given = tuple(found.shape[1:]), tuple(fidelity.reference.shape[1:])
        raise VitrimError(
            f"{served.path} gives outputs of {gives} where the given model has {given}; name the one it was made from"
        )
    return compared_lines(fidelity, fidelity.judged(found))


def _timed(
    served: ServedFile, original: nn.Module, batch_size: int, say: Callable[[str], None]
) -> tuple[list[Line], str]:
    """The times of the file and of the given model in the same format, or no lines and the reason."""
    say(f"exporting the given model for {served.runtime}, and measuring the time in fresh rounds")
    size = served.dims[0] or batch_size
    where = tempfile.TemporaryDirectory(prefix="vitrim-verify-")
    with where as folder, heartbeat("exporting and timing the given model", say):
        try:
            given = open_as(original, served.runtime, folder)
        except VitrimError as error:
            return [], f"the given model cannot be exported ({error})"
        times = sessions(given, served, batch_size=size, device="cpu", dtype="float32", compile=False)
    return time_lines(times), ""


def _about_times(served: ServedFile) -> str:
    return (
        f"Times are those of {served.runtime} in float32 on the CPU, for the file and for the given model exported in "
        "the same format."
    )
