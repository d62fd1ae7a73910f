"""The chain as data: growing, monotony, budgets, and what it refuses."""

import json
import math
import random
from dataclasses import replace
from itertools import pairwise
from math import isfinite

import pytest
import torch

from elastic_models import digits, images, small, trained
from vitrim import cost, stratify
from vitrim.elastic import SuperNet
from vitrim.elastic.chain import Chain, Entry, UnitCost, hash_of, start_chain
from vitrim.elastic.growth import _falling_outwards, blend, grow, grow_evenly
from vitrim.elastic.importance import interpolate, measure_rises, probe_loss, tail_sums, taylor_curves
from vitrim.elastic.measured_chain import log_ratio, worse
from vitrim.elastic.probing import first_batches, in_turn, portions
from vitrim.elastic.sampler import RULES, draw, narrowed
from vitrim.errors import CheckpointError, UnknownNameError, VitrimError


def random_case(seed: int):
    chain = start_chain(small(), width_multiple=2)
    generator = torch.Generator().manual_seed(seed)
    widths = {name: unit.width for name, unit in chain.units.items()}
    shares = {name: torch.rand(width, generator=generator, dtype=torch.float64) for name, width in widths.items()}
    return chain, {name: tail_sums(share) for name, share in shares.items()}


@pytest.mark.parametrize("seed", range(3))
def test_chain_is_monotone_and_nested(seed):
    chain = grow(*random_case(seed), saving=0.7)
    for index in range(1, len(chain)):
        wider, narrower = chain.widths(index - 1), chain.widths(index)
        changed = [name for name in wider if wider[name] != narrower[name]]
        assert changed == [chain.entries[index - 1].module]
        assert narrower[changed[0]] < wider[changed[0]]
        assert chain.macs_at(index) < chain.macs_at(index - 1)
        assert chain.params_at(index) < chain.params_at(index - 1)
        assert chain.macs_linear_only_at(index) <= chain.macs_at(index)


def test_growing_meets_its_saving_within_one_group():
    chain, curves = random_case(3)
    for saving in (0.1, 0.35, 0.6):
        grown = grow(chain, curves, saving)
        assert grown.macs_at(-1) <= chain.macs * (1 - saving) < grown.macs_at(-2)


def test_an_even_chain_takes_the_same_fraction_everywhere():
    chain = start_chain(small(), width_multiple=2)
    even = grow_evenly(chain, 0.6)
    assert even.macs_at(-1) <= chain.macs * 0.4 < even.macs_at(-2)
    group = max(unit.step / unit.width for unit in chain.units.values())
    for index in range(len(even)):
        kept = [width / chain.units[name].width for name, width in even.widths(index).items()]
        assert max(kept) - min(kept) <= group + 1e-9
    assert not any(entry.importance for entry in even.entries)


def test_growing_in_parts_keeps_what_there_is():
    chain, curves = random_case(4)
    half = grow(chain, curves, 0.3)
    widths = half.widths(-1)
    more = grow(half, {name: curve[: widths[name] + 1] for name, curve in curves.items()}, 0.6)
    assert more.entries[: len(half.entries)] == half.entries
    assert len(more) > len(half)


def test_merged_densities_fall_outwards_as_the_best_suffix_does():
    rng = random.Random(0)
    for _ in range(50):
        size = rng.randrange(1, 9)
        value, macs = [rng.random() for _ in range(size)], [rng.randrange(1, 5) for _ in range(size)]
        merged = _falling_outwards(value, macs)
        densities = [density for density, _ in merged]
        assert all(inner > outer for inner, outer in pairwise(densities))
        assert [index for _, members in merged for index in members] == list(range(size))
        # The outermost merged group is the suffix of lowest density of all.
        suffixes = [sum(value[start:]) / sum(macs[start:]) for start in range(size)]
        assert densities[-1] == pytest.approx(min(suffixes))


