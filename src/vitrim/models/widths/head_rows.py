"""Rows of a parameter that belong to one stream of an attention layer: the queries, keys or values of all heads."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .slicing import leading


@dataclass(frozen=True)
class Rows:
    """Rows of a weight or of a bias.

    owner, name: the module that holds the parameter or buffer, and its name there.
    first: of the rows. heads, dims: how many heads they are of, and how many there are of each.
    """

    owner: Any
    name: str
    first: int
    heads: int
    dims: int

    @property
    def tensor(self) -> Tensor:
        """All of them."""
        return getattr(self.owner, self.name)[self.first : self.first + self.heads * self.dims]

    @property
    def params(self) -> int:
        """How many parameters they are; a buffer is none."""
        return self.tensor.numel() if isinstance(getattr(self.owner, self.name), nn.Parameter) else 0

    def leading(self, width: int) -> Tensor:
        """The leading rows of every head."""
        return leading(self.tensor, width, self.heads)

    def chosen(self, dims_HD: Tensor) -> Tensor:
        """These rows of every head."""
        by_heads = self.tensor.unflatten(0, (self.heads, self.dims))
        return by_heads[torch.arange(self.heads, device=dims_HD.device)[:, None], dims_HD].flatten(0, 1)

    def replace(self, rows: Tensor) -> None:
        """Put other rows into their place, fewer perhaps, for good."""
        old = getattr(self.owner, self.name)
        new = torch.cat([old[: self.first], rows, old[self.first + self.heads * self.dims :]]).detach().clone()
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        setattr(self.owner, self.name, new)
        if isinstance(self.owner, nn.Linear):
            self.owner.out_features = len(new)
