"""The settings of a sweep: what values each name may take, which of them are whole numbers, and which are tried."""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from math import prod
from typing import Any

import optuna

from ..errors import VitrimError
from .template import MOST_SETTINGS, Setting, Settings, settings_of

WIDE = 100.0
"""A range of positive numbers whose ends differ by this factor or more is searched on a logarithmic scale."""
Distribution = optuna.distributions.BaseDistribution


class Space:
    """The values of every name.

    Args:
        vary: the values of each name; of a search over numbers, those between the lowest and the highest are tried too.
        check: raises `VitrimError` for a setting that is impossible; by it an option that counts is recognised.
    """

    def __init__(self, vary: Settings, check: Callable[[Setting], object]) -> None:
        self.vary = vary
        self.distributions: dict[str, Distribution] = {name: self._distribution(name, check) for name in vary}

    def grid(self) -> list[dict[str, float | str]]:
        """Every combination of the values; the last name varies fastest."""
        return [self.typed(setting) for setting in settings_of(self.vary)]

    def all(self) -> list[dict[str, float | str]] | None:
        """Every setting that a search may try; None where these are too many to be listed."""
        values = [_values(one) for one in self.distributions.values()]
        if any(one is None for one in values) or prod(len(one or ()) for one in values) > MOST_SETTINGS:
            return None
        return [dict(zip(self.vary, chosen, strict=True)) for chosen in product(*(one or () for one in values))]

    def typed(self, setting: Mapping[str, Any]) -> dict[str, float | str]:
        """The setting with whole numbers where an option counts."""
        whole = optuna.distributions.IntDistribution
        return {name: int(v) if isinstance(self.distributions[name], whole) else v for name, v in setting.items()}

    def _distribution(self, name: str, check: Callable[[Setting], object]) -> Distribution:
        values = self.vary[name]
        numbers = [float(value) for value in values if not isinstance(value, str)]
        if len(numbers) < len(values):
            return optuna.distributions.CategoricalDistribution(list(values))
        low, high = min(numbers), max(numbers)
        log = low > 0 and high / low >= WIDE
        if all(number.is_integer() for number in numbers) and self._counts(name, low, check):
            return optuna.distributions.IntDistribution(int(low), int(high), log=log)
        return optuna.distributions.FloatDistribution(low, high, log=log)

    def _counts(self, name: str, low: float, check: Callable[[Setting], object]) -> bool:
        """Whether an option takes whole numbers only: it refuses a number between two that it takes."""
        try:
            check({**{other: values[0] for other, values in self.vary.items()}, name: low + 0.5})
        except VitrimError:
            return True
        return False


def key_of(setting: Mapping[str, Any]) -> str:
    """The same text for equal settings, and for no others."""
    numbers = {name: v if isinstance(v, str) else float(v) for name, v in setting.items()}
    return json.dumps(numbers, sort_keys=True)


def _values(distribution: Distribution) -> Sequence[float | str] | None:
    if isinstance(distribution, optuna.distributions.CategoricalDistribution):
        return [one for one in distribution.choices if isinstance(one, float | int | str)]
    if isinstance(distribution, optuna.distributions.IntDistribution):
        return range(distribution.low, distribution.high + 1)
    assert isinstance(distribution, optuna.distributions.FloatDistribution)
    return [distribution.low] if distribution.low == distribution.high else None