@pytest.mark.parametrize("rise", [-0.5, 0.0])
def test_sublayer_that_does_not_help_is_cut_first(rise):
    chain, curves = random_case(5)
    useless = "blocks.1.mlp"
    curves[useless] = rise * curves[useless]
    grown = grow(chain, curves, saving=0.5)
    groups = -(-chain.units[useless].width // chain.units[useless].step)
    assert [entry.module for entry in grown.entries[:groups]] == [useless] * groups
    assert grown.entries[groups - 1].width == 0


def test_groups_follow_their_number_and_the_multiple():
    model = small()
    units = start_chain(model).units
    assert (units["blocks.0.attn"].step, units["blocks.0.mlp"].step) == (8, 8)
    units = start_chain(model, width_multiple=1).units
    assert (units["blocks.0.attn"].step, units["blocks.0.mlp"].step) == (2, 6)
    assert start_chain(model, groups={"attention": 1, "mlp": 2}).units["blocks.0.mlp"].step == 96


def test_unit_costs_are_the_published_formulas():
    unit = start_chain(small()).units
    heads, tokens, width = 3, 17, 48
    assert unit["blocks.0.attn"].macs == heads * tokens * 4 * width + 2 * heads * tokens**2
    assert unit["blocks.0.attn"].macs_linear_only == heads * tokens * 4 * width
    assert unit["blocks.0.mlp"].macs == 2 * tokens * width


def test_json_round_trip_and_what_is_refused():
    chain = grow(*random_case(6), saving=0.5)
    assert Chain.from_json(chain.to_json()) == chain
    raw = json.loads(chain.to_json())
    with pytest.raises(CheckpointError, match="schema 99"):
        Chain.from_json(json.dumps(raw | {"schema": 99}))
    with pytest.raises(CheckpointError, match="stratify again"):
        Chain.from_json(json.dumps(raw | {"schema": 1}))
    with pytest.raises(CheckpointError, match="not a chain"):
        Chain.from_json("{}")
    with pytest.raises(CheckpointError, match="nothing narrower"):
        replace(chain, entries=(*chain.entries, chain.entries[-1]))
    for change in ({"macs": chain.entries[0].macs - 1}, {"params": 3}):
        with pytest.raises(CheckpointError, match="does not cost what it says"):
            replace(chain, entries=(replace(chain.entries[0], **change), *chain.entries[1:]))
    with pytest.raises(CheckpointError, match="nothing narrower"):
        replace(chain, entries=(replace(chain.entries[0], width=chain.entries[0].width + 0.5),))
    with pytest.raises(CheckpointError, match="nothing narrower"):
        Chain({"a": UnitCost(8, 4, 1, 1, 1, 0)}, 10, 10, 10, (Entry("b", 4, 6, 6, 0.1),))


def test_budget_is_the_largest_that_fits_and_an_impossible_one_names_the_smallest():
    chain = grow(*random_case(7), saving=0.5)
    for what in ("macs", "params"):
        at = getattr(chain, f"{what}_at")
        for most in [at(0), at(1), at(3) + 1, at(-1)]:
            index = chain.largest(what, most)
            assert at(index) <= most
            assert index == 0 or at(index - 1) > most
        with pytest.raises(VitrimError, match=f"smallest has {at(-1):,}"):
            chain.largest(what, at(-1) - 1)


def test_a_network_that_is_not_in_the_chain_is_told():
    chain = grow(*random_case(7), saving=0.5)
    for at in (chain.widths, chain.macs_at, chain.params_at, chain.macs_linear_only_at):
        assert at(-len(chain)) == at(0)
        for index in (len(chain), -len(chain) - 1, 1.5):
            with pytest.raises(VitrimError, match=f"there is no network {index}; the chain has {len(chain)}"):
                at(index)


def test_hash_depends_on_every_weight():
    model = small()
    before = hash_of(model)
    assert before == hash_of(small())
    with torch.no_grad():
        model.blocks[2].mlp.fc2.bias[3] += 1e-12
    assert hash_of(model) != before


@pytest.mark.parametrize("labelled", [False, True])
def test_rises_are_those_of_the_network_with_one_sublayer_narrower(labelled):
    model, x = small(), images(6)
    target = torch.tensor([0, 1, 2, 3, 4, 0])
    widths = grow(*random_case(8), saving=0.4).widths(-1)
    candidates = {name: [0, width // 2] for name, width in widths.items() if width > 1}
    found = measure_rises(model, [(x[:4], target[:4]), (x[4:], target[4:])], widths, candidates, labels=labelled)
    loss = probe_loss(model, labelled)
    with torch.no_grad():
        full = model(x)

        def mean_loss(**changes):
            with narrowed(model, {**widths, **{name.replace("/", "."): width for name, width in changes.items()}}):
                return loss(model(x), target, full).mean().item()

        for name, narrower in candidates.items():
            for width in narrower:
                rise = mean_loss(**{name.replace(".", "/"): width}) - mean_loss()
                assert found[name][width] == pytest.approx(rise, abs=1e-10)


def test_between_measured_widths_a_curve_has_the_form_that_is_expected():
    expected = torch.tensor([9.0, 5.0, 3.0, 2.0, 0.0])
    curve = interpolate({0: 10.0, 2: 1.0, 4: 0.0}, expected)
    assert curve.tolist() == pytest.approx([10, 1 + 9 * 2 / 6, 1, 2 / 3, 0])
    assert interpolate({0: 4.0, 4: 0.0}, torch.zeros(5)).tolist() == pytest.approx([4, 3, 2, 1, 0])


def test_a_blend_lies_between_both_chains():
    chain, curves = random_case(10)
    one, even = grow(chain, curves, 1.0), grow_evenly(chain, 1.0)
    for part, like in ((0.0, one), (1.0, even)):
        blended = blend(chain, one, even, part, 0.6)
        for index in range(0, len(blended), 9):
            other = like.widths(like.largest("macs", blended.macs_at(index)))
            steps = [abs(blended.widths(index)[n] - other[n]) / unit.step for n, unit in chain.units.items()]
            assert max(steps) <= 2
    assert blend(chain, one, even, 0.5, 0.6).macs_at(-1) <= 0.4 * chain.macs


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(("classes", "sure"), [(5, 1000), (1, 1)])
def test_a_network_that_is_sure_of_itself_or_has_one_class_is_judged_by_finite_numbers(classes, sure, labelled):
    model, x = small(torch.float32, num_classes=classes), images(8, dtype=torch.float32)
    with torch.no_grad():
        model.head.weight *= sure
        target = model(x).argmax(1)
    full = {name: unit.width for name, unit in start_chain(model).units.items()}
    found = measure_rises(model, [(x, target)], full, {name: [0] for name in full}, num_images=8, labels=labelled)
    assert all(isfinite(rise[0]) for rise in found.values())
    assert max(rise[0] for rise in found.values()) > 0
    net = stratify(model, [(x, target)], num_images=8, labels=labelled, max_saving=0.5, say=lambda _: None)
    assert net.chain.macs_at(-1) <= net.chain.macs / 2


@pytest.mark.parametrize("init_values", [None, 1e-2])
def test_a_measured_chain_keeps_more_than_taylor_importance_and_than_an_even_cut(init_values):
    """On networks that learnt with decay or LayerScale, where |G F| without compensation orders sub-layers wrongly."""
    model, data, x = trained(init_values), [digits()[0][:256]], digits()[0][1400:]
    options = {"num_images": 256, "width_multiple": 1, "say": lambda _: None}
    measured, even = stratify(model, data, **options), stratify(model, data, even=True, **options)
    start = start_chain(model, width_multiple=1)
    curves = taylor_curves(measured.model, data, start.widths(0), num_images=256)
    taylor = SuperNet(measured.model, grow(start, curves, 0.875), measured.compensations)

    def divergence(net: SuperNet) -> float:
        with torch.no_grad():
            wanted, found = model(x).log_softmax(1), net.extract(macs=0.25)(x).log_softmax(1)
        return torch.nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True).item()

    assert divergence(measured) < 0.7 * divergence(taylor)
    assert divergence(measured) < divergence(even)
    small_one = measured.extract(macs=0.25, compensate="means")
    with torch.no_grad():
        means = (small_one(x) - model(x)).square().mean()
        regression = (measured.extract(macs=0.25)(x) - model(x)).square().mean()
    assert regression < 0.3 * means


def test_noise_alone_does_not_give_measured_widths_up():
    """Of networks that diverge as much as even ones, on 64 images whose divergences have a long tail."""
    generator = torch.Generator().manual_seed(0)
    given_up = 0
    for _ in range(200):
        shared = torch.randn(1, 64, generator=generator)
        one, other = ((0.8 * shared + torch.randn(12, 64, generator=generator)).exp() for _ in range(2))
        given_up += bool(worse(one, other).any())
    assert given_up <= 20
    assert worse(other + 0.1, other).all()
    assert abs(log_ratio(2 * other, other) - math.log(2)) < 1e-6


def test_every_round_and_the_comparison_have_images_of_their_own():
    x, labels = images(20, dtype=torch.float32), torch.arange(20)
    kept = first_batches(iter([(x[:3], labels[:3]), (x[3:15], labels[3:15]), (x[15:], labels[15:]), (x, labels)]), 16)
    assert len(kept) == 3
    found = portions(kept, 4)
    numbers = [torch.cat([batch[1] for batch in portion]).tolist() for portion in found]
    assert numbers == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15], [16, 17, 18, 19]]
    assert torch.equal(torch.cat([batch[0] for portion in found for batch in portion]), x)
    assert in_turn([[1], [2], [3]], 5) == [[1], [2], [1], [2], [3]]
    assert in_turn([[1]], 3) == [[1]] * 3
    assert [len(batch) for batch in portions([x[:3]], 4)[0]] == [3]
    assert [len(part) for part in portions([x], 8)] == [1, 1]


