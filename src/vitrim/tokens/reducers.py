"""From scores or similarities to fewer tokens: drop, fuse or merge.

To add a reducer, subclass `Reducer`: say what it needs, and turn an `Evidence` into an `Assignment`.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..errors import ScoreError
from ..kinds import check_options
from .assignment import Assignment
from .precision import wide
from .scores import Evidence, Needs, find_score

REDUCERS: dict[str, type["Reducer"]] = {}


@dataclass(frozen=True)
class Reducer:
    """Base of all reducers. Immutable configuration; `assign` is a pure function of the evidence."""

    extra_tokens: ClassVar[int] = 0
    """Tokens appended by a cut beside the kept ones."""
    prop_attn: ClassVar[bool] = False
    """Whether log(size) enters the attention logits after a cut."""

    merges: ClassVar[bool] = False
    """Whether lost tokens are averaged into those that stay."""

    def __init_subclass__(cls) -> None:
        REDUCERS[cls.__name__] = cls

    def __post_init__(self) -> None:
        check_options(self, ScoreError)

    @property
    def needs(self) -> Needs:
        """The evidence that `assign` reads."""
        raise NotImplementedError

    @property
    def drops_queries(self) -> bool:
        """True when lost tokens leave no trace, so that their queries need not be computed."""
        return False

    @property
    def carries_scores(self) -> bool:
        """Whether a cut wants the scores of earlier cuts."""
        return False

    @property
    def training_only(self) -> bool:
        """Whether the evidence is there in training steps alone."""
        return False

    def fewest(self, num_tokens: int) -> int:
        """The smallest number of tokens that one cut can keep of `num_tokens`."""
        return 1

    def reads_evidence(self, block: int) -> bool:
        """False at blocks where the decision rests on earlier blocks alone."""
        return True

    def macs(self, num_tokens: int, head_dim: int) -> int:
        """Multiply-accumulates per image of `assign` itself, over those of the evidence."""
        return 0

    def assign(self, evidence: Evidence, keep: int) -> Assignment:
        """Decide which `keep` of the N patch tokens survive, `1 <= keep < N`."""
        raise NotImplementedError


def ranking(score_BN: Tensor) -> Tensor:
    """Indices of (B, N) scores from the highest to the lowest; ties go to the lower index."""
    if torch.compiler.is_exporting():
        # ONNX knows no stable sort, but its own operator breaks ties by index anyway.
        return score_BN.sort(dim=1, descending=True).indices
    return score_BN.sort(dim=1, descending=True, stable=True).indices


def order_by(score_BN: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Indices of the `keep` highest scores and of the rest, each ascending; ties go to the lower index."""
    order_BN = ranking(score_BN)
    return order_BN[:, :keep].sort(dim=1).values, order_BN[:, keep:].sort(dim=1).values


