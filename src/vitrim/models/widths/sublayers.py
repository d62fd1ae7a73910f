"""The two halves of a transformer block as layers of a variable inner width: head dimension or hidden units.

A sub-layer runs at a smaller width by real, smaller matrix products on the leading part of its own weights. As with
reductions, the class of the foreign module is exchanged for a module-level subclass that overrides `forward`. Only
that subclass, in the file of its family, knows which rows and columns of a foreign layer belong to one unit of width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import UnsupportedModelError, WidthError
from ...tables import Table
from ..finding import find_adapter
from ..macs import Macs
from ..own_code import replaced
from ..removed_branch import RemovedBranch
from .compensation import Compensation
from .slicing import leading, store

Kind = Literal["attention", "mlp"]
Tap = Callable[..., None]
STATE = ("vitrim_width", "vitrim_last", "vitrim_scales")
"""Names of what says how a layer runs."""
ELASTIC: Table[type[nn.Module], type["Elastic"]] = Table("elastic layer")
"""Which subclass takes the place of which foreign layer."""


class Elastic(nn.Module):
    """Mixin placed before the foreign class of a sub-layer. Widths count head dimensions or hidden units.

    vitrim_width: the width that the next forward pass uses, at most `full_width`.
    vitrim_last: weight (C, inputs) and bias of the last projection at this width; None: the leading part of its own.
    vitrim_scales: factors (H, pairs) on the rotary pairs of the queries that are left at this width; None: all 1.
    vitrim_tap: called with (name, tensor) at the places where statistics are taken: "streams" (B, N, S*H*h), the
        queries, keys and values before any norm (S = 3) or the values alone (S = 1), and "mixed" (B, N, H*h) before
        the output projection, where whole rotary pairs can be cut with the (query, key, value) behind it; "hidden"
        (B, N, units) before the last projection.
    """

    kind: ClassVar[Kind]
    replaces: ClassVar[type[nn.Module]]
    vitrim_width: int
    vitrim_last: tuple[Tensor, Tensor | None] | None
    vitrim_scales: Tensor | None
    vitrim_tap: Tap | None

    def __init_subclass__(cls, replaces: type[nn.Module] | None = None) -> None:
        if replaces is not None:
            cls.replaces = replaces
            ELASTIC.enter(replaces, cls)

    @property
    def last(self) -> nn.Linear:
        """The projection back to the embedding width."""
        raise NotImplementedError

    @property
    def full_width(self) -> int:
        """The width of the weights."""
        raise NotImplementedError

    @property
    def inputs(self) -> Tensor:
        """Columns of the last projection in the order of the units: the leading ones belong to the leading units."""
        return torch.arange(self.last.in_features)

    @property
    def last_by_units(self) -> Tensor:
        """Weight (C, inputs) of the last projection with its columns in the order of the units, see `inputs`."""
        return self.last.weight[:, self.inputs.to(self.last.weight.device)]

    def units_at(self, width: int) -> int:
        """How many of the units that the last projection reads stay at this width; dims of the values in attention."""
        return width

    def kept_inputs(self, width: int) -> int:
        """How many inputs the last projection has at this width."""
        return self.units_at(width) * (self.last.in_features // self.full_width)

    def run_at(self, width: int, compensation: Compensation | None = None) -> None:
        """Run at this width from now on, with what makes up for the lost units; None: they add nothing."""
        self.vitrim_width, self.vitrim_last, self.vitrim_scales = width, None, None
        if compensation is not None and width < self.full_width:
            weight, bias = self.compensated(width, compensation)
            self.vitrim_last = weight.to(self.last.weight), None if bias is None else bias.to(self.last.weight)

    def compensated(self, width: int, compensation: Compensation | None) -> tuple[Tensor, Tensor | None]:
        """Weight (C, inputs) and bias of the last projection at this width, columns in its own order, in float64."""
        last = self.last
        bias = last.weight.new_zeros(last.out_features) if last.bias is None and width == 0 else last.bias
        compensation = compensation or Compensation(torch.zeros(last.in_features))
        weight, bias = compensation.folded(self.last_by_units, bias, self.kept_inputs(width))
        return weight[:, self.inputs[: weight.shape[1]].argsort().to(weight.device)], bias

    def refuse(self, name: str) -> None:
        """Raise `UnsupportedModelError` if a part of this layer forbids narrowing it."""

    def unit_macs(self, tokens: int) -> Macs:
        """MACs of one unit of width for one image of so many tokens."""
        raise NotImplementedError

    def unit_params(self) -> int:
        """Parameters that belong to one unit of width."""
        raise NotImplementedError

    def fixed_macs(self, tokens: int) -> Macs:
        """MACs of what belongs to no unit of width, and goes only with the whole layer."""
        return Macs()

    def left_params(self) -> int:
        """Parameters that removal adds: the constant that stays, where the last projection had no bias.

        Less those that belong to no unit of width: the number may be negative.
        """
        return 0 if self.last.bias is not None else self.last.out_features

    def shrink(self, width: int, compensation: Compensation | None = None) -> None:
        """Cut the weights to the leading `width` units, for good.

        Args:
            width: units kept, at least one; `remains` takes the place of a layer that keeps none.
            compensation: what lets the kept units do the work of the lost ones. None: the lost units add nothing.
        """
        raise NotImplementedError

    def remains(self, compensation: Compensation | None = None) -> "RemovedBranch":
        """What takes the place of this layer when its width is 0: its bias, and the mean of what it added."""
        last = self.last
        branch = RemovedBranch(last.out_features, last.weight.device, last.weight.dtype)
        if last.bias is not None:
            branch.bias = last.bias
        _, bias = self.compensated(0, compensation)
        assert bias is not None
        store(branch.bias, bias)
        return branch.train(self.training)

    def project(self, x_BNA: Tensor) -> Tensor:
        """The last projection at the present width, (B, N, C)."""
        last = self.last
        if self.vitrim_last is not None:
            weight, bias = self.vitrim_last
            return F.linear(x_BNA, weight, bias)
        parts = last.in_features // self.full_width
        return F.linear(x_BNA, leading(last.weight, self.units_at(self.vitrim_width), parts, dim=1), last.bias)

    def tap(self, name: str, x: Tensor, *behind: Tensor) -> None:
        """Hand a tensor to the statistics, if any are taken, with those that it was made from."""
        if self.vitrim_tap is not None:
            self.vitrim_tap(name, x, *behind)

    def constant(self, x_BNC: Tensor) -> Tensor:
        """What width 0 adds: the last bias. Unused weights get zero gradients, which data parallelism needs."""
        bias = self.last.bias if self.vitrim_last is None else self.vitrim_last[1]
        out = torch.zeros_like(x_BNC) if bias is None else bias.to(x_BNC.dtype).expand_as(x_BNC)
        if self.training and torch.is_grad_enabled():
            out = out + 0.0 * (x_BNC + sum(p.sum() for p in self.parameters() if p.requires_grad))
        return out


@dataclass(frozen=True)
class Sublayer:
    """One half of one block: its name in the model, its block index, its kind, and the name of the norm before it."""

    name: str
    block: int
    kind: Kind
    norm: str


def sublayers(model: nn.Module) -> list[Sublayer]:
    """All sub-layers whose width can change, in order; those removed earlier are left out.

    Raises:
        UnsupportedModelError: no adapter knows the model, a layer can take no other width, or two share parameters.
    """
    names = {module: name for name, module in model.named_modules()}
    found: list[Sublayer] = []
    adapter = find_adapter(model)
    adapter.check_widths(model)
    for index, block in enumerate(adapter.blocks(model)):
        for branch, norm in adapter.narrowable(model).items():
            child = getattr(block, branch)
            if isinstance(child, RemovedBranch):
                continue
            if type(child) not in ELASTIC:
                kind = f"{type(child).__module__}.{type(child).__qualname__}"
                raise WidthError(f"the width of {names[child]} cannot be cut: no narrow form of {kind} is known")
            found.append(Sublayer(names[child], index, ELASTIC[type(child)].kind, f"{names[block]}.{norm}"))
    _refuse_tied(model, found)
    return found


def _refuse_tied(model: nn.Module, parts: list[Sublayer]) -> None:
    """Raise where a parameter of a sub-layer, or of the norm before it, has a second place in the model."""
    homes = [f"{name}." for part in parts for name in (part.name, part.norm)]
    first: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(parameter, name)
        if other != name and any(place.startswith(home) for place in (name, other) for home in homes):
            raise WidthError(f"{other} and {name} are one parameter, whose width cannot be cut in one place")


@contextmanager
def elastic(model: nn.Module) -> Iterator[dict[str, Elastic]]:
    """Within this context the sub-layers run at `vitrim_width` (at first the full one); yields them by name.

    Nesting is allowed; the outermost context restores the foreign classes.

    Raises:
        UnsupportedModelError: a layer can take no other width.
    """
    inside = {name: module for name, module in model.named_modules() if isinstance(module, Elastic)}
    if inside:
        yield inside
        return
    layers: dict[str, Elastic] = {}
    try:
        for part in sublayers(model):
            module: Any = model.get_submodule(part.name)
            if "forward" in vars(module) or replaced(type(module)):  # The elastic one would not run, or not this one.
                raise UnsupportedModelError(f"the forward of {part.name} was replaced; undo that patch or hook first")
            module.__class__ = ELASTIC[type(module)]
            layers[part.name] = module
            module.refuse(part.name)
            module.vitrim_tap = None
            module.run_at(module.full_width)
        yield layers
    finally:
        for module in layers.values():
            module.__class__ = module.replaces
            for name in (*STATE, "vitrim_tap"):
                vars(module).pop(name, None)
