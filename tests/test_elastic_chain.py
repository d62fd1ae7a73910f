"""The chain as data: growing, monotony, budgets, and what it refuses."""

import json
import random
from dataclasses import replace
from itertools import pairwise
from math import isfinite

import pytest
import torch

from elastic_models import images, small
from vitrim import cost, stratify
from vitrim.elastic.chain import Chain, Entry, UnitCost, hash_of, start_chain
from vitrim.elastic.growth import _falling_outwards, grow, grow_evenly
from vitrim.elastic.importance import probe_loss, sensitivities
from vitrim.elastic.sampler import RULES, draw, narrowed
from vitrim.errors import CheckpointError, UnknownNameError, VitrimError


def random_case(seed: int):
    chain = start_chain(small(), width_multiple=2)
    generator = torch.Generator().manual_seed(seed)
    widths = {name: unit.width for name, unit in chain.units.items()}
    shares = {name: torch.rand(width, generator=generator, dtype=torch.float64) for name, width in widths.items()}
    rises = {name: torch.rand((), generator=generator).item() for name in chain.units}
    return chain, shares, rises


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
        assert chain.macs_linear_only_at(index) < chain.macs_at(index)


def test_growing_meets_its_saving_within_one_group():
    chain, shares, rises = random_case(3)
    for saving in (0.1, 0.35, 0.6):
        grown = grow(chain, shares, rises, saving)
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
    chain, shares, rises = random_case(4)
    half = grow(chain, shares, rises, 0.3)
    widths = half.widths(-1)
    more = grow(half, {name: share[: widths[name]] for name, share in shares.items()}, rises, 0.6)
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
    chain, shares, rises = random_case(5)
    useless = "blocks.1.mlp"
    grown = grow(chain, shares, rises | {useless: rise, "blocks.0.attn": 1e-5}, saving=0.5)
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
    with pytest.raises(CheckpointError, match="no chain"):
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
def test_sensitivity_is_measured_by_adding_the_constant_and_nothing_else(labelled):
    model, x = small(), images(6)
    target = torch.tensor([0, 1, 2, 3, 4, 0])
    widths = grow(*random_case(8), saving=0.4).widths(-1)
    found = sensitivities(model, [(x, target)], widths, num_images=6, labels=labelled)
    loss = probe_loss(model, labelled)
    with torch.no_grad():
        full = model(x)
        with narrowed(model, widths):
            base = loss(model(x), target, full)
        for name, rise in found.items():
            with narrowed(model, widths):
                sublayer = model.get_submodule(name)
                constant = (sublayer.proj if "attn" in name else sublayer.fc2).bias
                hook = sublayer.register_forward_hook(lambda m, i, out, c=constant: torch.zeros_like(out) + c)
                assert rise == pytest.approx((loss(model(x), target, full) / base - 1).item(), abs=1e-10)
                hook.remove()
    assert set(found) == {name for name, width in widths.items() if width > 0}
    assert min(found.values()) < max(found.values())


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(("classes", "sure"), [(5, 1000), (1, 1)])
def test_a_network_that_is_sure_of_itself_or_has_one_class_is_judged_by_finite_numbers(classes, sure, labelled):
    model, x = small(torch.float32, num_classes=classes), images(8, dtype=torch.float32)
    with torch.no_grad():
        model.head.weight *= sure
        target = model(x).argmax(1)
    full = {name: unit.width for name, unit in start_chain(model).units.items()}
    found = sensitivities(model, [(x, target)], full, num_images=8, labels=labelled)
    assert all(map(isfinite, found.values()))
    assert max(found.values()) > 0
    net = stratify(model, [(x, target)], num_images=8, labels=labelled, max_saving=0.5, say=lambda _: None)
    assert net.chain.macs_at(-1) <= net.chain.macs / 2


@pytest.mark.parametrize("broken", ["rise", "share"])
def test_worth_that_is_not_finite_is_refused(broken):
    chain, shares, rises = random_case(9)
    if broken == "rise":
        rises["blocks.1.mlp"] = float("nan")
    else:
        shares["blocks.1.mlp"][3] = float("inf")
    with pytest.raises(VitrimError, match=r"the importance of blocks\.1\.mlp is not finite"):
        grow(chain, shares, rises, 0.5)


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
