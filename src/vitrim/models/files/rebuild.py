"""A model as a description, and a new model as described: architecture, arguments, widths and reduction, no weights."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, UnsupportedModelError, VitrimError
from ...text import short_name
from ..adapter import ADAPTERS, OTHERS
from ..architectures import build_architecture
from ..copying import MAKE_PLAIN, computed
from ..finding import adapter_of
from ..own_code import check_no_own_methods
from ..reduction.attached import attached
from ..shapes_only import shapes_only
from ..widths.block_widths import BlockWidths, set_widths, widths_of
from ..wrapped import find_inside
from .description import Cut, Record, check_args
from .same_layers import other_layers
from .weights import misfits


def describe(model: nn.Module) -> Record:
    """All that `load` needs to build the model again, its weights aside.

    Raises:
        CheckpointError: a model that cannot be built again; says what to save in its place, where that is known.
    """
    try:
        return _described(model)
    except CheckpointError as error:
        if _holds_lora(model):
            advice = "merge the adapters into the weights first: model = peft_model.merge_and_unload()"
        elif (found := find_inside(model, lambda part: _is_whole(part, model))) is not None:
            advice = f"save the model inside it: {found[0]}"
        else:
            raise
        raise CheckpointError(f"this {type(model).__name__} cannot be rebuilt from a description; {advice}") from error


def _described(model: nn.Module) -> Record:
    handle, adapter = attached(model), adapter_of(model)
    found = adapter.describe(model)
    _check_methods(model)
    check_plain(found.args)
    check_args(found.args)
    record = Record(
        architecture=found.architecture,
        args=found.args,
        images=found.images,
        num_classes=adapter.classifier(model).classes,
        family=adapter.name,
        tables=_formats(model),
        versions={name: version(name) for name in ("vitrim", "timm", "torch")},
    )
    record = replace(record, widths=_uneven_widths(model, record))
    if handle is None:
        return record
    handle.policy.warn_if_left_behind()
    # The schedule as it acts, so that another version does not solve a budget again.
    reduction = None if handle.reduction is None else replace(handle.reduction, schedule=handle.schedule)
    text, phase = (None, None) if reduction is None else (str(reduction), reduction.phase)
    return replace(record, reduction=Cut(text, phase, handle.strength, handle.cls_only))


def _check_methods(model: nn.Module) -> None:
    try:
        check_no_own_methods(model)
    except UnsupportedModelError as error:
        raise CheckpointError(error) from None


def rebuild(record: Record, args: Mapping[str, Any] | None = None) -> nn.Module:
    """The described model with fresh weights, without reduction.

    Args:
        record: what `describe` made.
        args: arguments of the architecture that take the place of those in the record.
    """
    if record.family not in (None, *ADAPTERS, *OTHERS):
        raise CheckpointError(
            f"this model is of the family {record.family!r}, which is not known here; give its file with --import"
        )
    model = build_architecture(record.architecture, {**record.args, **(args or {})}, images=record.images)
    if record.widths is not None:
        set_widths(model, record.widths)
    return model


def cast_tables(model: nn.Module, formats: Mapping[str, str]) -> None:
    """Give buffers that are not part of the state dict these number formats; `load_state_dict` leaves them as they are.

    Raises:
        CheckpointError: the model has no such buffer.
    """
    known = dict(_tables(model))
    for name, kind in formats.items():
        if name not in known:
            raise CheckpointError(
                f"the description of the model names a table {short_name(name)} that it does not have"
            )
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, known[name].to(getattr(torch, kind)))


def _formats(model: nn.Module) -> dict[str, str]:
    """Number formats of tables that are not float32, as which they are built."""
    formats = {name: str(table.dtype).removeprefix("torch.") for name, table in _tables(model)}
    return {name: kind for name, kind in formats.items() if kind != "float32"}


def _tables(model: nn.Module) -> list[tuple[str, Tensor]]:
    kept = model.state_dict().keys()
    return [(name, value) for name, value in model.named_buffers() if name not in kept and value.is_floating_point()]


def _uneven_widths(model: nn.Module, record: Record) -> tuple[BlockWidths, ...] | None:
    """Widths of the blocks where they differ from the architecture's own; proves that the model can be rebuilt."""
    own = model.state_dict()
    if names := computed(model):
        raise CheckpointError(f"{names[0]} is computed from other tensors and not a weight of its own; {MAKE_PLAIN}")
    with shapes_only():
        stock = rebuild(record, {})
        widths = None
        if misfits(stock.state_dict(), own):
            with suppress(VitrimError):  # Whatever cannot be narrowed shows as a misfit below.
                widths = widths_of(model)
                set_widths(stock, widths)
        differs = f"the model differs from the {record.architecture} that its description builds: "
        if faults := misfits(stock.state_dict(), own):
            raise CheckpointError(
                f"{differs}{faults}; for another number of classes use model.reset_classifier(CLASSES), or write "
                "model.state_dict() with safetensors"
            )
        if faults := other_layers(model, stock, adapter_of(model).speed_settings):
            raise CheckpointError(
                f"{differs}{faults}; create the model with these settings (in timm as act_layer='relu'), or write "
                "model.state_dict() with safetensors"
            )
    return widths


def _holds_lora(model: nn.Module) -> bool:
    return any(type(module).__module__.startswith("peft.") for module in model.modules())


def _is_whole(part: nn.Module, model: nn.Module) -> bool:
    """Whether `part` has all the parameters of the model around it, and can be saved by itself."""
    if {id(each) for each in part.parameters()} != {id(each) for each in model.parameters()}:
        return False
    try:
        _described(part)
    except VitrimError:
        return False
    return True


def check_plain(values: Mapping[str, object]) -> None:
    """Raise `CheckpointError` for a value that JSON cannot hold."""
    for name, value in values.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"JSON cannot hold {name}={short_name(value)}; give a plain value or a name"
            ) from error
