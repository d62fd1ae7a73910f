"""Attention layers whose queries and keys are rotated by place: values lose dims, queries and keys whole rotary pairs.

Nothing stands between the values and the output projection: values rotate freely onto their principal axes, and lose
the last ones. A rotation by place turns fixed pairs of query and key dims by a table, so no other rotation agrees with
it, and a pair goes as a whole. One width says how much stays of both, by a `PairRule` that the layer carries once its
pairs are in order; without one, or under a norm of queries and keys, which mixes the dims of a head, all pairs stay.
At width 0 the whole layer goes. A layer that was cut is not a stock layer any more: a class of its family that keeps
`value_dim`, `query_dim` and `kept_pairs` takes its place. The scale of the logits remains that of the full head.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...tokens.precision import exact
from ..attention_product import attention_product
from ..heads import split_heads
from ..macs import Macs
from .compensation import Compensation
from .elastic_pairs import RotaryHeads, value_dim
from .slicing import check_linear, cut_linear, store, store_linear
from .sublayers import ELASTIC


class ElasticValues(RotaryHeads):
    """An attention layer on the leading dims of the values of every head, and on its best rotary pairs.

    narrow: the class of a layer that was cut, with `value_dim`, and if pairs were cut `query_dim` and `kept_pairs`.
    """

    cut_streams = 1
    narrow: ClassVar[type[nn.Module]]
    value_dim: int

    @property
    def full_width(self) -> int:
        return value_dim(self)

    def units_at(self, width: int) -> int:
        return width if self.vitrim_rule is None else self.vitrim_rule.values[width]

    def pairs_at(self, width: int) -> int:
        """Rotary pairs in a head at this width."""
        return self.pairs * (width > 0) if self.vitrim_rule is None else self.vitrim_rule.pairs[width]

    def run_at(self, width: int, compensation: Compensation | None = None) -> None:
        super().run_at(width, compensation)
        self.vitrim_scales = self._scales(width, compensation)

    def _scales(self, width: int, compensation: Compensation | None) -> Tensor | None:
        number = self.pairs_at(width)
        if compensation is None or compensation.pairs is None or not 0 < number < self.pairs:
            return None
        return compensation.pair_scales(number).to(self.last.weight)

    def refuse(self, name: str) -> None:
        for linear in (*self.projections, self.last):
            check_linear(linear, name)

    def unit_macs(self, tokens: int) -> Macs:
        inputs = self.projections[-1].in_features
        linear = tokens * (self.value_heads * inputs + self.num_heads * self.last.out_features)
        return Macs(linear, self.num_heads * tokens**2)

    def unit_params(self) -> int:
        made = sum(part.params for part in self.rows(2) if part is not None)
        return made // self.full_width + self.num_heads * self.last.out_features

    def fixed_macs(self, tokens: int) -> Macs:
        pair = self.pair_macs(tokens)
        return Macs(self.pairs * pair.linear, self.pairs * pair.products)

    def left_params(self) -> int:
        own = sum(parameter.numel() for parameter in self.parameters())
        bias = 0 if self.last.bias is None else self.last.bias.numel()
        return super().left_params() - (own - bias - self.full_width * self.unit_params())

    def mix(self, x: Tensor, table: Any, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attention and output projection at the present width, (B, N, C)."""
        width, heads = self.vitrim_width, self.value_heads
        if width == 0:
            return self.constant(x)
        weight, bias = self.rows(2)
        units = self.units_at(width)
        rows = F.linear(x, weight.leading(units), None if bias is None else bias.leading(units))
        self.tap("streams", rows)
        value = self.of_every_head(split_heads(rows, heads), 1)
        number = self.pairs_at(width)
        query, key = self.queries_and_keys(x, table) if number == self.pairs else self.of_pairs(x, table, number)
        mixed = attention_product(
            query,
            key,
            value,
            attn_mask,
            dropout=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            scale=self.head_dim**-0.5,
        )
        mixed = mixed.transpose(1, 2).flatten(2)
        self.tap("mixed", mixed, *((query, key, value) if attn_mask is None and not is_causal else ()))
        return self.project(mixed)

    @torch.no_grad()
    def stream_norms(self) -> Tensor:
        return exact(self.rows(2)[0].tensor).view(1, self.value_heads, self.full_width, -1).norm(dim=-1)

    @torch.no_grad()
    def rotate(self, value_Hhh: Tensor, query_key_Hhh: Tensor | None = None) -> None:
        for rows in self.rows(2):
            if rows is None:
                continue
            old = exact(rows.tensor).view(self.value_heads, self.full_width, -1)
            new = value_Hhh.to(old).mT @ old
            store(rows.tensor, new.view(rows.tensor.shape))
        self.rotate_last(value_Hhh)

    def shrink(self, width: int, compensation: Compensation | None = None) -> None:
        self.shrink_to(self.units_at(width), self.pairs_at(width), width, compensation)

    def shrink_to(self, values: int, pairs: int, width: int = -1, compensation: Compensation | None = None) -> None:
        """Cut the weights to so many dims of values and rotary pairs in each head, for good.

        Args:
            values, pairs: how many stay, at least one of each; the best pairs.
            width: that they belong to, if there is a compensation for it.
            compensation: see `shrink`.
        """
        projection = None if compensation is None else self.compensated(width, compensation)
        scales = None if compensation is None else self._scales(width, compensation)
        for rows in self.rows(2):  # They come last in a layer of all three, so that the others keep their places.
            if rows is not None:
                rows.replace(rows.leading(values))
        if pairs < self.pairs:
            self.keep_pairs(pairs, scales)
        cut_linear(self.last, values, self.num_heads, dim=1)
        if projection is not None:
            store_linear(self.last, *projection)
        self.value_dim = values
        vars(self).pop("vitrim_rule", None)
        self.__class__ = ELASTIC[self.narrow]
        self.run_at(values)
