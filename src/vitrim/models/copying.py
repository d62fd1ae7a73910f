"""A copy of a model, or one line that says why there can be none."""

import copy
from typing import Any, TypeVar

from torch import Tensor, nn

from ..errors import UnsupportedModelError

M = TypeVar("M", bound=nn.Module)
MAKE_PLAIN = (
    "where torch's pruning, weight_norm or spectral_norm makes it, make it plain first (prune.remove, "
    "remove_weight_norm, remove_spectral_norm)"
)


def copied(model: M, memo: dict[int, Any] | None = None) -> M:
    """A deep copy of a model.

    Args:
        model: any model; it is not changed.
        memo: id of a part -> what stands for it in the copy, such as the part itself where both are to share it.

    Raises:
        UnsupportedModelError: a module holds a tensor that was computed with gradients, which PyTorch does not copy.
    """
    try:
        return copy.deepcopy(model, memo)
    except RuntimeError as error:
        if (held := _computed(model)) is None:
            raise
        raise UnsupportedModelError(
            f"this {type(model).__name__} cannot be copied: {held} was computed with gradients; {MAKE_PLAIN}, or run "
            "the model once within torch.no_grad()"
        ) from error


def _computed(model: nn.Module) -> str | None:
    """The name of a tensor in the model that is the result of a computation with gradients."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                return f"{name}.{key}".lstrip(".")
    return None


def computed(model: nn.Module) -> list[str]:
    """The names of weights and biases of linear layers that are computed from other parameters at every pass."""
    return [
        f"{name}.{key}".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        for key in ("weight", "bias")
        if isinstance(vars(module).get(key), Tensor)
    ]
