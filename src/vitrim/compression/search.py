"""Find the candidate that stays closest to the given model: successive halving on images, then optuna's sampler.

Every candidate meets the budget: its schedule is solved for the part of the budget that its width leaves. Many
candidates are compared on few images, few on all; the sampler varies width and shape continuously around the good ones.
The best candidates without cut widths, and the one without removed tokens, stay to the end, so that the answer can be
compared with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..models import attach
from ..notation import render
from ..text import counted
from ..tokens import Plan, Reducer, Schedule
from .candidates import Candidate, can_cut, first_shapes, reducers
from .fidelity import Closeness, Fidelity, joined
from .networks import Networks, Price
from .progress import Progress
from .sampler_space import SHARES, Space

ROUNDS = ((8, 4), (3, 4))
"""(part of the images that a round sees, part of the candidates that stay): one eighth and a quarter, ..."""
LAST = 6
"""Candidates that see all images."""
PURE = 2
"""Candidates without cut widths that always stay."""


Key = tuple[int, Reducer | None, Plan]
"""Network, reducer and numbers of tokens."""


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
        networks: of every width.
        fidelity: compares candidates with the given model.
        limit: the budget, in units of `price`.
        price: what the budget counts.
        tokens: whether tokens may be removed.
        progress: counts the work that is done.
    """

    def __init__(
        self, networks: Networks, fidelity: Fidelity, limit: float, price: Price, *, tokens: bool, progress: Progress
    ) -> None:
        self.networks, self.fidelity, self.limit, self.price, self.progress = networks, fidelity, limit, price, progress
        self.tokens = tokens
        self.full = networks.full.macs(networks.full.plan(None, None), None)
        self.reducers = reducers(networks.full.geometry.has_cls) if tokens else []
        self.narrowest = networks.narrowest_within(limit, price)
        self.tried: list[Tried] = []
        self._width_of: dict[int, int] = {0: 0}

    def width_at(self, step: int) -> int:
        """The network that makes `step / SHARES` of the saving that width alone can make within the budget."""
        if step not in self._width_of:
            last = len(self.networks) - 1
            dense, least = self._dense(0), max(self.limit, self._dense(last))
            found = self.networks.narrowest_within(dense * min(1.0, least / dense) ** (step / SHARES), self.price)
            self._width_of[step] = last if found is None else found
        return self._width_of[step]

    def least(self) -> float:
        """The smallest price that some candidate can have."""
        if self.narrowest is not None:
            return self._dense(self.narrowest)
        network = self.networks.empty(len(self.networks) - 1)
        prices = [self._dense(network.index)]
        for reducer in self.reducers:
            for shape in first_shapes(network.geometry.depth):
                if can_cut(network, reducer, shape):
                    prices.append(self.price(network, network.plan(reducer, shape), reducer))
        return min(prices)

    def _dense(self, index: int) -> float:
        network = self.networks.empty(index)
        return self.price(network, network.plan(None, None), None)

    def candidates(self) -> list[Candidate]:
        """Those of the first round."""
        if self.narrowest == 0:  # The given model meets the budget.
            return [self._dense_candidate(0, SHARES)]
        found: dict[Key, Candidate] = {}
        steps = range(0, SHARES + 1, 2) if len(self.networks) > 1 else (0,)
        for step in steps:
            if step == SHARES and self.narrowest is not None:
                one = self._dense_candidate(self.narrowest, step)
                found[self.key(one)] = one
                continue
            for reducer in self.reducers:
                for shape in first_shapes(self.networks.full.geometry.depth):
                    if (one := self.candidate(step, reducer, shape)) is not None:
                        found.setdefault(self.key(one), one)
        return list(found.values())

    def candidate(self, step: int, reducer: Reducer, shape: Schedule) -> Candidate | None:
        """A candidate with its schedule solved; None where it cannot meet the budget."""
        index = self.width_at(step)
        if not can_cut(self.networks.empty(index), reducer, shape):
            return None
        solved = self.networks.empty(index).solve(reducer, shape, self.limit, self.price)
        return None if solved is None else Candidate(index, step / SHARES, solved[1], reducer, solved[0], shape)

    def key(self, candidate: Candidate) -> Key:
        """Equal for candidates that do the same."""
        plan = self.networks.empty(candidate.index).plan(candidate.reducer, candidate.schedule)
        return candidate.index, candidate.reducer, plan

    def _dense_candidate(self, index: int, step: int) -> Candidate:
        return Candidate(index, step / SHARES, self._dense(index))

    def run(self, trials: int, first: Sequence[Candidate] | None = None) -> list[Tried]:
        """All candidates that have seen all images, best first.

        Args:
            trials: how many candidates the sampler proposes.
            first: candidates of the first round.
        """
        present = [Tried(candidate) for candidate in (self.candidates() if first is None else first)]
        self.tried = list(present)
        for number, (part, stay) in enumerate(ROUNDS, 1):
            if len(present) <= LAST:
                break
            present = self._judged(
                present, max(8, len(self.fidelity) // part), f"round {number}, {counted(len(present), 'candidate')}"
            )
            if number == len(ROUNDS):
                present = self._sampled(present, trials, present[0].images)
            present = self._best(present, max(LAST, len(present) // stay) if number < len(ROUNDS) else LAST)
        return self._judged(present, len(self.fidelity), f"last round, {counted(len(present), 'candidate')}")

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
        fitted = self.networks.is_fitted(tried.candidate.index)
        network = self.networks.real(tried.candidate.index)
        if not fitted and tried.candidate.index:  # Network 0 is the given model.
            self.progress.add(fit_units(sum(map(len, self.networks.fit))), "fitting a narrower network")
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
        steps = SHARES - (self.narrowest is not None) if len(self.networks) > 1 else 0
        space = Space(sorted(by_name), self.networks.full.geometry.depth, steps)
        for tried in known:
            study.add_trial(space.finished(tried.candidate, tried.typical))
        met = {self.key(tried.candidate) for tried in self.tried}
        found = list(ranked)
        for _ in range(trials):
            trial = study.ask()
            name, step, shape = space.propose(trial)
            candidate = self.candidate(step, by_name[name], shape)
            if candidate is None or self.key(candidate) in met:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                continue
            met.add(self.key(candidate))
            tried = Tried(candidate)
            self._see(tried, images, "sampled candidates")
            study.tell(trial, tried.typical)
            self.tried.append(tried)
            found.append(tried)
        return sorted(found, key=lambda one: one.typical)


def fit_units(images: int) -> float:
    """Work of fitting one cut network, in images of the given model."""
    return 6.0 * images


def planned_work(number: int, each: float, images: int) -> float:
    """Work of the rounds, without fitting, in images of the given model; somewhat more than it will be.

    Args:
        number: candidates of the first round.
        each: work of one image in the mean candidate.
        images: that the last round sees.
    """
    seen, total = 0, 0.0
    for part, stay in ROUNDS:
        if number <= LAST:
            break
        now = min(images, max(8, images // part))
        total += number * (now - seen) * each
        number, seen = max(LAST, number // stay), now
    return total + min(number, LAST + PURE + 1) * (images - seen) * each
