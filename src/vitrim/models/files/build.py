"""One door to models: a timm name, a folder written by `save`, or a file of weights.

A text that no file can have as its name (too long) is not a file: `os.path` says so, `Path` raises `OSError`.
"""

import difflib
import os
import re
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import CheckpointError, ClassCountError, UnknownNameError
from ...text import short_name
from ..architectures import architectures, build_architecture, builder_of
from ..create import SOURCES
from ..families.hf.hub import SOURCE as HF
from ..finding import adapter_of
from ..shapes_only import shapes_only
from .checkpoints import SUFFIXES, read_weights
from .store import DESCRIPTION, WEIGHTS, check_heads, known_size, load, saved_folder, weights_path
from .torchvision_weights import Converted, convert_torchvision, is_torchvision
from .weights import aligned, check_not_hugging_face, class_count, load_weights


def build_model(
    spec: str | Path,
    *,
    num_classes: int | None = None,
    checkpoint: str | Path | None = None,
    reset_head: bool = False,
    pretrained: bool = False,
    checkpoint_size: int | tuple[int, int] | None = None,
    **args: Any,
) -> nn.Module:
    """A model from any of the things that people have.

    Args:
        spec: a timm name (`deit_small_patch16_224`, `hf-hub:...`), a folder written by `save` or the run folder around
            it, a file of torchvision weights, whose tensors show the architecture, or a model of Hugging Face
            transformers: a folder written by `save_pretrained`, or `hf:NAME` with its name on the hub.
        num_classes: classes of the head; by default those of the checkpoint, else the architecture's own. 0: no head.
        checkpoint: weights for the named architecture: a file (timm's names or torchvision's), or a folder by `save`.
        reset_head: take everything but the classifier from the checkpoint.
        pretrained: let timm download its weights.
        checkpoint_size: (height, width) of the images that the checkpoint was trained on, where that is in doubt:
            positions of a grid that is not square do not say how they lie.
        args: further arguments of the architecture, such as `img_size` or `drop_path_rate`. Without `img_size` the
            model takes images of the size that its checkpoint was trained on.

    Raises:
        UnknownNameError: no such architecture.
        CheckpointError: weights that are missing, unsafe, damaged, or made for another model.
        VitrimError: arguments that the architecture does not take.
    """
    path, name = Path(spec), str(spec)
    check_name(name)
    if (found := transformers_name(name)) is not None:
        if checkpoint is not None:
            raise CheckpointError(f"{spec} brings its own weights; leave checkpoint out, or name an architecture")
        model = build_architecture(found, {"num_classes": num_classes or None, **args})
        return _with_classes(model, spec, num_classes, reset_head)
    if checkpoint_size is not None and checkpoint is None:
        raise CheckpointError("checkpoint_size is that of the images of a checkpoint; give checkpoint too, or neither")
    if os.path.isdir(path) or (path.name == WEIGHTS and os.path.exists(path.parent / DESCRIPTION)):
        if checkpoint is not None:
            raise CheckpointError(f"{spec} brings its own weights; leave checkpoint out, or name an architecture")
        return _with_classes(load(path, **args), spec, num_classes, reset_head)
    if path.suffix in SUFFIXES:
        if checkpoint is not None:
            raise CheckpointError(f"{spec} is a file of weights already; leave checkpoint out, or name an architecture")
        return _from_file(path, num_classes, reset_head, args)
    if checkpoint is None:
        return build_architecture(name, {"num_classes": num_classes, **args}, pretrained=pretrained)
    return _from_checkpoint(name, checkpoint, num_classes, reset_head, checkpoint_size, args)


def open_model(spec: str, image_size: int | None = None) -> nn.Module:
    """A model from one text, as the commands take it.

    A run folder, a folder written by `vitrim.save`, a file of torchvision weights, a timm name, `NAME@FILE` (that
    architecture with weights from a file), `NAME@pretrained` (with timm's published weights, which it downloads),
    timm's own `hf-hub:NAME` and `local-dir:FOLDER`, with the weights in them, or a model of Hugging Face transformers:
    a folder written by `save_pretrained`, or `hf:NAME` with its name on the hub. `NAME@FILE@HEIGHTxWIDTH` says the size
    of the images that the weights in the file were trained on, where positions do not show it.

    Args:
        spec: one of these.
        image_size: side of square images in pixels; position embeddings are resampled. By default the size that the
            weights were trained at, as far as they show it, else the architecture's own.
    """
    args: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    if (folder := saved_folder(spec)) is not None:
        return load(folder, image_size=image_size)
    name, weights, size = split_spec(spec)
    if weights == "pretrained":
        return build_model(name, pretrained=True, **args)
    return build_model(name, checkpoint=weights, pretrained=spec.startswith(SOURCES), checkpoint_size=size, **args)


