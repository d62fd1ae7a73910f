"""Compilation of models that share their code, as all of one family do."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

FORMS = 1024
"""Forms that the same code may be compiled in; more than there are numbers of tokens."""


def without_limit(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """What `torch.compile` returned, compiled for every model and every number of tokens that comes.

    Left to itself, torch goes back to eager execution after 8 forms of the same code, and tells only a log.
    """

    @wraps(compiled)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=FORMS, accumulated_recompile_limit=4 * FORMS):
            return compiled(*args, **kwargs)

    return call
