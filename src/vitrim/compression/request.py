"""What `vitrim.compress` is asked for, and which models it takes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..elastic.probing import check_counts
from ..errors import UnknownNameError, VitrimError
from ..measure.cost import cost
from ..measure.speed import DTYPES
from ..models import attached, find_adapter
from ..models.compiling import check_compiler
from ..models.files.weights import check_tensors
from ..models.own_code import check_no_own_methods
from .goal import Goal, Part

MOST_IMAGES = 1024
"""How many images are used for the search, unless another number is given."""


@dataclass(frozen=True)
class Request:
    """What is asked for, apart from the model and the images; see `compress`."""

    goal: Goal
    using: Sequence[Part]
    batch_size: int = 32
    dtype: str = "float32"
    compile: bool = False
    num_images: int = MOST_IMAGES
    trials: int = 12

    def __post_init__(self) -> None:
        check_counts(batch_size=self.batch_size, num_images=self.num_images)
        if type(self.trials) is not int or self.trials < 0:
            raise VitrimError(f"trials is a whole number, 0 or more, not {self.trials!r}")
        if self.dtype not in DTYPES:
            raise UnknownNameError("dtype", self.dtype, DTYPES)

    def check_device(self, device: torch.device) -> None:
        """Raise `VitrimError` where models are to be compiled for times on this device, and cannot be."""
        if self.compile:
            check_compiler(device)


def check_model(model: nn.Module, goal: Goal) -> tuple[int, int, int]:
    """The size of the images of a model that can be compressed.

    Raises:
        VitrimError: a reduction is attached already, or the model is within the budget as it is.
        UnsupportedModelError: no adapter can reduce it.
        CheckpointError: quantised weights, or weights in shards.
    """
    if attached(model) is not None:
        raise VitrimError("token reduction is attached to this model; compress after handle.remove()")
    adapter = find_adapter(model)
    check_no_own_methods(model)
    check_tensors(model)
    if goal.kind != "latency":
        spent = cost(model)
        check_asks(goal, spent.params if goal.kind == "params" else spent.macs)
    elif goal.fraction:
        check_asks(goal, 1.0)
    return adapter.geometry(model).input_size


def check_asks(goal: Goal, full: float, error: float = 0.0) -> None:
    """Raise `VitrimError` where a model that needs `full` is within the budget as it is.

    Args:
        goal: the budget.
        full: what the model needs.
        error: by what part of it `full` may be too small; a budget within that error is let through.
    """
    if goal.limit(full) < full * (1 + error):
        return
    if goal.fraction:
        raise VitrimError(f"{goal.kind} is 1, all that the model needs; ask for less, such as {goal.kind}=0.5")
    unit = "ms" if goal.kind == "latency" else goal.unit
    needs = f"about {full:.3g} ms" if goal.kind == "latency" else f"{full:,.0f} {unit}"
    raise VitrimError(
        f"the model needs {needs}, so it is within the budget of {goal.most:,.15g} {unit} already; ask for less"
    )


def device_named(device: str | torch.device) -> torch.device:
    """The device of a name.

    Raises:
        VitrimError: there is no such device.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        raise VitrimError(f"device is a name such as 'cpu' or 'cuda:0', not {device!r}") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise VitrimError(f"there is no device {found} here; take another, such as 'cpu'")
    return found
