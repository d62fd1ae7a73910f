"""Compilation for every number of tokens that a reduction or a curriculum gives."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn

from ..errors import VitrimError
from .wrapped import check_is_model

FORMS = 1024
"""Forms in which the same code may be compiled; more than there are numbers of tokens."""


def compile(model: nn.Module, **options: Any) -> nn.Module:
    """Compile the forward pass of the model in place, as `model.compile` does, for every number of tokens.

    A curriculum changes the number of tokens many times in a training. `torch.compile` by itself goes back to eager
    execution after 8 forms of the same code, and says so only in a log.

    Args:
        model: with or without a reduction; attach first.
        options: of `torch.compile`.

    Returns:
        The model.
    """
    check_is_model(model)
    model.compile(**options)
    compiled = model._compiled_call_impl
    assert compiled is not None  # As `compile` has just set it.
    model._compiled_call_impl = without_limit(compiled)
    return model


def check_compiler(device: str | torch.device, otherwise: str = "leave compile out") -> None:
    """Raise `VitrimError` where code for the processor cannot be compiled; `otherwise` is what else can be done."""
    if torch.device(device).type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise VitrimError(
            "PyTorch compiles C++, and there is no compiler here; install g++ or clang++, name one in CXX, or "
            + otherwise
        ) from None


def without_limit(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """What `torch.compile` returned, compiled again for each new number of tokens."""

    @wraps(compiled)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=FORMS, accumulated_recompile_limit=4 * FORMS):
            return compiled(*args, **kwargs)

    return call
