"""Putting the weights of a file into a model: which part of the file is this model, and does it fit."""

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, ClassCountError
from ...text import printable, short_name
from ..finding import adapter_of
from ..wrapped import check_is_model
from .checkpoints import State, is_averaged

log = logging.getLogger(__name__)
_HUGGING_FACE = ("embeddings.patch_embeddings.projection.weight", "embeddings.patch_embedding.weight")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def aligned(state: State, names: Collection[str], source: str | Path) -> State:
    """The part of a state dict that has the names of a model, after one common prefix (`model.`, `backbone.net.`).

    Training code keeps the model inside a larger module. Where the names agree as they are, nothing changes. What is
    removed is reported; of averaged and plain weights side by side the averaged ones are taken.

    Args:
        state: names to tensors.
        names: of the model's own state dict.
        source: where the weights are from, for messages.

    Raises:
        CheckpointError: two parts fit equally well, or the names are those of Hugging Face transformers,
            and those of the model differ.
    """
    if not set(names) <= set(state):
        check_not_hugging_face(state, source)
    found = _prefixes(state, set(names))
    most = max(found.values(), default=0)
    if not most or found[""] == most:
        return state
    best = [prefix for prefix, number in found.items() if number == most]
    averaged = [prefix for prefix in best if is_averaged(prefix)]
    chosen = averaged or best
    if len(chosen) > 1:
        both = ", ".join(short_name(prefix) for prefix in sorted(chosen)[:3])
        raise CheckpointError(f"{source} holds the weights of several models ({both}); save the one to use by itself")
    prefix = chosen[0]
    part = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    others = sorted({name.split(".")[0] for name in state if not name.startswith(prefix)})
    besides = f", without {_few(others)}" if others else ""
    log.warning("%s: took the weights under %s%s", printable(source), short_name(prefix), besides)
    return part


def check_not_hugging_face(names: Iterable[str], source: str | Path) -> None:
    """Raise `CheckpointError` with the way to open a file whose weights have the names of Hugging Face transformers."""
    if any(name.endswith(_HUGGING_FACE) for name in names):
        folder = Path(source).parent
        lacks = "" if (folder / "config.json").exists() else ", with its config.json and preprocessor_config.json,"
        raise CheckpointError(
            f"{source} has the names of Hugging Face transformers; give the folder that holds it{lacks} as the model: "
            f"{folder} or hf:{folder}"
        )


def _prefixes(state: State, wanted: set[str]) -> Counter[str]:
    """What stands before names of the model in the names of the state dict, and how often; "" for those as they are."""
    found: Counter[str] = Counter()
    for name in state:
        parts = name.split(".")[:12]
        found.update(
            "".join(f"{part}." for part in parts[:number])
            for number in range(len(parts))
            if ".".join(parts[number:]) in wanted
        )
    return found


def class_count(state: Mapping[str, Tensor], head: str = "head") -> int | None:
    """Classes of the checkpoint's classifier named `head`; None where it has none."""
    weight = state.get(f"{head}.weight")
    return None if weight is None or not weight.ndim else weight.shape[0]


def load_weights(
    model: nn.Module,
    state: State,
    source: str | Path,
    *,
    reset_head: bool = False,
    given: Collection[str] = ("img_size",),
    trained_at: tuple[int, int] | None = None,
) -> None:
    """Put a state dict into the model, in place.

    Args:
        model: of the architecture that the weights are of.
        state: names to tensors, see `aligned`.
        source: where the weights are from, for messages.
        reset_head: keep the model's own, fresh classifier.
        given: arguments that were chosen for the model. Without `img_size` among them the model takes the input size
            that the weights were trained at, else positions are resampled to the size of the model; without
            `patch_size` weights for patches of another size are refused, else they are resampled.
        trained_at: (height, width) of the images that the weights were trained on, where that is known.

    Raises:
        ClassCountError: another number of classes.
        CheckpointError: names missing, left over, or of another shape; positions of an unknown grid; weights that are
            quantised or not finite.
    """
    adapter = adapter_of(model)
    head = adapter.classifier(model)
    classes, wanted = class_count(state, *head.names[:1]), head.classes
    if not reset_head and classes is not None and classes != wanted:
        raise ClassCountError(
            f"{source} has {classes} classes, the model {wanted}",
            f"ask for num_classes={classes}, or reset_head=True to start a new head",
        )
    try:
        size = None if "img_size" in given else adapter.trained_size(model, state, trained_at)
        if size is not None:
            adapter.resize(model, size)
            trained_at = size
        state = adapter.fit_weights(model, state, trained_at, resample_patches="patch_size" in given)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    own = model.state_dict()
    prefixes = tuple(f"{name}." for name in head.names)
    if reset_head:
        state = {name: value for name, value in state.items() if not name.startswith(prefixes)}
        state |= {name: value for name, value in own.items() if name.startswith(prefixes)}
    if faults := misfits(own, state):
        missing = own.keys() - state.keys()
        without_head = bool(missing) and all(name.startswith(prefixes) for name in missing)
        hint = "; name the weights of the classifier so, or ask for reset_head=True to start a new one" * without_head
        raise CheckpointError(f"{source} does not fit {adapter.info(model).name}: {faults}{hint}")
    check_values(own, state, source)
    if size is not None:
        log.warning("%s: the model takes images of %s x %s px, as its weights do", printable(source), *size)
    model.load_state_dict(state)


def check_values(own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise `CheckpointError` if tensors of fitting shapes hold what cannot be the weights: integers, or NaN."""
    for name, value in state.items():
        mine, where = own[name], short_name(name)
        kind = str(value.dtype).removeprefix("torch.")
        if value.dtype not in _DTYPES if mine.is_floating_point() else value.dtype != mine.dtype:
            raise CheckpointError(f"{source} holds {kind} values for {where}; convert them to {_words(mine)} first")
        if not value.isfinite().all() and mine.isfinite().all():
            raise CheckpointError(f"{source} holds values that are not finite (in {where}); use an earlier one")


def check_tensors(model: nn.Module) -> None:
    """Raise `CheckpointError` unless all weights of a model are plain tensors, as those of quantised layers are not."""
    check_is_model(model)
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor) or type(value.detach()) is not Tensor or value.is_quantized:
            raise CheckpointError(
                f"the weights are not all plain tensors ({short_name(name)}); quantise a model, or cut it into shards, "
                "after vitrim has compressed or saved it"
            )


def _words(tensor: Tensor) -> str:
    return "float" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")


def misfits(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """How the names and shapes of `state` differ from the model's own, in one line; empty if they agree."""
    return shape_misfits(
        {name: tuple(value.shape) for name, value in own.items()},
        {name: tuple(value.shape) for name, value in state.items()},
    )


def shape_misfits(own: Mapping[str, tuple[int, ...]], others: Mapping[str, tuple[int, ...]]) -> str:
    """The same of names and shapes."""
    lists = {
        "missing": [name for name in own if name not in others],
        "left over": [name for name in others if name not in own],
        "of another shape": [
            f"{name} {others[name]} in place of {shape}"
            for name, shape in own.items()
            if name in others and others[name] != shape
        ],
    }
    return "; ".join(f"{len(names)} {kind} ({_few(names)})" for kind, names in lists.items() if names)


def _few(names: list[str]) -> str:
    return ", ".join(short_name(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")
