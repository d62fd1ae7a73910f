"""From scores or similarities to fewer tokens: drop, fuse or merge.

To add a reducer, subclass `Reducer`: say what it needs, and turn an `Evidence` into an `Assignment`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import ScoreError
from ..option_types import check_options
from ..tables import Table
from .assignment import Assignment
from .precision import without_autocast
from .scores import SCORES, Evidence, Needs

REDUCERS: Table[str, type["Reducer"]] = Table("reducer")


@dataclass(frozen=True)
class Reducer:
    """Base of all reducers: immutable options, and `assign`, a pure function of the evidence."""

    extra_tokens: ClassVar[int] = 0
    """Tokens that a cut appends to the kept ones."""
    merges: ClassVar[bool] = False
    """Whether removed tokens are averaged into kept ones."""

    to_try: ClassVar[Mapping[str, Sequence[Any]]] = {}
    """Values of options that a search tries, by the name of the option. It tries every score and every named choice of
    the options that are not here; other options keep their defaults."""

    def __init_subclass__(cls) -> None:
        REDUCERS.enter(cls.__name__, cls)

    def __post_init__(self) -> None:
        check_options(self, ScoreError)

    @property
    def needs(self) -> Needs:
        """The evidence that `assign` uses: "nothing", "key", "cls_row", "attention" or "hidden"."""
        raise NotImplementedError

    @property
    def prop_attn(self) -> bool:
        """Whether log(size) is added to the attention logits after a cut."""
        return False

    @property
    def drops_queries(self) -> bool:
        """Whether nothing of a removed token is used later, so that its query need not be computed."""
        return False

    @property
    def carries_scores(self) -> bool:
        """Whether a cut uses the scores of earlier cuts."""
        return False

    @property
    def training_only(self) -> bool:
        """Whether the evidence exists only in training steps."""
        return False

    def fewest(self, num_tokens: int) -> int:
        """The smallest number of tokens that one cut can keep of `num_tokens`."""
        return 1

    def reads_evidence(self, block: int) -> bool:
        """Whether a cut at this block uses evidence of this block; False if it uses only that of earlier ones."""
        return True

    def macs(self, num_tokens: int, head_dim: int, width: int) -> int:
        """Multiply-accumulates per image of `assign`, without those that compute the evidence.

        Args:
            num_tokens: N, the patch tokens that enter the cut.
            head_dim: dims of the keys.
            width: channels of the tokens.
        """
        return 0

    def assign(self, evidence: Evidence, keep: int) -> Assignment:
        """Decide which `keep` of the N patch tokens are kept, `1 <= keep < N`."""
        raise NotImplementedError


def ranking(score_BN: Tensor) -> Tensor:
    """Indices of (B, N) scores from the highest to the lowest; ties go to the lower index."""
    tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]  (torch documents it.)
    if torch.compiler.is_exporting() or (tracing and torch.onnx.is_in_onnx_export()):
        # ONNX has no stable sort, but its own operator breaks ties by index.
        return score_BN.sort(dim=1, descending=True).indices
    return score_BN.sort(dim=1, descending=True, stable=True).indices


def highest(order_BN: Tensor, keep: int) -> Tensor:
    """The first indices (B, keep) of a `ranking`, ascending."""
    return order_BN[:, :keep].sort(dim=1).values


def order_by(score_BN: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Indices of the `keep` highest scores and of the rest, each ascending; ties go to the lower index."""
    order_BN = ranking(score_BN)
    return highest(order_BN, keep), order_BN[:, keep:].sort(dim=1).values


