"""Which cuts a reduction makes in a model now: its schedule, with budgets solved, at its present strength."""

import copy
import warnings
import weakref
from collections.abc import Callable, Mapping
from functools import cache
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import VitrimError
from ...text import short
from ...tokens import Constant, Plan, Reduction, Schedule, make_plan
from ...tokens.gradients import GradientMemory
from ..adapter import Adapter, Geometry
from .needs import check_needs
from .padded import PaddedTrace
from .trace import Trace


class Policy:
    """What all blocks of one model share: the cuts to make. Nothing here belongs to one forward pass.

    Args:
        model: as `adapter` claims it. It is only read; a policy keeps no reference to it.
        adapter: knows what the cuts of this model cost.
        reduction: what acts; None: nothing.
        cls_only: whether the last block computes prefix tokens only.

    Raises:
        VitrimError, ScoreError, ScheduleError: the model cannot do this.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, reduction: Reduction | None, cls_only: bool) -> None:
        self.reduction, self.cls_only = reduction, cls_only
        self.owner = type(model).__name__
        self.strength = 1.0 if reduction is None else reduction.curriculum.strength(0.0)
        learns = reduction is not None and reduction.reducer.training_only
        self.gradients = GradientMemory() if learns else None
        """What the score has learnt from training steps; None where it learns nothing."""
        self.last: Trace | PaddedTrace | None = None
        """Of the latest forward pass, for the user to look at. Nothing is computed from it."""
        self.restorable = False
        """Whether the values of dropped tokens are kept, so that they can be restored."""
        self._origin: weakref.ref[Policy] | None = None
        self._moved = False
        self._unsaid = False
        """Whether weights were loaded that do not say at which strength they were trained."""
        self.fit(model, adapter)

    def fit(self, model: nn.Module, adapter: Adapter) -> None:
        """Plan for the model's present input size, for which a budget is solved."""
        reduction, g = self.reduction, adapter.geometry(model)
        check_needs(reduction, self.cls_only, g, type(model).__name__)
        schedule = None
        if reduction is not None:
            dense = Plan(g.num_patches, g.num_prefix, g.depth, ())
            macs_of = self._macs_of(model, adapter, g)
            schedule = reduction.schedule.resolve(macs_of, lambda: adapter.macs(model, dense, None).total)
        self.geometry: Geometry = g
        self.schedule: Schedule | None = schedule
        """At full strength, with nothing left to solve."""
        self.entering = {mode: adapter.patches_entering(model, training=mode) for mode in (True, False)}
        """Patch tokens that reach the first block at the model's own input size, by training mode."""
        self._plans = self._plans_at(self.strength)
        if reduction is not None:
            # The curriculum will not reach some strengths for many epochs; what the model cannot do is refused now.
            for strength in sorted({self.strength, *reduction.curriculum.strengths}, reverse=True):
                self._check_plans(self._plans_at(strength), model, adapter)

    @property
    def fuses(self) -> bool:
        """Whether a token can stand for several, so that a head which averages tokens must weigh them."""
        reducer = None if self.reduction is None else self.reduction.reducer
        return reducer is not None and (reducer.merges or reducer.extra_tokens > 0)

    def idle(self, training: bool) -> bool:
        """Whether nothing is cut in this mode, whatever the number of tokens."""
        active = self.reduction is not None and self.reduction.active(training) and self.strength > 0
        return not (active or self.cls_only)

    def plan(self, num_patches: int, training: bool) -> Plan:
        """The cuts for so many patch tokens, in this mode of the model."""
        plans = self._plans
        key = (num_patches, training)
        if key not in plans:
            plans[key] = self._make(num_patches, training, self.strength)
        return plans[key]

    def set_strength(self, strength: float, model: nn.Module, adapter: Adapter) -> None:
        """Apply this much of the schedule from now on, in [0, 1].

        Raises:
            VitrimError: the model cannot do this; the strength stays as it was.
        """
        if not isinstance(strength, Real) or not 0 <= strength <= 1:
            raise VitrimError(f"strength is between 0 and 1, not {short(strength)}")
        if strength != self.strength:
            plans = self._plans_at(strength)
            self._check_plans(plans, model, adapter)
            self.strength, self._plans = strength, plans
        self._moved = True

    def metadata(self) -> dict[str, object]:
        """What the metadata of a state dict says: how much of which reduction acts."""
        return {"reduction": self._text, "strength": self.strength}

    def strength_in(self, metadata: object) -> float | None:
        """The strength in the metadata of a state dict; None if it is not that of the same reduction."""
        same = isinstance(metadata, dict) and self._text and metadata.get("reduction") == self._text
        return float(metadata["strength"]) if same and isinstance(metadata, dict) else None

    @property
    def _text(self) -> str:
        return "" if self.reduction is None else f"{self.reduction} in {self.reduction.phase}"

    def start(self, x_BTC: Tensor, training: bool, expected: int | None, *, alone: bool = False) -> Trace:
        """The trace of tokens that are about to enter the first block.

        Args:
            x_BTC: prefix tokens first.
            training: mode of the model.
            expected: patch tokens that the images of this pass give; None: not known.
            alone: whether the block is called by itself, so that nothing says what the images are.
        """
        g = self.geometry
        num_patches = int(x_BTC.shape[1]) - g.num_prefix
        known = (expected,) if expected is not None else tuple(self.entering.values()) if g.fixed_size else None
        if known is not None and num_patches not in known:
            raise VitrimError(
                f"{num_patches + g.num_prefix} tokens reach the first block, but the images give "
                f"{known[0] + g.num_prefix}; tokens that are added or removed before the blocks (as in prompt tuning) "
                "cannot be combined with token reduction; call handle.remove() first"
            )
        if not torch.compiler.is_compiling():
            self.warn_if_left_behind()
            if not training:
                self._warn_if_unsaid()
        plan = self.plan(num_patches, training)
        if alone and known is None and num_patches not in self.entering.values() and (plan.cuts or plan.prefix_only):
            raise VitrimError(
                f"{num_patches + g.num_prefix} tokens reach the first block, which is called by itself, and this model "
                "takes images of all sizes, so it is not known which of them are patches; run the blocks inside "
                "`with model.open_call(images):`, or call the model. Added tokens (as in prompt tuning) cannot be "
                "combined with token reduction"
            )
        # What is known may change before this pass is recomputed, which must choose the same tokens again.
        gradients = self.gradients.known() if self.gradients is not None and plan.cuts else None
        reducer = self.reduction.reducer if self.reduction else None
        positions = g.rotary or g.relative
        return Trace(
            plan, reducer, x_BTC.shape[0], x_BTC.device, training=training, positions=positions,
            restorable=self.restorable, gradients=gradients,
        )  # fmt: skip

    def show(self, trace: Trace | PaddedTrace) -> None:
        """Keep this trace for the user to look at."""
        if not torch.compiler.is_exporting():  # The tensors of an export are not real.
            self.last = trace.summary()

    def warn_if_left_behind(self) -> None:
        """Warn, once, if the model that this one was copied from has moved on in its curriculum."""
        origin = None if self._origin is None or self._moved else self._origin()
        curriculum = Constant() if self.reduction is None else self.reduction.curriculum
        if origin is not None and origin.strength != self.strength and curriculum != Constant():
            self._moved = True  # Said once.
            warnings.warn(
                f"this copy of a model (an EMA?) still reduces at strength {self.strength:g}, while the model that it "
                f"was copied from is at {origin.strength:g}; move both with vitrim.set_epoch(model, copy, epoch=...)",
                stacklevel=3,
            )

    def weights_loaded(self, said: bool) -> None:
        """Note that weights were loaded; `said`: with the strength at which they were trained."""
        self._unsaid = not said

    def _warn_if_unsaid(self) -> None:
        """Warn, once, if nobody has said how far the curriculum of loaded weights has come."""
        if self._unsaid and not self._moved and self.strength < 1:
            warnings.warn(
                f"weights were loaded that do not say how far their curriculum had come, so this model reduces at "
                f"strength {self.strength:g}; call vitrim.set_epoch(model, epoch=...) or handle.load_state_dict(...)",
                stacklevel=3,
            )
        self._unsaid = False  # Said once.

    def _make(self, num_patches: int, training: bool, strength: float) -> Plan:
        g = self.geometry
        if self.reduction is None or self.schedule is None or not self.reduction.active(training):
            plan = Plan(num_patches, g.num_prefix, g.depth, ())
        else:
            schedule = self.schedule if strength == 1 else self.schedule.scaled(strength)
            plan = make_plan(
                schedule, self.reduction.reducer, depth=g.depth, num_patches=num_patches, num_prefix=g.num_prefix
            )
        return plan.for_prefix_only() if self.cls_only else plan

    def _plans_at(self, strength: float) -> dict[tuple[int, bool], Plan]:
        # Plans for the model's own size are made ahead, so that a compiled forward pass only looks them up.
        keys = [(self.entering[mode], mode) for mode in (True, False)]
        return {key: self._make(*key, strength) for key in keys}

    def _check_plans(self, plans: Mapping[Any, Plan], model: nn.Module, adapter: Adapter) -> None:
        if self.reduction is not None:
            for plan in dict.fromkeys(plans.values()):
                adapter.check_plan(model, plan, self.reduction.reducer)

    def _macs_of(self, model: nn.Module, adapter: Adapter, g: Geometry) -> Callable[[Schedule], int]:
        assert self.reduction is not None
        reducer = self.reduction.reducer

        @cache  # Most steps of a bisection end at a plan that was met before.
        def of_plan(plan: Plan) -> int:
            plan = plan.for_prefix_only() if self.cls_only else plan
            return adapter.macs(model, plan, reducer).total

        def of_schedule(schedule: Schedule) -> int:
            return of_plan(
                make_plan(
                    schedule, reducer, depth=g.depth, num_patches=g.num_patches, num_prefix=g.num_prefix, limits=False
                )
            )

        return of_schedule

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None, "_origin": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Policy":
        twin = memo[id(self)] = Policy.__new__(Policy)
        twin.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        twin._origin, twin._moved = weakref.ref(self), False
        return twin
