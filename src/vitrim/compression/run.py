"""One budget in, a cheaper model and a certificate out: `vitrim.compress`."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..elastic import SuperNet, stratify
from ..elastic.chain import hash_of, start_chain
from ..elastic.probing import check_counts
from ..errors import UnknownNameError, UnsupportedModelError, VitrimError
from ..measure.cost import cost
from ..measure.environment import environment
from ..measure.speed import DTYPES
from ..models import attach, attached, find_adapter
from ..models.foreign_macs import counting_once
from ..models.store import describe, save_with
from .block_times import NANO
from .candidates import Candidate, reducers
from .certificate import FILE, TRIED, Certificate, Line
from .clock import Clock, LatencyPrice, table_for
from .fidelity import Closeness, Judge
from .goal import Goal, Part, check_using
from .images import Parts, divide, gather
from .intervals import of_drop, of_mean, of_share
from .networks import Networks, Price, device_of, macs_price, params_price
from .progress import Progress
from .search import Search, Tried, fit_units, planned_work
from .timing import milliseconds, sessions, time_ratio

MOST_IMAGES, MOST_UNSEEN = 1024, 5000
STRATIFY_UNITS = 10
"""Work of ordering and of measuring a chain, in images of the given model for each image."""


@dataclass(frozen=True)
class Compressed:
    """A cheaper model in eval mode, ready to use, and its certificate."""

    model: nn.Module
    certificate: Certificate

    def save(self, folder: str | Path, *, overwrite: bool = False, **extra: Any) -> Path:
        """Write the model, which `vitrim.load` brings back whole, and its certificate.

        Args:
            folder: made if it does not exist.
            overwrite: replace a model that is there already.
            extra: kept with the model, see `vitrim.save`.
        """
        certificate = self.certificate.in_folder(folder)

        def write(staged: Path) -> None:
            (staged / FILE).write_text(certificate.to_json() + "\n", encoding="utf-8")
            certificate.tried_table().write(staged / TRIED)

        return save_with(self.model, folder, write, overwrite=overwrite, **extra)


def compress(
    model: nn.Module,
    images: Any,
    *,
    macs: float | None = None,
    params: float | None = None,
    latency: float | str | None = None,
    val: Any = None,
    max_drop: float | None = None,
    using: Sequence[Part] = ("tokens", "width"),
    batch_size: int = 32,
    device: str | torch.device | None = None,
    dtype: str = "float32",
    compile: bool = False,
    num_images: int = MOST_IMAGES,
    trials: int = 12,
    say: Callable[[str], None] = print,
) -> Compressed:
    """The cheaper model within one budget that stays closest to the given one; needs neither labels nor training.

    Args:
        model: any model that an adapter supports, without a reduction attached; it is not changed.
        images: images as the model takes them: a tensor, a `Dataset`, a shuffled `DataLoader`, or batches; 512 or more
            if possible. Half of them fit narrower networks, the others compare candidates and measure the answer.
        macs: most multiply-accumulates per image, attention products included.
        params: most parameters; width alone is cut then.
        latency: longest time of one batch in milliseconds; "0.5ms" where that is not more than 1.
        val: images with their classes, on which the certificate states the loss of accuracy; used for nothing else.
        max_drop: largest loss of accuracy, such as 0.01; only the certificate depends on it.
        using: what may be reduced.
        batch_size, device, dtype, compile: for which times are measured. The search runs on `device` too; by default
            where the model is.
        num_images: how many of the images to use at most.
        trials: candidates that the sampler proposes after the first rounds.
        say: called with lines for the user.

    A number in (0, 1] is a fraction of what the given model needs. A budget that cannot be reached gives the nearest
    model that can be, and a certificate that says so.

    Raises:
        VitrimError: not exactly one budget, an impossible option, or a model in which nothing can be reduced.
        UnsupportedModelError: no adapter knows the model.
        DataError: too few images, or of another size than the model takes.
    """
    goal = Goal.of(macs, params, latency)
    wish = Wish(goal, check_using(using, goal), batch_size, dtype, compile, num_images, trials)
    if max_drop is not None and (val is None or not 0 <= max_drop <= 1):
        raise VitrimError("max_drop is a fraction in [0, 1], such as 0.01, and needs val, images with their classes")
    size = check_model(model)
    place = torch.device(device) if device is not None else device_of(model)
    labelled = None if val is None else gather(val, size, MOST_UNSEEN, "val")
    if labelled is not None and labelled.classes is None:
        raise VitrimError("val has no classes, so no accuracy can be measured; give batches of (images, classes)")
    parts = divide(gather(images, size, num_images), "width" in wish.using, labelled)
    return Job(model, wish, parts, place, say).run(max_drop, labelled=labelled is not None)


@dataclass(frozen=True)
class Wish:
    """What is asked for, apart from the model and the images; see `compress`."""

    goal: Goal
    using: Sequence[Part]
    batch_size: int = 32
    dtype: str = "float32"
    compile: bool = False
    num_images: int = MOST_IMAGES
    trials: int = 12

    def __post_init__(self) -> None:
        check_counts(batch_size=self.batch_size, num_images=self.num_images)
        if type(self.trials) is not int or self.trials < 0:
            raise VitrimError(f"trials is a whole number, 0 or more, not {self.trials!r}")
        if self.dtype not in DTYPES:
            raise UnknownNameError("dtype", self.dtype, DTYPES)


def check_model(model: nn.Module) -> tuple[int, int, int]:
    """The size of the images of a model that can be compressed.

    Raises:
        VitrimError: a reduction is attached already.
        UnsupportedModelError: no adapter can reduce it.
    """
    if attached(model) is not None:
        raise VitrimError("token reduction is attached to this model; compress after handle.remove()")
    return find_adapter(model).geometry(model).input_size


class Job:
    """One call of `compress` with everything checked.

    Args:
        model: the given model; it is copied.
        wish: what is asked for.
        parts: the images.
        device: where to run.
        say: called with lines for the user.
        source: what is known of where the model and the images come from, for the certificate.
    """

    def __init__(
        self, model: nn.Module, wish: Wish, parts: Parts, device: torch.device, say: Callable[[str], None],
        source: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.source = dict(source or {})
        self.original = copy.deepcopy(model).to(device).eval()
        self.wish, self.parts, self.device, self.notes = wish, parts, device, list[str]()
        self.progress = Progress(STRATIFY_UNITS * len(parts.fit), say)
        self.price, full = self._price()
        absolute = wish.goal.kind == "latency" and not wish.goal.fraction
        self.asked = wish.goal.limit(full) * (NANO if absolute else 1)

    def run(self, max_drop: float | None = None, *, labelled: bool = False) -> Compressed:
        """Search, measure, and certify; `labelled`: whether the images that nothing has seen have classes."""
        judge = Judge(self.original, self.parts.judge, self.device)
        if judge.one_class:
            self._note("the given model has the same top class for all images, so agreement with it says little")
        networks = Networks(self.original, self._supernet(), self.parts.fit.batches())
        with counting_once():
            search = self.search(networks, judge)
            first = search.candidates()
            if not first:
                raise VitrimError("nothing in this model can be reduced for this budget; allow more with using=")
            each = sum(map(search.units, first)) / len(first)
            self.progress.total += planned_work(len(first), each, len(judge))
            self.progress.total += fit_units(len(self.parts.fit)) * len({one.index for one in first} - {0})
            ranked = search.run(self.wish.trials, first)
            answers = self._answers(ranked)
            if self.wish.goal.kind == "latency":
                answers = self._in_time(networks, search, ranked)
        networks.drop_others({tried.candidate.index for tried in answers.values()})
        model = self._built(networks, answers["best"].candidate)
        others = {
            kind: partial(self._built, networks, tried.candidate)
            for kind, tried in answers.items()
            if tried is not answers["best"]
        }
        lines = self._lines(model, others, max_drop, labelled)
        certificate = Certificate(
            asked=str(self.wish.goal), lines=lines, weights=hash_of(model), original=hash_of(self.original),
            reduction=None if (reduction := answers["best"].candidate.reduction) is None else str(reduction),
            settings=self.settings, environment=environment(),
            source={**self.source, "description": self._description()},
            tried=[self._row(tried, search) for tried in _by_images(search.tried)], notes=self.notes,
        )  # fmt: skip
        return Compressed(model, certificate)

    def again(
        self, model: nn.Module, before: Certificate, note: str, max_drop: float | None, *, labelled: bool
    ) -> Compressed:
        """The certificate of an answer whose weights were trained further; `before` is that of the search."""
        lines = self._lines(model, {}, max_drop, labelled)
        certificate = replace(before, lines=lines, weights=hash_of(model), notes=[*before.notes, note])
        return Compressed(model, certificate)

    def _price(self) -> tuple[Price, float]:
        """What the budget counts, and how much of it the given model needs."""
        wish, given = self.wish, cost(self.original)
        if wish.goal.kind != "latency":
            return (params_price, given.params) if wish.goal.kind == "params" else (macs_price, given.macs)
        has_cls = find_adapter(self.original).geometry(self.original).has_cls
        methods = reducers(has_cls) if "tokens" in wish.using else []
        table = table_for(
            self.original, methods, batch_size=wish.batch_size, device=self.device, dtype=wish.dtype,
            say=self.progress.line,
        )  # fmt: skip
        return LatencyPrice(table), NANO * table.dense

    @property
    def _timing(self) -> dict[str, Any]:
        """Options of `sessions`."""
        wish = self.wish
        return {
            "batch_size": wish.batch_size, "device": self.device, "dtype": wish.dtype, "compile": wish.compile,
        }  # fmt: skip

    @property
    def settings(self) -> dict[str, Any]:
        """What times depend on."""
        wish = self.wish
        return {
            "batch_size": wish.batch_size, "device": self.device.type, "dtype": wish.dtype, "compile": wish.compile,
            "threads": torch.get_num_threads(),
        }  # fmt: skip

    def search(self, networks: Networks, judge: Judge) -> Search:
        """The search for the budget, or for the nearest one that can be reached."""
        tokens = "tokens" in self.wish.using
        search = Search(networks, judge, self.asked, self.price, tokens=tokens, progress=self.progress)
        if (least := search.least()) <= self.asked:
            return search
        given = self.asked / self.wish.goal.most if self.wish.goal.fraction else None
        unit, digits = (NANO, 2) if self.wish.goal.kind == "latency" else (1, 0)
        self._note(
            f"{self.wish.goal} cannot be reached; the least is {least / unit:,.{digits}f}"
            + ("" if given is None else f" ({least / given:.3f} of the given model)")
            + f", of which {self._fixed(networks) / unit:,.{digits}f} lie outside of the blocks (patch embedding, "
            "classifier)"
        )
        return Search(networks, judge, least, self.price, tokens=tokens, progress=self.progress)

    def _supernet(self) -> SuperNet | None:
        if "width" not in self.wish.using:
            return None
        goal = self.wish.goal
        most = {"macs": 1 - goal.most, "params": 0.9, "latency": 1 - goal.most / 2}[goal.kind]
        saving = min(0.95, max(0.1, most + 0.03)) if goal.fraction else 0.9
        self.progress.line("ordering the widths and measuring what each costs")
        images = len(self.parts.fit)
        try:
            net = stratify(
                self.original, self.parts.fit.batches(), num_images=images, max_saving=saving, say=lambda line: None
            )
        except UnsupportedModelError as error:
            if "tokens" not in self.wish.using:
                raise
            self._note(f"widths stay as they are: {error}")
            return None
        self.progress.add(STRATIFY_UNITS * images, "ordering widths")
        return net

    def _fixed(self, networks: Networks) -> float:
        """What of the price no candidate lowers: that of the model without its blocks."""
        chain = start_chain(self.original) if networks.supernet is None else networks.supernet.chain
        if isinstance(self.price, LatencyPrice):
            return NANO * self.price.table.empty
        if self.wish.goal.kind == "params":
            return chain.params - sum(unit.width * unit.params for unit in chain.units.values())
        return chain.macs - sum(unit.width * unit.macs for unit in chain.units.values())

    def _answers(self, ranked: Sequence[Tried]) -> dict[str, Tried]:
        """The best candidate, and the best ones of one kind."""
        found = {"best": ranked[0]}
        for tried in ranked:
            if tried.candidate.kind in ("tokens", "width"):
                found.setdefault(tried.candidate.kind, tried)
        return found

    def _in_time(self, networks: Networks, search: Search, ranked: Sequence[Tried]) -> dict[str, Tried]:
        """The answers as `_answers`, corrected until the clock agrees with the budget."""
        self.progress.line("timing the best candidates, and correcting them")
        clock = Clock(networks, search, self.wish.goal.most, self.wish.goal.fraction, self._timing)
        found = {"best": clock.first_in_time(ranked)}
        for kind in ("tokens", "width"):
            if found["best"].candidate.kind == kind:
                found[kind] = found["best"]
            elif own := [tried for tried in ranked if tried.candidate.kind == kind]:
                found[kind] = clock.first_in_time(own)
        return found

    def _built(self, networks: Networks, candidate: Candidate) -> nn.Module:
        model = copy.deepcopy(networks.real(candidate.index))
        attach(model, candidate.reduction, cls_only=networks.full.cls_only)
        return model.eval()

    def _lines(
        self, model: nn.Module, others: Mapping[str, Callable[[], nn.Module]], max_drop: float | None, labelled: bool
    ) -> list[Line]:
        goal, spent, given = self.wish.goal.kind, cost(model), cost(self.original)
        lines = [
            Line("macs", spent.macs, asked=self.asked if goal == "macs" else None, of=given.macs),
            Line("params", spent.params, asked=self.asked if goal == "params" else None, of=given.params),
        ]
        self.progress.line(f"measuring the answer on {len(self.parts.unseen)} images that the search has not seen")
        judge = Judge(self.original, self.parts.unseen, self.device)
        best = judge.compare(model)
        lines += fidelity_lines(best)
        for kind, build in others.items():
            difference = of_mean((best.divergence - judge.compare(build()).divergence).numpy())
            lines.append(Line.of_interval(f"over_{kind}", difference, number=len(judge)))
        if labelled:
            lines += accuracy_lines(judge, best, max_drop)
        self.progress.line("measuring the time of the answer in fresh rounds")
        return [*lines, *time_lines(sessions(self.original, model, **self._timing), self.wish.goal)]

    def _row(self, tried: Tried, search: Search) -> dict[str, Any]:
        candidate, network = tried.candidate, search.networks.hollow(tried.candidate.index)
        width = network.macs(network.plan(None, None), None) / search.full
        return {
            "kind": candidate.kind, "reduction": str(candidate), "share": candidate.share, "width_macs": width,
            "price": candidate.price / search.limit, "divergence": tried.mean, "agreement": tried.closeness.agreement,
            "images": tried.images,
        }  # fmt: skip

    def _description(self) -> str | None:
        try:
            return describe(self.original).to_json()
        except VitrimError:  # Made in a way that no description can tell; it is needed by `verify` alone.
            return None

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.progress.line(text)


def time_lines(times: list[tuple[float, float, float]], goal: Goal | None = None) -> list[Line]:
    """The ratio of times, and milliseconds, of these sessions, with what was asked of them."""
    ms, given = milliseconds(times)
    asked = goal.most if goal is not None and goal.kind == "latency" else None
    fraction = goal is not None and goal.fraction
    return [
        Line.of_interval("time", time_ratio(times), asked=asked if fraction else None, of=1.0, number=len(times)),
        Line.of_interval("ms", ms, asked=None if fraction else asked, of=given, number=len(times)),
    ]


def fidelity_lines(found: Closeness) -> list[Line]:
    """Divergence and agreement on some images, with intervals."""
    number = len(found.divergence)
    lines = [Line.of_interval("divergence", of_mean(found.divergence.numpy()), number=number)]
    if found.same is not None:
        share = of_share(int(found.same.sum()), number)
        lines.append(Line.of_interval("agreement", share, number=number))
    return lines


def accuracy_lines(judge: Judge, found: Closeness, max_drop: float | None) -> list[Line]:
    """Accuracy, and how much of it is lost, on images with classes."""
    before, after = judge.right(judge.reference), judge.right(found.outputs)
    if before is None or after is None:
        raise VitrimError("this model has no classes to be right about; leave val out")
    share = of_share(int(after.sum()), len(judge))
    drop = of_drop(before.numpy(), after.numpy())
    return [
        Line.of_interval("accuracy", share, of=before.double().mean().item(), number=len(judge)),
        Line.of_interval("drop", drop, asked=max_drop, number=len(judge)),
    ]


def _by_images(tried: Sequence[Tried]) -> list[Tried]:
    seen = [one for one in tried if one.parts]
    return sorted(seen, key=lambda one: (-one.images, one.mean))