def split_spec(spec: str) -> tuple[str, str | None, tuple[int, int] | None]:
    """The parts of `NAME@WEIGHTS@HEIGHTxWIDTH`; None for those that are not there.

    >>> split_spec("deit_tiny_patch16_224@best.pth@128x288")
    ('deit_tiny_patch16_224', 'best.pth', (128, 288))
    >>> split_spec("deit_tiny_patch16_224")
    ('deit_tiny_patch16_224', None, None)

    Raises:
        CheckpointError: nothing follows the @.
    """
    if "@" not in spec or spec.startswith((*SOURCES, HF)):
        return spec, None, None
    name, _, weights = spec.partition("@")
    if not weights:
        raise CheckpointError(f"{spec} names no weights; write {name}@FILE or {name}@pretrained, or {name} alone")
    sized = re.fullmatch(r"(.+)@([0-9]{1,5})x([0-9]{1,5})", weights)
    if sized is None or os.path.exists(weights):
        return name, weights, None
    return name, sized[1], (int(sized[2]), int(sized[3]))


def has_weights(spec: str) -> bool:
    """Whether `open_model` finds trained weights; a timm name by itself gives random ones."""
    return os.path.exists(spec) or "@" in spec or spec.startswith((*SOURCES, HF))


def transformers_name(spec: str) -> str | None:
    """`hf:NAME` for a model of Hugging Face transformers on the hub or in a folder; None for anything else."""
    if spec.startswith(HF):
        return spec
    there = os.path.exists(Path(spec) / "config.json") and saved_folder(spec) is None
    return f"{HF}{spec}" if there else None


def is_architecture(name: str) -> bool:
    """Whether this is the name of an architecture, and not a saved folder or a file of weights."""
    if name.startswith(HF):
        return False
    return name.startswith(SOURCES) or not (os.path.isdir(name) or Path(name).suffix in SUFFIXES)


def _from_checkpoint(
    name: str,
    checkpoint: str | Path,
    num_classes: int | None,
    reset_head: bool,
    size: int | tuple[int, int] | None,
    args: dict[str, Any],
) -> nn.Module:
    file = weights_path(checkpoint) if os.path.isdir(checkpoint) else Path(checkpoint)
    state = read_weights(file)
    if is_torchvision(state):
        state = convert_torchvision(state).state
    with shapes_only():
        names = build_architecture(name, args).state_dict().keys()
    state = aligned(state, names, file)
    if num_classes is None and not reset_head:
        builder = builder_of(name)
        num_classes = None if builder is None else class_count(state, builder.classifiers_of(name)[0])
    model = build_architecture(name, {"num_classes": num_classes, **args})
    trained_at = known_size(file) if size is None else (size, size) if isinstance(size, int) else size
    given = {option for option, value in args.items() if value is not None}
    load_weights(
        model, state, checkpoint, reset_head=reset_head or num_classes == 0, given=given, trained_at=trained_at
    )
    check_heads(model, file)
    return model


def _from_file(path: Path, num_classes: int | None, reset_head: bool, args: dict[str, Any]) -> nn.Module:
    state = read_weights(path)
    if not is_torchvision(state):
        check_not_hugging_face(state, path)
        raise CheckpointError(
            f"{path} does not say its architecture; give that as the name and this file as checkpoint, or both as "
            f"NAME@{path}"
        )
    found: Converted = convert_torchvision(state, num_heads=args.pop("num_heads", None))
    classes = found.num_classes if num_classes is None else num_classes
    model = build_architecture(found.name, {"num_classes": classes, **found.sizes, **args}, images=found.data)
    load_weights(model, found.state, path, reset_head=reset_head or classes == 0)
    return model


def _with_classes(model: nn.Module, spec: str | Path, num_classes: int | None, reset_head: bool) -> nn.Module:
    adapter = adapter_of(model)
    own = adapter.classifier(model).classes
    if reset_head or num_classes == 0:
        adapter.reset_classifier(model, own if num_classes is None else num_classes)
    elif num_classes not in (None, own):
        raise ClassCountError(
            f"{spec} has {own} classes, not the {num_classes} asked for",
            f"ask for num_classes={own}, or reset_head=True to start a new head",
        )
    return model


def check_name(name: str) -> None:
    """Raise unless this is what `build_model` takes: a folder, a file of weights, or an architecture.

    Raises:
        UnknownNameError: no such architecture.
        CheckpointError: there is nothing at this path.
    """
    if name.startswith((*SOURCES, HF)):
        return
    _check_parts(name)
    if not is_architecture(name):
        return
    if "/" in name or "\\" in name:
        raise CheckpointError(f"nothing at {name}: no folder written by vitrim.save and no file of weights")
    if builder_of(name) is None:
        known = architectures()
        # A list of over a thousand names is no help: without a near one, show the kinds that people start from.
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        usual = [other for other in known if re.fullmatch(r"vitrim_.*|deit_.*_224", other)]
        raise UnknownNameError("model", name, near or usual)


def _check_parts(name: str) -> None:
    """Raise `CheckpointError` for a name and its weights in one text, which only commands take."""
    architecture, at, _ = name.partition("@")
    if not at or os.path.exists(name) or builder_of(architecture) is None:
        return
    _, weights, size = split_spec(name)
    way = "pretrained=True" if weights == "pretrained" else f"checkpoint={short_name(weights)!r}"
    way += "" if size is None else f", checkpoint_size={size}"
    raise CheckpointError(
        f"{short_name(name)} holds a name and its weights, as commands take them; give {architecture} as the name, and "
        f"{way} beside it"
    )
