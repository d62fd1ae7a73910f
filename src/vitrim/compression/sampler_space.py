"""What optuna's sampler varies in a search, and how a candidate of an earlier round becomes one of its trials."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..notation import render
from ..tokens import Schedule
from .candidates import Candidate, power, stages

SHARES = 8
"""Into how many steps the share of the width is divided."""
FIRST_STEPS = range(0, SHARES + 1, 2)
"""Steps that the first round tries, from tokens alone to width alone."""
METHOD_STEPS = (0, SHARES // 2)
"""Steps at which all reducers are compared, before the best of them are tried at the others too."""


class Space:
    """What the sampler varies: the reducer, the share of the width, stages or a power law and its exponent.

    Args:
        names: of the reducers.
        depth: of the model.
        steps: of the width.
    """

    def __init__(self, names: Sequence[str], depth: int, steps: Sequence[int]) -> None:
        self.names, self.steps = [*names], [*steps]
        self.shapes = {"power": None, **{str(shape): shape for shape in stages(depth)}}

    def propose(self, trial: Any) -> tuple[str, int, Schedule]:
        """Reducer by name, step of the width, and shape."""
        name = trial.suggest_categorical("reducer", self.names)
        step = trial.suggest_categorical("step", self.steps)
        shape = self.shapes[trial.suggest_categorical("shape", list(self.shapes))]
        return name, step, power(trial.suggest_float("alpha", 0.3, 6.0, log=True)) if shape is None else shape

    def finished(self, candidate: Candidate, divergence: float) -> Any:
        """What is known of a candidate of an earlier round, as a trial."""
        import optuna

        alpha = getattr(candidate.shape, "alpha", None)
        params: dict[str, Any] = {
            "reducer": render(candidate.reducer),
            "step": step_of(candidate),
            "shape": "power" if alpha is not None else str(candidate.shape),
        }
        ranges: dict[str, Any] = {
            "reducer": optuna.distributions.CategoricalDistribution(self.names),
            "step": optuna.distributions.CategoricalDistribution(self.steps),
            "shape": optuna.distributions.CategoricalDistribution(list(self.shapes)),
        }
        if alpha is not None:
            params["alpha"] = alpha
            ranges["alpha"] = optuna.distributions.FloatDistribution(0.3, 6.0, log=True)
        return optuna.trial.create_trial(params=params, distributions=ranges, values=[min(divergence, 1e9)])


def step_of(candidate: Candidate) -> int:
    """The step of the width of a candidate."""
    return round(candidate.share * SHARES)


def refined(typical: Mapping[int, float]) -> int | None:
    """The step between the best one and the better of its neighbours; None where there is none between.

    Args:
        typical: of each step that was tried, the divergence of its best candidate.

    >>> refined({0: 0.5, 2: 0.1, 4: 0.2, 6: 0.9})
    3
    """
    best = min(typical, key=lambda step: typical[step])
    beside = [step for step in (best - 2, best + 2) if step in typical]
    return (best + min(beside, key=lambda step: typical[step])) // 2 if beside else None
