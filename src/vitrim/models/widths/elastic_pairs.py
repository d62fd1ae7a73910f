"""Queries and keys of attention with rotary positions by their pairs of dims: some of them at run time, or for good."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...tokens.precision import exact
from ..heads import split_heads
from ..macs import Macs
from .attention_heads import AttentionHeads
from .head_rows import Rows
from .rotary_pairs import PairRule, dims_of


def value_dim(attn: Any) -> int:
    """Dims of the values in every head of a foreign attention layer, or of one that was cut."""
    return getattr(attn, "value_dim", attn.head_dim)


def query_dim(attn: Any) -> int:
    """Dims of queries and keys in every head of a foreign attention layer, or of one that was cut."""
    return getattr(attn, "query_dim", attn.head_dim)


class RotaryHeads(AttentionHeads):
    """An attention layer whose queries and keys are pairs of dims, each turned by an angle of its own.

    half_pairs: whether a pair is dims (i, i + half of them), and not (2i, 2i + 1).
    vitrim_rule: what stays at every width; None: values alone are cut.
    query_dim, kept_pairs: of a layer that lost pairs: dims of queries and keys per head, and which pairs of the table
        each head of the keys has.
    """

    vitrim_rule: PairRule | None = None
    query_dim: int
    kept_pairs: Tensor

    @property
    def projections(self) -> tuple[Any, ...]:
        """The layers that make queries, keys and values: one or three."""
        raise NotImplementedError

    @property
    def half_pairs(self) -> bool:
        raise NotImplementedError

    def queries_and_keys(self, x: Tensor, table: Any) -> tuple[Tensor, Tensor]:
        """Queries and keys of all heads (B, H, T, D), after norms and rotation by the table of the family."""
        raise NotImplementedError

    def turned(self, stream_BHTD: Tensor, table: Any, pairs_Hp: Tensor | None) -> Tensor:
        """Queries or keys of all heads rotated by the table, of which they have these pairs; None: all."""
        raise NotImplementedError

    def rows(self, stream: int) -> tuple[Rows, Rows | None]:
        """Weight and bias of queries (0), keys (1) or values (2) of all heads."""
        linears = self.projections
        heads = (self.num_heads, self.value_heads, self.value_heads)
        dims = (query_dim(self), query_dim(self), value_dim(self))
        linear, first = linears[stream % len(linears)], 0
        if len(linears) == 1:
            first = sum(number * size for number, size in zip(heads[:stream], dims[:stream], strict=True))
        weight = Rows(linear, "weight", first, heads[stream], dims[stream])
        return weight, None if linear.bias is None else Rows(linear, "bias", first, heads[stream], dims[stream])

    @property
    def pairs(self) -> int:
        """Rotary pairs in a head of this layer."""
        return query_dim(self) // 2

    @property
    def cuts_pairs(self) -> bool:
        """Whether pairs can be cut: not under a norm of queries and keys."""
        return self.rotates_query_key

    def of_pairs(self, x: Tensor, table: Any, number: int) -> tuple[Tensor, Tensor]:
        """Queries and keys of all heads on their best pairs (B, H, T, 2 * number)."""
        pairs, made = self._best_pairs(number), []
        for stream, kept in enumerate((self.of_every_head(pairs), pairs)):
            dims = dims_of(kept, self.pairs, self.half_pairs)
            weight, bias = self.rows(stream)
            out = F.linear(x, weight.chosen(dims), None if bias is None else bias.chosen(dims))
            made.append(self.of_every_head(split_heads(out, len(dims)), 1))
        query, key = made
        if self.vitrim_scales is not None:
            query = query * self._of_dims(self.vitrim_scales)[:, None].to(query.dtype)
        places = self.of_every_head(self._places(pairs))
        return self.turned(query, table, places), self.turned(key, table, places)

    def _best_pairs(self, number: int) -> Tensor:
        """The best pairs of each head of the keys (heads, number), as they are counted in this layer."""
        device = self.last.weight.device
        if self.vitrim_rule is None:
            return torch.arange(number, device=device).expand(self.value_heads, -1)
        return self.vitrim_rule.kept(number, device)

    def _places(self, pairs_Hp: Tensor) -> Tensor:
        """These pairs of each head of the keys as the rotary table counts them."""
        kept = getattr(self, "kept_pairs", None)
        return pairs_Hp if kept is None else kept.to(pairs_Hp.device).gather(1, pairs_Hp)

    def _of_dims(self, of_pairs_Hp: Tensor) -> Tensor:
        """A number for each pair as one for each of its dims, in their order."""
        return of_pairs_Hp.repeat(1, 2) if self.half_pairs else of_pairs_Hp.repeat_interleave(2, dim=1)

    def by_pairs(self, stream_HTD: Tensor) -> Tensor:
        """Queries or keys of all heads by their pairs of dims (H, pairs, T, 2)."""
        one, two = stream_HTD.chunk(2, -1) if self.half_pairs else (stream_HTD[..., 0::2], stream_HTD[..., 1::2])
        return torch.stack([one, two], dim=-1).transpose(1, 2)

    @torch.no_grad()
    def pair_norms(self) -> Tensor:
        """Product of the lengths of the weights of queries and keys (heads of keys, pairs), in float64."""
        found = []
        for weight, _ in (self.rows(0), self.rows(1)):
            pairs = self.by_pairs(exact(weight.tensor).unflatten(0, (weight.heads, -1)).mT)
            found.append(pairs.square().sum((2, 3)).view(self.value_heads, -1, self.pairs).sum(1).sqrt())
        return found[0] * found[1]

    def pair_macs(self, tokens: int) -> Macs:
        """MACs of one rotary pair of all heads for one image of so many tokens."""
        rows = 2 * (self.num_heads + self.value_heads)
        return Macs(tokens * rows * self.projections[0].in_features, 2 * self.num_heads * tokens**2)

    def pair_params(self) -> int:
        """Parameters that belong to one rotary pair of all heads."""
        made = [part for stream in (0, 1) for part in self.rows(stream) if part is not None]
        return sum(part.params for part in made) // self.pairs

    def keep_pairs(self, number: int, scales: Tensor | None) -> None:
        """Cut queries and keys to the best `number` pairs of each head, for good, with factors on the queries."""
        pairs = self._best_pairs(number)
        places = self._places(pairs)
        for stream, kept in ((1, pairs), (0, self.of_every_head(pairs))):  # Keys first: they lie behind queries.
            dims = dims_of(kept, self.pairs, self.half_pairs)
            for rows in self.rows(stream):
                if rows is None:
                    continue
                chosen = rows.chosen(dims)
                if stream == 0 and scales is not None:
                    factors = self._of_dims(scales).flatten().to(chosen)
                    chosen = chosen * (factors[:, None] if chosen.ndim == 2 else factors)
                rows.replace(chosen)
        self.query_dim = 2 * number
        self.register_buffer("kept_pairs", places.contiguous().clone())
