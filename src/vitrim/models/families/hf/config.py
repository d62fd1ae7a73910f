"""Building and describing models of Hugging Face transformers: their configurations, sizes and classes."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import nn

from ....errors import CheckpointError, VitrimError
from ....text import short_name
from ...adapter import Description
from .images import default_images, images_of, library, set_images
from .layout import LAYOUTS, Layout, Whole, pair
from .quiet import quiet

_SIZE = "vitrim_image_size"
"""Attribute of a model: (height, width) of its images where it takes all sizes."""
_MEANT = {"num_classes": "num_labels", "img_size": "image_size", "in_chans": "num_channels"}
"""Arguments that mean the same in every family."""


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
        if kind.config_class is not tower.config_class:
            labels = {"num_labels": given.pop("num_labels")} if "num_labels" in given else {}
            given = {"vision_config": given, **labels}
        with quiet():
            model = kind(kind.config_class(**given))
    except Exception as error:  # transformers builds with what it is given and fails in many places.
        reason = short_name(" ".join(str(error).split()), 200)
        raise VitrimError(f"{name} cannot be built with {short_name(given, 150)}: {reason}") from error
    if size is not None:
        set_image_size(layout, model, pair(size))
    set_images(model, {**default_images(layout), **images})
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


def class_names(model: Any) -> list[str] | None:
    """The names of the classes of a model, in the order of its classifier; None where it has only numbers."""
    return names_in(getattr(model, "config", None))


def names_in(config: Any) -> list[str] | None:
    """The names of the classes in a configuration; None where it has only numbers."""
    labels = getattr(config, "id2label", None) or {}
    names = [str(labels[key]) for key in sorted(labels)]
    return None if names == [f"LABEL_{at}" for at in range(len(names))] else names


def _named(key: str) -> str:
    return {value: name for name, value in _MEANT.items()}.get(key, key)


def _plain_size(size: Any) -> Any:
    height, width = pair(size)
    return height if height == width else [height, width]
