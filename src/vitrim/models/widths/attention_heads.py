"""What statistics and orderings need of an attention layer whose heads can lose dims, for all families."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ...tokens.precision import exact
from ..heads import every_head
from .slicing import store
from .sublayers import Elastic


class AttentionHeads(Elastic):
    """An attention layer on the leading dims of every head. Always with the scale of the full head dimension.

    num_heads, head_dim: of the queries, as the foreign layer has them.
    cut_streams: how many of queries, keys and values lose dims by a rotation of their own: all 3, or the values alone.
    """

    kind = "attention"
    num_heads: int
    head_dim: int
    cut_streams: ClassVar[int] = 3

    @property
    def value_heads(self) -> int:
        """Heads of the values; fewer than `num_heads` where groups of heads share keys and values."""
        return self.num_heads

    @property
    def query_key_norms(self) -> tuple[nn.Module, nn.Module]:
        """The norms of queries and keys; `nn.Identity` where there are none."""
        return nn.Identity(), nn.Identity()

    @property
    def dropout(self) -> float:
        """Probability of dropout on the attention."""
        return 0.0

    @property
    def inputs(self) -> Tensor:
        return torch.arange(self.last.in_features).view(self.num_heads, -1).mT.flatten()

    @property
    def rotates_query_key(self) -> bool:
        """Whether queries and keys may be rotated: not under a norm, which only permutations commute with."""
        return all(isinstance(norm, nn.Identity) for norm in self.query_key_norms)

    def stream_norms(self) -> Tensor:
        """Length of the weights of every dim of the streams that are cut (S, heads, dims), values last, in float64."""
        raise NotImplementedError

    def rotate(self, value_Hhh: Tensor, query_key_Hhh: Tensor | None = None) -> None:
        """Rotate every head's values, and its queries and keys together, by orthogonal matrices (columns: new axes)."""
        raise NotImplementedError

    def order_query_key(self, order_h: Tensor) -> None:
        """Put the query and key dims of all heads, and the weights of their norms, in one and the same order."""
        raise NotImplementedError

    def of_every_head(self, of_groups: Tensor, dim: int = 0) -> Tensor:
        """What belongs to the heads of keys and values, along one dimension, repeated for all heads that read them."""
        return every_head(of_groups, self.num_heads, dim)

    @torch.no_grad()
    def rotate_last(self, value_Hhh: Tensor) -> None:
        """Rotate the columns of the output projection with the values."""
        columns = exact(self.last.weight).view(self.last.out_features, self.num_heads, -1)
        axes = self.of_every_head(value_Hhh).to(columns)
        store(self.last.weight, torch.einsum("chi,hij->chj", columns, axes).flatten(1))
