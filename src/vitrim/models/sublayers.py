"""The two halves of a transformer block as layers of a variable inner width: head dimension or hidden units.

A sub-layer runs at a smaller width by real, smaller matrix products on the leading part of its own weights. As with
reductions, the class of the foreign module is exchanged for a module-level subclass that overrides `forward`; what the
super-network must know of a foreign layer (which rows and columns belong to one unit of width) is in that subclass
and nowhere else.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UnsupportedModelError, VitrimError
from .adapter import Macs, find_adapter

Kind = Literal["attention", "mlp"]
Tap = Callable[[str, Tensor], None]
ELASTIC: dict[type[nn.Module], type["Elastic"]] = {}
"""Which subclass takes the place of which foreign layer."""


class Elastic(nn.Module):
    """Mixin placed before the foreign class of a sub-layer. Widths count head dimensions or hidden units.

    vitrim_width: the width that the next forward pass uses, at most `full_width`.
    vitrim_tap: called with (name, tensor) at the places where statistics are taken: "qkv" (B, N, 3*H*h) before any
        norm and "mixed" (B, N, H*h) before the output projection; "hidden" (B, N, units) before the last projection.
    """

    kind: ClassVar[Kind]
    replaces: ClassVar[type[nn.Module]]
    vitrim_width: int
    vitrim_tap: Tap | None

    def __init_subclass__(cls, replaces: type[nn.Module] | None = None) -> None:
        if replaces is not None:
            ELASTIC[replaces], cls.replaces = cls, replaces

    @property
    def last(self) -> nn.Linear:
        """The projection back to the embedding width."""
        raise NotImplementedError

    @property
    def full_width(self) -> int:
        """The width of the weights."""
        raise NotImplementedError

    def refuse(self, name: str) -> None:
        """Raise `UnsupportedModelError` if a part of this layer forbids narrowing it."""

    def unit_macs(self, tokens: int) -> Macs:
        """MACs of one unit of width for one image of so many tokens."""
        raise NotImplementedError

    def unit_params(self) -> int:
        """Parameters that belong to one unit of width."""
        raise NotImplementedError

    def left_params(self) -> int:
        """Parameters that removal adds: the constant that stays, where the last projection had no bias."""
        return 0 if self.last.bias is not None else self.last.out_features

    def shrink(self, width: int, mean: Tensor | None = None) -> None:
        """Cut the weights to the leading `width` units, for good.

        Args:
            width: units kept.
            mean: mean value of every unit's input to the last projection; what the lost units add on average
                then moves into that projection's bias. None, or a projection without bias: no compensation.
        """
        raise NotImplementedError

    def remains(self) -> "RemovedBranch":
        """What takes the place of this layer when its width is 0."""
        last = self.last
        branch = RemovedBranch(last.out_features, last.weight.device, last.weight.dtype)
        if last.bias is not None:
            branch.bias = last.bias
        return branch.train(self.training)

    def tap(self, name: str, x: Tensor) -> None:
        """Show a tensor to whoever takes statistics."""
        if self.vitrim_tap is not None:
            self.vitrim_tap(name, x)

    def constant(self, x_BNC: Tensor, bias: Tensor | None) -> Tensor:
        """What width 0 adds: the last bias. Idle weights get zero gradients, as data parallelism asks."""
        out = torch.zeros_like(x_BNC) if bias is None else bias.to(x_BNC.dtype).expand_as(x_BNC)
        if self.training and torch.is_grad_enabled():
            out = out + 0.0 * (x_BNC + sum(p.sum() for p in self.parameters() if p.requires_grad))
        return out


class RemovedBranch(nn.Module):
    """What is left of an attention or MLP branch of width 0: a constant, zero unless something is learnt or put there.

    A branch without inputs still has the bias of its output projection, which is where the mean of what was removed
    may be kept. Costs no MACs.
    """

    def __init__(self, dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """The constant, in the shape of `x` (..., C); attention masks change nothing."""
        # A copy, since hooks on gradients stumble over a parameter's view made while none are taken.
        return self.bias.to(x.dtype, copy=True).expand_as(x)


@dataclass(frozen=True)
class Sublayer:
    """One half of one block: its name in the model, its block index and its kind."""

    name: str
    block: int
    kind: Kind


def sublayers(model: nn.Module) -> list[Sublayer]:
    """All sub-layers whose width can change, in order; those removed earlier are left out.

    Raises:
        UnsupportedModelError: no adapter knows the model, or a layer can take no other width.
    """
    names = {module: name for name, module in model.named_modules()}
    found: list[Sublayer] = []
    removed = False
    for index, block in enumerate(find_adapter(model).blocks(model)):
        for child in block.children():
            removed |= isinstance(child, RemovedBranch)
            layer = ELASTIC.get(type(child))
            if layer is not None:
                found.append(Sublayer(names[child], index, layer.kind))
    if not found and not removed:
        known = ", ".join(sorted(cls.__name__ for cls in ELASTIC))
        raise UnsupportedModelError(f"no sub-layer of this {type(model).__name__} can change its width; known: {known}")
    return found


@contextmanager
def elastic(model: nn.Module) -> Iterator[dict[str, Elastic]]:
    """Within this context the sub-layers run at `vitrim_width` (at first the full one); yields them by name.

    Nesting is allowed; the outermost context gives the foreign classes back.
    """
    inside = {name: module for name, module in model.named_modules() if isinstance(module, Elastic)}
    if inside:
        yield inside
        return
    layers: dict[str, Elastic] = {}
    for part in sublayers(model):
        module = model.get_submodule(part.name)
        original = type(module)
        module.__class__ = ELASTIC[original]
        module.vitrim_width, module.vitrim_tap = module.full_width, None
        layers[part.name] = module
    try:
        for name, module in layers.items():
            module.refuse(name)
        yield layers
    finally:
        for module in layers.values():
            module.__class__ = module.replaces
            del module.vitrim_width, module.vitrim_tap


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


def cut_norm(norm: nn.Module, width: int) -> None:
    """Make a norm over the inner width a norm over its leading part."""
    if isinstance(norm, nn.Identity):
        return
    for name, _ in list(norm.named_parameters(recurse=False)):
        _cut(norm, name, width, 1, 0)
    norm.normalized_shape = (width,)


def narrow_norm(norm: nn.Module, x: Tensor) -> Tensor:
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
        raise UnsupportedModelError(f"{name} is a {type(norm).__name__}; only LayerNorm and RMSNorm can be narrowed")


def compensate(linear: nn.Linear, mean: Tensor | None, lost: Tensor) -> None:
    """Add to the bias what the lost inputs (boolean mask over the columns) contribute on average."""
    if mean is None or linear.bias is None:
        return
    if mean.numel() != lost.numel():
        raise VitrimError(f"{mean.numel()} means for a layer of width {lost.numel()}")
    with torch.no_grad():
        gone = lost.to(linear.weight.device)
        mean = mean.flatten().to(linear.weight.device, torch.float64)
        extra = linear.weight[:, gone].double() @ mean[gone]
        linear.bias.copy_(linear.bias.double() + extra)


def _cut(module: nn.Module, name: str, width: int, parts: int, dim: int) -> None:
    old = getattr(module, name)
    new = leading(old.detach(), width, parts, dim).clone()
    setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))