def test_an_importance_that_is_not_finite_is_refused():
    chain, curves = random_case(9)
    curves["blocks.1.mlp"][3] = float("inf")
    with pytest.raises(VitrimError, match=r"the importance of blocks\.1\.mlp is not finite"):
        grow(chain, curves, 0.5)


def test_draws_are_the_same_everywhere_and_reach_every_network():
    assert [draw("sandwich", 9, 5, step) for step in range(20)] == [draw("sandwich", 9, 5, step) for step in range(20)]
    drawn = {rule: {index for step in range(300) for index in draw(rule, 5, 0, step).values()} for rule in RULES}
    assert drawn["sandwich"] == drawn["uniform"] == {0, 1, 2, 3, 4}
    assert drawn["original"] == {0, 1, 2, 3}
    steps = [draw("sandwich", 5, 0, step) for step in range(20)]
    assert all((found["full"], found["smallest"]) == (0, 4) for found in steps)
    assert draw("original", 1, 0, 0) == {"random": 0}
    with pytest.raises(UnknownNameError, match="sandwich"):
        draw("sandwitch", 5, 0, 0)


def test_cost_of_the_full_network_is_the_cost_of_the_model():
    chain, whole = start_chain(small()), cost(small())
    assert (chain.macs, chain.macs_linear_only, chain.params) == (whole.macs, whole.macs_linear_only, whole.params)
