"""Put a reduction into a model, and move its curriculum."""

from typing import Any

from torch import nn

from ...errors import VitrimError
from ...text import short
from ...tokens import Constant, Curriculum, Reducer, Reduction, Schedule
from ...tokens.curriculum import History
from ...tokens.reduction import Phase
from .attached import attached, handles_inside
from .handle import Handle, not_a_model


def attach(
    model: nn.Module,
    reducer: Reducer | Reduction | str | None,
    schedule: Schedule | None = None,
    *,
    curriculum: Curriculum | None = None,
    phase: Phase | None = None,
    cls_only: bool = False,
    restorable: bool = False,
) -> Handle:
    """Make the model reduce its tokens, in place, until `handle.remove()`.

    Args:
        model: any model that an adapter supports (`vitrim list adapters`). Attach before compiling, wrapping or
            copying it (`torch.compile`, DDP, FSDP, EMA).
        reducer: which tokens go, with `schedule`; or a whole `Reduction`, or its text
            (`"TopK() @ KeepRate(0.7)"`); None reduces nothing, for `cls_only` alone.
        schedule: how many tokens stay, and where.
        curriculum: how the schedule grows over training; moved by `handle.set_epoch` or `vitrim.set_epoch`.
        phase: reduce in "train", "eval" or "both" modes of the model; "both" by default.
        cls_only: let the last block compute only prefix tokens. Logits stay the same; features of patch tokens
            are no longer returned. Only for heads that read only CLS.
        restorable: keep the values of dropped tokens, for `handle.restore`.

    Returns:
        A `Handle`, not a model: go on using `model`.

    Raises:
        UnsupportedModelError: no adapter can change the model; names the model inside that can be changed, if any.
        ScheduleError, ScoreError: the model cannot do what is asked.
        VitrimError: something is attached already.
    """
    if isinstance(model, Handle):
        raise VitrimError(not_a_model("attach(handle, ...)"))
    if attached(model) is not None:
        raise VitrimError("a reduction is attached to this model already; call handle.remove() first")
    if isinstance(reducer, Reduction) and phase is not None:
        raise VitrimError("phase goes with a reducer or a text; a Reduction holds its own: Reduction(..., phase=...)")
    if isinstance(reducer, str):
        reducer = Reduction.parse(reducer, phase or "both")
    if reducer is not None and not isinstance(reducer, Reducer | Reduction):
        what = f"write {reducer.__name__}() with brackets" if isinstance(reducer, type) else f"not {reducer!r}"
        raise VitrimError(f"attach takes a reducer such as vitrim.TopK(), a Reduction or its text; {what}")
    if isinstance(reducer, Reducer):
        if schedule is None:
            raise VitrimError("a reducer needs a schedule, for example vitrim.KeepRate(0.7)")
        _check_kind("schedule", schedule, Schedule, "KeepRate(0.7)")
        _check_kind("curriculum", curriculum, Curriculum | None, "Delayed(5)")
        reducer = Reduction(reducer, schedule, curriculum or Constant(), phase or "both")
    elif schedule is not None or curriculum is not None:
        raise VitrimError("schedule and curriculum go with a reducer; a Reduction holds its own")
    handle = Handle(model, reducer, cls_only)
    handle.restorable = restorable
    handle.install()
    return handle


def _check_kind(name: str, given: object, kind: Any, example: str) -> None:
    if not isinstance(given, kind):
        shown = f"write {given.__name__}(...)" if isinstance(given, type) else f"not {short(given)}"
        raise VitrimError(f"{name} must be a {name} such as vitrim.{example}; {shown}")


def set_epoch(*models: nn.Module | Handle, epoch: float, history: History = ()) -> float:
    """Move the curriculum of all these models, and of every model inside them.

    A copy of a model (an EMA) has a curriculum of its own, which must be moved too, or its copy stays as it was:

        vitrim.set_epoch(model, ema, epoch=epoch)

    Args:
        models: reduced models, their wrappers (DDP, FSDP, compiled), copies (`ModelEmaV3`, `AveragedModel`), handles.
        epoch: from 0; may be a fraction, for curricula that change within an epoch.
        history: one mapping for each finished epoch, see `Handle.set_epoch`.

    Returns:
        The strength that acts from now on, the lowest if they differ.

    Raises:
        VitrimError: no reduction is attached to one of them.
    """
    handles: list[Handle] = []
    for model in models:
        found = [model] if isinstance(model, Handle) else handles_inside(model)
        if not found:
            raise VitrimError(f"no reduction is attached to this {type(model).__name__}; call vitrim.attach first")
        handles += found
    if not handles:
        raise VitrimError("set_epoch takes the models to move: vitrim.set_epoch(model, epoch=3)")
    return min(handle.set_epoch(epoch, history) for handle in handles)
