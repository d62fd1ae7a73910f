"""The leading part of a layer: at run time as views of its weights, and for good as weights of their own."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import UnsupportedModelError, WidthError

Parts = tuple[tuple[Any, int], ...]
"""Linear layers, each with how many equal parts its outputs have."""


def leading(weight: Tensor, width: int, parts: int = 1, dim: int = 0) -> Tensor:
    """The leading `width` entries of each of `parts` equal parts of one dimension; a view where nothing is cut."""
    if width * parts == weight.shape[dim]:
        return weight
    return weight.unflatten(dim, (parts, -1)).narrow(dim + 1, 0, width).flatten(dim, dim + 1)


def cut_linear(linear: nn.Linear, width: int, parts: int = 1, dim: int = 0) -> None:
    """Replace the parameters of a linear layer by their leading part: its outputs (dim 0) or its inputs (dim 1)."""
    _cut(linear, "weight", width, parts, dim)
    if dim == 0:
        linear.out_features = width * parts
        if linear.bias is not None:
            _cut(linear, "bias", width, parts, 0)
    else:
        linear.in_features = width * parts


def cut_norm(norm: Any, width: int) -> None:
    """Make a norm over the inner width a norm over its leading part."""
    if isinstance(norm, nn.Identity):
        return
    for name, _ in list(norm.named_parameters(recurse=False)):
        _cut(norm, name, width, 1, 0)
    norm.normalized_shape = (width,)


def narrow_norm(norm: Any, x: Tensor) -> Tensor:
    """A norm over the last dimension applied to a tensor that is narrower than the norm's own width."""
    if isinstance(norm, nn.Identity) or x.shape[-1] == norm.normalized_shape[0]:
        return norm(x)
    width = x.shape[-1]
    weight = None if norm.weight is None else norm.weight[:width]
    bias = getattr(norm, "bias", None)
    if isinstance(norm, nn.LayerNorm):
        return F.layer_norm(x, (width,), weight, None if bias is None else bias[:width], norm.eps)
    return F.rms_norm(x, (width,), weight, norm.eps)


def check_norm(norm: nn.Module, name: str) -> None:
    """Refuse a norm of another kind than LayerNorm and RMSNorm, whose narrowed form is not known."""
    if not isinstance(norm, nn.Identity | nn.LayerNorm | nn.RMSNorm) and type(norm).__name__ != "RmsNorm":
        kind = type(norm).__name__
        raise WidthError(f"the width of {name} cannot be cut: it is a {kind}, not a LayerNorm or RMSNorm")


def check_linear(linear: nn.Module, name: str) -> None:
    """Refuse any layer but a plain `nn.Linear`: its subclasses, wrappers and patches compute something else.

    LoRA and other adapters, quantised layers and parametrised ones are meant, and weights that are tensor subclasses.
    """
    sources = linear._parameters.keys() - {"weight", "bias"}  # torch's pruning, weight_norm and spectral_norm of old.
    plain = type(linear) is nn.Linear and type(linear.weight) in (nn.Parameter, Tensor)
    if plain and not sources and "forward" not in vars(linear):
        return
    what = type(linear).__name__
    if sources:
        what = f"linear layer whose weight is computed from {', '.join(sorted(sources))}"
    elif type(linear) is nn.Linear:
        weight = type(linear.weight).__name__
        what = "linear layer whose forward was replaced" if "forward" in vars(linear) else f"linear layer of {weight}"
    raise UnsupportedModelError(
        f"{name} holds a {what}; only plain linear layers can be narrowed: merge adapters into the weights "
        "(merge_and_unload() in PEFT), undo patches (prune.remove and remove_weight_norm in torch), and quantise "
        "afterwards"
    )


def store(parameter: Tensor, value: Tensor) -> None:
    """Put a value of another precision, from another device perhaps, into a parameter."""
    with torch.no_grad():
        parameter.copy_(value.to(parameter.dtype))


def store_linear(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Put values of another precision into a linear layer."""
    store(linear.weight, weight)
    if linear.bias is not None and bias is not None:
        store(linear.bias, bias)


def _cut(module: nn.Module, name: str, width: int, parts: int, dim: int) -> None:
    old = getattr(module, name)
    new = leading(old.detach(), width, parts, dim).clone()
    setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))


def leading_rows(linear: nn.Linear, x: Tensor, width: int, parts: int) -> Tensor:
    """The leading `width` outputs of each part of a linear layer."""
    bias = None if linear.bias is None else leading(linear.bias, width, parts)
    return F.linear(x, leading(linear.weight, width, parts), bias)
