"""Models on disk: `model.safetensors`, which holds all that is needed, and `vitrim.json`, the same description to read.

The description travels in the header of the weights, so that one atomic replacement swaps both at once.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..errors import CheckpointError, VitrimError
from ..output import check_folder, replacing
from ..tokens import Reduction
from .adapter import adapter_of, build_architecture
from .attach import attach, attached
from .weights import misfits, read_weights
from .widths import BlockWidths, set_widths, widths_of

SCHEMA = 1
WEIGHTS, DESCRIPTION = "model.safetensors", "vitrim.json"
_KEY = "vitrim"


def save(model: nn.Module, folder: str | Path, *, overwrite: bool = False, **extra: Any) -> Path:
    """Write a model that `load` brings back whole, its reduction and its uneven widths included.

    Args:
        model: made by `timm.create_model`, `vitrim.build_model` or `vitrim.load`; on any device, in any dtype.
        folder: made if it does not exist.
        overwrite: replace a model that is there already.
        extra: anything JSON can hold, kept under "extra".

    Raises:
        CheckpointError: a model is there already, or this one cannot be rebuilt from a description.
        VitrimError: the folder cannot be written to.
    """
    folder = Path(folder)
    check_place(folder, overwrite=overwrite)
    _check_plain(extra)
    text = json.dumps(describe(model) | {"extra": extra}, indent=2)
    # Copies, because safetensors refuses tensors that share memory.
    state = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in (
        (WEIGHTS, lambda path: save_file(state, path, metadata={_KEY: text})),
        (DESCRIPTION, lambda path: path.write_text(text + "\n")),
    ):
        with replacing(folder / name) as part:
            write(part)
    return folder


def check_place(folder: str | Path, *, overwrite: bool = False) -> None:
    """Raise `VitrimError` where `save` could not write, so that it is known before a model is made."""
    check_folder(folder)
    if (run := Path(folder) / "model" / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} is a run, whose model is {run.parent}; choose another folder")
    if (Path(folder) / WEIGHTS).exists() and not overwrite:
        raise CheckpointError(f"{folder} holds a model already; choose another folder or pass overwrite=True")


def load(folder: str | Path, *, image_size: int | None = None, **args: Any) -> nn.Module:
    """The model that `save` wrote, in eval mode on the CPU, with its reduction attached.

    Args:
        folder: what `save` wrote, or the `model.safetensors` in it.
        image_size: side of square images in pixels; by default that of the saved model. Position embeddings are
            resampled.
        args: arguments for the architecture that change no weight, such as `drop_path_rate`.

    Raises:
        CheckpointError: nothing there, damaged, written by a newer version, or not for these arguments.
        VitrimError: arguments that the architecture does not take.
    """
    path = weights_path(folder)
    record = read_description(path)
    model = _rebuild(record, args)
    state = read_weights(path)
    if faults := misfits(model.state_dict(), state):
        if not args:
            raise CheckpointError(f"{path} does not fit its own description: {faults}")
        raise CheckpointError(
            f"{path} does not fit a model with {args}: {faults}; give no arguments that change weights, or "
            f"{record['architecture']} as the name and this file as checkpoint, whose position embedding is resampled"
        )
    model.load_state_dict(state, assign=True)
    family = adapter_of(model)
    if image_size is not None and family.input_format(model).size[1:] != (image_size, image_size):
        family.resize(model, image_size)
    if (cut := record["reduction"]) is not None:
        reduction = None if cut["text"] is None else Reduction.parse(cut["text"], cut["phase"])
        attach(model, reduction, cls_only=cut["cls_only"]).set_strength(cut["strength"])
    return model.eval()


def weights_path(folder: str | Path) -> Path:
    """The file of weights that a folder written by `save` holds."""
    folder = Path(folder)
    path = folder if folder.name == WEIGHTS else folder / WEIGHTS
    if not path.is_file():
        run = folder / "model" / WEIGHTS
        hint = f"; its model is the folder {run.parent}" if run.is_file() else ""
        raise CheckpointError(f"no model at {folder}: {path} is missing{hint}")
    return path


def read_description(path: Path) -> dict[str, Any]:
    """What `save` wrote of the model in this file of weights; CheckpointError if it was written by something else."""
    record = _description(path)
    if record is None:
        raise CheckpointError(
            f"{path} was not written by vitrim.save; give its architecture as the name and this file as checkpoint, or "
            f"both as NAME@{path}"
        )
    return record


def check_heads(model: nn.Module, path: Path) -> None:
    """Raise `CheckpointError` if the weights in this file were learnt with other attention heads, as no shape tells.

    Only files that `save` wrote say so.
    """
    record = _description(path) if path.suffix == ".safetensors" else None
    if record is None:
        return
    with torch.device("meta"):
        learnt = _heads(_rebuild(record, {}))
    for name, own in _heads(model).items():
        if (heads := learnt.get(name, own)) != own:
            raise CheckpointError(
                f"{path} was learnt with {heads} attention heads, the model has {own}; ask for num_heads={heads}"
            )


def _description(path: Path) -> dict[str, Any] | None:
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_KEY)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or cut short; copy or download it again") from error
    record = None if text is None else json.loads(text)
    if record is not None and record["schema"] > SCHEMA:
        raise CheckpointError(f"{path} has schema {record['schema']}, this vitrim reads up to {SCHEMA}; update vitrim")
    return record


def _heads(model: nn.Module) -> dict[str, int]:
    """Attention heads by the name of the layer."""
    return {name: int(module.num_heads) for name, module in model.named_modules() if hasattr(module, "num_heads")}


def describe(model: nn.Module) -> dict[str, Any]:
    """All that `load` needs to build the model again, weights excepted, as plain JSON values."""
    handle, adapter = attached(model), adapter_of(model)
    found = adapter.describe(model)
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "family": adapter.name,
        "architecture": found.architecture,
        "args": dict(found.args),
        "num_classes": adapter.classifier(model).classes,
        "data": dict(found.images),  # They belong to the weights and not to the architecture.
        "widths": None,
        "reduction": None,
        "versions": {name: version(name) for name in ("vitrim", "timm", "torch")},
    }
    _check_plain(record["args"])
    record["widths"] = _uneven_widths(model, record)
    if handle is not None:
        reduction = handle.reduction
        # The schedule as it acts, so that a budget is not solved anew by another version.
        fixed = None if reduction is None else replace(reduction, schedule=handle.schedule)
        record["reduction"] = {
            "text": None if fixed is None else str(fixed),
            "phase": None if fixed is None else fixed.phase,
            "strength": handle.strength,
            "cls_only": handle.cls_only,
        }
    return record


def _rebuild(record: Mapping[str, Any], args: Mapping[str, Any]) -> nn.Module:
    """The described model with fresh weights, without reduction."""
    name = record["architecture"]
    stored = {key: tuple(value) if isinstance(value, list) else value for key, value in record["args"].items()}
    data = {key: tuple(value) if isinstance(value, list) else value for key, value in record["data"].items()}
    model = build_architecture(name, {**stored, **args}, images=data)
    if record["widths"] is not None:
        set_widths(model, [BlockWidths(**widths) for widths in record["widths"]])
    return model


def _uneven_widths(model: nn.Module, record: Mapping[str, Any]) -> list[dict[str, int]] | None:
    """Widths of the blocks where they differ from the architecture's own; proves that the model can be rebuilt."""
    own = model.state_dict()
    with torch.device("meta"):
        stock = _rebuild(record, {})
        if not misfits(stock.state_dict(), own):
            return None
        widths = None
        with suppress(VitrimError):  # Whatever cannot be narrowed shows as a misfit below.
            widths = widths_of(model)
            set_widths(stock, widths)
        if faults := misfits(stock.state_dict(), own):
            raise CheckpointError(
                f"the model differs from the {record['architecture']} that its description builds: {faults}; "
                "undo the change, or write model.state_dict() with safetensors yourself"
            )
    return None if widths is None else [asdict(block) for block in widths]


def _check_plain(values: Mapping[str, object]) -> None:
    for name, value in values.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise CheckpointError(f"JSON cannot hold {name}={value!r}; give a plain value or a name") from error
