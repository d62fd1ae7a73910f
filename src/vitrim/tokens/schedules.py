"""How many patch tokens survive at each place.

A schedule names the blocks at which it cuts and how many tokens each cut keeps. To add one, subclass `Schedule`
with `blocks`, `target` and `scaled`; `make_plan` does the rest.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, floor
from numbers import Integral

from ..errors import ScheduleError
from ..kinds import as_tuple
from ..notation import SHOWN
from .plan import Place, Schedule
from .reducers import Reducer

_ROUNDING = 1e-9  # 0.7 * 10 must count as 7 whichever way binary fractions fall.


def _fraction(value: float, what: str) -> None:
    if not 0 < value <= 1:
        raise ScheduleError(f"{what} lies in (0, 1], not {value}")


@dataclass(frozen=True)
class PowerLaw(Schedule):
    """Every block l of L keeps `floor(n * (1 - r_max * ((l+1)/L)^alpha))` of its n patch tokens, never fewer than 1.

    `r_max` above 1 is clamped to dropping all but one token where the law asks for more.
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

    @property
    def drop_ratio(self) -> float | None:
        return self.r_max  # In the last block.


@dataclass(frozen=True)
class KeepRate(Schedule):
    """At the blocks `at`, keep `ceil(rate * n)` of the n patch tokens, an earlier fused token included (EViT).

    `at` defaults to a quarter, half and three quarters of the depth: (3, 6, 9) of 12.
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
        return tuple(block for block in sorted({depth // 4, depth // 2, 3 * depth // 4}) if block in self.span(depth))

    def target(self, block: int, depth: int, num_now: int, num_patches: int) -> int:
        return ceil(self.rate * num_now - _ROUNDING)

    def scaled(self, strength: float) -> Schedule:
        return replace(self, rate=1 - strength * (1 - self.rate))

    @property
    def drop_ratio(self) -> float | None:
        return 1 - self.rate  # At each cut.


@dataclass(frozen=True)
class Stages(Schedule):
    """Before each named block, keep `floor(fraction * N)` of the N ORIGINAL patch tokens (PTP-FAKD)."""

    fractions: Mapping[int, float]
    place: Place = field(default="before", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        stages = dict(self.fractions)
        object.__setattr__(self, "fractions", _FrozenDict(stages))
        values = list(stages.values())
        if not stages or list(stages) != sorted(stages):
            raise ScheduleError(f"stages name block indices in ascending order, not {stages}")
        for value in values:
            _fraction(value, "stage fraction")
        if values != sorted(values, reverse=True):
            raise ScheduleError(f"stage fractions are of the original tokens and cannot grow: {stages}")

    def blocks(self, depth: int) -> Sequence[int]:
        return tuple(self.fractions)

    def target(self, block: int, depth: int, num_now: int, num_patches: int) -> int:
        return max(1, floor(self.fractions[block] * num_patches + _ROUNDING))

    def scaled(self, strength: float) -> Schedule:
        return replace(self, fractions={b: 1 - strength * (1 - f) for b, f in self.fractions.items()})

    @property
    def drop_ratio(self) -> float | None:
        return 1 - min(self.fractions.values())  # In all.


class _FrozenDict(dict[int, float]):
    """A dict that can be hashed, so that schedules stay hashable; never changed after it is made."""

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return hash(tuple(self.items()))


@dataclass(frozen=True)
class ConstantR(Schedule):
    """Every block removes `r` patch tokens (ToMe); a reducer that can remove fewer removes what it can."""

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

    def check(self, depth: int, num_patches: int, reducer: Reducer) -> None:
        super().check(depth, num_patches, reducer)
        most = (num_patches - 1) // depth
        if self.r > most and reducer.fewest(num_patches) == 1:
            raise ScheduleError(
                f"{self} removes {self.r} tokens in each of {depth} blocks, more than the {num_patches} there are; "
                f"use r of at most {most}"
            )


@dataclass(frozen=True)
class Counts(Schedule):
    """Patch tokens that leave each block, one number per block from block 0 on (a fused token not counted).

    With `reinstate`, one number for each block before it.
    """

    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "counts", as_tuple(self.counts))
        super().__post_init__()
        if not self.counts or min(self.counts) < 1:
            raise ScheduleError(f"counts are 1 or more tokens per block, not {list(self.counts)}")
        if list(self.counts) != sorted(self.counts, reverse=True):
            raise ScheduleError(f"counts cannot grow from block to block: {list(self.counts)}")

    def blocks(self, depth: int) -> Sequence[int]:
        return range(len(self.counts))

    def target(self, block: int, depth: int, num_now: int, num_patches: int) -> int:
        # A fused token must not make a block that asks for nothing cut again.
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


@dataclass(frozen=True)
class Budget(Schedule):
    """The gentlest scaling of `shape` whose cost fits the budget, solved when it is attached to a model.

    Args:
        macs: a fraction in (0, 1] of the plain model's MACs, or an absolute number of MACs per image.
        shape: how the reduction spreads over depth; its strength is what is solved for.
    """

    macs: float
    shape: Schedule = PowerLaw(r_max=1.0, alpha=1.4)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.macs <= 0:
            raise ScheduleError(f"a budget of MACs is above 0, not {self.macs}")
        if (self.place, self.round_to, self.reinstate) != ("inside", 1, None):
            raise ScheduleError("place, round_to and reinstate of a Budget are those of its shape; set them there")

    def blocks(self, depth: int) -> Sequence[int]:
        raise ScheduleError("a Budget must be attached to a model before it has cuts")

    def resolve(self, macs_of: Callable[[Schedule], int], dense: Callable[[], int]) -> Schedule:
        least = macs_of(self.shape)
        limit = self.macs * dense() if self.macs <= 1 else self.macs
        if limit < least:
            raise ScheduleError(
                f"{self.shape} cannot reach {limit / 1e6:.1f} M MACs; the least is {least / 1e6:.1f} M "
                f"({least / dense():.3f} of the model)"
            )
        low, high = 0.0, 1.0  # `high` always meets the budget.
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if macs_of(self.shape.scaled(middle)) <= limit else (middle, high)
        return self.shape.scaled(high)
