"""What optuna's sampler varies in a search, and how a candidate of an earlier round becomes one of its trials."""

from typing import Any

from ..notation import render
from ..tokens import Schedule
from .candidates import Candidate, power, stages

SHARES = 8
"""Into how many steps the share of the width is divided; the first round tries every second one."""


class Space:
    """What the sampler varies: the reducer, the share of the width, stages or a power law and its exponent."""

    def __init__(self, names: list[str], depth: int, last: int) -> None:
        self.names, self.last = names, last
        self.shapes = {"power": None, **{str(shape): shape for shape in stages(depth)}}

    def propose(self, trial: Any) -> tuple[str, int, Schedule]:
        """Reducer by name, step of the width, and shape."""
        name = trial.suggest_categorical("reducer", self.names)
        step = trial.suggest_int("step", 0, self.last)
        shape = self.shapes[trial.suggest_categorical("shape", list(self.shapes))]
        return name, step, power(trial.suggest_float("alpha", 0.3, 6.0, log=True)) if shape is None else shape

    def finished(self, candidate: Candidate, divergence: float) -> Any:
        """What is known of a candidate of an earlier round, as a trial."""
        import optuna

        alpha = getattr(candidate.shape, "alpha", None)
        params: dict[str, Any] = {
            "reducer": render(candidate.reducer),
            "step": round(candidate.share * SHARES),
            "shape": "power" if alpha is not None else str(candidate.shape),
        }
        ranges: dict[str, Any] = {
            "reducer": optuna.distributions.CategoricalDistribution(self.names),
            "step": optuna.distributions.IntDistribution(0, self.last),
            "shape": optuna.distributions.CategoricalDistribution(list(self.shapes)),
        }
        if alpha is not None:
            params["alpha"] = alpha
            ranges["alpha"] = optuna.distributions.FloatDistribution(0.3, 6.0, log=True)
        return optuna.trial.create_trial(params=params, distributions=ranges, values=[min(divergence, 1e9)])
