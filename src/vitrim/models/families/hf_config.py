"""Building and describing models of Hugging Face transformers, and the format of their images."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import CheckpointError, UnsupportedModelError, VitrimError
from ...text import short_name
from ..adapter import Description
from ..architectures import check_patches
from .hf_layout import LAYOUTS, Layout, Whole, layout_of, pair

SOURCE = "hf:"
"""How the names of models begin that are a folder written by `save_pretrained`, or a name on the Hugging Face hub."""
Images = dict[str, Any]
_OWN, _SIZE = "vitrim_images", "vitrim_image_size"
"""Attributes of a model: what its images are like, and their (height, width) where the model takes all sizes."""
_MEANT = {"num_classes": "num_labels", "img_size": "image_size", "in_chans": "num_channels"}
"""Arguments that mean the same in every family."""
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def library() -> Any:
    """The package transformers; `VitrimError` with the command that installs it where it is missing."""
    try:
        import transformers
    except ImportError:
        raise VitrimError("transformers is not installed; run: pip install 'vitrim[hf]'") from None
    return transformers


def image_size(layout: Layout, model: Any) -> tuple[int, int]:
    """(height, width) of the images of this model."""
    return vars(model).get(_SIZE) or layout.own_size(layout.tower_of(model).config)


def set_image_size(layout: Layout, model: Any, size: tuple[int, int]) -> None:
    """Note the size of the images of a model that takes all sizes."""
    own = layout.own_size(layout.tower_of(model).config)
    vars(model).pop(_SIZE, None)
    if size != own:
        vars(model)[_SIZE] = size


def build(name: str, args: Mapping[str, Any], pretrained: bool, images: Mapping[str, Any]) -> nn.Module:
    """See `Adapter.build`."""
    if name.startswith(SOURCE):
        return opened(name, args)
    library()
    if pretrained:
        raise CheckpointError(f"{name} is a kind of model without weights of its own; write hf:NAME, a name on the hub")
    layout = next(layout for layout in LAYOUTS.values() if name in layout.names)
    kind, tower = getattr(layout.module, name), getattr(layout.module, layout.tower)
    given = {_MEANT.get(key, key): value for key, value in args.items() if value is not None}
    given = {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}
    # A model that takes images of all sizes has positions for one of them.
    size = given.pop("image_size", None)
    positions = given.pop("position_size", size)
    if not layout.any_size and size is not None and pair(positions) != pair(size):
        raise VitrimError(f"{name} takes images of the size that its positions are for; leave position_size out")
    if positions is not None:
        given |= layout.sized(given.get("patch_size", tower.config_class.patch_size), _plain_size(positions))
    known = {field.name for field in fields(tower.config_class)} | {"num_labels"}
    known |= {"out_indices"} if layout.maps else set()
    if unknown := [key for key in given if key not in known]:
        raise VitrimError(f"{name} does not take {short_name(unknown[0])}; it takes {', '.join(sorted(known))}")
    try:
        if kind.config_class is tower.config_class:
            config = kind.config_class(**given)
        else:
            labels = {"num_labels": given.pop("num_labels")} if "num_labels" in given else {}
            config = kind.config_class(vision_config=given, **labels)
        model = kind(config)
    except Exception as error:  # transformers builds with what it is given and fails in many places.
        reason = short_name(" ".join(str(error).split()), 200)
        raise VitrimError(f"{name} cannot be built with {short_name(given, 150)}: {reason}") from error
    if size is not None:
        set_image_size(layout, model, pair(size))
    vars(model)[_OWN] = {**_default_images(layout), **images}
    return model


def describe(layout: Layout, model: Any) -> Description:
    """See `Adapter.describe`."""
    config, base = layout.tower_of(model).config, {field.name for field in fields(library().PreTrainedConfig)}
    own = type(config)()
    args: dict[str, Any] = {}
    for field in fields(type(config)):
        value = getattr(config, field.name)
        if field.name in base or field.name.startswith("_"):  # The latter say what a backbone gives.
            continue
        if value != getattr(own, field.name) and not isinstance(value, Mapping):
            args[field.name] = list(value) if isinstance(value, tuple | list) else value
    if layout.maps:
        args["out_indices"] = list(config.out_indices)
    args["position_size"] = list(layout.own_size(config))
    args["image_size"] = list(image_size(layout, model))
    if (whole := layout.whole(model)) is not None and whole.classifies:
        args["num_labels"] = int(getattr(getattr(model, whole.heads[0]), "out_features", 0))
    return Description(type(model).__name__, {_named(key): value for key, value in args.items()}, images_of(model))


def images_of(model: Any) -> Images:
    """What the images of this model are like.

    Raises:
        UnsupportedModelError: its weights come from somewhere, and the processor that belongs to them is not there.
    """
    if (own := vars(model).get(_OWN)) is not None:
        return dict(own)
    source = getattr(model, "name_or_path", "") or ""
    layout = layout_of(model)
    assert layout is not None
    if not source:
        return _default_images(layout)
    try:
        processor = library().AutoImageProcessor.from_pretrained(source, local_files_only=True)
    except Exception:  # Whatever is wrong, its format is not known.
        raise UnsupportedModelError(
            f"what images this {type(model).__name__} expects is not known, since {source} has no processor here; save "
            "it there with processor.save_pretrained, or give size, mean and std"
        ) from None
    return read_processor(processor, source)[0]


def reset_classifier(layout: Layout, model: Any, whole: Whole, classes: int) -> None:
    """Put fresh classifiers in the place of those of the model; 0 removes them."""
    for name in whole.heads:
        old = getattr(model, name)
        width = getattr(old, "in_features", layout.tower_of(model).config.hidden_size)
        like = next(model.parameters())
        new = nn.Linear(width, classes).to(like) if classes else nn.Identity()
        if classes:
            model._init_weights(new)
        setattr(model, name, new.train(model.training))
    model.config.num_labels = model.num_labels = classes


def name_classes(model: Any, names: Sequence[str]) -> None:
    """Note the names of the classes, in the order of the classifier, where transformers looks for them."""
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: at for at, name in enumerate(names)}


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
    vars(model)[_OWN] = images
    if layout.any_size:
        set_image_size(layout, model, shown)
    elif shown != layout.own_size(layout.tower_of(model).config):
        raise CheckpointError(f"the processor of {source} gives images of {shown} px, which its model does not take")
    from .hf_model import TransformersViT

    adapter = TransformersViT()
    if size is not None and pair(size) != image_size(layout, model):
        check_patches(model, pair(size))
        adapter.resize(model, pair(size))
    return model.eval()


def read_processor(processor: Any, source: str) -> tuple[Images, tuple[int, int]]:
    """What a processor makes of images, in the words of `InputFormat`, and their (height, width)."""

    def read(name: str, default: Any = None) -> Any:
        value = getattr(processor, name, None)
        return default if value is None else value

    size, crop = _sides(read("size", {})), _sides(read("crop_size", {}))
    cropped = bool(read("do_center_crop", False)) and "height" in crop
    final = crop if cropped else size
    factor = float(read("rescale_factor", 1 / 255))
    if "height" not in final or not read("do_resize", True) or abs(factor * 255 - 1) > 1e-3:
        raise CheckpointError(
            f"the processor of {source} does not scale all images to one size and to values from 0 to 1, so it cannot "
            "be the format of a model here"
        )
    squashes = "height" in size
    resized = size.get("shortest_edge", size.get("height", 0))
    mean, std = (read("image_mean"), read("image_std")) if read("do_normalize", True) else ([0.0] * 3, [1.0] * 3)
    images = {
        "mean": [float(value) for value in mean],
        "std": [float(value) for value in std],
        "interpolation": _FILTERS[int(read("resample", 2))],
        "crop_pct": crop["height"] / resized if cropped else 1.0,
        "crop_mode": "squash" if squashes else "center",
    }
    return images, (final["height"], final["width"])


def _sides(size: Any) -> dict[str, int]:
    if isinstance(size, int):
        return {"height": size, "width": size}
    found = dict(size) if isinstance(size, Mapping) else vars(size)
    return {key: int(value) for key, value in found.items() if value is not None}


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


def class_names(model: Any) -> list[str] | None:
    """The names of the classes of a model, in the order of its classifier; None where it has only numbers."""
    return _names(getattr(model, "config", None))


def class_names_at(spec: str) -> list[str] | None:
    """As `class_names`, for what `opened` takes."""
    return _names(_configuration(spec.removeprefix(SOURCE)))


def _names(config: Any) -> list[str] | None:
    labels = getattr(config, "id2label", None) or {}
    names = [str(labels[key]) for key in sorted(labels)]
    return None if names == [f"LABEL_{at}" for at in range(len(names))] else names


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
        return kind.from_pretrained(source, **options)
    except Exception as error:  # Hubs, caches and files fail in many ways.
        # Its first sentence is the reason; advice that is about transformers follows.
        reason = short_name(" ".join(str(error).split()).partition(". ")[0], 160)
        raise CheckpointError(f"no {what} of {source} can be had: {reason}") from error


def _default_images(layout: Layout) -> Images:
    mean, std = layout.stats
    return {
        "mean": list(mean), "std": list(std), "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center",
    }  # fmt: skip


def _named(key: str) -> str:
    return {value: name for name, value in _MEANT.items()}.get(key, key)


def _plain_size(size: Any) -> Any:
    height, width = pair(size)
    return height if height == width else [height, width]
