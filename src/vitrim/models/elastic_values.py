"""Attention layers whose values alone change their width, for families that rotate queries and keys by place.

A rotation by place turns fixed pairs of query and key dims by a table that all heads may share, so no other rotation
and no narrower head agrees with it. Nothing of the kind stands between the values and the output projection: values
rotate freely onto their principal axes, and lose the last ones. At width 0 the whole layer goes, with queries and keys.
A layer with narrower values is no stock layer any more: a class of its family that keeps `value_dim` takes its place.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..tokens.precision import exact
from .attention_heads import AttentionHeads
from .attention_product import attention_product
from .compensation import Compensation
from .heads import split_heads
from .macs import Macs
from .slicing import check_linear, cut_linear, leading, store, store_linear
from .sublayers import ELASTIC


@dataclass(frozen=True)
class Rows:
    """The rows of a parameter from `first` on, those of the values of all heads.

    owner, name: the module that holds the parameter, and its name there.
    """

    owner: Any
    name: str
    first: int = 0

    @property
    def tensor(self) -> Tensor:
        return getattr(self.owner, self.name)[self.first :]

    def leading(self, width: int, heads: int) -> Tensor:
        """The leading rows of every head."""
        return leading(self.tensor, width, heads)

    def cut(self, width: int, heads: int) -> None:
        """Replace the parameter by one without the other rows of the values."""
        old = getattr(self.owner, self.name)
        new = torch.cat([old[: self.first], self.leading(width, heads)]).detach().clone()
        setattr(self.owner, self.name, nn.Parameter(new, requires_grad=old.requires_grad))
        if isinstance(self.owner, nn.Linear):
            self.owner.out_features = len(new)


def value_dim(attn: Any) -> int:
    """Dims of the values in every head of a foreign attention layer, or of one whose values were cut."""
    return getattr(attn, "value_dim", attn.head_dim)


class ElasticValues(AttentionHeads):
    """An attention layer that keeps its queries and keys, and the leading dims of the values of every head.

    narrow: the class of a layer that was cut, with `value_dim`.
    """

    cut_streams = 1
    narrow: ClassVar[type[nn.Module]]
    value_dim: int

    @property
    def projections(self) -> tuple[Any, ...]:
        """The layers that make queries, keys and values: one or three; the values come last."""
        raise NotImplementedError

    @property
    def value_bias(self) -> Rows | None:
        """The bias of the values, which most layers have in the layer that makes them."""
        linear = self.projections[-1]
        return None if linear.bias is None else Rows(linear, "bias", self.value_weight.first)

    def queries_and_keys(self, x: Tensor, table: Any) -> tuple[Tensor, Tensor]:
        """Queries and keys of all heads (B, H, T, D), after norms and rotation by the table of the family."""
        raise NotImplementedError

    @property
    def value_weight(self) -> Rows:
        """The weights of the values: the last rows of the last projection."""
        linear = self.projections[-1]
        return Rows(linear, "weight", linear.out_features - self.value_heads * self.full_width)

    @property
    def full_width(self) -> int:
        return value_dim(self)

    def refuse(self, name: str) -> None:
        for linear in (*self.projections, self.last):
            check_linear(linear, name)

    def unit_macs(self, tokens: int) -> Macs:
        inputs = self.value_weight.tensor.shape[1]
        linear = tokens * (self.value_heads * inputs + self.num_heads * self.last.out_features)
        return Macs(linear, self.num_heads * tokens**2)

    def unit_params(self) -> int:
        rows = self.value_weight.tensor.shape[1] + (self.value_bias is not None)
        return self.value_heads * rows + self.num_heads * self.last.out_features

    def fixed_macs(self, tokens: int) -> Macs:
        whole = sum(linear.weight.numel() for linear in self.projections)
        return Macs(tokens * (whole - self.value_weight.tensor.numel()), self.num_heads * self.head_dim * tokens**2)

    def left_params(self) -> int:
        own = sum(parameter.numel() for parameter in self.parameters())
        bias = 0 if self.last.bias is None else self.last.bias.numel()
        return super().left_params() - (own - bias - self.full_width * self.unit_params())

    def mix(self, x: Tensor, table: Any, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attention and output projection at the present width, (B, N, C)."""
        width, heads, bias = self.vitrim_width, self.value_heads, self.value_bias
        if width == 0:
            return self.constant(x)
        rows = F.linear(
            x, self.value_weight.leading(width, heads), None if bias is None else bias.leading(width, heads)
        )
        self.tap("streams", rows)
        value = split_heads(rows, heads).repeat_interleave(self.num_heads // heads, dim=1)
        mixed = attention_product(
            *self.queries_and_keys(x, table),
            value,
            attn_mask,
            dropout=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            scale=self.head_dim**-0.5,
        )
        mixed = mixed.transpose(1, 2).flatten(2)
        self.tap("mixed", mixed)
        return self.project(mixed)

    @torch.no_grad()
    def stream_norms(self) -> Tensor:
        return exact(self.value_weight.tensor).view(1, self.value_heads, self.full_width, -1).norm(dim=-1)

    @torch.no_grad()
    def rotate(self, value_Hhh: Tensor, query_key_Hhh: Tensor | None = None) -> None:
        for rows in (self.value_weight, self.value_bias):
            if rows is None:
                continue
            old = exact(rows.tensor).view(self.value_heads, self.full_width, -1)
            new = value_Hhh.to(old).mT @ old
            store(rows.tensor, new.view(rows.tensor.shape))
        self.rotate_last(value_Hhh)

    def shrink(self, width: int, compensation: Compensation | None = None) -> None:
        heads, projection = self.value_heads, self.compensated(width, compensation)
        bias, weight = self.value_bias, self.value_weight
        if bias is not None:
            bias.cut(width, heads)
        weight.cut(width, heads)
        cut_linear(self.last, width, self.num_heads, dim=1)
        store_linear(self.last, *projection)
        self.__class__ = ELASTIC[self.narrow]
        self.value_dim = self.vitrim_width = width