@dataclass(frozen=True)
class TopK(Reducer):
    """Keep the tokens with the highest score; drop the rest, or fuse them into one (EViT, arXiv 2202.07800).

    Args:
        score: a name of `vitrim list scores`; "cls_attention" by default.
        fuse: None (default) drops the rest. "sum" appends the token `sum_i a_i x_i` with the raw scores `a_i`, as
            EViT does, for scores that are attention probabilities. "mean" appends it divided by `sum_i a_i`.
        normalise: scale the scores of each image to mean 0 and standard deviation 1 before they are averaged;
            False by default.
        momentum: weight in [0, 1) of the scores of earlier cuts in a moving average over depth; 0 by default.
        shallow: cuts in later blocks than this one use the scores carried up to it and compute none. None (default):
            every cut computes its scores.
    """

    score: str = "cls_attention"
    fuse: Literal["sum", "mean"] | None = None
    normalise: bool = False
    momentum: float = 0.0
    shallow: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        found = SCORES.find(self.score)
        if self.fuse == "sum" and not found.is_probability:
            raise ScoreError(
                f"fuse='sum' adds up attention probabilities, which {self.score!r} is not; use fuse='mean'"
            )
        if not 0 <= self.momentum < 1:
            raise ScoreError(f"momentum is in [0, 1), not {self.momentum}")
        if self.shallow is not None and self.shallow < 0:
            raise ScoreError(f"shallow is a block index, 0 or more, not {self.shallow}")
        if self.shallow is not None and self.normalise and self.fuse is not None:
            raise ScoreError("normalise with shallow carries negative scores, which cannot be weights of a fused token")

    @property
    def extra_tokens(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return 0 if self.fuse is None else 1

    @property
    def needs(self) -> Needs:
        return SCORES.find(self.score).needs

    @property
    def training_only(self) -> bool:
        return SCORES.find(self.score).training_only

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
            raw = score = SCORES.find(self.score).compute(evidence)
            if self.normalise:
                score = (raw - raw.mean(1, keepdim=True)) / raw.std(1, keepdim=True, correction=0).clamp(min=1e-12)
            if previous is not None:
                score = self.momentum * previous + (1 - self.momentum) * score
        else:
            raw = score = previous
        if self.fuse is None:
            return Assignment.drop(evidence.num_patches, highest(ranking(score.detach()), keep), score.detach())
        kept, rest = order_by(score.detach(), keep)
        weight = raw.gather(1, rest)
        if self.fuse == "mean":
            weight = weight.clamp(min=torch.finfo(weight.dtype).tiny)
            weight = weight / weight.sum(1, keepdim=True)
        return Assignment.fuse(evidence.num_patches, kept, rest, weight, score.detach())


@dataclass(frozen=True)
class ToMe(Reducer):
    """Merge the most similar token pairs (ToMe, arXiv 2210.09461).

    Each patch token of even index chooses the token of odd index with the most similar key (cosine, keys averaged
    over heads); the most similar pairs merge into their mean, weighted by size. One cut removes at most half of the
    tokens.

    Args:
        prop_attn: add log(size) to the attention logits of later blocks, so that a merged token receives attention
            for all its members; True by default.
    """

    merges = True
    to_try = {"prop_attn": (True, False)}  # noqa: RUF012  (never changed)
    prop_attn: bool = True  # pyright: ignore[reportIncompatibleMethodOverride]

    @property
    def needs(self) -> Needs:
        return "key"

    def fewest(self, num_tokens: int) -> int:
        return num_tokens - num_tokens // 2

    def macs(self, num_tokens: int, head_dim: int, width: int) -> int:
        return (num_tokens - num_tokens // 2) * (num_tokens // 2) * head_dim

    def assign(self, evidence: Evidence, keep: int) -> Assignment:
        num_tokens = evidence.num_patches
        num_moved = num_tokens - keep
        key = evidence.key[:, :, evidence.num_prefix :].detach()
        # In half precision many similarities would be equal, and other pairs would merge.
        with without_autocast(key):
            metric = key.mean(1, dtype=torch.promote_types(key.dtype, torch.float32))
            metric = torch.nn.functional.normalize(metric, dim=-1, eps=torch.finfo(metric.dtype).tiny)
            similarity, partner = (metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)).max(dim=2)
        edge = ranking(similarity)[:, :num_moved]
        moved = edge * 2
        joined = partner.gather(1, edge) * 2 + 1
        # The slot of each token among the survivors, and the survivors in their original order.
        stays = torch.ones_like(metric[..., 0], dtype=torch.long).scatter(1, moved, 0)
        slot = stays.cumsum(1) - 1
        own = torch.arange(num_tokens, device=moved.device).expand_as(slot)
        # What is lost is written behind the last slot.
        kept = own.scatter(1, torch.where(stays > 0, slot, num_tokens - 1), own)[:, :keep]
        return Assignment.merge(num_tokens, kept, moved, slot.gather(1, joined))
