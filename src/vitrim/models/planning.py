"""Which cuts a reduction makes in a model: its schedule, with budgets solved, at the strength of the moment."""

from collections.abc import Callable
from functools import cache

from torch import nn

from ..errors import ScoreError, VitrimError
from ..tokens import Plan, Reduction, Schedule, make_plan
from .adapter import Adapter, Geometry


class Planner:
    """Makes the plans of one model and remembers them.

    schedule: at full strength, with nothing left to solve for; None without a reduction.

    Args:
        model: as `adapter` claims it.
        adapter: knows what its cuts cost.
        reduction: what is to act; None: nothing.
        cls_only: whether the last block computes prefix tokens alone.

    Raises:
        VitrimError, ScoreError, ScheduleError: the model cannot do what is asked.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, reduction: Reduction | None, cls_only: bool) -> None:
        self.model, self.adapter, self.reduction, self.cls_only = model, adapter, reduction, cls_only
        self.geometry: Geometry = adapter.geometry(model)
        self.strength = 1.0
        self.schedule: Schedule | None = None
        self._plans: dict[tuple[int, bool], Plan] = {}
        self._check()
        if reduction is not None:
            dense = Plan(self.geometry.num_patches, self.geometry.num_prefix, self.geometry.depth, ())
            self.schedule = reduction.schedule.resolve(self._macs_of(reduction), adapter.macs(model, dense, None).total)
            self.strength = reduction.curriculum.strength(0.0)
            self._prepare()

    def plan(self, num_patches: int, training: bool) -> Plan:
        """The cuts for so many patch tokens, in this mode of the model."""
        key = (num_patches, training)
        if key not in self._plans:
            self._plans[key] = self._make(num_patches, training)
        return self._plans[key]

    def set_strength(self, strength: float) -> None:
        """Let so much of the schedule act from now on, in [0, 1]."""
        if strength != self.strength:
            self.strength = strength
            self._prepare()

    def _make(self, num_patches: int, training: bool) -> Plan:
        g = self.geometry
        if self.reduction is None or self.schedule is None or not self.reduction.active(training):
            plan = Plan(num_patches, g.num_prefix, g.depth, ())
        else:
            schedule = self.schedule if self.strength == 1 else self.schedule.scaled(self.strength)
            sizes = {"depth": g.depth, "num_patches": num_patches, "num_prefix": g.num_prefix}
            plan = make_plan(schedule, self.reduction.reducer, **sizes)
            self.adapter.check_plan(self.model, plan, self.reduction.reducer)
        return plan.for_prefix_only() if self.cls_only else plan

    def _prepare(self) -> None:
        # Plans for the nominal size are made ahead, so that a compiled forward pass only looks them up.
        self._plans = {}
        for training in (True, False):
            self.plan(self.geometry.num_patches, training)

    def _macs_of(self, reduction: Reduction) -> Callable[[Schedule], int]:
        g, reducer = self.geometry, reduction.reducer

        @cache  # Most steps of a bisection end at a plan met before.
        def of_plan(plan: Plan) -> int:
            plan = plan.for_prefix_only() if self.cls_only else plan
            return self.adapter.macs(self.model, plan, reducer).total

        def of_schedule(schedule: Schedule) -> int:
            sizes = {"depth": g.depth, "num_patches": g.num_patches, "num_prefix": g.num_prefix}
            return of_plan(make_plan(schedule, reducer, **sizes, limits=False))

        return of_schedule

    def _check(self) -> None:
        g, name = self.geometry, type(self.model).__name__
        if self.cls_only and g.head != "prefix":
            raise VitrimError(f"cls_only needs a head that reads CLS alone; the head of this {name} pools patch tokens")
        if self.reduction is not None and self.reduction.reducer.needs == "cls_row" and not g.has_cls:
            raise ScoreError(
                f"this {name} has no CLS token to score with; use TopK(score='norm'), 'key_norm', "
                "'mean_attention' or ToMe()"
            )
