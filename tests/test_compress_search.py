"""Solving for a budget, and the search among candidates."""

import re
import threading
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from elastic_models import images, small
from vitrim import KeepRate, PowerLaw, ToMe, TopK, attach, cost, stratify
from vitrim.compression.candidates import Candidate, first_shapes, reducers, stages
from vitrim.compression.fidelity import Closeness, Fidelity
from vitrim.compression.images import Pictures
from vitrim.compression.networks import EmptyNetwork, Networks, macs_price, params_price
from vitrim.compression.progress import Progress, duration
from vitrim.compression.rounds import METHODS
from vitrim.compression.search import Search, Tried, best_reducers
from vitrim.compression.solver import Solver
from vitrim.heartbeat import heartbeat
from vitrim.models.foreign_macs import counting_once, empty_copy
from vitrim.tokens import REDUCERS, Reducer, Schedule, render

TINY = {"img_size": 64, "depth": 3, "embed_dim": 24, "num_heads": 2}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small(torch.float32, **TINY)


@pytest.fixture(scope="module")
def networks(model: nn.Module) -> Networks:
    fit = [images(32, dtype=torch.float32)]
    net = stratify(model, fit, num_images=32, rounds=1, even=True, say=lambda line: None)
    return Networks(model, net, fit)


def search_for(networks: Networks, fraction: float, *, judged: int = 24) -> Search:
    fidelity = Fidelity(networks.original, Pictures(images(judged, seed=3, dtype=torch.float32)), torch.device("cpu"))
    limit = fraction * cost(networks.original).macs
    return Search(Solver(networks, limit, macs_price, tokens=True), fidelity, Progress(1, lambda line: None))


@pytest.mark.parametrize("fraction", [0.85, 0.7])
@pytest.mark.parametrize("reducer", [TopK("norm", fuse="mean"), ToMe()], ids=render)
@pytest.mark.parametrize("shape", [PowerLaw(1.0, 1.4), KeepRate(0.02, at=(0, 2))], ids=str)
def test_a_solved_schedule_is_the_weakest_of_all_strengths_that_meets_the_budget(
    model: nn.Module, reducer: Reducer, shape: Schedule, fraction: float
) -> None:
    network, limit = EmptyNetwork(0, empty_copy(model)), fraction * cost(model).macs
    with counting_once():
        solved = network.solve(reducer, shape, limit, macs_price)
        prices = {network.macs(network.plan(reducer, shape.scaled(step / 100)), reducer) for step in range(101)}
    fitting = [price for price in prices if price <= limit]
    if solved is None:
        dense = network.macs(network.plan(None, None), None)
        assert not fitting or dense <= limit
        return
    schedule, price = solved
    assert max(fitting) <= price <= limit, "a finer strength may keep more, none of the coarse ones does"
    with attach(model, reducer, schedule, cls_only=network.cls_only):
        assert cost(model).macs == price <= limit


