"""A schedule that is solved for a number of MACs: the weakest scaling of another schedule that costs no more."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..budgets import check_budget
from ..errors import ScheduleError
from .plan import Schedule
from .schedules import PowerLaw

_SHAPE = PowerLaw(r_max=1.0, alpha=1.4)


@dataclass(frozen=True)
class Budget(Schedule):
    """The weakest scaling of `shape` that costs no more than the budget, solved when it is attached to a model.

    Args:
        macs: up to 1 a fraction of the dense model's MACs; above 1 an absolute number of MACs per image.
        shape: any other schedule, which says how the reduction is spread over depth;
            `PowerLaw(r_max=1.0, alpha=1.4)` by default. Its strength is what is solved for.
    """

    macs: float
    shape: Schedule = _SHAPE

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget("macs of a Budget", self.macs, ScheduleError)
        if isinstance(self.shape, Budget):
            raise ScheduleError("the shape of a Budget is a schedule of another kind, such as PowerLaw(1.0)")
        if (self.place, self.round_to, self.reinstate) != ("inside", 1, None):
            raise ScheduleError("place, round_to and reinstate of a Budget are those of its shape; set them there")

    def blocks(self, depth: int) -> Sequence[int]:
        raise ScheduleError("a Budget has cuts only after it is attached to a model, see handle.schedule")

    def scaled(self, strength: float) -> Schedule:
        raise ScheduleError("a Budget can be scaled only after it is attached to a model, see handle.schedule")

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
