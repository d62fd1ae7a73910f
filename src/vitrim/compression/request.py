"""What `vitrim.compress` is asked for, and which models it takes."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..elastic.probing import check_counts
from ..errors import UnknownNameError, VitrimError
from ..measure.speed import DTYPES
from ..models import attached, find_adapter
from ..models.weights import check_tensors
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


def check_model(model: nn.Module) -> tuple[int, int, int]:
    """The size of the images of a model that can be compressed.

    Raises:
        VitrimError: a reduction is attached already.
        UnsupportedModelError: no adapter can reduce it.
        CheckpointError: quantised weights, or weights in shards.
    """
    if attached(model) is not None:
        raise VitrimError("token reduction is attached to this model; compress after handle.remove()")
    adapter = find_adapter(model)
    check_tensors(model)
    return adapter.geometry(model).input_size
