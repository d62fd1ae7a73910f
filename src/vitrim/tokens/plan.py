"""From a schedule to a plan: every number of tokens is known, and checked, before any tensor is computed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from ..errors import ScheduleError
from ..notation import render
from ..option_types import check_options
from ..tables import Table
from .reducers import Reducer

Place = Literal["before", "inside"]
SCHEDULES: Table[str, type["Schedule"]] = Table("schedule")


@dataclass(frozen=True)
class Cut:
    """One place at which tokens go: `before` a block, or `inside` it between attention and MLP."""

    block: int
    place: Place
    num_in: int
    keep: int
    num_out: int
    first: bool = False
    """Whether this is the first cut of the model, so that there are no earlier scores to carry over."""
    returns: bool = False
    """Whether the removed tokens return in a later block, so that their attention must be computed before they go."""


@dataclass(frozen=True)
class Plan:
    """A schedule applied to one number of tokens. `cuts` count patch tokens, `token_counts` all tokens."""

    num_patches: int
    num_prefix: int
    depth: int
    cuts: tuple[Cut, ...]
    prefix_only: bool = False
    """Whether the last block computes only prefix tokens, for a head that reads nothing else."""
    reinstate: int | None = None
    """The block before which all patch tokens return; None if none was removed or none returns."""

    def cut(self, block: int, place: Place) -> Cut | None:
        """The cut at that place, or None."""
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
            now = self.num_patches if block == self.reinstate else now
            now = next((cut.num_out for cut in reversed(self.cuts) if cut.block == block), now)
            counts.append(now + self.num_prefix)
        if self.prefix_only:
            counts[-1] = self.num_prefix
        return tuple(counts)

    @property
    def entering(self) -> tuple[int, ...]:
        """Tokens entering each block, prefix tokens and those that return before it included."""
        full = self.num_patches + self.num_prefix
        counts = (full, *self.token_counts[:-1])
        return tuple(full if block == self.reinstate else count for block, count in enumerate(counts))

    def for_prefix_only(self) -> "Plan":
        """The same plan where the last block computes only prefix tokens; a cut inside that block is left out."""
        kept = tuple(cut for cut in self.cuts if (cut.block, cut.place) != (self.depth - 1, "inside"))
        return replace(self, cuts=kept, prefix_only=True)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Base of all schedules.

    Args:
        place: cut "before" a block, or "inside" it between attention and MLP (default, except for `Stages`).
        round_to: round the length of the sequence after a cut up to a multiple of this; 1 (default) does not round.
        reinstate: the block before which all tokens return in their original order: dropped and fused tokens with
            the values they had when they were removed, merged tokens with the value of their common token. Blocks
            from there on cut nothing. None (default): tokens do not return.
    """

    place: Place = "inside"
    round_to: int = 1
    reinstate: int | None = None

    def __init_subclass__(cls) -> None:
        SCHEDULES.enter(cls.__name__, cls)

    def __str__(self) -> str:
        return render(self)

    def __post_init__(self) -> None:
        check_options(self, ScheduleError)
        if self.round_to < 1:
            raise ScheduleError(f"round_to is a positive integer, not {self.round_to}")

    def span(self, depth: int) -> range:
        """Blocks that can remove tokens: all, or those before the tokens return."""
        return range(depth if self.reinstate is None else min(self.reinstate, depth))

    def blocks(self, depth: int) -> Sequence[int]:
        """Blocks that hold a cut, ascending."""
        raise NotImplementedError

    def target(self, block: int, depth: int, num_now: int, num_patches: int) -> int:
        """Patch tokens to keep at `block`, given `num_now` that enter it and `num_patches` at the input."""
        raise NotImplementedError

    def scaled(self, strength: float) -> "Schedule":
        """The same schedule with its reduction multiplied by `strength` in [0, 1]; 0 keeps everything."""
        raise NotImplementedError

    @classmethod
    def strongest(cls, depth: int, num_patches: int) -> "Schedule | None":
        """The strongest such schedule for a model of this size, for a `Budget` to scale; None if none can be scaled.

        By default the one that all defaults make, if there is a default for every option.
        """
        try:
            return cls()
        except TypeError:
            return None

    @property
    def drop_ratio(self) -> float | None:
        """The share of tokens that the schedule drops at full strength; None if it has no single drop ratio."""
        return None

    def check(self, depth: int, num_patches: int, reducer: Reducer) -> None:
        """Raise `ScheduleError` if the schedule does not fit a model of this size."""
        for block in self.blocks(depth):
            if not 0 <= block < depth:
                raise ScheduleError(f"{self} cuts at block {block}, but the model has blocks 0 to {depth - 1}")
            if block not in self.span(depth):
                raise ScheduleError(f"{self} cuts at block {block}, but tokens return before block {self.reinstate}")
        if self.reinstate is not None and not (self.blocks(depth) and self.reinstate < depth):
            raise ScheduleError(
                f"{self}: tokens return before a block that comes after a cut, {depth - 1} at most, "
                f"not before {self.reinstate}"
            )

    def resolve(self, macs_of: Callable[["Schedule"], int], dense: Callable[[], int]) -> "Schedule":
        """The schedule with its numbers solved for one model; only `Budget` has anything to solve.

        Args:
            macs_of: MACs of the model under a schedule.
            dense: counts the MACs of the dense model.
        """
        return self


def make_plan(
    schedule: Schedule, reducer: Reducer, *, depth: int, num_patches: int, num_prefix: int, limits: bool = True
) -> Plan:
    """The plan of a schedule for `num_patches` patch tokens; `limits` turns the checks on."""
    if limits:
        schedule.check(depth, num_patches, reducer)
        if schedule.round_to > num_patches + num_prefix:
            raise ScheduleError(
                f"{schedule} would cut nothing: round_to is {schedule.round_to}, but the model has only "
                f"{num_patches + num_prefix} tokens"
            )
    cuts: list[Cut] = []
    now = num_patches
    for block in schedule.blocks(depth):
        keep = schedule.target(block, depth, now, num_patches)
        fixed = num_prefix + reducer.extra_tokens
        keep = ceil((keep + fixed) / schedule.round_to) * schedule.round_to - fixed
        keep = max(keep, reducer.fewest(now), 1)
        if keep < now:
            out, returns = keep + reducer.extra_tokens, schedule.reinstate is not None
            cuts.append(Cut(block, schedule.place, now, keep, out, first=not cuts, returns=returns))
            now = out
    return Plan(num_patches, num_prefix, depth, tuple(cuts), reinstate=schedule.reinstate if cuts else None)
