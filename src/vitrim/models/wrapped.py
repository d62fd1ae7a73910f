"""What users give as a model: a network, one inside a wrapper (DDP, a compiled model, PEFT, an EMA), or none."""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from ..errors import VitrimError
from ..text import short


def check_is_model(model: object) -> None:
    """Raise `VitrimError` that says what to give, unless this is a network."""
    if isinstance(model, nn.Module):
        return
    inner = vars(model).get("model") if hasattr(model, "__dict__") else None
    if isinstance(inner, nn.Module):
        advice = f"a {type(model).__name__} is not a model; give the model in it, its .model"
    elif isinstance(model, str | Path):
        advice = f"{short(str(model))} is a name, not a model; open it first: vitrim.build_model({short(str(model))})"
    elif isinstance(model, Mapping):
        advice = "a dict of weights is not a model; put it into one first: model.load_state_dict(...)"
    elif isinstance(model, type):
        advice = f"{model.__name__} is a class, not a model; make one: {model.__name__}(...)"
    else:
        what = "None" if model is None else f"an object of the type {type(model).__name__}"
        advice = f"{what} is not a model; give a torch.nn.Module"
    raise VitrimError(advice)


def find_inside(model: nn.Module, suits: Callable[[nn.Module], bool]) -> tuple[str, nn.Module] | None:
    """The first module inside `model` that suits, and how to write it, such as "model.backbone"; None without one."""
    for name, module in model.named_modules():
        if name and suits(module):
            return written(name), module
    return None


def written(name: str) -> str:
    """How to write the module of this name in Python: "blocks.0.mlp" is `model.blocks[0].mlp`."""
    return "model" + "".join(f"[{part}]" if part.isdecimal() else f".{part}" for part in name.split(".") if part)
