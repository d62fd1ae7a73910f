"""The images that a verb reads: from its options, a run, or a certificate, for training, testing or comparing."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.specs import DataSpec
from ..errors import DataError, NoSplitError, VitrimError
from ..options import from_dict
from ..places import RECIPE, where_made
from .delivery import say

if TYPE_CHECKING:
    from torch import nn

    from ..compression import Certificate
    from ..compression.images import Pictures
    from ..data.streams import Stream


def images_of(models: Sequence[str], given: Mapping[str, Any]) -> DataSpec:
    """The images of the first model with the `given` options of `DataSpec` instead of its own.

    Where `given` names another data set, folder and splits of the first model do not apply. Its image size does not
    apply either: each model has its own.

    Raises:
        DataError: no images are given, and the first model comes with none.
        VitrimError: there is no such model.
    """
    found = known_images(models[0], given)
    if found is None:
        from ..models.files.build import check_name, split_spec

        check_name(split_spec(models[0])[0])  # A misspelt name is reported first.
        raise DataError("no images are given; add --data.root FOLDER, or --data.name digits for the built-in digits")
    return found


def known_images(model: str, given: Mapping[str, Any]) -> DataSpec | None:
    """As `images_of` for one model; None where no images are given and it comes with none."""
    own = own_images(model)
    if own is not None and not names_images(given):
        _check_there(model, own)
    if own is None and not names_images(given):
        return None
    return override_data(DataSpec() if own is None else replace(own, image_size=None), given)


def names_images(given: Mapping[str, Any]) -> bool:
    """Whether these options say which images."""
    return "name" in given or "root" in given


def own_images(model: str) -> DataSpec | None:
    """The images that a folder names: those of its run, or of its certificate; None without any.

    A relative path in it begins where the command ran that wrote the folder.
    """
    if os.path.isfile(Path(model) / RECIPE):
        from ..train.recipe import Recipe

        return Recipe.read(Path(model) / RECIPE).data
    from ..compression.certificate import FILE, Certificate

    found = recorded_images(Certificate.read(model)) if os.path.isfile(Path(model) / FILE) else None
    base = where_made(model)
    if found is None or found.root is None or base is None:
        return found
    return replace(found, root=os.path.normpath(base / found.root))


def _check_there(model: str, spec: DataSpec) -> None:
    """Raise `DataError` where a folder of images was relative to another place, and is not there."""
    base = where_made(model)
    if base is None or spec.root is None or spec.download or os.path.isdir(spec.root):
        return
    raise DataError(
        f"the images of {model} are not here: {os.path.relpath(spec.root, base)}, which was {spec.root} when it was "
        "made; give --data.root FOLDER"
    )


def recorded_images(certificate: "Certificate") -> DataSpec | None:
    """The images of a certificate; None where it names none."""
    recorded: Any = certificate.source.get("data")
    return from_dict(DataSpec, recorded, "the data of the certificate") if isinstance(recorded, dict) else None


def override_data(own: DataSpec, given: Mapping[str, Any]) -> DataSpec:
    """These images with the `given` options instead of their own; see `images_of`."""
    from ..data.digits import BUILT_IN

    new = DataSpec()
    if "root" in given and own.name in BUILT_IN:
        given = {"name": "folder", **given}  # What is built in lies in no folder.
    if given.get("name", own.name) != own.name:
        own = replace(own, root=new.root, download=new.download, train_split=new.train_split, test_split=new.test_split)
    return replace(own, **given)


def training_stream(network: "nn.Module", spec: DataSpec) -> "Stream":
    """The training images, or all images of a folder that has no splits."""
    from ..data.splits import plain_stream

    return _flat(network, spec) if _is_flat(spec) else plain_stream(network, spec, train=True)


def test_stream(network: "nn.Module", spec: DataSpec) -> "Stream | None":
    """The test images; None, with a line that says so, where there is no test split and none is asked for.

    Raises:
        DataError: there is a test split that cannot be opened.
    """
    from ..data.splits import plain_stream

    if _is_flat(spec):
        say(f"{spec.root} has no folder {spec.train_split}: all images below it are taken, without classes")
        return None
    try:
        return plain_stream(network, spec)
    except NoSplitError as error:
        if spec.test_split is not None:
            raise
        say(f"{error}: training images stand in for test images, without classes")
        return None


def measured_on(stream: "Stream", number: int, *, test: bool) -> dict[str, Any]:
    """The record of the images that something was measured on, as in the `source` of a certificate."""
    return {"place": stream.images.place, "split": "test" if test else "train", "number": number}


def knows_classes(network: "nn.Module", model: str, stream: "Stream") -> bool:
    """Whether the classes of the images are those of the model."""
    from ..models import num_classes
    from ..models.files.classes import other_classes

    classes = stream.images.classes
    return num_classes(network) == len(classes) > 1 and not other_classes(model, classes)


def images_to_compare(network: "nn.Module", spec: DataSpec, most: int) -> "Pictures":
    """At most so many images without classes: test images, or training images where there is no test split."""
    from ..compression.images import read

    stream = test_stream(network, spec)
    stream = training_stream(network, spec) if stream is None else stream
    return read(stream, most, spec.workers, labelled=False)


def check_dense(network: "nn.Module", model: str, verb: str) -> None:
    """Raise `VitrimError` for a model that reduces its tokens already, with what to do about it on the command line."""
    from ..models import attached

    handle = attached(network)
    if handle is None:
        return
    by = "the last block" if handle.reduction is None else str(handle.reduction)
    raise VitrimError(
        f"{model} is reduced already, by {by}; {verb} the model that it was made from, or write a dense copy in "
        f"Python: m = vitrim.load({model!r}); vitrim.attached(m).remove(); vitrim.save(m, FOLDER)"
    )


def _is_flat(spec: DataSpec) -> bool:
    """Whether it is a folder that has no training split, of which no test split is asked for."""
    if spec.name != "folder" or spec.root is None or spec.test_split is not None:
        return False
    root = Path(spec.root)
    return root.is_dir() and not (root / spec.train_split).is_dir()


def _flat(network: "nn.Module", spec: DataSpec) -> "Stream":
    """All images below a folder."""
    from ..data.data_sets import open_unlabelled
    from ..data.streams import Stream
    from ..data.transforms import transforms_for
    from ..models.input_format import InputFormat

    assert spec.root is not None
    images = open_unlabelled(spec.root)
    images.mode = InputFormat.of(network, spec.image_size).mode
    return Stream(images, transforms_for(network, spec), skip=spec.on_corrupt == "skip")
