"""Models inside wrappers: a network of one's own that holds a ViT, DDP, a compiled model, PEFT, an EMA."""

from collections.abc import Callable

from torch import nn


def name_inside(model: nn.Module, suits: Callable[[nn.Module], bool]) -> str:
    """How to write the first module inside `model` that suits, such as "model.backbone"; empty if there is none."""
    for name, module in model.named_modules():
        if name and suits(module):
            return "model" + "".join(f"[{part}]" if part.isdecimal() else f".{part}" for part in name.split("."))
    return ""
