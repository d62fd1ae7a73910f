"""Opening models of Hugging Face transformers: from a folder that `save_pretrained` wrote, or from the hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ....errors import CheckpointError, VitrimError
from ....text import short_name
from ...architectures import check_patches
from .config import image_size, names_in, set_image_size
from .images import library, read_processor, set_images
from .layout import LAYOUTS, pair
from .quiet import quiet
from .sizes import resize

SOURCE = "hf:"
"""How the names of models begin that are a folder written by `save_pretrained`, or a name on the Hugging Face hub."""


def opened(spec: str, args: Mapping[str, Any]) -> nn.Module:
    """The model in a folder written by `save_pretrained`, or with this name on the hub, with its processor's format.

    Raises:
        CheckpointError: nothing there, no weights, no processor, or a model that is no Vision Transformer.
    """
    transformers, source = library(), spec.removeprefix(SOURCE)
    given = {key: value for key, value in args.items() if value is not None}
    size, classes = given.pop("img_size", None), given.pop("num_classes", None)
    if given:
        raise VitrimError(f"{spec} brings its own architecture; leave {', '.join(given)} out")
    if not source or ("/" in source and not Path(source).exists() and source.startswith((".", "/", "~"))):
        raise CheckpointError(f"nothing at {source or spec}: give a folder written by save_pretrained or a hub name")
    config = _configuration(source)
    kind = _kind(config, source)
    layout = next(layout for layout in LAYOUTS.values() if kind.__name__ in layout.names)
    fresh: dict[str, Any] = {}
    classifying = [name for name, whole in layout.wholes.items() if whole.classifies]
    if classes and kind.__name__ not in classifying and classifying:
        kind, fresh = getattr(layout.module, classifying[0]), {"num_labels": classes}  # With a new classifier.
    what = "weights (model.safetensors)"
    model, report = _loaded(kind, source, what, dtype=torch.float32, output_loading_info=True, **fresh)
    new = () if not fresh else layout.wholes[kind.__name__].heads
    missing = [name for name in report["missing_keys"] if name.partition(".")[0] not in (*new, "pooler")]
    if missing:
        raise CheckpointError(f"the weights of {source} lack {short_name(sorted(missing)[0])} of a {kind.__name__}")
    _check_processor(source)
    processor = _loaded(transformers.AutoImageProcessor, source, "processor (preprocessor_config.json)")
    images, shown = read_processor(processor, source)
    set_images(model, images)
    if layout.any_size:
        set_image_size(layout, model, shown)
    elif shown != layout.own_size(layout.tower_of(model).config):
        raise CheckpointError(f"the processor of {source} gives images of {shown} px, which its model does not take")
    if size is not None and pair(size) != image_size(layout, model):
        check_patches(model, pair(size))
        resize(layout, model, pair(size))
    return model.eval()


def class_names_at(spec: str) -> list[str] | None:
    """The names of the classes of what `opened` takes; None where it has only numbers."""
    return names_in(_configuration(spec.removeprefix(SOURCE)))


def _kind(config: Any, source: str) -> Any:
    """The class that opens this configuration: the one that wrote it, or the tower of its family."""
    fitting = [layout for layout in LAYOUTS.values() if config.model_type in layout.model_types]
    for layout in fitting:
        if written := [name for name in config.architectures or () if name in layout.names]:
            return getattr(layout.module, written[0])
    if fitting:
        return getattr(fitting[0].module, fitting[0].tower)
    known = ", ".join(sorted({kind for layout in LAYOUTS.values() for kind in layout.model_types}))
    raise CheckpointError(f"{source} is a model of the type {config.model_type!r}; types that vitrim opens: {known}")


def _configuration(source: str) -> Any:
    return _loaded(library().AutoConfig, source, "configuration (config.json)")


def _check_processor(source: str) -> None:
    """Raise `CheckpointError` for a folder that does not say what images its model expects."""
    files = ("preprocessor_config.json", "processor_config.json")
    if Path(source).is_dir() and not any((Path(source) / file).exists() for file in files):
        raise CheckpointError(
            f"{source} has no {files[0]}, which says what images the model expects; save its image processor there: "
            "AutoImageProcessor.from_pretrained(NAME).save_pretrained(FOLDER)"
        )


def _loaded(kind: Any, source: str, what: str, **options: Any) -> Any:
    try:
        with quiet():
            return kind.from_pretrained(source, **options)
    except Exception as error:  # Hubs, caches and files fail in many ways.
        # Its first sentence is the reason; advice that is about transformers follows.
        reason = short_name(" ".join(str(error).split()).partition(". ")[0], 160)
        raise CheckpointError(f"no {what} of {source} can be had: {reason}") from error
