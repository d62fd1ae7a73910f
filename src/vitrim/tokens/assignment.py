"""Where every token goes at one cut, and where every input token is after several.

Shapes: B images, N patch tokens entering a cut, K tokens that keep a slot of their own, R tokens that join another
slot, M tokens leaving, C channels. Prefix tokens are never part of an assignment.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import VitrimError
from ..text import outline
from .recording import recording


def take(x_BNC: Tensor, index_BK: Tensor) -> Tensor:
    """Rows `index_BK` of every image of `x_BNC`, as (B, K, C)."""
    if x_BNC.is_cuda:  # One kernel: there it costs more to start one than to run it.
        return x_BNC.gather(1, index_BK.unsqueeze(2).expand(-1, -1, x_BNC.shape[2]))
    # One flat copy of rows: on CPUs `gather` is 6x slower.
    num_images, num_tokens = x_BNC.shape[0], x_BNC.shape[1]
    if num_images == 1 and not recording():
        return x_BNC.index_select(1, index_BK[0])
    start_B1 = torch.arange(num_images, device=x_BNC.device).unsqueeze(1) * num_tokens
    rows = x_BNC.flatten(0, 1).index_select(0, (index_BK + start_B1).flatten())
    return rows.reshape(num_images, index_BK.shape[1], x_BNC.shape[2])


@dataclass(frozen=True, eq=False)
class Assignment:
    """One cut: N patch tokens in, M out. Immutable; made by `drop`, `fuse` or `merge`.

    Slots 0..K-1 belong to the kept tokens, in ascending original order; a fused token takes slot K.
    """

    num_in: int
    num_out: int
    kept_BK: Tensor
    moved_BR: Tensor | None = None
    slot_BR: Tensor | None = None
    weight_BR: Tensor | None = None
    score_BN: Tensor | None = None

    def __repr__(self) -> str:
        return outline(self)

    @classmethod
    def drop(cls, num_in: int, kept_BK: Tensor, score_BN: Tensor | None = None) -> "Assignment":
        """Keep `kept_BK` (ascending) and drop the rest."""
        return cls(num_in, kept_BK.shape[1], kept_BK, score_BN=score_BN)

    @classmethod
    def fuse(
        cls, num_in: int, kept_BK: Tensor, rest_BR: Tensor, weight_BR: Tensor, score_BN: Tensor | None = None
    ) -> "Assignment":
        """Keep `kept_BK`; the rest becomes one token, the sum of `weight_BR` times each, appended last."""
        slot_BR = torch.full_like(rest_BR, kept_BK.shape[1])
        return cls(num_in, kept_BK.shape[1] + 1, kept_BK, rest_BR, slot_BR, weight_BR, score_BN)

    @classmethod
    def merge(cls, num_in: int, kept_BK: Tensor, moved_BR: Tensor, slot_BR: Tensor) -> "Assignment":
        """`moved_BR` join the kept tokens in `slot_BR`, as a mean weighted by size."""
        return cls(num_in, kept_BK.shape[1], kept_BK, moved_BR, slot_BR)

    def detach(self) -> "Assignment":
        """The same cut, with weights that carry no gradient."""
        return self if self.weight_BR is None else replace(self, weight_BR=self.weight_BR.detach())

    def rows(self, num_prefix: int) -> Tensor:
        """Rows of the whole sequence that keep a slot, prefix first: (B, P + K)."""
        if num_prefix <= 1:
            return torch.nn.functional.pad(self.kept_BK + num_prefix, (num_prefix, 0)) if num_prefix else self.kept_BK
        prefix = torch.arange(num_prefix, device=self.kept_BK.device).expand(self.kept_BK.shape[0], -1)
        return torch.cat([prefix, self.kept_BK + num_prefix], dim=1)

    def apply(
        self, x_BNC: Tensor, size_BN: Tensor | None = None, num_prefix: int = 0, new_size_BM: Tensor | None = None
    ) -> Tensor:
        """Apply the cut to tokens of shape (B, P + N, C); returns (B, P + M, C).

        `size_BN` is the number of input tokens in each token (None: one each); only merging uses it, and `new_size_BM`,
        what `size` makes of it, where that is known already.
        Merging sums and divides by size, because a mean scatter exports to ONNX as a wrong answer.
        """
        kept = take(x_BNC, self.rows(num_prefix))
        if self.moved_BR is None or self.slot_BR is None:
            return kept
        if self.weight_BR is not None:
            moved = take(x_BNC, self.moved_BR + num_prefix)
            fused = self.weight_BR.to(moved.dtype).unsqueeze(1) @ moved
            return torch.cat([kept, fused], dim=1)
        if size_BN is None:
            size_BN = torch.ones(x_BNC.shape[0], self.num_in, device=x_BNC.device)
        # Half precision cannot count above 256 or add up many small shares: merge in float32 at least.
        size_BN = size_BN.to(torch.promote_types(x_BNC.dtype, torch.float32))
        new_size = self.size(size_BN) if new_size_BM is None else new_size_BM.to(size_BN.dtype)
        share = size_BN.gather(1, self.moved_BR) / new_size.gather(1, self.slot_BR)
        # A token that others join moves towards them by their share; one that none joins stays bit-equal.
        slot = self.slot_BR + num_prefix
        step = (take(x_BNC, self.moved_BR + num_prefix) - take(kept, slot)) * share.unsqueeze(2)
        return kept.to(step.dtype).scatter_add(1, slot.unsqueeze(2).expand_as(step), step).to(x_BNC.dtype)

    @property
    def merges(self) -> bool:
        """Whether removed tokens are averaged into kept ones."""
        return self.moved_BR is not None and self.weight_BR is None

    def undo(self, x_BMC: Tensor, before_BNC: Tensor | None = None, num_prefix: int = 0) -> Tensor:
        """Undo the cut on tokens of shape (B, P + M, C); returns (B, P + N, C), in the order before the cut.

        Kept tokens have their present values. Dropped and fused ones have those of `before_BNC`, the (B, P + N, C)
        tokens that the cut was applied to. Merged ones all get the present value of their common token, so that
        merging needs no `before_BNC`. A fused token is removed.
        """
        num_images, device = x_BMC.shape[0], x_BMC.device
        prefix = torch.arange(num_prefix, device=device).expand(num_images, -1)
        now = take(x_BMC, torch.cat([prefix, self.target().clamp(min=0) + num_prefix], dim=1))
        if before_BNC is None:
            return now
        stays = torch.zeros(num_images, self.num_in, dtype=torch.bool, device=device)
        stays = stays.scatter(1, self.kept_BK, torch.ones_like(self.kept_BK, dtype=torch.bool))
        stays = torch.cat([torch.ones_like(prefix, dtype=torch.bool), stays], dim=1)
        return torch.where(stays.unsqueeze(2), now, before_BNC)

    def size(self, size_BN: Tensor) -> Tensor:
        """Number of input tokens in each outgoing token, (B, M), from the numbers of the incoming ones."""
        kept = size_BN.gather(1, self.kept_BK)
        if self.moved_BR is None or self.slot_BR is None:
            return kept
        extra = self.num_out - kept.shape[1]
        grown = torch.nn.functional.pad(kept, (0, extra)) if extra else kept
        return grown.scatter_add(1, self.slot_BR, size_BN.gather(1, self.moved_BR))

    def carry(self, value_BN: Tensor) -> Tensor:
        """A number per token after the cut, (B, M): that of each kept token, and the mean for a fused token."""
        kept = value_BN.gather(1, self.kept_BK)
        if self.moved_BR is None or self.weight_BR is None:
            return kept
        return torch.cat([kept, value_BN.gather(1, self.moved_BR).mean(1, keepdim=True)], dim=1)

    def place(self, place_BN: Tensor, size_BN: Tensor | None = None) -> Tensor:
        """The place of each outgoing token, (B, M), from the places of the incoming ones.

        A merged token takes the place of its largest member, a fused one that of the member with the highest score;
        of several, the one with the lowest index among the incoming tokens. `size_BN` as in `apply`.
        """
        own = place_BN.gather(1, self.kept_BK)
        if self.moved_BR is None or self.slot_BR is None:
            return own
        if self.weight_BR is not None:
            score = self.weight_BR if self.score_BN is None else self.score_BN.gather(1, self.moved_BR)
            index = torch.arange(score.shape[1], device=score.device)
            best = torch.where(score == score.amax(1, keepdim=True), index, len(index) - 1).amin(1, keepdim=True)
            return torch.cat([own, place_BN.gather(1, self.moved_BR.gather(1, best))], dim=1)
        # One integer that grows with the size and, at equal sizes, falls with the index; the largest wins the slot.
        size = torch.ones_like(place_BN) if size_BN is None else size_BN.long()
        rank = size * self.num_in + torch.arange(self.num_in, 0, -1, device=place_BN.device) - 1
        highest = rank.gather(1, self.kept_BK).scatter_reduce(1, self.slot_BR, rank.gather(1, self.moved_BR), "amax")
        return place_BN.gather(1, self.num_in - 1 - highest % self.num_in)

    def target(self) -> Tensor:
        """Slot of every incoming token, (B, N) long, -1 where it was dropped."""
        num_images, num_kept = self.kept_BK.shape
        target = self.kept_BK.new_full((num_images, self.num_in), -1)
        slots = torch.arange(num_kept, device=target.device).expand(num_images, -1)
        target = target.scatter(1, self.kept_BK, slots)
        if self.moved_BR is not None and self.slot_BR is not None:
            target = target.scatter(1, self.moved_BR, self.slot_BR)
        return target


@dataclass(frozen=True, eq=False)
class TokenState:
    """Where the input tokens are after some block.

    origin: (B, N) long, slot of every input patch token among the patch tokens now, -1 = dropped.
    size: (B, M), number of input patch tokens in each token now.
    score: (B, n) scores by which the last cut of the block chose its tokens; None without a cut or without scores.
    coordinates: (B, N, 2), row and column of every input patch, from (0, 0) on; B may be 1. None: not known.
    """

    origin: Tensor
    size: Tensor
    score: Tensor | None = None
    coordinates: Tensor | None = None

    def __repr__(self) -> str:
        return outline(self)

    @property
    def positions(self) -> Tensor:
        """Row and column of every token in patch units, (B, M, 2): the mean over the input patches behind it.

        -1 in slots that hold no token, as the shorter images of a padded batch have them.

        Raises:
            VitrimError: it is not known where the input patches lie.
        """
        if self.coordinates is None:
            raise VitrimError(
                "it is not known where these patches lie on their image: the model shuffles them or drops some before "
                "its first block, or its blocks were called one by one on another image size"
            )
        present_BN1 = (self.origin >= 0).unsqueeze(2)
        slot_BN2 = self.origin.clamp(min=0).unsqueeze(2).expand(-1, -1, 2)
        size_BM1 = self.size.unsqueeze(2)
        own_BN2 = (self.coordinates.to(self.size.dtype) * present_BN1).expand(slot_BN2.shape)
        total_BM2 = torch.zeros_like(size_BM1).repeat(1, 1, 2).scatter_add(1, slot_BN2, own_BN2)
        return torch.where(size_BM1 > 0, total_BM2 / size_BM1.clamp(min=1), torch.full_like(total_BM2, -1))

    @classmethod
    def start(cls, num_images: int, num_tokens: int, device: torch.device) -> "TokenState":
        """Before any cut: every token in its own slot, with size one."""
        slots = torch.arange(num_tokens, device=device).expand(num_images, -1)
        return cls(slots, torch.ones(num_images, num_tokens, device=device))

    def after(self, assignments: Iterable[Assignment]) -> "TokenState":
        """The state after these cuts, in order."""
        origin, size, score = self.origin, self.size, None
        for assignment in assignments:
            moved = assignment.target().gather(1, origin.clamp(min=0))
            origin = torch.where(origin < 0, origin, moved)
            size, score = assignment.size(size), assignment.score_BN
        return TokenState(origin, size, score, self.coordinates)

    def spread(self, x_BMC: Tensor, fill: float = 0.0) -> Tensor:
        """Tokens (B, M, C) copied to the places of their input tokens, (B, N, C); dropped places get `fill`."""
        full = take(x_BMC, self.origin.clamp(min=0))
        return torch.where((self.origin < 0).unsqueeze(2), torch.full_like(full, fill), full)
