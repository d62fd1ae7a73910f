"""Eval mode for the length of a context, whatever happens in it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models into eval mode, and every module in them back into its own mode at the end, also after an exception.

    Modules of one model may differ in mode: a frozen batch norm stays in eval mode while the rest is trained.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    roots = [(model, model.training) for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, mode in roots:  # Modules with a `train` of their own undo here what their `eval` did.
            model.train(mode)
        for module, mode in modes:
            module.training = mode
