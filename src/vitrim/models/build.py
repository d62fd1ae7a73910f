"""One door to models: a timm name, a folder written by `save`, or a file of weights."""

import difflib
from pathlib import Path
from typing import Any

import timm
from torch import nn

from ..errors import CheckpointError, UnknownNameError, VitrimError
from .store import DESCRIPTION, WEIGHTS, check_heads, load, weights_path
from .torchvision import Converted, convert_torchvision, is_torchvision
from .weights import SUFFIXES, class_count, load_weights, read_weights

_SOURCES = ("hf-hub:", "local-dir:")


def build_model(
    spec: str | Path,
    *,
    num_classes: int | None = None,
    checkpoint: str | Path | None = None,
    reset_head: bool = False,
    pretrained: bool = False,
    **args: Any,
) -> nn.Module:
    """A model from any of the things that people have.

    Args:
        spec: a timm name (`deit_small_patch16_224`, `hf-hub:...`), a folder written by `save`, or a file of
            torchvision weights, whose architecture is read off the tensors.
        num_classes: classes of the head; by default those of the checkpoint, else the architecture's own. 0: no head.
        checkpoint: weights for the named architecture: a file (timm's names or torchvision's), or a folder by `save`.
        reset_head: take everything but the classifier from the checkpoint.
        pretrained: let timm download its weights.
        args: further arguments of the architecture, such as `img_size` or `drop_path_rate`.

    Raises:
        UnknownNameError: no such architecture.
        CheckpointError: weights that are missing, unsafe, damaged, or made for another model.
        VitrimError: arguments that the architecture does not take.
    """
    path, name = Path(spec), str(spec)
    check_name(name)
    if path.is_dir() or (path.name == WEIGHTS and (path.parent / DESCRIPTION).exists()):
        if checkpoint is not None:
            raise CheckpointError(f"{spec} brings its own weights; leave checkpoint out, or name an architecture")
        return _with_classes(load(path, **args), spec, num_classes, reset_head)
    if path.suffix in SUFFIXES:
        if checkpoint is not None:
            raise CheckpointError(f"{spec} is a file of weights already; leave checkpoint out, or name an architecture")
        return _from_file(path, num_classes, reset_head, args)
    if checkpoint is None:
        return _create(name, num_classes, pretrained, args)
    file = weights_path(checkpoint) if Path(checkpoint).is_dir() else Path(checkpoint)
    state = read_weights(file)
    if is_torchvision(state):
        state = convert_torchvision(state).state
    if num_classes is None and not reset_head:
        num_classes = class_count(state)
    model = _create(name, num_classes, False, args)
    load_weights(model, state, checkpoint, reset_head=reset_head or num_classes == 0)
    check_heads(model, file)
    return model


def open_model(spec: str) -> nn.Module:
    """A model by what people have of it.

    A run folder, a folder written by `vitrim.save`, a file of torchvision weights, a timm name, `NAME@FILE` (that
    architecture with weights from a file) or `NAME@pretrained` (with timm's published weights, which it downloads).
    """
    if (folder := saved_folder(spec)) is not None:
        return load(folder)
    weights = weights_in(spec)
    name = spec if weights is None else spec.partition("@")[0]
    if weights == "":
        raise CheckpointError(f"{spec} names no weights; write {name}@FILE or {name}@pretrained, or {name} alone")
    if weights == "pretrained":
        return build_model(name, pretrained=True)
    return build_model(name, checkpoint=weights)


def weights_in(spec: str) -> str | None:
    """What stands behind the @ in the spec of a model, None where there is no @."""
    return spec.partition("@")[2] if "@" in spec and not spec.startswith(_SOURCES) else None


def saved_folder(spec: str) -> Path | None:
    """Where the saved model lies that a run folder, or a folder written by `save`, stands for; None for other names."""
    places = (Path(spec) / "model", Path(spec))
    return next((place for place in places if (place / DESCRIPTION).exists()), None)


def has_weights(spec: str) -> bool:
    """Whether `open_model` finds weights that were learnt; a bare timm name stands for random ones."""
    return Path(spec).exists() or "@" in spec or spec.startswith(_SOURCES)


def _from_file(path: Path, num_classes: int | None, reset_head: bool, args: dict[str, Any]) -> nn.Module:
    state = read_weights(path)
    if not is_torchvision(state):
        raise CheckpointError(
            f"{path} does not say its architecture; name it: build_model('<timm name>', checkpoint={str(path)!r})"
        )
    found: Converted = convert_torchvision(state, num_heads=args.pop("num_heads", None))
    classes = found.num_classes if num_classes is None else num_classes
    model = _create(found.name, classes, False, {"pretrained_cfg_overlay": found.data, **found.sizes, **args})
    load_weights(model, found.state, path, reset_head=reset_head or classes == 0)
    return model


def _create(name: str, num_classes: int | None, pretrained: bool, args: dict[str, Any]) -> nn.Module:
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **args)
    except TypeError as error:
        raise VitrimError(f"{name} does not take these arguments: {error}") from error
    except Exception as error:
        if not pretrained and not name.startswith(_SOURCES):
            # timm builds with what it is given and stumbles later, over an assertion or in torch.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise VitrimError(f"{name} cannot be built with {args}: {reason}") from error
        # Hubs and mirrors fail in many ways; all of them leave the user without weights.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"no pretrained weights for {name}: {reason}; give a file with checkpoint=") from error
    embed = getattr(model, "patch_embed", None)
    if getattr(embed, "num_patches", None) == 0:
        raise VitrimError(f"images of {embed.img_size} px are smaller than one patch of {embed.patch_size} px")
    return model


def _with_classes(model: nn.Module, spec: str | Path, num_classes: int | None, reset_head: bool) -> nn.Module:
    if reset_head or num_classes == 0:
        model.reset_classifier(model.num_classes if num_classes is None else num_classes)
    elif num_classes not in (None, model.num_classes):
        raise CheckpointError(
            f"{spec} has {model.num_classes} classes, not the {num_classes} asked for; "
            f"ask for num_classes={model.num_classes}, or reset_head=True to start a new head"
        )
    return model


def check_name(name: str) -> None:
    """Raise unless `build_model` has something to begin with: a folder, a file of weights, or an architecture.

    Raises:
        UnknownNameError: no such architecture.
        CheckpointError: nothing lies at this path.
    """
    path = Path(name)
    if name.startswith(_SOURCES) or path.is_dir() or path.suffix in SUFFIXES:
        return
    if "/" in name or "\\" in name:
        raise CheckpointError(f"nothing at {name}: no folder written by vitrim.save and no file of weights")
    if not timm.is_model(name):
        known = timm.list_models()
        # Over a thousand names help nobody: without a near one, show the kinds that people start from.
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        raise UnknownNameError("model", name, near or timm.list_models("vitrim_*") + timm.list_models("deit_*_224"))
