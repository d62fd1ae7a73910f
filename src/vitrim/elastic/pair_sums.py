"""What each rotary pair of queries and keys adds to the output of its attention layer, as sums over queries.

If the logits of a query lose a part d_n, its attention A changes by A (d - sum A d) to first order, and its mixed
values by J = sum_n A_n (d_n - sum A d) v_n. A part that is the same for all keys changes nothing. The second moments of
W J for the parts of all pairs of a head, where W is the output projection, say what leaving some of them out costs, and
by which factors the others make up for it, in the unit in which the errors of cut values are measured.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.widths.elastic_values import ElasticValues
from ..tokens.precision import exact, wide

QUERIES = 32
"""Most queries of an image that are looked at, evenly spaced: with all of them the sums would take longest."""


@dataclass
class PairSums:
    """Sums over queries: weight, and weighted second moments (H, p, p) of what each of p pairs adds in H heads."""

    weight: Tensor
    moments_Hpp: Tensor

    @classmethod
    def zeros(cls, heads: int, pairs: int, device: torch.device) -> "PairSums":
        """Empty sums."""
        shapes = ((), (heads, pairs, pairs))
        weight, moments = (torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes)
        return cls(weight, moments)

    @torch.no_grad()
    def add(
        self, layer: ElasticValues, query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor, weight_BN: Tensor
    ) -> None:
        """Add the queries of images, rotated as their keys are, each with its weight, see `token_weights`."""
        number, device = query_BHTD.shape[2], query_BHTD.device
        rows = torch.linspace(0, number - 1, min(number, QUERIES), device=device).round().long()
        weight_BQ = weight_BN.to(device)[:, rows]
        # Each patch stands for its neighbours, CLS for itself.
        weight_BQ[:, 1:] *= (number - 1) / max(1, len(rows) - 1)
        last = wide(layer.last.weight).unflatten(1, (layer.num_heads, -1)).transpose(0, 1)
        gram_Hvv = last.mT @ last
        for query, key, value, weight in zip(query_BHTD[:, :, rows], key_BHTD, value_BHTD, weight_BQ, strict=True):
            query, key, value = wide(query) * layer.head_dim**-0.5, wide(key), wide(value)
            attention_HQT = (query @ key.mT).softmax(-1)
            parts_HpQT = layer.by_pairs(query) @ layer.by_pairs(key).mT
            apart = parts_HpQT - (attention_HQT[:, None] * parts_HpQT).sum(-1, keepdim=True)
            change_HpQv = (apart * attention_HQT[:, None]).flatten(1, 2) @ value
            change_HpQv = change_HpQv.view(*parts_HpQT.shape[:3], -1)
            weighed = (change_HpQv * weight.to(change_HpQv)[:, None]).flatten(2)
            self.moments_Hpp += exact(weighed @ (change_HpQv @ gram_Hvv[:, None]).flatten(2).mT).to(self.weight.device)
        self.weight += weight_BQ.sum(dtype=torch.float64).to(self.weight.device)

    @property
    def spread(self) -> Tensor:
        """Weighted mean of the second moments (H, p, p)."""
        return (self.moments_Hpp + self.moments_Hpp.mT) / (2 * self.weight)
