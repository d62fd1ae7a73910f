"""MLP layers of a variable width, for all families: they run on their leading hidden units.

A family says which layers make the hidden units, and what activates them.
"""

import torch
from torch import Tensor, nn

from ...tokens.precision import exact
from ..macs import Macs
from .compensation import Compensation
from .slicing import Parts, check_linear, check_norm, cut_linear, cut_norm, leading_rows, narrow_norm, store_linear
from .sublayers import Elastic


class ElasticHidden(Elastic):
    """An MLP on its leading hidden units: one or two layers that make them, a norm at most, and a last projection."""

    kind = "mlp"

    @property
    def first(self) -> Parts:
        """The layers that make the hidden units, each with how many of its rows belong to one unit."""
        raise NotImplementedError

    @property
    def hidden_norm(self) -> nn.Module:
        """The norm of the hidden units; `nn.Identity` where there is none."""
        return nn.Identity()

    def activate(self, x: Tensor) -> Tensor:
        """Hidden units after activation, gate and dropout, at the present width; see `made`."""
        raise NotImplementedError

    @property
    def full_width(self) -> int:
        return self.last.in_features

    def refuse(self, name: str) -> None:
        for linear, _ in (*self.first, (self.last, 1)):
            check_linear(linear, name)
        check_norm(self.hidden_norm, f"{name}: the norm of the hidden units")

    def unit_macs(self, tokens: int) -> Macs:
        rows = sum(linear.in_features * parts for linear, parts in self.first)
        return Macs(tokens * (rows + self.last.out_features))

    def unit_params(self) -> int:
        rows = sum(parts * (linear.in_features + (linear.bias is not None)) for linear, parts in self.first)
        return rows + self.last.out_features + sum(1 for _ in self.hidden_norm.parameters())

    def made(self, x: Tensor, index: int = 0) -> Tensor:
        """The rows that layer `index` of `first` makes, cut to the present width."""
        linear, parts = self.first[index]
        return leading_rows(linear, x, self.vitrim_width, parts)

    def narrow_mlp(self, x: Tensor) -> Tensor:
        """The MLP at the present width, (B, N, C)."""
        if self.vitrim_width == 0:
            return self.constant(x)
        hidden = narrow_norm(self.hidden_norm, self.activate(x))
        self.tap("hidden", hidden)
        return self.project(hidden)

    @torch.no_grad()
    def unit_norms(self) -> Tensor:
        """Squared length of the weights that make every hidden unit, in float64."""
        squares = [exact(linear.weight).unflatten(0, (parts, -1)).square().sum((0, 2)) for linear, parts in self.first]
        return torch.stack(squares).sum(0)

    @torch.no_grad()
    def order_units(self, order: Tensor) -> None:
        """Put the hidden units in this order; gate and value rows of a unit stay together."""
        order = order.to(self.last.weight.device)
        for linear, parts in self.first:
            for parameter in linear.parameters():
                parameter.copy_(parameter.unflatten(0, (parts, -1))[:, order].flatten(0, 1))
        for parameter in self.hidden_norm.parameters():
            parameter.copy_(parameter[order])
        self.last.weight.copy_(self.last.weight[:, order])

    def shrink(self, width: int, compensation: Compensation | None = None) -> None:
        projection = self.compensated(width, compensation)
        norm = self.hidden_norm
        for linear, parts in self.first:
            cut_linear(linear, width, parts)
        cut_norm(norm, width)
        cut_linear(self.last, width, dim=1)
        store_linear(self.last, *projection)
        self.vitrim_width = width