@dataclass(frozen=True)
class TopK(Reducer):
    """Keep the tokens with the highest score; drop the rest, or fuse them into one (EViT, arXiv 2202.07800).

    Args:
        score: name in `vitrim list scores`.
        fuse: None drops the rest; "sum" appends `sum_i a_i x_i` with the raw scores `a_i` (EViT);
            "mean" appends the same divided by `sum_i a_i`.
        normalise: scores to mean 0 and standard deviation 1 within each image, before they are averaged.
        momentum: weight in [0, 1) of the scores carried from earlier cuts (a moving average over depth).
        shallow: cuts in blocks after this one reuse the carried scores and compute none of their own.
    """

    score: str = "cls_attention"
    fuse: Literal["sum", "mean"] | None = None
    normalise: bool = False
    momentum: float = 0.0
    shallow: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        found = find_score(self.score)
        if self.fuse == "sum" and not found.is_probability:
            raise ScoreError(
                f"fuse='sum' adds up attention probabilities, which {self.score!r} is not; use fuse='mean'"
            )
        if not 0 <= self.momentum < 1:
            raise ScoreError(f"momentum lies in [0, 1), not {self.momentum}")
        if self.shallow is not None and self.shallow < 0:
            raise ScoreError(f"shallow is a block index, 0 or more, not {self.shallow}")
        if self.shallow is not None and self.normalise and self.fuse is not None:
            raise ScoreError("normalise and shallow carry scores that can be negative and cannot weigh a fused token")

    @property
    def extra_tokens(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return 0 if self.fuse is None else 1

    @property
    def needs(self) -> Needs:
        return find_score(self.score).needs

    @property
    def training_only(self) -> bool:
        return find_score(self.score).training_only

    @property
    def drops_queries(self) -> bool:
        return self.fuse is None and self.needs in ("nothing", "key", "cls_row")

    @property
    def carries_scores(self) -> bool:
        return self.momentum > 0 or self.shallow is not None

    def reads_evidence(self, block: int) -> bool:
        return self.shallow is None or block <= self.shallow

    def assign(self, evidence: Evidence, keep: int) -> Assignment:
        previous = evidence.previous_BN
        if previous is None or self.reads_evidence(evidence.block):
            raw = score = find_score(self.score).compute(evidence)
            if self.normalise:
                score = (raw - raw.mean(1, keepdim=True)) / raw.std(1, keepdim=True, correction=0).clamp(min=1e-12)
            if previous is not None:
                score = self.momentum * previous + (1 - self.momentum) * score
        else:
            raw = score = previous
        kept, rest = order_by(score.detach(), keep)
        if self.fuse is None:
            return Assignment.drop(evidence.num_patches, kept, score.detach())
        weight = raw.gather(1, rest)
        if self.fuse == "mean":
            weight = weight.clamp(min=torch.finfo(weight.dtype).tiny)
            weight = weight / weight.sum(1, keepdim=True)
        return Assignment.fuse(evidence.num_patches, kept, rest, weight, score.detach())


@dataclass(frozen=True)
class ToMe(Reducer):
    """Merge the most similar token pairs (ToMe, arXiv 2210.09461).

    Even-indexed patch tokens each choose the odd-indexed one with the most similar key (cosine, keys averaged
    over heads); the best edges merge, by size-weighted mean. At most half of the tokens can go in one cut.

    Args:
        prop_attn: add log(size) to the attention logits of later blocks.
    """

    merges = True
    prop_attn: bool = True  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def needs(self) -> Needs:
        return "key"

    def fewest(self, num_tokens: int) -> int:
        return num_tokens - num_tokens // 2

    def macs(self, num_tokens: int, head_dim: int) -> int:
        return (num_tokens - num_tokens // 2) * (num_tokens // 2) * head_dim

    def assign(self, evidence: Evidence, keep: int) -> Assignment:
        num_tokens = evidence.num_patches
        num_moved = num_tokens - keep
        key = evidence.key[:, :, evidence.num_prefix :].detach()
        # Half precision would tie the similarities of near tokens, and so merge other pairs.
        with nullcontext() if key.is_meta else torch.autocast(key.device.type, enabled=False):
            metric = wide(key).mean(1)
            metric = torch.nn.functional.normalize(metric, dim=-1, eps=torch.finfo(metric.dtype).tiny)
            similarity, partner = (metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)).max(dim=2)
        edge = ranking(similarity)[:, :num_moved]
        moved = edge * 2
        joined = partner.gather(1, edge) * 2 + 1
        # Survivors in their original order, and the slot of each odd token among them.
        lost = torch.zeros(moved.shape[0], num_tokens, dtype=torch.bool, device=moved.device)
        lost = lost.scatter(1, moved, torch.ones_like(moved, dtype=torch.bool))
        own = torch.arange(num_tokens, device=moved.device)
        kept = torch.where(lost, num_tokens, own).sort(dim=1).values[:, :keep]
        slot = (~lost).long().cumsum(1) - 1
        return Assignment.merge(num_tokens, kept, moved, slot.gather(1, joined))
