"""Budgets of time: the table of block times, its file, and the corrections by the clock."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import vitrim
from elastic_models import images, small
from eva_models import MORE as MORE_EVA
from hf_models import HF
from hf_models import MORE as MORE_HF
from vitrim import ToMe, TopK
from vitrim.compression import budget, clock, job, solver, times_file
from vitrim.compression.block_times import NANO, WIDTHS, BlockTimes, Workbench, kind_of
from vitrim.compression.clock import Clock, LatencyPrice
from vitrim.compression.networks import EmptyNetwork, Networks
from vitrim.compression.solver import Solver
from vitrim.errors import UnsupportedModelError, VitrimError
from vitrim.models import BlockWidths
from vitrim.models.families.timm_eva import ReducedEvaBlock
from vitrim.models.foreign_macs import empty_copy
from vitrim.tokens import KeepRate, Plan, make_plan

TINY = {"img_size": 64, "depth": 3, "embed_dim": 24, "num_heads": 2}
CPU = torch.device("cpu")


def table(cuts: dict[str, float] | None = None) -> BlockTimes:
    """A token takes 2 units in attention and 3 in the MLP at full width; the rest of the model takes 10."""
    tokens = (2, 5, 17)
    rows = [[share * number for number in tokens] for share in (0.0, 0.5, 1.0)]
    attention, mlp = ([[each * value for value in row] for row in rows] for each in (2.0, 3.0))
    return BlockTimes(tokens, (0, 6, 12), (0, 48, 96), attention, mlp, 10.0 + 3 * 5 * 17, 10.0, cuts or {})


FULL = (BlockWidths(12, 96),) * 3


def test_a_prediction_adds_what_each_half_of_each_block_takes() -> None:
    dense = Plan(16, 1, 3, ())
    assert table().predict(dense, FULL, None) == pytest.approx(table().dense)
    half = (BlockWidths(6, 48), BlockWidths(0, 96), BlockWidths(12, 0))
    assert table().predict(dense, half, None) == pytest.approx(10 + 17 * (2.5 + 3 + 2))
    tome = ToMe()
    plan = make_plan(KeepRate(0.5, at=(1,)), tome, depth=3, num_patches=16, num_prefix=1)
    expected = 10 + 5 * 17 + (2 * 17 + 3 * 9) + 5 * 9
    assert table().predict(plan, FULL, tome) == pytest.approx(expected)
    assert table({kind_of(tome): 0.25}).predict(plan, FULL, tome) == pytest.approx(expected + 16 * 0.25)


def test_queries_that_are_not_computed_and_a_last_block_for_cls_save_time() -> None:
    dropping = TopK()
    plan = make_plan(KeepRate(0.5, at=(1,)), dropping, depth=3, num_patches=16, num_prefix=1)
    attention = 2 * 17 * (0.5 + 0.5 * 9 / 17)
    assert table().predict(plan, FULL, dropping) == pytest.approx(10 + 5 * 17 + attention + 3 * 9 + 5 * 9)
    only = Plan(16, 1, 3, ()).for_prefix_only()
    last = 2 * 17 * (0.5 + 0.5 / 17) + 3 * 2 * 0.5  # Half of what the fewest measured tokens take.
    assert table().predict(only, FULL, None) == pytest.approx(10 + 2 * 5 * 17 + last)


def test_kinds_of_reducers_share_what_their_cuts_take() -> None:
    assert kind_of(TopK()) == kind_of(TopK(momentum=0.5))
    assert len({kind_of(one) for one in (TopK(), TopK(fuse="sum"), TopK("norm"), ToMe())}) == 4


def by_size(self: Workbench, calls: Mapping[Any, Callable[[], Any]], rounds: int = 5) -> dict[Any, float]:
    """In place of a clock: what a call returns is large where it takes long; names say the widths."""
    known, found = {"dense": 8.0, "empty": 1.0, "reduced": 7.0}, {}
    for name, call in calls.items():
        out = call()
        found[name] = known[name] if name in known else 0.5 + sum(name) / 100 * out.shape[1] / 17
    return found


@pytest.fixture
def fake_times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Workbench, "times", by_size)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.usefixtures("fake_times")
def test_a_workbench_times_halves_of_blocks_at_tokens_and_widths() -> None:
    bench = Workbench(small(torch.float32, **TINY), 2, CPU, "float32")
    found = bench.measure()
    assert found.tokens == sorted(found.tokens)
    assert (found.tokens[-1], found.head_dims[-1], found.hiddens[-1]) == (17, 12, 96)
    assert found.attention[0] == [0.0] * len(found.tokens)
    assert found.attention[-1][-1] == pytest.approx(0.12)
    assert found.mlp[-1][-1] == pytest.approx(0.96)
    bench.measure_cut(found, ToMe())
    assert list(found.cuts) == [kind_of(ToMe())]


@pytest.mark.usefixtures("fake_times")
def test_a_table_is_measured_once_and_kept_with_what_it_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    network, lines = small(torch.float32, **TINY), []
    options: dict[str, Any] = {"batch_size": 2, "device": CPU, "dtype": "float32", "say": lines.append}
    first = clock.table_for(network, [ToMe()], **options)
    assert len(lines) == 1
    (path,) = times_file.cache_folder().glob("*.json")
    assert json.loads(path.read_text())["circumstances"]["environment"]["torch"]
    again = clock.table_for(network, [ToMe()], **options)
    assert len(lines) == 1, "the second time it is read"
    assert again.dense == first.dense
    assert again.cuts == first.cuts
    clock.table_for(network, [ToMe()], **options | {"batch_size": 4})
    assert len(lines) == 2, "another batch size has other times"
    for content in ("{", "[]", '{"circumstances": 1}', path.read_text().replace('"dense": 8.0', '"dense": -1')):
        path.write_text(content)
        where = times_file.circumstances(network, 2, CPU, "float32")
        assert times_file.read_table(where) is None, "a damaged table is measured again"


@pytest.mark.usefixtures("fake_times")
@pytest.mark.parametrize("name", ["hf_siglip", "hf_siglip2"])
def test_blocks_of_transformers_are_timed_with_the_arguments_that_they_are_called_with(name: str) -> None:
    bench = Workbench(HF[name](), 2, CPU, "float32")
    found = bench.measure()
    assert found.tokens[-1] == 25
    bench.measure_cut(found, ToMe())


@pytest.mark.usefixtures("fake_times")
@pytest.mark.parametrize("name", ["eva02", "mixed", "eva", "qk_norm", "hf_dinov3"])
def test_blocks_with_rotary_positions_are_timed_with_tables_of_as_many_tokens(name: str) -> None:
    made = {**MORE_EVA, "hf_dinov3": MORE_HF["dinov3"]}[name]()
    bench = Workbench(made, 2, CPU, "float32")
    found = bench.measure()
    dims = vitrim.models.widths_of(made)[0].head_dim
    if name == "qk_norm":  # One value dim: queries and keys, almost alone.
        assert found.head_dims[:2] == [0, (1 + dims) / 2]
    else:
        values = [round(part * dims) for part in WIDTHS]
        assert found.head_dims == [0, *sorted((value + value + value % 2) / 2 for value in values)]
    assert found.head_dims[-1] == dims
    assert found.attention[0] == [0.0] * len(found.tokens)
    bench.measure_cut(found, ToMe())
    plan = Plan(25, found.tokens[-1] - 25, 3, ())
    narrow, whole = (found.predict(plan, vitrim.models.even_widths(made, values, 8), None) for values in (1, dims))
    assert narrow < whole


@pytest.mark.usefixtures("fake_times")
def test_blocks_that_take_more_than_tokens_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gated = MORE_EVA["gated"]()
    with pytest.raises(UnsupportedModelError, match=r"cannot be timed by halves.*give macs= or params="):
        Workbench(gated, 2, CPU, "float32").measure()
    monkeypatch.setattr(ReducedEvaBlock, "rotary_argument", "")
    with pytest.raises(UnsupportedModelError, match=r"take more than tokens.*give a budget of macs="):
        Workbench(MORE_EVA["eva02"](), 2, CPU, "float32").measure()


@pytest.mark.usefixtures("fake_times")
@pytest.mark.parametrize(
    "made",
    [lambda: timm.create_model("beit_base_patch16_224", img_size=32, depth=1, embed_dim=12), MORE_HF["beit"]],
)
def test_blocks_that_read_the_places_of_all_tokens_are_refused(made: Callable[[], nn.Module]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"reads the places of all tokens; give macs= or params="):
        Workbench(made(), 2, CPU, "float32")


class _Exact(Clock):
    """A clock by which everything takes `factor` times what the table predicts."""

    factor = 1.0

    def spent(self, candidate: Any) -> float:
        return self.factor * candidate.price / self.solver.limit


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.4])
def test_candidates_are_corrected_until_the_clock_agrees(factor: float) -> None:
    network = small(torch.float32, **TINY)
    networks = Networks(network, None, [])
    price = LatencyPrice(table())
    limit = 0.7 * NANO * table().dense
    one = Solver(networks, limit, price, tokens=True)
    candidate = one.candidate(0, ToMe(), KeepRate(0.02, at=(0, 1)))
    assert candidate is not None
    measured = _Exact(networks, one, 0.7, True, {})
    measured.factor = factor
    spent, found = measured.corrected(candidate)
    assert spent == measured.spent(found) <= 1
    assert measured.spent(found) >= min(0.8, measured.spent(candidate)), "no more is removed than is needed"
    if factor > 1:
        assert measured.spent(candidate) > 1
        assert found.price < candidate.price


def test_prices_are_nanoseconds() -> None:
    network = EmptyNetwork(0, empty_copy(small(torch.float32, **TINY)))
    assert LatencyPrice(table())(network, network.plan(None, None), None) < NANO * table().dense


@pytest.mark.parametrize(("latency", "key"), [(0.7, "time"), ("5.6ms", "ms")])
@pytest.mark.usefixtures("fake_times")
def test_a_budget_of_time_is_met_by_fresh_measurements(
    latency: float | str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(original: nn.Module, model: nn.Module, *, number: int = 2, **_: Any) -> list[tuple[float, float, float]]:
        ratio = vitrim.cost(model).macs / vitrim.cost(original).macs
        return [(ratio, 8.0, 8.0 * ratio)] * number

    for module in (clock, job):
        monkeypatch.setattr(module, "sessions", timed)
    monkeypatch.setattr(solver, "reducers", lambda has_cls: [ToMe()])
    monkeypatch.setattr(budget, "reducers", lambda has_cls: [ToMe()])
    found = vitrim.compress(
        small(torch.float32, **TINY), images(40, dtype=torch.float32), latency=latency, using="tokens", batch_size=2,
        trials=0, say=lambda line: None,
    )  # fmt: skip
    assert found.certificate[key].asked in (0.7, 5.6)
    assert found.certificate.met
    assert "time" in found.certificate.asked or "ms" in found.certificate.asked


@pytest.mark.usefixtures("fake_times")
def test_a_budget_that_no_candidate_meets_on_the_clock_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (clock, job):
        monkeypatch.setattr(module, "sessions", lambda *models, number=2, **_: [(1.4, 8.0, 11.2)] * number)
    for module in (solver, budget):
        monkeypatch.setattr(module, "reducers", lambda has_cls: [ToMe()])
    found = vitrim.compress(
        small(torch.float32, **TINY), images(40, dtype=torch.float32), latency=0.7, using="tokens", batch_size=2,
        trials=0, say=lambda line: None,
    ).certificate  # fmt: skip
    assert found.met is False
    assert "of the time was not reached on the clock; the fastest candidate took 2.00 times that" in found.notes[-1]


@pytest.mark.usefixtures("fake_times")
def test_a_time_that_the_model_takes_anyway_is_refused_before_the_search() -> None:
    with pytest.raises(VitrimError, match=r"needs about .* ms, so it is within the budget of 99,999 ms already"):
        vitrim.compress(
            small(torch.float32, **TINY), images(40, dtype=torch.float32), latency=99_999, using="tokens",
            batch_size=2, say=lambda line: None,
        )  # fmt: skip
