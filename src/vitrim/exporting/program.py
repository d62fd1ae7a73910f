"""From a model to a program: one function of images, with a batch of any size, and a description of what it is."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UncountableError, UnsupportedModelError, VitrimError
from ..measure.cost import cost_of_any
from ..measure.environment import environment
from ..models import adapter_of, attached, num_classes, variant
from ..models.foreign_macs import num_parameters
from ..models.input_format import InputFormat
from ..models.reduction.exchange import acts
from ..text import reason_of

INPUT = "images"
_VERSIONS = ("date", "python", "vitrim", "torch", "timm")


class Served(nn.Module):
    """A model as a function from images (B, channels, H, W) to logits (B, K), features (B, C) or a map (B, C, ...)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Logits, or features."""
        return adapter_of(self.model).predict(self.model, images)


def prepared(model: nn.Module, method: str | None = None) -> nn.Module:
    """A copy of the model that shares its weights, in eval mode, under a method (see `variant`), ready to be exported.

    Raises:
        VitrimError: a file could not do what the model does.
    """
    for name, module in model.named_modules():
        if any(map(acts, (*module._forward_hooks.values(), *module._forward_pre_hooks.values()))):
            raise VitrimError(f"{name or 'the model'} has a forward hook, which no file holds; remove it first")
    ready = variant(model, method)
    handle = attached(ready)
    reduction = None if handle is None else handle.reduction
    if handle is not None and reduction is not None and reduction.active(False) and handle.strength < 1:
        raise VitrimError(
            f"the curriculum of this model has reached strength {handle.strength:g} of its reduction, whose final form "
            "is 1; train it to the end, or give the method that is to act, such as 'TopK() @ KeepRate(0.7)' or dense"
        )
    return ready


def make_program(model: nn.Module) -> torch.export.ExportedProgram:
    """The program of a prepared model, for batches of any size.

    Raises:
        VitrimError: PyTorch cannot follow its forward pass.
    """
    adapter, form = adapter_of(model), InputFormat.of(model)
    example = torch.zeros(2, *form.size)
    batch = torch.export.Dim("batch", min=1)
    try:
        with torch.no_grad(), adapter.exporting():
            return torch.export.export(Served(model).eval(), (example,), dynamic_shapes=({0: batch},))
    except VitrimError:
        raise
    except Exception as error:  # torch.export fails with whatever the model, or its own parts, raise.
        raise UnsupportedModelError(
            f"torch.export cannot follow this {type(model).__name__} for batches of any size: {reason_of(error)}"
        ) from error


def described(model: nn.Module, classes: Sequence[str] | None) -> dict[str, Any]:
    """What somebody needs who has the file and no vitrim: images, outputs, classes, reduction, cost and versions."""
    form, handle, adapter = InputFormat.of(model), attached(model), adapter_of(model)
    number, names = num_classes(model), classes or adapter.class_names(model)
    reduction = None if handle is None or handle.reduction is None else handle.reduction
    acts = reduction is not None and reduction.active(False)
    return {
        "input": {
            "name": INPUT, "batch": "any", "size": form.size, "dtype": "float32",
            "pixels": "from 0 to 1, minus mean, divided by std, per channel",
            "mean": form.mean, "std": form.std, "interpolation": form.interpolation, "crop_pct": form.crop_pct,
            "crop_mode": form.crop_mode,
        },
        "output": {"name": output_name(model), "width": adapter.output_width(model) or None},
        "classes": list(names) if names and len(names) == number else None,
        "reduction": str(reduction) if acts else None,
        **_cost(model),
        "versions": {name: value for name, value in environment().items() if name in _VERSIONS},
    }  # fmt: skip


def output_name(model: nn.Module) -> str:
    """Of what the file returns."""
    return "logits" if num_classes(model) else "features"


def _cost(model: nn.Module) -> dict[str, Any]:
    try:
        spent = cost_of_any(model, training=False)
    except UncountableError:
        return {"macs": None, "params": num_parameters(model), "token_counts": None}
    return {"macs": spent.macs, "params": spent.params, "token_counts": spent.token_counts or None}
