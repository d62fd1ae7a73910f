"""Models on disk: `model.safetensors`, which holds all that is needed, and `vitrim.json`, the same description to read.

The description is in the header of the weights, so that the weights alone are enough to load the model.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from ...errors import CheckpointError, VitrimError
from ...output import check_folder, recover, replacing_files, write_errors
from ...text import short_name
from ...tokens import Reduction
from ..architectures import check_patches
from ..finding import adapter_of
from ..reduction.attach import attach
from ..shapes_only import shapes_only
from ..widths.rotary_pairs import check_kept_pairs
from .checkpoints import opened, read_header, read_tensors
from .description import Record, parse
from .rebuild import cast_tables, check_plain, describe, rebuild
from .weights import check_not_hugging_face, check_tensors, check_values, misfits, shape_misfits

Size = int | Sequence[int]
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
    return save_with(model, folder, lambda staged: None, overwrite=overwrite, **extra)


def save_with(
    model: nn.Module, folder: str | Path, write: Callable[[Path], None], *, overwrite: bool = False, **extra: Any
) -> Path:
    """Save a model together with other files: however the process ends, all of them are the new ones or the old ones.

    Args:
        model, folder, overwrite, extra: see `save`.
        write: writes the other files into the folder that it is given; an empty file removes one of this name.
    """
    folder = Path(folder)
    check_place(folder, overwrite=overwrite)
    check_plain(extra)
    check_tensors(model)
    names = adapter_of(model).class_names(model)
    extra = extra if names is None else {"classes": names, **extra}
    text = replace(describe(model), extra=extra).to_json()
    # Copies, because safetensors refuses tensors that share memory.
    state = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    with replacing_files(folder) as staged:
        check_place(folder, overwrite=overwrite)  # Another process may have saved a model here in the meantime.
        with write_errors(folder / WEIGHTS):
            save_file(state, staged / WEIGHTS, metadata={_KEY: text})
        (staged / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
        write(staged)
        if not (folder / WEIGHTS).exists():
            _check_free(folder, staged)
    return folder


def check_place(folder: str | Path, *, overwrite: bool = False) -> None:
    """Raise `VitrimError` where `save` could not write, so that it is known before a model is made."""
    check_folder(folder)
    if (run := Path(folder) / "model" / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} is a run, whose model is {run.parent}; choose another folder")
    if (Path(folder) / WEIGHTS).exists() and not overwrite:
        raise CheckpointError(
            f"{folder} holds a model already; choose another folder, or replace it by --overwrite (overwrite=True)"
        )


def _check_free(folder: Path, staged: Path) -> None:
    """Raise `CheckpointError` where a file of somebody else has a name that the files of a model have."""
    if taken := sorted(path.name for path in staged.iterdir() if (folder / path.name).exists()):
        raise CheckpointError(f"{folder} holds a {taken[0]}, but no model; choose another folder")


def load(folder: str | Path, *, image_size: Size | None = None, img_size: Size | None = None, **args: Any) -> nn.Module:
    """The model that `save` wrote, in eval mode on the CPU, with its reduction attached.

    Args:
        folder: what `save` wrote, the `model.safetensors` in it, or the folder of a run that holds it.
        image_size: (height, width) of the images in pixels, or the side of square ones; by default that of the saved
            model. Position embeddings are resampled.
        img_size: the same in the word that timm and `build_model` use.
        args: arguments for the architecture that change no weight, such as `drop_path_rate`.

    Raises:
        CheckpointError: nothing there, damaged, written by a newer version, or not for these arguments.
        VitrimError: arguments that the architecture does not take, or a size that the model cannot be resized to.
    """
    size = _one_size(image_size, img_size)
    path = weights_path(folder)
    record = read_description(path)
    _check_fit(record, path)
    model = rebuild(record, args)
    state = read_tensors(path)
    if faults := misfits(model.state_dict(), state):
        raise CheckpointError(
            f"{path} does not fit a model with {args}: {faults}; give no arguments that change weights, or "
            f"{record.architecture} as the name and this file as checkpoint, whose position embedding is resampled"
        )
    check_values(model.state_dict(), state, path)
    model.load_state_dict(state, assign=True)
    cast_tables(model, record.tables)
    check_kept_pairs(model, path)
    family = adapter_of(model)
    if record.classes is not None and len(record.classes) == family.classifier(model).classes:
        family.name_classes(model, record.classes)
    if size is not None and family.input_format(model).size[1:] != size:
        check_patches(model, size)
        family.resize(model, size)
    attach_described(model, record)
    return model.eval()


def attach_described(model: nn.Module, record: Record) -> None:
    """Attach the reduction of a description to the model that was built from it, if there is one."""
    if (cut := record.reduction) is not None:
        reduction = None if cut.text is None or cut.phase is None else Reduction.parse(cut.text, cut.phase)
        attach(model, reduction, cls_only=cut.cls_only).set_strength(cut.strength)


def _one_size(image_size: Any, img_size: Any) -> tuple[int, int] | None:
    """(height, width) from the two words for it; None where neither is given."""
    sizes = {_height_and_width(size) for size in (image_size, img_size) if size is not None}
    if len(sizes) > 1:
        raise VitrimError(f"image_size={image_size} and img_size={img_size} mean the same; give one of them")
    return next(iter(sizes), None)


def _height_and_width(size: Any) -> tuple[int, int]:
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in sides):
        raise VitrimError(f"the image size is {short_name(size)}; it must be a side in pixels or (height, width)")
    return sides


def saved_folder(spec: str | Path) -> Path | None:
    """The folder of the saved model in a run folder, or in a folder written by `save`; None for anything else."""
    places = (Path(spec) / "model", Path(spec))
    return next((place for place in places if os.path.exists(place / DESCRIPTION)), None)


def weights_path(folder: str | Path) -> Path:
    """The file of weights in a folder that `save` wrote, or in the run folder around it."""
    folder = Path(folder)
    path = folder if folder.name == WEIGHTS else folder / WEIGHTS
    if not os.path.exists(path.parent / DESCRIPTION):
        path = (saved_folder(folder) or path.parent) / WEIGHTS
    recover(path.parent)
    if not path.is_file():
        raise CheckpointError(f"no model at {folder}: {path} is missing")
    return path


def read_description(path: Path) -> Record:
    """The description in a file of weights; `CheckpointError` if `save` did not write it, or it was altered."""
    record = _description(path)
    if record is None:
        check_not_hugging_face(read_header(path)[1], path)
        raise CheckpointError(
            f"{path} was not written by vitrim.save; give its architecture as the name and this file as checkpoint, or "
            f"both as NAME@{path}"
        )
    return record


def known_size(path: Path) -> tuple[int, int] | None:
    """(height, width) of the images that the positions in this file are for, where its description says so."""
    record = _description(path)
    return None if record is None else record.position_size


def check_heads(model: nn.Module, path: Path) -> None:
    """Raise `CheckpointError` if the weights in this file were trained with another number of attention heads.

    No shape shows it; only the descriptions in files that `save` wrote do.
    """
    record = _description(path)
    if record is None:
        return
    _check_fit(record, path)
    with shapes_only():
        trained = _heads(rebuild(record, {}))
    for name, own in _heads(model).items():
        if (heads := trained.get(name, own)) != own:
            raise CheckpointError(
                f"{path} was trained with {heads} attention heads, the model has {own}; ask for num_heads={heads}"
            )


def _description(path: Path) -> Record | None:
    with opened(path) as file:
        if file.read(9)[8:] != b"{":
            return None  # No safetensors.
    text = read_header(path)[0].get(_KEY)
    return None if text is None else parse(text, path)


def _check_fit(record: Record, path: Path) -> None:
    """Raise `CheckpointError` unless the description builds a model of the weights' shapes, before memory is taken."""
    shapes = read_header(path)[1]
    if any(number > len(shapes) for number in _depths(record.args)):
        raise CheckpointError(f"the description of the model in {path} has more layers than the weights; save it again")
    with shapes_only():
        model = rebuild(record, {})
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if faults := shape_misfits(own, shapes):
        raise CheckpointError(f"{path} does not fit its own description: {faults}")
    tables = sum(value.nbytes for name, value in model.named_buffers() if name not in own)
    if tables > (1 << 28) + 4 * path.stat().st_size:
        raise CheckpointError(f"the description of the model in {path} asks for {tables >> 20} MB of tables")


def _depths(args: Mapping[str, Any]) -> list[int]:
    found: list[int] = []
    for name, value in args.items():
        if any(part in name for part in ("depth", "layers", "blocks", "stages")):
            numbers = [part for part in (value if isinstance(value, tuple) else (value,)) if isinstance(part, int)]
            found.append(sum(numbers))
    return found


def _heads(model: nn.Module) -> dict[str, int]:
    """Attention heads by the name of the layer."""
    return {
        name: int(heads)
        for name, module in model.named_modules()
        if (heads := getattr(module, "num_heads", None)) is not None
    }
