"""Put a reduction into a model, and take it out again without a trace."""

from dataclasses import replace
from types import TracebackType

import torch
from torch import Tensor, nn

from ..errors import VitrimError
from ..tokens import Constant, Curriculum, Plan, Reducer, Reduction, Schedule, TokenState
from ..tokens.curricula import History
from ..tokens.gradients import GradientMemory
from ..tokens.reduction import Phase
from .adapter import Geometry, find_adapter
from .planning import Planner
from .trace import Trace

_TRACE = "vitrim_trace"
_HANDLE = "vitrim_handle"


class Handle:
    """A reduction at work in a model. Made by `attach`; use it as a context manager, or call `remove`."""

    def __init__(self, model: nn.Module, reduction: Reduction | None, cls_only: bool) -> None:
        self.model = model
        self.adapter = find_adapter(model)
        self.reduction = reduction
        self.cls_only = cls_only
        self._planner = Planner(model, self.adapter, reduction, cls_only)
        self._originals: list[tuple[nn.Module, type[nn.Module]]] = []
        self._last: Trace | None = None
        learns = reduction is not None and reduction.reducer.training_only
        self.gradients = GradientMemory() if learns else None
        """What the score has learnt from training steps, a part of their checkpoint; None where it learns nothing."""

    @property
    def geometry(self) -> Geometry:
        """Of the model at its own input size."""
        return self._planner.geometry

    @property
    def reducer(self) -> Reducer:
        """The reducer at work."""
        if self.reduction is None:
            raise VitrimError("no reducer is attached")
        return self.reduction.reducer

    @property
    def schedule(self) -> Schedule | None:
        """The schedule at full strength, with nothing left to solve for."""
        return self._planner.schedule

    @property
    def strength(self) -> float:
        """How much of the schedule acts now, in [0, 1]; see `set_epoch`."""
        return self._planner.strength

    @property
    def token_counts(self) -> tuple[int, ...]:
        """Tokens leaving each block in the model's present mode, prefix tokens included."""
        return self.plan().token_counts

    @property
    def states(self) -> list[TokenState]:
        """One `TokenState` per block of the latest forward pass."""
        trace = self.last_trace()
        return [trace.state(block) for block in range(self.geometry.depth)]

    def plan(self, num_patches: int | None = None, training: bool | None = None) -> Plan:
        """The cuts for so many patch tokens (default: the model's own input size), in this mode of the model."""
        num_patches = self.geometry.num_patches if num_patches is None else num_patches
        training = self.model.training if training is None else training
        return self._planner.plan(num_patches, training)

    def set_epoch(self, epoch: float, history: History = ()) -> float:
        """Move the curriculum to `epoch` (may be a fraction); returns the strength that acts from now on."""
        if self.reduction is not None:
            self.set_strength(self.reduction.curriculum.strength(epoch, history))
        return self.strength

    def set_strength(self, strength: float) -> None:
        """Let so much of the schedule act, in [0, 1], until the curriculum is moved again."""
        self._planner.set_strength(strength)

    def plan_anew(self) -> None:
        """Take up a change of the model's own input size; what a budget allows is solved for that size."""
        strength = self.strength
        self._planner = Planner(self.model, self.adapter, self.reduction, self.cls_only)
        self.set_strength(strength)

    def install(self) -> None:
        """Put the reduction (back) into the model."""
        if attached(self.model) is not None:
            raise VitrimError("a reduction is attached to this model already; call handle.remove() first")
        # Looked up before anything is changed, so that a refusal leaves the model as it was.
        blocks = self.adapter.blocks(self.model)
        changes = [(module, type(module), self.adapter.reduced_class(module)) for module in (*blocks, self.model)]
        for index, (module, original, reduced) in enumerate(changes):
            self._originals.append((module, original))
            module.__class__ = reduced
            module.vitrim_handle, module.vitrim_index = self, index

    def remove(self) -> None:
        """Give the model back exactly as it was. Calling it twice does no harm."""
        for module, original in self._originals:
            module.__class__ = original
            del module.vitrim_handle, module.vitrim_index
        self._originals = []
        self._last = None

    def __enter__(self) -> "Handle":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_last": None}

    # What the reduced blocks and models call.

    def trace_of(self, x: Tensor, block: int) -> Trace:
        """The trace of these tokens on their way into `block`."""
        num_patches = x.shape[1] - self.geometry.num_prefix
        trace = getattr(x, _TRACE, None)
        if block == 0:
            return trace if trace is not None and recomputing() else self._start(x, num_patches)
        if trace is None and self._last is not None:
            # A wrapper between the blocks (FSDP, a hook) replaced the tensor: the latest pass is the one it came from.
            trace = self._last.upto(block)
            carries = trace.size_BN is not None or trace.score_BN is not None or trace.plan.reinstate is not None
            if recomputing() and carries:
                # Another pass may have come in between, whose sizes would be silently wrong for these tokens.
                raise VitrimError(
                    "this reduction carries sizes, scores or tokens from block to block, which reentrant activation "
                    "checkpointing loses; pass use_reentrant=False"
                )
        if trace is None:
            raise VitrimError(f"block {block} was called on its own; run the model from its first block")
        return trace

    def watch(self, x: Tensor, block: int, num_kept: int) -> None:
        """Where the score learns from gradients, note the one that will reach the tokens kept by this cut."""
        if self.gradients is not None and not recomputing():
            self.gradients.watch(block, x, self.geometry.num_prefix, self.geometry.num_prefix + num_kept)

    def leave(self, x: Tensor, trace: Trace) -> Tensor:
        """Send the tokens on, with their trace."""
        setattr(x, _TRACE, trace)
        if not recomputing():
            self._last = trace
        return x

    def finish(self, x: Tensor) -> Tensor:
        """Hand the trace of the latest pass to its final tokens, so that a head applied later finds the right one."""
        if self._last is not None:
            setattr(x, _TRACE, self._last)
        if torch.compiler.is_exporting():
            self._last = None  # Its tensors are not real.
        return x

    def trace_at_head(self, x: Tensor) -> Trace | None:
        """The trace of final tokens (B, T, C): their own, or that of the latest pass if they can be its outcome."""
        trace = getattr(x, _TRACE, self._last)
        if trace is None or x.is_meta or (trace.num_images, trace.plan.token_counts[-1]) != tuple(x.shape[:2]):
            return None
        return trace

    def last_trace(self) -> Trace:
        """The trace of the latest forward pass."""
        if self._last is None:
            raise VitrimError("no forward pass has been made since the reduction was attached")
        return self._last

    def _start(self, x: Tensor, num_patches: int) -> Trace:
        trace = Trace(self.plan(num_patches), self.reduction.reducer if self.reduction else None, x.shape[0])
        if self.gradients is not None and trace.plan.cuts:
            # What is known may change before this pass is recomputed, which must choose the same tokens again.
            trace = replace(trace, gradients=self.gradients.known())
            setattr(x, _TRACE, trace)
        return trace


