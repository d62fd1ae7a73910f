"""From a schedule to a plan: every number of tokens known, and checked, before a tensor is touched."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from ..errors import ScheduleError
from ..notation import render
from .options import check_options
from .reducers import Reducer

Place = Literal["before", "inside"]
SCHEDULES: dict[str, type["Schedule"]] = {}


@dataclass(frozen=True)
class Cut:
    """One place at which tokens go: `before` a block, or `inside` it between attention and MLP."""

    block: int
    place: Place
    num_in: int
    keep: int
    num_out: int
    first: bool = False
    """Whether no cut comes earlier in the model, so that there are no scores to carry over."""


@dataclass(frozen=True)
class Plan:
    """A schedule carried out for one number of tokens: `cuts` count patch tokens, `token_counts` all tokens."""

    num_patches: int
    num_prefix: int
    depth: int
    cuts: tuple[Cut, ...]
    prefix_only: bool = False
    """Whether the last block computes the prefix tokens alone, for a head that reads nothing else."""

    def cut(self, block: int, place: Place) -> Cut | None:
        """The cut at that place, None where there is none."""
        for cut in self.cuts:
            if cut.block == block and cut.place == place:
                return cut
        return None

    @property
    def token_counts(self) -> tuple[int, ...]:
        """Tokens leaving each block, prefix tokens included."""
        counts: list[int] = []
        now = self.num_patches
        for block in range(self.depth):
            now = next((cut.num_out for cut in reversed(self.cuts) if cut.block == block), now)
            counts.append(now + self.num_prefix)
        if self.prefix_only:
            counts[-1] = self.num_prefix
        return tuple(counts)

    def for_prefix_only(self) -> "Plan":
        """The same plan where the last block computes prefix tokens alone, which makes a cut inside it pointless."""
        kept = tuple(cut for cut in self.cuts if (cut.block, cut.place) != (self.depth - 1, "inside"))
        return replace(self, cuts=kept, prefix_only=True)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Base of all schedules. `round_to` rounds the length of the sequence after a cut up to a multiple."""

    place: Place = "inside"
    round_to: int = 1

    def __init_subclass__(cls) -> None:
        SCHEDULES[cls.__name__] = cls

    def __str__(self) -> str:
        return render(self)

    def __post_init__(self) -> None:
        check_options(self, ScheduleError)
        if self.round_to < 1:
            raise ScheduleError(f"round_to is a positive integer, not {self.round_to}")

    def blocks(self, depth: int) -> Sequence[int]:
        """Blocks that hold a cut, ascending."""
        raise NotImplementedError

    def target(self, block: int, depth: int, num_now: int, num_patches: int) -> int:
        """Patch tokens to keep at `block`, of `num_now` that reach it and `num_patches` at the input."""
        raise NotImplementedError

    def scaled(self, strength: float) -> "Schedule":
        """The same schedule with its reduction multiplied by `strength` in [0, 1]; 0 keeps everything."""
        raise NotImplementedError

    def check(self, depth: int, num_patches: int, reducer: Reducer) -> None:
        """Raise `ScheduleError` where the schedule asks for what a model of that size cannot give."""
        for block in self.blocks(depth):
            if not 0 <= block < depth:
                raise ScheduleError(f"{self} cuts at block {block}, but the model has blocks 0 to {depth - 1}")

    def resolve(self, macs_of: Callable[["Schedule"], int], dense: int) -> "Schedule":
        """A schedule with nothing left to solve for.

        Args:
            macs_of: MACs of the model under a schedule, exact savings included.
            dense: MACs of the plain model.
        """
        return self


def make_plan(
    schedule: Schedule, reducer: Reducer, *, depth: int, num_patches: int, num_prefix: int, limits: bool = True
) -> Plan:
    """Carry the schedule out for `num_patches` patch tokens; `limits` turns its checks on."""
    if limits:
        schedule.check(depth, num_patches, reducer)
    cuts: list[Cut] = []
    now = num_patches
    for block in schedule.blocks(depth):
        keep = schedule.target(block, depth, now, num_patches)
        fixed = num_prefix + reducer.extra_tokens
        keep = ceil((keep + fixed) / schedule.round_to) * schedule.round_to - fixed
        keep = max(keep, reducer.fewest(now), 1)
        if keep < now:
            cuts.append(Cut(block, schedule.place, now, keep, keep + reducer.extra_tokens, first=not cuts))
            now = keep + reducer.extra_tokens
    return Plan(num_patches, num_prefix, depth, tuple(cuts))
