"""How many patch tokens are kept at each place.

A schedule names the blocks at which it cuts and how many tokens each cut keeps. To add one, subclass `Schedule`
with `blocks`, `target` and `scaled`; `make_plan` does the rest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, floor
from numbers import Integral

from ..errors import ScheduleError
from ..notation import SHOWN
from ..option_types import as_tuple
from ..text import short
from .plan import Place, Schedule
from .reducers import Reducer

_ROUNDING = 1e-9  # 0.7 * 10 must count as 7, although binary fractions are not exact.


def _fraction(value: float, what: str) -> None:
    if not 0 < value <= 1:
        raise ScheduleError(f"{what} lies in (0, 1], not {value}")


def _quarters(depth: int) -> list[int]:
    """The blocks at a quarter, half and three quarters of the depth, each once."""
    return sorted({depth // 4, depth // 2, 3 * depth // 4})


@dataclass(frozen=True)
class PowerLaw(Schedule):
    """Every block l of L keeps `floor(n * (1 - r_max * ((l+1)/L)^alpha))` of its n patch tokens, at least 1.

    Args:
        r_max: drop ratio of the last block, 0 or more; 0.6 by default. Above 1, late blocks keep a single token.
        alpha: how late the reduction sets in, above 0; 1 is a straight line, 2 by default.
    """

    r_max: float = field(default=0.6, metadata=SHOWN)
    alpha: float = field(default=2.0, metadata=SHOWN)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r_max < 0:
            raise ScheduleError(f"r_max is 0 or more, not {self.r_max}")
        if self.alpha <= 0:
            raise ScheduleError(f"alpha is above 0, not {self.alpha}")

    def blocks(self, depth: int) -> Sequence[int]:
        return self.span(depth)

    def target(self, block: int, depth: int, num_now: int, num_patches: int) -> int:
        return max(1, floor(num_now * (1 - self.r_max * ((block + 1) / depth) ** self.alpha) + _ROUNDING))

    def scaled(self, strength: float) -> Schedule:
        return replace(self, r_max=self.r_max * strength)

    @classmethod
    def strongest(cls, depth: int, num_patches: int) -> Schedule:
        return cls(r_max=1.0, alpha=1.4)

    @property
    def drop_ratio(self) -> float | None:
        return self.r_max  # In the last block.


@dataclass(frozen=True)
class KeepRate(Schedule):
    """At a few blocks, keep `ceil(rate * n)` of the n patch tokens, an earlier fused token included (EViT).

    Paper: arXiv 2202.07800.

    Args:
        rate: keep rate of each cut, in (0, 1]; 0.7 by default.
        at: indices of the blocks that cut, ascending; by default those at a quarter, half and three quarters of the
            depth: (3, 6, 9) of 12.
    """

    rate: float = field(default=0.7, metadata=SHOWN)
    at: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", (self.at,) if isinstance(self.at, Integral) else as_tuple(self.at))
        super().__post_init__()
        _fraction(self.rate, "keep rate")
        if self.at is not None and (not self.at or list(self.at) != sorted(set(self.at))):
            raise ScheduleError(f"at lists block indices, ascending and each once, not {self.at}")

    def blocks(self, depth: int) -> Sequence[int]:
        if self.at is not None:
            return self.at
        return tuple(block for block in _quarters(depth) if block in self.span(depth))

    def target(self, block: int, depth: int, num_now: int, num_patches: int) -> int:
        return ceil(self.rate * num_now - _ROUNDING)

    def scaled(self, strength: float) -> Schedule:
        return replace(self, rate=1 - strength * (1 - self.rate))

    @classmethod
    def strongest(cls, depth: int, num_patches: int) -> Schedule:
        return cls(rate=0.02)

    @property
    def drop_ratio(self) -> float | None:
        return 1 - self.rate  # At each cut.


@dataclass(frozen=True)
class Stages(Schedule):
    """Before each named block, keep `floor(fraction * N)` of the N ORIGINAL patch tokens (PTP-FAKD).

    Args:
        fractions: block index to fraction in (0, 1], such as `{4: 0.85, 8: 0.5}`; indices ascend, fractions do not
            rise. At least one token is kept.
        place: "before" by default.
    """

    fractions: Mapping[int, float]
    place: Place = field(default="before", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        stages = dict(self.fractions)
        object.__setattr__(self, "fractions", _FrozenDict(stages))
        values = list(stages.values())
        if not stages or list(stages) != sorted(stages):
            raise ScheduleError(f"stages name block indices in ascending order, not {short(stages)}")
        for value in values:
            _fraction(value, "stage fraction")
        if values != sorted(values, reverse=True):
            raise ScheduleError(f"stage fractions are of the original tokens and cannot grow: {short(stages)}")

    def blocks(self, depth: int) -> Sequence[int]:
        return tuple(self.fractions)

    def target(self, block: int, depth: int, num_now: int, num_patches: int) -> int:
        return max(1, floor(self.fractions[block] * num_patches + _ROUNDING))

    def scaled(self, strength: float) -> Schedule:
        return replace(self, fractions={b: 1 - strength * (1 - f) for b, f in self.fractions.items()})

    @classmethod
    def strongest(cls, depth: int, num_patches: int) -> Schedule:
        return cls(dict(zip(_quarters(depth), (0.4, 0.15, 0.02), strict=False)))

    @property
    def drop_ratio(self) -> float | None:
        return 1 - min(self.fractions.values())  # In all.


class _FrozenDict(dict[int, float]):
    """A dict that can be hashed, so that schedules stay hashable. It is never changed."""

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return hash(tuple(self.items()))


@dataclass(frozen=True)
class ConstantR(Schedule):
    """Every block removes `r` patch tokens (ToMe, arXiv 2210.09461).

    A reducer that can remove only a part of the tokens, such as `ToMe`, removes as many of the r as it can.

    Args:
        r: tokens to remove in each block, 0 or more.
    """

    r: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 0:
            raise ScheduleError(f"r is 0 or more tokens, not {self.r}")

    def blocks(self, depth: int) -> Sequence[int]:
        return self.span(depth)

    def target(self, block: int, depth: int, num_now: int, num_patches: int) -> int:
        return max(1, num_now - self.r)

    def scaled(self, strength: float) -> Schedule:
        return replace(self, r=round(self.r * strength))

    @classmethod
    def strongest(cls, depth: int, num_patches: int) -> Schedule:
        return cls(r=(num_patches - 1) // depth)

    def check(self, depth: int, num_patches: int, reducer: Reducer) -> None:
        super().check(depth, num_patches, reducer)
        blocks = len(self.span(depth))
        # A block after the first may also remove the token that the block before it has added.
        most = (num_patches - 1 + reducer.extra_tokens * (blocks - 1)) // blocks
        if self.r > most and reducer.fewest(num_patches) == 1:
            raise ScheduleError(
                f"{self} removes {self.r} tokens in each of {blocks} blocks, but there are only {num_patches}; "
                f"use r of at most {most}"
            )


@dataclass(frozen=True)
class Counts(Schedule):
    """The number of patch tokens that leave each block, given one by one.

    It cannot follow a curriculum.

    Args:
        counts: one number for each block from block 0 on, 1 or more and never rising; a fused token is not counted.
            With `reinstate`, one for each block before it.
    """

    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "counts", as_tuple(self.counts))
        super().__post_init__()
        if not self.counts or min(self.counts) < 1:
            raise ScheduleError(f"counts are 1 or more tokens per block, not {short(list(self.counts))}")
        if list(self.counts) != sorted(self.counts, reverse=True):
            raise ScheduleError(f"counts cannot grow from block to block: {short(list(self.counts))}")

    def blocks(self, depth: int) -> Sequence[int]:
        return range(len(self.counts))

    def target(self, block: int, depth: int, num_now: int, num_patches: int) -> int:
        # A fused token must not make a block cut again whose count is that of the block before.
        same = block > 0 and self.counts[block] == self.counts[block - 1]
        return num_now if same else min(self.counts[block], num_now)

    def scaled(self, strength: float) -> Schedule:
        if strength == 1:
            return self
        raise ScheduleError(
            "Counts fixes every number of tokens and cannot follow a curriculum; use KeepRate or PowerLaw"
        )

    def check(self, depth: int, num_patches: int, reducer: Reducer) -> None:
        span = len(self.span(depth))
        if len(self.counts) != span:
            there = f"the model has {depth}" if self.reinstate is None else f"{span} come before the tokens return"
            raise ScheduleError(f"Counts lists {len(self.counts)} blocks, but {there}")
        super().check(depth, num_patches, reducer)
        if self.counts[0] > num_patches:
            raise ScheduleError(f"Counts keeps {self.counts[0]} patch tokens, but the model has only {num_patches}")
