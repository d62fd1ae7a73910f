"""Cluster: keep tokens that matter and that no more important token resembles; the others join them (2204.08680).

Density peak clustering, with which TCFormer merges tokens, finds centres that are dense and far from any denser point.
Here a score takes the place of the density: of many tokens that are alike one is enough, however important they are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .assignment import Assignment, take
from .precision import wide, without_autocast
from .reducers import Reducer, order_by, ranking
from .scores import SCORES, Evidence, Needs

_SHARPNESS = 4
"""Exponent of the distance to the nearest more important token: how much more it counts than the score."""


@dataclass(frozen=True)
class Cluster(Reducer):
    """Keep important tokens that differ from each other; each of the rest merges with the kept token most like it.

    A token stays for its score times the fourth power of its cosine distance to the most similar of all tokens that
    have a higher score. Tokens merge into their mean, weighted by size. One cut may keep any number of tokens.

    Args:
        score: a name of `vitrim list scores`; "cls_attention" by default.
        prop_attn: add log(size) to the attention logits of later blocks, so that a merged token receives attention
            for all its members; True by default. False is closer to the full network where a few cuts remove most
            tokens.
    """

    merges = True
    to_try = {"score": ("cls_attention", "norm"), "prop_attn": (True, False)}  # noqa: RUF012  (never changed)
    score: str = "cls_attention"
    prop_attn: bool = True  # pyright: ignore[reportIncompatibleMethodOverride]

    def __post_init__(self) -> None:
        super().__post_init__()
        SCORES.find(self.score)

    @property
    def needs(self) -> Needs:
        return SCORES.find(self.score).needs

    @property
    def training_only(self) -> bool:
        return SCORES.find(self.score).training_only

    def macs(self, num_tokens: int, head_dim: int, width: int) -> int:
        return num_tokens * num_tokens * width

    def assign(self, evidence: Evidence, keep: int) -> Assignment:
        hidden_BNC = evidence.hidden_BTC[:, evidence.num_prefix :].detach()
        score_BN = wide(SCORES.find(self.score).compute(evidence).detach())
        alike_BNN = _cosines(hidden_BNC)
        order_BN = ranking(score_BN)
        rank_BN = torch.zeros_like(order_BN).scatter(1, order_BN, _places(order_BN))
        behind_BNN = rank_BN.unsqueeze(2) <= rank_BN.unsqueeze(1)
        alike_BN = alike_BNN.masked_fill(behind_BNN, -1.0).amax(2)
        kept_BK, rest_BR = order_by(score_BN * (1 - alike_BN).clamp(min=0) ** _SHARPNESS, keep)
        columns_BRK = kept_BK.unsqueeze(1).expand(-1, rest_BR.shape[1], -1)
        slot_BR = take(alike_BNN, rest_BR).gather(2, columns_BRK).argmax(2)
        return Assignment.merge(evidence.num_patches, kept_BK, rest_BR, slot_BR)


def _cosines(x_BNC: Tensor) -> Tensor:
    """Cosine of every token with every other one, (B, N, N), in float32 at least."""
    with without_autocast(x_BNC):
        x_BNC = torch.nn.functional.normalize(wide(x_BNC), dim=-1, eps=torch.finfo(torch.float32).tiny)
        return x_BNC @ x_BNC.transpose(1, 2)


def _places(order_BN: Tensor) -> Tensor:
    return torch.arange(order_BN.shape[1], device=order_BN.device).expand_as(order_BN)
