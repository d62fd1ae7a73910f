"""The names of the classes of a saved model, in the order of its classifier."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from ..create import SOURCES
from ..families.hf.hub import class_names_at
from ..finding import adapter_of
from .build import split_spec, transformers_name
from .store import WEIGHTS, read_description, saved_folder, weights_path

_SYNSET = re.compile(r"n\d{8}")


def classes_of(spec: str | Path) -> list[str] | None:
    """The names that were saved with a model: in a run folder, a saved folder, its weights, NAME@FOLDER or hf:NAME.

    None for everything else, and where no names were saved.
    """
    if (found := transformers_name(str(spec))) is not None:
        return class_names_at(found)
    path = Path(spec if os.path.exists(spec) else split_spec(str(spec))[1] or spec)
    folder = saved_folder(path.parent if path.name == WEIGHTS else path)
    return None if folder is None else read_description(weights_path(folder)).classes


def kept_classes(spec: str | Path) -> dict[str, list[str]]:
    """For `save` of a model that is made from this one and keeps its classifier: its classes, if they are known."""
    known = classes_of(spec)
    return {} if known is None else {"classes": known}


def other_classes(spec: str | Path, classes: Sequence[str]) -> str:
    """In which class, in words, a saved model differs from these; empty if names and order agree, or are not known."""
    known = classes_of(spec)
    if known is None or known == list(classes):
        return ""
    one, other = next(((a, b) for a, b in zip(known, classes, strict=False) if a != b), (known, list(classes)))
    return f"{spec} was trained on class {one} where the images have {other}"


def class_labels(spec: str | Path, model: nn.Module) -> list[str]:
    """A text for each class of a model, no two alike: its name where that is known, else its number.

    Names of folders of ImageNet (n02123045) become what they mean. timm's published weights are named after the
    ImageNet that has so many classes; for other weights that is a guess, and the text says so.
    """
    adapter = adapter_of(model)
    number = adapter.classifier(model).classes
    names = classes_of(spec) or adapter.class_names(model)
    if names is None or len(names) != number:
        names = _imagenet_labels(str(spec), number)
    elif all(_SYNSET.fullmatch(name) for name in names):
        known = ImageNetInfo("imagenet-22k")
        names = [known.label_name_to_description(name) for name in names]
    repeated = Counter(names)
    return [f"{name} ({at})" if repeated[name] > 1 else name for at, name in enumerate(names)]


def _imagenet_labels(spec: str, number: int) -> list[str]:
    subset = infer_imagenet_subset({"num_classes": number})
    if subset is None:
        return [f"class {at}" for at in range(number)]
    known = ImageNetInfo(subset)
    names = [known.index_to_description(at) for at in range(number)]
    published = spec.endswith("@pretrained") or spec.startswith(SOURCES)
    return names if published else [f"class {at} (in ImageNet: {name})" for at, name in enumerate(names)]