def test_every_candidate_costs_what_it_says_and_never_more_than_the_budget(networks: Networks) -> None:
    search = search_for(networks, 0.7)
    with counting_once():
        found = search.solver.candidates()
    assert {one.kind for one in found} == {"tokens", "width", "joint"}
    assert {one.share for one in found} == {0.0, 0.25, 0.5, 0.75, 1.0}
    for one in (found[0], found[len(found) // 2], found[-1]):
        network = networks.supernet.cut(one.index)  # type: ignore[union-attr]
        with attach(network, one.reduction, cls_only=networks.full.cls_only):
            assert cost(network).macs == one.price <= search.solver.limit


def test_the_widest_network_within_a_limit_is_found(networks: Networks) -> None:
    prices = []
    for index in range(0, len(networks)):
        network = networks.empty(index)
        prices.append(network.macs(network.plan(None, None), None))
    for limit in (prices[0], prices[3], prices[3] - 1, prices[-1]):
        assert networks.narrowest_within(limit, macs_price) == next(i for i, p in enumerate(prices) if p <= limit)
    assert networks.narrowest_within(prices[-1] - 1, macs_price) is None
    assert networks.empty(2).params == cost(networks.supernet.cut(2)).params  # type: ignore[union-attr]
    assert params_price(networks.empty(2), networks.empty(2).plan(None, None), None) == networks.empty(2).params


def test_the_answer_is_that_of_brute_force_over_all_candidates(networks: Networks) -> None:
    search = search_for(networks, 0.7)
    with counting_once():
        # All that the first round has of three reducers; each kept round is at least as large as the final one.
        group = [
            one
            for one in search.solver.candidates()
            if one.reducer is None or render(one.reducer) in ("TopK()", "ToMe()")
        ]
        ranked = search.run(0, group)
    means = {}
    for one in group:
        network = networks.real(one.index)
        with attach(network, one.reduction, cls_only=networks.full.cls_only):
            means[search.solver.key(one)] = search.fidelity.compare(network).typical
    best = min(means.values())
    assert ranked[0].typical == pytest.approx(means[search.solver.key(ranked[0].candidate)])
    assert ranked[0].typical <= sorted(means.values())[2], "halving lost the best candidates"
    assert ranked[0].typical >= best
    assert {one.candidate.kind for one in ranked} >= {"tokens", "width"}, "pure answers stay to the end"
    assert all(one.images == len(search.fidelity) for one in ranked)


def test_the_sampler_proposes_candidates_within_the_budget(networks: Networks) -> None:
    search = search_for(networks, 0.6)
    with counting_once():
        group = [one for one in search.solver.candidates() if one.reducer is None or render(one.reducer) == "TopK()"]
        search.run(6, group)
    sampled = search.tried[len(group) :]
    assert sampled
    assert all(one.candidate.price <= search.solver.limit and one.images > 0 for one in sampled)
    assert len({search.solver.key(one.candidate) for one in search.tried}) == len(search.tried), "none is tried twice"


def test_reducers_are_compared_first_and_the_best_of_them_tried_in_all_shapes(networks: Networks) -> None:
    search = search_for(networks, 0.6)
    with counting_once():
        ranked = search.run(0)
        few, all_of_them = search.solver.methods(), search.solver.candidates()
    assert {one.reducer for one in few} == {*search.solver.reducers}, "every reducer has its chance"
    tried = {search.solver.key(one.candidate) for one in search.tried}
    assert {search.solver.key(one) for one in few} < tried < {search.solver.key(one) for one in (*few, *all_of_them)}
    shapes: dict[Any, set[Any]] = {}
    for one in search.tried:
        shapes.setdefault(one.candidate.reducer, set()).add((one.candidate.share, one.candidate.shape))
    most = max(map(len, shapes.values()))
    assert sum(len(each) == most for each in shapes.values()) <= METHODS
    assert ranked[0].candidate.reducer is None or len(shapes[ranked[0].candidate.reducer]) > 2


def test_the_best_reducers_are_taken_in_turns_from_each_share_of_the_width() -> None:
    def tried(share: float, score: str) -> Tried:
        return Tried(Candidate(1, share, 1.0, TopK(score), KeepRate(0.5)))

    scores = ("norm", "key_norm", "mean_attention", "cls_attention")
    dense = Tried(Candidate(1, 1.0, 1.0))
    compared = [tried(0.5, "norm"), dense, *(tried(0.0, score) for score in scores[1:]), tried(0.5, "key_norm")]
    assert [one.score for one in best_reducers(compared)] == ["norm", "key_norm", "mean_attention", "cls_attention"]
    assert best_reducers([]) == []


def test_a_model_that_meets_the_budget_is_the_only_candidate(networks: Networks) -> None:
    (one,) = search_for(networks, 1.0).solver.candidates()
    assert (one.kind, one.index, str(one)) == ("none", 0, "all tokens")


def test_what_cannot_be_reached_is_known_before_the_search(networks: Networks) -> None:
    search = search_for(networks, 0.001)
    with counting_once():
        least = search.solver.least()
        assert least > search.solver.limit
        found = Solver(networks, least, macs_price, tokens=True).candidates()
    assert found
    assert min(one.price for one in found) == least


@pytest.mark.parametrize("has_cls", [True, False])
def test_reducers_of_a_search_need_no_training_and_see_the_image(has_cls: bool) -> None:
    names = [render(one) for one in reducers(has_cls)]
    assert len(names) == len({*names})
    assert ("TopK()" in names) == has_cls
    assert {"ToMe()", "TopK(score='norm')", "TopK(score='key_norm', fuse='mean')"} <= {*names}
    assert not [name for name in names if "gradient" in name or "random" in name]


def test_a_reducer_of_the_user_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class _Own(TopK):
        score: str = "norm"

    @dataclass(frozen=True)
    class _NeedsMore(TopK):
        extra: int = None  # type: ignore[assignment]

    monkeypatch.setitem(REDUCERS._entries, "Own", _Own)
    monkeypatch.setitem(REDUCERS._entries, "NeedsMore", _NeedsMore)
    found = [type(one) for one in reducers(True)]
    assert _Own in found
    assert _NeedsMore not in found, "it cannot be made without its option"


def test_stages_lie_inside_of_every_depth() -> None:
    for depth, shape in product((1, 2, 3, 12), (0, 1, 2, 3)):
        shapes = stages(depth)
        at = shapes[min(shape, len(shapes) - 1)].blocks(depth)
        assert all(0 <= block < depth for block in at)
        assert list(at) == sorted({*at})
    assert [str(one) for one in first_shapes(12)][-1] == "KeepRate(rate=0.02, at=(0, 4))"


def test_the_better_of_two_candidates_is_first_and_the_pure_ones_stay() -> None:
    def tried(divergence: float, index: int, schedule: Schedule | None) -> Tried:
        return Tried(Candidate(index, 0.5, 1.0, TopK() if schedule else None, schedule), [found(divergence)])

    def found(divergence: float) -> Closeness:
        return Closeness(torch.full((4,), divergence), None, torch.zeros(4, 2))

    many = [tried(float(number), 3, KeepRate(0.5)) for number in range(9)]
    pure, width = tried(50.0, 0, KeepRate(0.5)), tried(60.0, 9, None)
    search = object.__new__(Search)
    kept = search._best([*many, pure, width], 2)
    assert kept == [many[0], many[1], pure, width]
    assert replace(many[0].candidate, index=0).kind == "tokens"


def test_candidates_are_ranked_by_a_typical_image_and_not_by_the_few_that_decide_a_mean() -> None:
    def closeness(divergences: torch.Tensor) -> Closeness:
        return Closeness(divergences, None, torch.zeros(len(divergences), 2))

    generator = torch.Generator().manual_seed(0)
    few, many = torch.rand(40, generator=generator).double() * 0.01, torch.rand(40, generator=generator).double() * 0.1
    few[7] = 10.0
    assert closeness(few).mean > closeness(many).mean
    assert closeness(few).typical < closeness(many).typical
    assert closeness(few).typical == pytest.approx(sum(value ** (1 / 3) / 40 for value in few.tolist()) ** 3)
    assert closeness(1000 * few).typical == pytest.approx(1000 * closeness(few).typical)
    worst = few.clone()
    worst[0] = torch.inf
    assert closeness(worst).typical == torch.inf


def test_a_step_that_takes_long_says_that_it_goes_on() -> None:
    said: list[str] = []
    enough = threading.Event()

    def say(line: str) -> None:
        said.append(line)
        enough.set()

    with heartbeat("reading images", say, every=0.001):
        assert enough.wait(60)
    assert re.fullmatch(r"reading images: \d+ s so far", said[0])
    number = len(said)
    with pytest.raises(KeyError), heartbeat("reading images", say):
        raise KeyError
    assert len(said) == number, "a short one says nothing"


def test_the_time_that_is_left_follows_the_speed_so_far() -> None:
    now, lines = [0.0], []
    progress = Progress(100, lines.append, clock=lambda: now[0])
    now[0] = 30.0
    progress.add(25, "round 1")
    assert lines == ["round 1: 25% of all, 1 min 30 s left"]
    with progress.step("fitting", 5):
        assert lines[-1] == "fitting"
    assert progress.left() == pytest.approx(70)
    progress.add(200, "round 1")
    assert progress.left() == 0
    assert [duration(5), duration(61)] == ["5 s", "1 min 1 s"]


def test_a_search_speaks_of_fitting_only_where_a_network_is_fitted(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitrim.compression.progress.EVERY", 0.0)
    lines: list[str] = []
    search = search_for(Networks(model, None, []), 0.8)
    search.progress = Progress(1, lines.append)
    search.run(0)
    assert lines
    assert not any("fitting" in line for line in lines)
