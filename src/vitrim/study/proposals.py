"""Which setting a sweep tries next: the next one of a grid, or what one of optuna's samplers proposes.

A proposal depends on the trials so far and on the seed alone. It is made on a copy of the trials in memory, so that a
setting that was tried before leaves no trace and another one can be asked for.
"""

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial

from .objectives import Direction
from .space import Space, key_of

Search = Literal["grid", "tpe", "nsga2"]
ATTEMPTS = 16
"""Proposals of the sampler that may have been tried before; then as many are drawn at random."""


@dataclass(frozen=True)
class Proposal:
    """A setting that no trial has had; `memory` is what the sampler notes about it."""

    setting: dict[str, Any]
    memory: dict[str, Any] = field(default_factory=dict)


class Proposer:
    """Proposes settings until enough have been tried.

    Args:
        search: "grid", "tpe" (Bayesian) or "nsga2" (evolution of a population along the frontier).
        space: the settings.
        directions: "maximize" or "minimize" for each objective.
        most: trials of a search; a grid tries all combinations.
        seed: of the sampler.
    """

    def __init__(self, search: Search, space: Space, directions: Sequence[Direction], most: int, seed: int) -> None:
        self.search, self.space, self.directions, self.seed = search, space, directions, seed
        self.grid = space.grid() if search == "grid" else []
        self.most = len(self.grid) if search == "grid" else most
        self.population = max(4, min(50, most // 4))

    def __call__(self, trials: Sequence[FrozenTrial]) -> Proposal | None:
        """The next setting; None where enough were tried, or all that there are."""
        tried = {key_of(trial.params) for trial in trials}
        if self.search == "grid":
            return next((Proposal(setting) for setting in self.grid if key_of(setting) not in tried), None)
        if len(trials) >= self.most:
            return None
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            return self._sampled(trials, tried)
        finally:
            optuna.logging.set_verbosity(verbosity)

    def _sampled(self, trials: Sequence[FrozenTrial], tried: set[str]) -> Proposal | None:
        study = optuna.create_study(directions=[*self.directions])
        study.add_trials(trials)
        for attempt in range(2 * ATTEMPTS):
            # Each trial has a sampler of its own, so that a search that continues proposes what it would have proposed.
            seed = self.seed * 100_003 + len(trials) + attempt * 1_000_003
            study.sampler = self._sampler(seed) if attempt < ATTEMPTS else optuna.samplers.RandomSampler(seed)
            asked = study.ask(self.space.distributions)
            if key_of(asked.params) not in tried:
                return Proposal(asked.params, dict(study.trials[asked.number].system_attrs))
        dice = random.Random(self.seed * 100_003 + len(trials))
        if (every := self.space.all()) is None:
            return None  # Numbers between two others are never used up.
        left = [setting for setting in every if key_of(setting) not in tried]
        return Proposal(dice.choice(left)) if left else None

    def _sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if self.search == "nsga2":
                return optuna.samplers.NSGAIISampler(population_size=self.population, seed=seed)
            return optuna.samplers.TPESampler(seed=seed)
