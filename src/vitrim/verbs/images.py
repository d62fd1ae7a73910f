"""The images that a verb reads: from its options, a run, or a certificate, for training, testing or comparing."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..data.specs import DataSpec
from ..errors import DataError
from ..options import from_dict

if TYPE_CHECKING:
    from torch import nn

    from ..compression import Certificate
    from ..compression.images import Pictures
    from ..data.streams import Stream


def images_of(models: list[str], data: Mapping[str, Any]) -> DataSpec:
    """The images that were named; a root without a name is a folder."""
    from ..study.compare import data_of, override_data

    named = _named(data)
    return data_of(models, named) if models else override_data(DataSpec(), named)


def recorded_images(certificate: "Certificate", data: Mapping[str, Any] | None = None) -> DataSpec | None:
    """The images of a certificate, with the `data` options instead of its own; None where it names none."""
    from ..study.compare import override_data

    recorded: Any = certificate.source.get("data")
    if not isinstance(recorded, dict):
        return None
    return override_data(from_dict(DataSpec, recorded, "the data of the certificate"), _named(data or {}))


def _named(data: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": "folder", **data} if "root" in data else dict(data)


def training_images(network: "nn.Module", spec: DataSpec, most: int) -> "Pictures":
    """At most so many training images, or images without classes where the folder has no splits."""
    from ..compression.images import read
    from ..data.splits import plain_stream

    flat = _flat(network, spec)
    stream = plain_stream(network, spec, train=True) if flat is None else flat
    return read(stream, min(most, spec.limit or most), spec.workers, labelled=False)


def unseen_images(network: "nn.Module", model: str, spec: DataSpec) -> "Pictures | None":
    """The test images, with their classes where these are the model's; None where there is no test split."""
    from ..compression.images import read
    from ..compression.run import MOST_UNSEEN
    from ..models import num_classes
    from ..models.classes import other_classes

    stream = None if _flat(network, spec) is not None else _test_stream(network, spec)
    if stream is None:
        return None  # Of images without splits, or of training images alone, some are kept for the certificate.
    classes = stream.images.classes
    own = num_classes(network) == len(classes) > 1 and not other_classes(model, classes)
    return read(stream, MOST_UNSEEN, spec.workers, labelled=own)


def images_to_compare(network: "nn.Module", spec: DataSpec, most: int) -> "Pictures":
    """At most so many images without classes: test images, or training images where there is no test split."""
    from ..compression.images import read
    from ..data.splits import plain_stream

    stream = _flat(network, spec)
    if stream is None:
        stream = _test_stream(network, spec)
    if stream is None:
        stream = plain_stream(network, spec, train=True)
    return read(stream, most, spec.workers, labelled=False)


def _test_stream(network: "nn.Module", spec: DataSpec) -> "Stream | None":
    """The test images; None where there is no test split and none is asked for."""
    from ..data.splits import plain_stream

    try:
        return plain_stream(network, spec)
    except DataError:
        if spec.test_split is not None:
            raise
        return None


def _flat(network: "nn.Module", spec: DataSpec) -> "Stream | None":
    """All images below a folder that has no training split."""
    from pathlib import Path

    from ..data.images import open_unlabelled
    from ..data.streams import Stream
    from ..data.transforms import transforms_for
    from ..models.input_format import InputFormat

    if spec.name != "folder" or spec.root is None or (Path(spec.root) / spec.train_split).is_dir():
        return None
    images = open_unlabelled(spec.root)
    images.mode = InputFormat.of(network, spec.image_size).mode
    return Stream(images, transforms_for(network, spec), skip=spec.on_corrupt == "skip")
