"""Budgets of MACs or parameters as numbers: up to 1 a fraction of the model, above 1 a count."""

from numbers import Real
from typing import TypeGuard

from .errors import VitrimError
from .text import short

FEWEST = 1000
"""No model has fewer MACs or parameters, so that a smaller number above 1 is a fraction in another form."""


def is_positive(value: object) -> TypeGuard[float]:
    """Whether this is a positive finite number."""
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < float("inf")


def check_budget(what: str, most: object, error: type[VitrimError] = VitrimError) -> None:
    """Raise `error` for a budget that is not a positive finite number, or a count that no model has.

    >>> check_budget("macs", 70)
    Traceback (most recent call last):
    ...
    vitrim.errors.VitrimError: macs is 70, a count that no model has; write a fraction of the model, such as 0.7
    """
    if not is_positive(most):
        raise error(f"{what} is a fraction in (0, 1] or a positive number, not {short(most)}")
    if 1 < float(most) < FEWEST:
        percent = 2 <= float(most) < 100
        fraction = f"{float(most) / 100:g}" if percent else "0.7"
        raise error(f"{what} is {most:g}, a count that no model has; write a fraction of the model, such as {fraction}")
