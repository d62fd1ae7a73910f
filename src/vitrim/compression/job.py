"""One call of `vitrim.compress` at work: search for the best candidate, measure it, and certify it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..elastic import SuperNet, stratify
from ..elastic.chain import hash_of
from ..errors import UnsupportedModelError, VitrimError, WidthError
from ..measure.cost import cost
from ..measure.environment import environment
from ..measure.intervals import of_mean
from ..models import attach, find_adapter, reads_prefix_only
from ..models.copying import copied
from ..models.files.rebuild import describe
from ..models.foreign_macs import counting_once
from .block_times import NANO
from .budget import fixed_part, price_for
from .candidates import Candidate, reducers
from .certificate import Certificate, Line
from .clock import Clock
from .compressed import Compressed
from .fidelity import Fidelity
from .images import Parts
from .measured_lines import accuracy_lines, fidelity_lines, time_lines
from .networks import Networks
from .progress import Progress
from .remarks import change_note
from .request import Request, check_asks
from .search import Search, Tried, best_of_each_kind
from .solver import Solver
from .timing import WORK, sessions
from .work import ordering_units, search_units

FIT_BATCH = 16
"""Images of a batch where widths are ordered and fitted: gradients of all layers are kept for it."""
ERROR = 0.25
"""By what part of it a predicted time may be too small: a budget above that is surely met by the given model."""


class Job:
    """One call of `compress` with everything checked.

    Args:
        model: the given model; it is copied.
        request: what is asked for.
        parts: the images.
        device: where to run.
        say: called with lines for the user.
        source: what is known of where the model and the images come from, for the certificate.
    """

    def __init__(
        self, model: nn.Module, request: Request, parts: Parts, device: torch.device, say: Callable[[str], None],
        source: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.source = dict(source or {})
        self.original = copied(model).to(device).eval()
        self.request, self.parts, self.device, self.notes = request, parts, device, list[str]()
        self.price, full = price_for(self.original, request, device, say)
        absolute = request.goal.kind == "latency" and not request.goal.fraction
        if absolute:
            check_asks(request.goal, full / NANO, ERROR)
        self.asked = request.goal.limit(full) * (NANO if absolute else 1)
        self.geometry = find_adapter(self.original).geometry(self.original)
        methods = len(reducers(self.geometry.has_cls)) if "tokens" in request.using else 0
        self.progress = Progress(search_units(request, parts.sizes, self.geometry, methods), say)
        self.description: str | None = None
        try:
            self.description = describe(self.original).to_json()
        except VitrimError as error:
            self._note(f"what is found can be used but not saved: {error}")

    def run(self, max_drop: float | None = None, *, labelled: bool = False) -> Compressed:
        """Search, measure, and certify; `labelled`: whether the images that nothing has seen have classes."""
        fidelity = Fidelity(self.original, self.parts.judge, self.device)
        self.progress.add(len(fidelity), "the given model")
        if fidelity.one_class:
            self._note("the given model has the same top class for all images, so agreement with it says little")
        networks = Networks(self.original, self.supernet(), self.parts.fit.batches(FIT_BATCH))
        search, answers = self._searched(networks, fidelity)
        networks.drop_others({tried.candidate.index for tried in answers.values()})
        best = answers.pop("best").candidate
        model = self._built(networks, best)
        others = {
            kind: partial(self._built, networks, tried.candidate)
            for kind, tried in answers.items()
            if tried.candidate is not best
        }
        lines = self._lines(model, others, max_drop, labelled)
        certificate = Certificate(
            asked=str(self.request.goal), lines=lines, weights=hash_of(model), original=hash_of(self.original),
            reduction=None if best.reduction is None else str(best.reduction),
            settings=self.settings, environment=environment(),
            source={**self.source, "description": self.description},
            tried=[self._row(tried, search) for tried in _by_images(search.tried)],
            notes=[self._change(best), *self.notes],
        )  # fmt: skip
        return Compressed(model, certificate)

    def _searched(self, networks: Networks, fidelity: Fidelity) -> tuple[Search, dict[str, Tried]]:
        """The search, and its answers: the best candidate, and the best ones of one kind."""
        with counting_once():
            search = self.search(networks, fidelity)
            if not (ranked := search.run(self.request.trials)):
                raise VitrimError("nothing in this model can be reduced for this budget; allow more with using=")
            if self.request.goal.kind == "latency":
                return search, self._in_time(networks, search, ranked)
            return search, best_of_each_kind(ranked)

    def learnt(
        self, found: Compressed, model: nn.Module, epochs: int, max_drop: float | None, *, labelled: bool
    ) -> Compressed:
        """The answer after it has learnt from the given model, or as it was found where that brought it no closer.

        Args:
            found: the answer of the search.
            model: the same after learning.
            epochs: for how long it learnt.
            max_drop, labelled: see `run`.
        """
        fidelity, before = Fidelity(self.original, self.parts.judge, self.device), found.certificate
        given, now = (fidelity.compare(each).divergence.mean().item() for each in (found.model, model))
        note = (
            f"Learnt from the given model after the search, epochs: {epochs}. On the images of the search the "
            f"divergence was {given:.3g} before and {now:.3g} afterwards"
        )
        if not now < given:
            note += ", so the answer is as it was before; a lower finetune.lr or more epochs may help."
            self.progress.line(note)
            return replace(found, certificate=replace(before, notes=[*before.notes, note]))
        lines = self._lines(model, {}, max_drop, labelled)
        certificate = replace(before, lines=lines, weights=hash_of(model), notes=[*before.notes, f"{note}."])
        return Compressed(model, certificate)

    @property
    def _timing(self) -> dict[str, Any]:
        """Options of `sessions`."""
        request = self.request
        return {
            "batch_size": request.batch_size, "device": self.device, "dtype": request.dtype, "compile": request.compile,
        }  # fmt: skip

    @property
    def settings(self) -> dict[str, Any]:
        """What times depend on."""
        return {**self._timing, "device": self.device.type, "threads": torch.get_num_threads()}

    def search(self, networks: Networks, fidelity: Fidelity) -> Search:
        """The search for the budget, or for the nearest one that can be reached."""
        tokens = "tokens" in self.request.using
        solver = Solver(networks, self.asked, self.price, tokens=tokens)
        if (least := solver.least()) <= self.asked:
            return Search(solver, fidelity, self.progress)
        given = self.asked / self.request.goal.most if self.request.goal.fraction else None
        unit, digits, name = (NANO, 2, " ms") if self.request.goal.kind == "latency" else (1, 0, "")
        fixed = fixed_part(networks, self.price, self.request.goal)
        self._note(
            f"{self.request.goal} cannot be reached; the least is {least / unit:,.{digits}f}{name}"
            + ("" if given is None else f" ({least / given:.3f} of the given model)")
            + f", of which {fixed / unit:,.{digits}f}{name} lie outside of the blocks (patch embedding, classifier)"
        )
        return Search(Solver(networks, least, self.price, tokens=tokens), fidelity, self.progress)

    def supernet(self) -> SuperNet | None:
        """The widths that may be cut; None where none is."""
        if "width" not in self.request.using:
            return None
        images = len(self.parts.fit)
        try:
            units = ordering_units(self.request.goal, self.geometry.depth, images)
            with self.progress.step("ordering the widths and measuring what each costs", units):
                net = stratify(
                    self.original, self.parts.fit.batches(FIT_BATCH), num_images=images,
                    max_saving=self.request.goal.largest_saving, say=lambda line: None,
                )  # fmt: skip
        except UnsupportedModelError as error:
            if "tokens" not in self.request.using:
                raise
            fact = error.fact if isinstance(error, WidthError) else error
            self._note(f"widths stay as they are: {fact}")
            return None
        return net

    def _in_time(self, networks: Networks, search: Search, ranked: Sequence[Tried]) -> dict[str, Tried]:
        """The answers as `best_of_each_kind`, corrected until the clock agrees with the budget."""
        goal = self.request.goal
        with self.progress.step("timing the best candidates, and correcting them"):
            spent, found = Clock(networks, search.solver, goal.most, goal.fraction, self._timing).answers(ranked)
        if spent > 1:
            self._note(f"{goal} was not reached on the clock; the fastest candidate took {spent:.2f} times that")
        return found

    def _built(self, networks: Networks, candidate: Candidate) -> nn.Module:
        model = copied(networks.real(candidate.index))
        attach(model, candidate.reduction, cls_only=networks.full.cls_only)
        return model.eval()

    def _lines(
        self, model: nn.Module, others: Mapping[str, Callable[[], nn.Module]], max_drop: float | None, labelled: bool
    ) -> list[Line]:
        goal, spent, given = self.request.goal.kind, cost(model), cost(self.original)
        lines = [
            Line("macs", spent.macs, asked=self.asked if goal == "macs" else None, of=given.macs),
            Line("params", spent.params, asked=self.asked if goal == "params" else None, of=given.params),
        ]
        number = len(self.parts.unseen)
        units, left = number * (2 + len(others)), spent.macs / given.macs
        with self.progress.step(f"measuring the answer on {number} images that the search has not seen", units):
            fidelity = Fidelity(self.original, self.parts.unseen, self.device)
            best = fidelity.compare(model)
            lines += fidelity_lines(best)
            for kind, build in others.items():
                difference = of_mean((best.divergence - fidelity.compare(build()).divergence).numpy())
                lines.append(Line.of_interval(f"over_{kind}", difference, number=number))
        if labelled:
            lines += accuracy_lines(fidelity, best, max_drop)
        units = WORK * (1 + left) * self.request.batch_size
        with self.progress.step("measuring the time of the answer in fresh rounds", units):
            times = sessions(self.original, model, **self._timing)
        return [*lines, *time_lines(times, self.request.goal)]

    def _row(self, tried: Tried, search: Search) -> dict[str, Any]:
        candidate, network = tried.candidate, search.networks.empty(tried.candidate.index)
        width = network.macs(network.plan(None, None), None) / search.full
        return {
            "kind": candidate.kind, "reduction": str(candidate), "share": candidate.share, "width_macs": width,
            "price": candidate.price / search.solver.limit, "typical": tried.typical,
            "divergence": tried.closeness.mean, "agreement": tried.closeness.agreement, "images": tried.images,
        }  # fmt: skip

    def _change(self, best: Candidate) -> str:
        last = reads_prefix_only(self.original)
        return change_note(tokens=best.reduction is not None, width=best.index > 0, cls_only=last)

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.progress.line(text)


def _by_images(tried: Sequence[Tried]) -> list[Tried]:
    seen = [one for one in tried if one.parts]
    return sorted(seen, key=lambda one: (-one.images, one.typical))
