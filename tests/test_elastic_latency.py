"""Budgets of time: what is chosen is the largest that meets them, whatever one sample says."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.utils import benchmark

import vitrim
from clocks import Clock
from hf_models import HF
from test_elastic_extract import supernet
from vitrim.elastic import SuperNet, extract
from vitrim.elastic.chain import Chain
from vitrim.elastic.extract import choose
from vitrim.elastic.latency import ROUNDS, milliseconds, parse
from vitrim.errors import VitrimError


@pytest.fixture(scope="module")
def net() -> SuperNet:
    return supernet()


@pytest.fixture(scope="module", autouse=True)
def _cut_once() -> Iterator[None]:
    """Each sub-network is cut once for all tests, which only count its MACs."""
    own, known = extract.cut, dict[tuple[int, int], nn.Module]()

    def cut_once(model: nn.Module, chain: Chain, index: int) -> nn.Module:
        if (key := (id(chain), index)) not in known:
            known[key] = own(model, chain, index)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extract, "cut", cut_once)
        yield


def test_latency_is_found_by_bisection(net):
    calls = []

    def clock(*models):
        calls.append(1)
        return torch.tensor([[vitrim.cost(model).macs / 1e6 for model in models]])

    full = net.chain.macs / 1e6
    for latency in (0.75, 0.75 * full, f"{0.75 * full}ms"):
        calls.clear()
        index = choose(net.model, net.chain, latency=latency, clock=clock)
        assert index == net.chain.largest("macs", 0.75 * net.chain.macs)
        assert len(calls) <= 6 + 2 * len(net.chain).bit_length()
    for latency in (0.01, "0.01ms", "0.01 ms"):
        with pytest.raises(VitrimError, match=r"no sub-network takes 0\.01 .* the smallest takes"):
            choose(net.model, net.chain, latency=latency, clock=clock)


def test_all_of_the_time_is_the_full_network(net):
    def never(*models):
        raise AssertionError

    assert choose(net.model, net.chain, latency=1, clock=never) == 0
    assert vitrim.cost(net.extract(latency=1e6)).macs == net.chain.macs
    assert vitrim.cost(net.extract(latency="1000000 ms")).macs == net.chain.macs
    assert parse("0.5 s") == parse(500) == (500, False)
    assert parse("1ms") == (1, False)


@pytest.mark.parametrize("wrong", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize("factor", [0.1, 10])
def test_one_wrong_sample_costs_one_group_at_most(net, wrong, factor):
    calls = []

    def clock(*models):
        calls.append(1)
        times = torch.tensor([[vitrim.cost(model).macs / 1e6 for model in models]])
        times[0, -1] *= factor if len(calls) == wrong else 1
        return times

    for latency in (0.8, 0.8 * net.chain.macs / 1e6):
        calls.clear()
        index = choose(net.model, net.chain, latency=latency, clock=clock)
        assert 0 <= index - net.chain.largest("macs", 0.8 * net.chain.macs) <= 1


def test_drift_of_the_machine_meets_both(net):
    """The machine is twice as slow after a while; a fraction is still one of the time at the same moment."""
    calls = []

    def clock(*models):
        calls.append(1)
        return torch.tensor([[vitrim.cost(model).macs * (1 + len(calls) / 10) for model in models]])

    assert choose(net.model, net.chain, latency=0.8, clock=clock) == net.chain.largest("macs", 0.8 * net.chain.macs)


def test_times_are_taken_in_turns(net, monkeypatch):
    clock, order = Clock(), list[int]()
    monkeypatch.setattr(benchmark, "timer", clock.read)
    models = [net.model.train(), net.cut(-1)]
    for index, model in enumerate(models):
        model.register_forward_hook(lambda *_, index=index: (order.append(index), clock.sleep(0.02 / (1 + index)))[0])
    times = milliseconds(*models)
    assert net.model.training
    net.model.eval()
    assert torch.allclose(times, torch.tensor([[20.0, 10.0]], dtype=times.dtype).expand(ROUNDS, 2), rtol=1e-4)
    assert order[-2 * ROUNDS :] == [0, 1] * ROUNDS


def test_models_that_take_more_than_images_are_timed():
    assert milliseconds(HF["hf_siglip2"]().eval()).isfinite().all()
