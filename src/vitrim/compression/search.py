"""Find the candidate that stays closest to the given model: successive halving on images, then optuna's sampler.

Every candidate meets the budget. Many are compared on few images, few on all: reducers first, then the best of them at
several widths and in several shapes; the sampler varies width and shape continuously around the good ones.
The best candidates without cut widths, and the one without removed tokens, stay to the end, so that the answer can be
compared with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest

from ..models import attach
from ..notation import render
from ..text import counted
from ..tokens import Reducer
from .candidates import Candidate
from .fidelity import Closeness, Fidelity, joined
from .progress import Progress
from .rounds import LAST, METHODS, PURE, ROUNDS, images_of_round
from .sampler_space import Space, refined, step_of
from .solver import Solver
from .work import fit_units


@dataclass
class Tried:
    """A candidate with what was found on the first `images` images."""

    candidate: Candidate
    parts: list[Closeness] = field(default_factory=list)

    @property
    def images(self) -> int:
        """How many images it has seen."""
        return sum(len(part.divergence) for part in self.parts)

    @property
    def closeness(self) -> Closeness:
        """On all of them."""
        return joined(self.parts)

    @property
    def typical(self) -> float:
        """The divergence of a typical image; candidates with less come first."""
        return self.closeness.typical


class Search:
    """One search for one budget.

    Args:
        solver: of candidates that meet the budget.
        fidelity: compares candidates with the given model.
        progress: counts the work that is done.
    """

    def __init__(self, solver: Solver, fidelity: Fidelity, progress: Progress) -> None:
        self.solver, self.networks, self.fidelity, self.progress = solver, solver.networks, fidelity, progress
        self.full = self.networks.full.macs(self.networks.full.plan(None, None), None)
        self.tried: list[Tried] = []

    def run(self, trials: int, first: Sequence[Candidate] | None = None) -> list[Tried]:
        """All candidates that have seen all images, best first; none where nothing can be reduced.

        Args:
            trials: how many candidates the sampler proposes.
            first: candidates of the first round.
        """
        present = self._first_round() if first is None else [Tried(candidate) for candidate in first]
        self.tried = list(present)
        for number, (part, stay) in enumerate(ROUNDS, 1):
            if len(present) <= LAST:
                break
            what = f"round {number}, {counted(len(present), 'candidate')}"
            present = self._judged(present, images_of_round(len(self.fidelity), part), what)
            if number == len(ROUNDS):
                present = self._sampled(present, trials, present[0].images)
            present = self._best(present, max(LAST, len(present) // stay) if number < len(ROUNDS) else LAST)
        return self._judged(present, len(self.fidelity), f"last round, {counted(len(present), 'candidate')}")

    def _first_round(self) -> list[Tried]:
        """A few candidates of every reducer, compared, and all those of the best reducers."""
        if len(self.solver.reducers) <= METHODS:
            return [Tried(candidate) for candidate in self.solver.candidates()]
        methods = [Tried(candidate) for candidate in self.solver.methods()]
        what = f"comparing {counted(len(self.solver.reducers), 'reducer')}"
        compared = self._judged(methods, images_of_round(len(self.fidelity), ROUNDS[0][0]), what) if methods else []
        known = {tried.candidate.reducer for tried in compared}
        best = [*best_reducers(compared), *(one for one in self.solver.reducers if one not in known)]
        met = {self.solver.key(tried.candidate) for tried in compared}
        others = [one for one in self.solver.candidates(best) if self.solver.key(one) not in met]
        return [*compared, *map(Tried, others)]

    def _judged(self, group: list[Tried], images: int, what: str) -> list[Tried]:
        """These candidates, best first, after each has seen so many images."""
        self.progress.line(f"{what}, {counted(min(images, len(self.fidelity)), 'image')}")
        # Candidates of one width follow each other, so that a network is fitted when it is needed first.
        for tried in sorted(group, key=lambda one: one.candidate.index):
            self._see(tried, images, what)
        return sorted(group, key=lambda one: one.typical)

    def _see(self, tried: Tried, images: int, what: str) -> None:
        start, stop = tried.images, min(images, len(self.fidelity))
        if start >= stop:
            return
        index = tried.candidate.index
        if index and not self.networks.is_fitted(index):  # Network 0 is the given model.
            with self.progress.step("fitting a narrower network", fit_units(sum(map(len, self.networks.fit)))):
                self.networks.real(index)
        network = self.networks.real(index)
        with attach(network, tried.candidate.reduction, cls_only=self.networks.full.cls_only):
            tried.parts.append(self.fidelity.compare(network, start, stop))
        self.progress.add((stop - start) * self.units(tried.candidate), what)

    def units(self, candidate: Candidate) -> float:
        """Work of one image, in images of the given model."""
        network = self.networks.empty(candidate.index)
        return network.macs(network.plan(candidate.reducer, candidate.schedule), candidate.reducer) / self.full

    def _best(self, ranked: Sequence[Tried], number: int) -> list[Tried]:
        """The best ones, and those without which the answer could not be compared."""
        pure = [tried for tried in ranked if tried.candidate.kind == "tokens"][:PURE]
        width = [tried for tried in ranked if tried.candidate.kind in ("width", "none")]
        kept = {id(tried): tried for tried in (*ranked[:number], *pure, *width)}
        return sorted(kept.values(), key=lambda one: one.typical)

    def _sampled(self, ranked: list[Tried], trials: int, images: int) -> list[Tried]:
        """These candidates and those that optuna's sampler proposes from them, all judged on so many images."""
        known = [tried for tried in ranked if tried.candidate.reducer is not None]
        if not known or trials < 1:
            return ranked
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
        by_name = {render(one): one for tried in known if (one := tried.candidate.reducer) is not None}
        best: dict[int, float] = {}
        for tried in ranked:
            best.setdefault(step_of(tried.candidate), tried.typical)
        # Every other width would have to be fitted, which costs more than all that the sampler tries.
        steps = {step_of(tried.candidate) for tried in known}
        if (between := refined(best)) is not None:
            steps.add(between)
        space = Space(sorted(by_name), self.networks.full.geometry.depth, sorted(steps))
        for tried in known:
            study.add_trial(space.finished(tried.candidate, tried.typical))
        met = {self.solver.key(tried.candidate) for tried in self.tried}
        found = list(ranked)
        for _ in range(trials):
            trial = study.ask()
            name, step, shape = space.propose(trial)
            candidate = self.solver.candidate(step, by_name[name], shape)
            if candidate is None or self.solver.key(candidate) in met:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                continue
            met.add(self.solver.key(candidate))
            tried = Tried(candidate)
            self._see(tried, images, "sampled candidates")
            study.tell(trial, tried.typical)
            self.tried.append(tried)
            found.append(tried)
        return sorted(found, key=lambda one: one.typical)


def best_reducers(compared: Sequence[Tried]) -> list[Reducer]:
    """The reducers of the best candidates at each share of the width, in turns; `METHODS` of them.

    Args:
        compared: some candidates, best first.
    """
    at: dict[float, list[Reducer]] = {}
    for tried in compared:
        if tried.candidate.reducer is not None:
            at.setdefault(tried.candidate.share, []).append(tried.candidate.reducer)
    in_turns = chain.from_iterable(zip_longest(*(dict.fromkeys(each) for each in at.values())))
    return [one for one in dict.fromkeys(in_turns) if one is not None][:METHODS]


def best_of_each_kind(ranked: Sequence[Tried]) -> dict[str, Tried]:
    """The best candidate ("best"), and the best ones of tokens alone and of width alone, where there are any."""
    found = {"best": ranked[0]}
    for tried in ranked:
        if tried.candidate.kind in ("tokens", "width"):
            found.setdefault(tried.candidate.kind, tried)
    return found
