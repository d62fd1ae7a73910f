"""Reading files of weights safely, and putting weights into a model with every misfit told in one line."""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import CheckpointError, ClassCountError
from .adapter import adapter_of

State = dict[str, Tensor]
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")
_NESTS = ("model_ema", "state_dict_ema", "state_dict", "model")
_WRAPPERS = ("module.", "_orig_mod.")


def read_weights(path: str | Path) -> State:
    """The tensors of a safetensors file or of a PyTorch checkpoint, on the CPU; no code in the file is ever run.

    Usual nestings (`model`, `state_dict`, averaged weights first) and the prefixes of wrappers are taken off.

    Raises:
        CheckpointError: the file is missing, damaged, holds code, or is no file of weights.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no file of weights at {path}")
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise CheckpointError(f"{path} is empty; copy or download it again")
    if start.lstrip()[:1] == b"<":
        raise CheckpointError(f"{path} is a web page, not weights; download the file itself")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not weights; run git lfs pull")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
    except Exception as error:  # Readers of foreign bytes fail in many ways.
        # torch.save writes pickles of protocol 2; it says which global a pickle must not name.
        foreign_pickle = start[:1] == b"\x80" and start[1:2] > b"\x02"
        if foreign_pickle or "GLOBAL" in str(error):
            raise CheckpointError(
                f"{path} holds code, refused; convert it to safetensors, or save its state dict alone, if you trust it"
            ) from error
        raise CheckpointError(f"{path} is damaged, cut short or no file of weights; get it again") from error
    return _unwrap(content, path)


def _unpickle(path: Path) -> object:
    # Training scripts of the timm family keep their argparse.Namespace beside the weights; it holds plain values.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _unwrap(content: object, path: Path) -> State:
    while isinstance(content, Mapping):
        nest = next((name for name in _NESTS if isinstance(content.get(name), Mapping)), None)
        if nest is None:
            break
        content = content[nest]
    state = dict(content) if isinstance(content, Mapping) else {}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state dict (names to tensors); save model.state_dict()")
    while prefix := next((p for p in _WRAPPERS if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def class_count(state: Mapping[str, Tensor], head: str = "head") -> int | None:
    """Classes of the checkpoint's classifier named `head`; None where it has none."""
    weight = state.get(f"{head}.weight")
    return None if weight is None else weight.shape[0]


def load_weights(model: nn.Module, state: State, source: str | Path, *, reset_head: bool = False) -> None:
    """Put a state dict into the model, in place; timm resamples position and patch embeddings of another size.

    Args:
        source: where the weights are from, for messages.
        reset_head: leave the model's own, fresh classifier in place.

    Raises:
        ClassCountError: another number of classes.
        CheckpointError: names missing, left over, or of another shape.
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
        state = adapter.fit_weights(model, state)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    own = model.state_dict()
    if reset_head:
        prefixes = tuple(f"{name}." for name in head.names)
        state = {name: value for name, value in state.items() if not name.startswith(prefixes)}
        state |= {name: value for name, value in own.items() if name.startswith(prefixes)}
    if faults := misfits(own, state):
        raise CheckpointError(f"{source} does not fit {adapter.info(model).name}: {faults}")
    model.load_state_dict(state)


def misfits(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """How the names and shapes of `state` differ from the model's own, in one line; empty if they agree."""
    shapes = [
        f"{name} {tuple(state[name].shape)} in place of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    lists = {
        "missing": [name for name in own if name not in state],
        "left over": [name for name in state if name not in own],
        "of another shape": shapes,
    }
    return "; ".join(f"{len(names)} {kind} ({_few(names)})" for kind, names in lists.items() if names)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