def attach(
    model: nn.Module,
    reducer: Reducer | Reduction | str | None = None,
    schedule: Schedule | None = None,
    *,
    curriculum: Curriculum | None = None,
    phase: Phase = "both",
    cls_only: bool = False,
) -> Handle:
    """Make the model reduce its tokens, in place, until `handle.remove()`.

    Args:
        model: any model that an adapter claims (`vitrim list adapters`). Attach before compiling or wrapping it.
        reducer: which tokens go, with `schedule`; or a whole `Reduction`, or its text
            (`"TopK() @ KeepRate(0.7)"`); None reduces nothing (for `cls_only` alone).
        schedule: how many tokens stay, and where.
        curriculum: how the schedule grows over training; moved by `handle.set_epoch`.
        phase: reduce in "train", "eval" or "both" modes of the model.
        cls_only: let the last block compute prefix tokens alone. Logits stay the same; features of patch tokens
            are no longer returned. Only for heads that read CLS.

    Raises:
        UnsupportedModelError: no adapter can change the model, or something is attached already.
        ScheduleError, ScoreError: the model cannot do what is asked.
    """
    if attached(model) is not None:
        raise VitrimError("a reduction is attached to this model already; call handle.remove() first")
    if isinstance(reducer, str):
        reducer = Reduction.parse(reducer, phase)
    if reducer is not None and not isinstance(reducer, Reducer | Reduction):
        what = f"write {reducer.__name__}() with brackets" if isinstance(reducer, type) else f"not {reducer!r}"
        raise VitrimError(f"attach takes a reducer such as vitrim.TopK(), a Reduction or its text; {what}")
    if isinstance(reducer, Reducer):
        if schedule is None:
            raise VitrimError("a reducer needs a schedule, for example vitrim.KeepRate(0.7)")
        reducer = Reduction(reducer, schedule, curriculum or Constant(), phase)
    elif schedule is not None or curriculum is not None:
        raise VitrimError("schedule and curriculum go with a reducer; a Reduction holds its own")
    handle = Handle(model, reducer, cls_only)
    handle.install()
    return handle


def attached(model: nn.Module) -> Handle | None:
    """The handle at work in this model, None if there is none."""
    handle = getattr(model, _HANDLE, None)
    return handle if isinstance(handle, Handle) else None


def recomputing() -> bool:
    """Whether the block runs inside a backward pass, to recompute what activation checkpointing did not store."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
