"""Whole rotary pairs of queries and keys: against masked networks, slow loops in float64, and least squares."""

import copy
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eva_models
import hf_models
import vitrim
from test_contract import Case, agrees_with_reference
from vitrim.elastic import ORDERINGS, SuperNet, pair_sums, stratify
from vitrim.elastic.chain import Chain, start_chain
from vitrim.elastic.growth import grow_evenly
from vitrim.elastic.pair_rule import _kept, pair_errors
from vitrim.elastic.piad import Piad, Stratifier
from vitrim.elastic.sampler import narrowed
from vitrim.elastic.statistics import HeadSums, collect
from vitrim.elastic.wpac import wpac
from vitrim.errors import CheckpointError, UnsupportedModelError
from vitrim.models import BlockWidths, adapter_of, load, narrow, set_widths, widths_of
from vitrim.models.widths.compensation import Compensation
from vitrim.models.widths.elastic_pairs import query_dim, value_dim
from vitrim.models.widths.rotary_pairs import PairRule
from zoo import images, predicted, redrawn

MODELS = {**eva_models.EVA, **eva_models.MORE, "hf_dinov3": hf_models.MORE["dinov3"]}
# One layer for all streams with biases of its own, of the layer, or none; tables of each head's own; groups of heads.
NAMES = ["eva02", "dinov3", "mixed", "grouped_plain", "eva", "hf_dinov3", "qkv_bias_separate"]


def _model(name: str) -> Any:
    return redrawn(MODELS[name]()).double().eval()


def _net(model: nn.Module, x: Tensor, **options: Any) -> SuperNet:
    options = {"rounds": 1, "even": True, "max_saving": 0.7, "width_multiple": 4, **options}
    return stratify(model, [x], num_images=len(x), say=lambda _: None, **options)


def _attentions(model: Any) -> list[Any]:
    blocks = adapter_of(model).blocks(model)
    return [getattr(block, "attn", None) or block.attention for block in blocks]


def _rows(attn: Any, stream: int) -> list[Tensor]:
    """Weights and biases of the queries (0) or keys (1) of a stock layer, as views (heads, dims, ...)."""
    heads = attn.num_heads if stream == 0 else getattr(attn, "num_kv_heads", attn.num_heads)
    if getattr(attn, "qkv", None) is None:
        parts = [(attn.q_proj, attn.k_proj)[stream]]
    else:
        parts = [attn.qkv]
    first = stream * heads * attn.head_dim if parts[0] is getattr(attn, "qkv", None) else 0
    last = first + heads * attn.head_dim
    found = [each.data[first:last].view(heads, attn.head_dim, -1) for part in parts for each in part.parameters()]
    if stream == 0 and getattr(attn, "q_bias", None) is not None:
        found.append(attn.q_bias.data.view(heads, attn.head_dim, 1))
    return found


def _dims(attn: Any, pair: int) -> tuple[int, int]:
    half = getattr(attn, "rotate_half", True)  # The layers of transformers have no such word: theirs lie in halves.
    return (pair, pair + attn.head_dim // 2) if half else (2 * pair, 2 * pair + 1)


def _masked(net: SuperNet, widths: dict[str, int], with_scales: bool = False) -> Any:
    """The full network with queries of lost pairs and columns of lost values set to zero, one by one."""
    model: Any = copy.deepcopy(net.model)
    for name, attn in zip([n for n in widths if "att" in n.rpartition(".")[2]], _attentions(model), strict=True):
        rule, width = attn.vitrim_rule, widths[name]
        groups = attn.num_heads // len(rule.order)
        for head in range(attn.num_heads):
            order = rule.order[head // groups]
            scales = None
            if with_scales and rule.pairs[width] < len(order):
                scales = net.compensations[name].pair_scales(rule.pairs[width])[head]
            for place, pair in enumerate(order):
                kept = place < rule.pairs[width]
                factor = 0.0 if not kept else 1.0 if scales is None else float(scales[place])
                for dim in _dims(attn, pair):
                    for rows in _rows(attn, 0):
                        rows[head, dim] *= factor
        if not with_scales:
            last = getattr(attn, "proj", None) or attn.o_proj
            last.weight.data.view(len(last.weight), attn.num_heads, -1)[:, :, rule.values[width] :] = 0
    return model


def _attention_widths(net: SuperNet, width: int) -> dict[str, int]:
    full = {name: unit.width for name, unit in net.chain.units.items()}
    return {name: width if net.chain.units[name].rule else full[name] for name in full}


@pytest.mark.parametrize("name", NAMES)
def test_narrow_networks_equal_the_full_one_with_masked_pairs(name: str, tmp_path: Path) -> None:
    model, x = _model(name), images(16, dtype=torch.float64)
    before = predicted(model, x)
    net = _net(model, x)
    assert all(unit.rule is not None for part, unit in net.chain.units.items() if not part.endswith("mlp"))
    torch.testing.assert_close(predicted(net.model, x), before, rtol=0, atol=1e-10)
    with net.at(0) as full:  # The rule keeps everything at the full width.
        torch.testing.assert_close(predicted(full, x), before, rtol=0, atol=1e-10)
    for width in (widths_of(model)[0].head_dim - 3, 4, 1):
        widths = _attention_widths(net, width)
        expected = predicted(_masked(net, widths), x)
        small = copy.deepcopy(net.model)
        narrow(small, widths)
        torch.testing.assert_close(predicted(small, x), expected, rtol=0, atol=1e-11)
        with narrowed(net.model, widths):
            torch.testing.assert_close(predicted(net.model, x), expected, rtol=0, atol=1e-11)
        assert any(query_dim(attn) < attn.head_dim for attn in _attentions(small))
    assert all(2 * attn.kept_pairs.shape[1] == query_dim(attn) == 2 for attn in _attentions(small))
    net.save(tmp_path)
    again = SuperNet.load(tmp_path)
    assert again.chain.units == net.chain.units
    for index in (len(net.chain) // 2, -1):
        ours, theirs = net.cut(index).float(), again.cut(index).float()
        torch.testing.assert_close(predicted(theirs, x.float()), predicted(ours, x.float()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["eva02", "dinov3", "grouped_plain", "hf_dinov3"])
def test_pairs_that_stay_make_up_for_the_lost_ones(name: str) -> None:
    """Running, extracted, and the full network with scaled queries: one answer."""
    model, x = _model(name), images(16, dtype=torch.float64)
    net = _net(model, x)
    widths = _attention_widths(net, 8)
    pairs_only = copy.deepcopy(net.model)
    for attn in _attentions(pairs_only):
        rule = attn.vitrim_rule
        attn.vitrim_rule = PairRule(rule.order, tuple(range(attn.head_dim + 1)), rule.pairs)
    expected = predicted(_masked(net, widths, with_scales=True), x)
    assert net.compensations is not None
    values = {part: Compensation(torch.zeros_like(each.mean), None, each.pairs)
              for part, each in net.compensations.items()}  # fmt: skip
    with narrowed(pairs_only, widths, values):
        running = predicted(pairs_only, x)
    small = copy.deepcopy(pairs_only)
    narrow(small, widths, values)
    torch.testing.assert_close(predicted(small, x), running, rtol=0, atol=1e-11)
    for attn, own in zip(_attentions(small), _attentions(pairs_only), strict=True):  # All dims of the values are back.
        assert value_dim(attn) == 8 < own.head_dim
    for attn in _attentions(pairs_only):
        attn.vitrim_rule = PairRule(
            attn.vitrim_rule.order, (0, *[attn.head_dim] * attn.head_dim), attn.vitrim_rule.pairs
        )
    with narrowed(pairs_only, widths, values):
        torch.testing.assert_close(predicted(pairs_only, x), expected, rtol=0, atol=1e-6)  # Factors are in float32.


@pytest.mark.parametrize(("name", "queries"), [("eva02", 64), ("grouped_plain", 7), ("hf_dinov3", 32)])
def test_sums_of_pairs_equal_derivatives_of_the_output(name: str, queries: int, monkeypatch: Any) -> None:
    """What leaving a part of the logits out changes to first order, by automatic differentiation of slow attention."""
    monkeypatch.setattr(pair_sums, "QUERIES", queries)
    model, x = _model(name), images(2, dtype=torch.float64)
    layer = next(part for part, unit in start_chain(model).units.items() if not part.endswith("mlp"))
    attn = model.get_submodule(layer)
    seen: dict[str, Tensor] = {}
    with vitrim.models.widths.sublayers.elastic(model) as layers:
        inside: Any = layers[layer]

        def tap(part: str, tensor: Tensor, *behind: Tensor) -> None:
            if part == "mixed":
                tensor.retain_grad()
                seen.update(zip(("mixed", "query", "key", "value"), (tensor, *behind), strict=True))

        inside.vitrim_tap = tap
        out = predicted(model, x)
        (out.max(1).values.sum() if adapter_of(model).classifier(model).classes else out.square().sum()).backward()
    gradient = seen["mixed"].grad
    assert gradient is not None
    size = gradient.square().sum(-1)
    weight = 1 + size / size.mean(1, keepdim=True)
    tokens = weight.shape[1]
    if queries < tokens:  # CLS for itself, and others, which stand for their neighbours.
        rows = [round(place * (tokens - 1) / (queries - 1)) for place in range(queries)]
        chosen = torch.zeros(tokens, dtype=torch.float64)
        chosen[rows] = (tokens - 1) / (queries - 1)
        chosen[0] = 1
        weight = weight * chosen
    query, key, value = (seen[part].detach() for part in ("query", "key", "value"))
    last = getattr(attn, "proj", None) or attn.o_proj
    heads, pairs = attn.num_heads, attn.head_dim // 2
    columns = last.weight.detach().view(len(last.weight), heads, -1)
    expected = torch.zeros(heads, pairs, pairs, dtype=torch.float64)
    for image in range(len(x)):
        for head in range(heads):
            changes = []
            for pair in range(pairs):
                dims = list(_dims(attn, pair))
                part = query[image, head][:, dims] @ key[image, head][:, dims].mT / attn.head_dim**0.5
                logits = query[image, head] @ key[image, head].mT / attn.head_dim**0.5

                def mixed(logits: Tensor, values: Tensor = value[image, head]) -> Tensor:
                    return logits.softmax(-1) @ values

                change = torch.func.jvp(mixed, (logits,), (part,))[1]
                changes.append(change @ columns[:, head].mT)
            made = torch.stack(changes)
            expected[head] += torch.einsum("itc,t,jtc->ij", made, weight[image], made)
    sums = collect(model, [x], num_images=2)[layer]
    assert isinstance(sums, HeadSums)
    assert sums.pairs is not None
    torch.testing.assert_close(sums.pairs.moments_Hpp, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sums.pairs.weight, weight.sum(), rtol=1e-9, atol=0)


def test_scales_are_those_of_least_squares_and_errors_what_they_leave() -> None:
    dice = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 50, 6, dtype=torch.float64, generator=dice)
    rows = rows @ torch.randn(6, 6, dtype=torch.float64, generator=dice)
    factors = torch.linalg.cholesky(rows.mT @ rows)
    errors = pair_errors(factors)
    assert errors[-1] == 0
    for kept in (1, 3, 5):
        scales = Compensation(torch.zeros(1), None, factors).pair_scales(kept)
        left = 0.0
        for head in range(2):
            found = torch.linalg.lstsq(rows[head][:, :kept], rows[head].sum(1, keepdim=True)).solution[:, 0]
            torch.testing.assert_close(scales[head], found, rtol=1e-7, atol=1e-9)
            left += (rows[head].sum(1) - rows[head][:, :kept] @ found).square().sum().item()
        assert errors[kept].item() == pytest.approx(left, rel=1e-9)


@pytest.mark.parametrize("multiple", [1, 4, 8])
def test_the_rule_cuts_what_costs_least_error_in_blocks(multiple: int) -> None:
    falling = [float(left) for left in range(16, -1, -1)]
    cheap, dear = [each * 1e-3 for each in falling[::2]], [each * 10 for each in falling[::2]]
    kept = _kept(falling, cheap, multiple)  # 16 dims of values, 8 pairs of 2 dims.
    assert (kept[0], kept[9], kept[-1]) == ((0, 0), (16, 1), (16, 8))
    assert all(values == 16 for values, _ in kept[9:])
    by_values = _kept(falling, dear, multiple)
    assert all(pairs == 8 for _, pairs in by_values[9:])
    assert by_values[1] == (1, 1)
    for table in (kept, by_values, _kept(falling, [each * 0.6 for each in falling[::2]], multiple)):
        for width, ((values, pairs), (wider, more)) in enumerate(pairwise(table)):
            assert values <= wider
            assert pairs <= more
            assert width == 0 or values + 2 * pairs <= max(2 * width, 3)
            if width % multiple == 0 and min(values, pairs) > 1:
                assert values % multiple == pairs % max(1, multiple // 2) == 0
    # A pair of two dims goes before them only if it costs less than half as much.
    even = _kept(falling, [each * 0.51 * 2 for each in falling[::2]], 2)
    assert even[15] == (14, 8)


def test_networks_are_nested_and_cost_what_runs() -> None:
    model, x = _model("dinov3"), images(16, dtype=torch.float64)
    net = _net(model, x, max_saving=0.8)
    before: list[set[int]] = []
    for index in range(len(net.chain)):
        small = net.cut(index, compensate="none")
        cost = vitrim.cost(small)
        assert (cost.macs, cost.params) == (net.chain.macs_at(index), net.chain.params_at(index))
        assert cost.macs_linear_only == net.chain.macs_linear_only_at(index)
        attn: Any = _attentions(small)[0]
        if not hasattr(attn, "head_dim"):
            break
        now = [set(each) for each in getattr(attn, "kept_pairs", torch.arange(6).expand(3, -1)).tolist()]
        assert not before or all(few <= many for few, many in zip(now, before, strict=True))
        before = now
    assert [len(each) < 6 for each in before] == [True] * 3


@pytest.mark.parametrize("name", ["eva02", "dinov3", "mixed", "grouped_plain", "hf_dinov3"])
def test_reductions_work_on_heads_that_lost_pairs(name: str) -> None:
    net = _net(_model(name), images(16, dtype=torch.float64))
    small = net.cut(len(net.chain) // 2)
    assert any(query_dim(attn) < attn.head_dim for attn in _attentions(small) if hasattr(attn, "head_dim"))
    for reducer, place in ((vitrim.TopK(fuse="sum"), "inside"), (vitrim.ToMe(), "before")):
        agrees_with_reference(small, reducer, Case(reducer).cuts(0, 1, place=place))


@pytest.mark.parametrize("name", ["grouped", "qk_norm"])
def test_under_a_norm_all_pairs_stay(name: str) -> None:
    model, x = _model(name), images(16, dtype=torch.float64)
    net = _net(model, x)
    assert all(unit.rule is None for unit in net.chain.units.values())
    attn = next(attn for attn in _attentions(net.cut(-1)) if hasattr(attn, "head_dim"))
    assert query_dim(attn) == attn.head_dim > value_dim(attn)
    dims = widths_of(model)[0].head_dim
    with pytest.raises(UnsupportedModelError, match=rf"a norm of its queries .* give query_dim={dims}"):
        set_widths(model, [BlockWidths(dims, 8, 5, 4)] * 3)


def test_odd_or_no_dims_of_queries_are_refused() -> None:
    model = _model("dinov3")
    for queries, values in ((5, 5), (0, 5), (4, 0)):
        with pytest.raises(UnsupportedModelError, match=r"whole pairs of dims, at least one"):
            set_widths(model, [BlockWidths(12, 8, values, queries)] * 3)


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_every_ordering_orders_pairs(ordering: str) -> None:
    model, x = _model("grouped_plain"), images(8, dtype=torch.float64)
    net = _net(model, x, ordering=ordering)
    orders = [unit.rule.order for unit in net.chain.units.values() if unit.rule is not None]
    assert [len(order) for order in orders] == [2, 2, 2]
    assert all(sorted(each) == list(range(6)) for order in orders for each in order)
    if ordering == "magnitude":
        attn = _attentions(net.model)[0]
        query, key = (torch.cat(_rows(attn, stream)[:1]).square().sum(-1).view(2, -1, 12).sum(1) for stream in (0, 1))
        size = (query[:, :6] + query[:, 6:]) * (key[:, :6] + key[:, 6:])
        assert [list(each) for each in orders[0]] == size.argsort(1, descending=True).tolist()


def test_a_layer_that_was_cut_is_cut_again_by_what_is_left() -> None:
    model, x = _model("dinov3"), images(16, dtype=torch.float64)
    once = _net(model, x, max_saving=0.3)
    first = once.cut(-1)
    twice = _net(first, x)
    torch.testing.assert_close(predicted(twice.cut(0), x), predicted(first, x), rtol=0, atol=1e-10)
    second = twice.cut(-1)
    bare = twice.cut(-1, "none")
    with twice.at(-1) as running:
        torch.testing.assert_close(predicted(bare, x), predicted(running, x), rtol=0, atol=1e-11)
    for old, new in zip(_attentions(first), _attentions(second), strict=True):
        if hasattr(new, "kept_pairs"):
            kept = [set(each) for each in getattr(old, "kept_pairs", torch.arange(6).expand(3, -1)).tolist()]
            assert all(set(few) <= many for few, many in zip(new.kept_pairs.tolist(), kept, strict=True))


def test_both_libraries_give_one_super_network() -> None:
    theirs = redrawn(hf_models.MORE["dinov3"]()).eval()
    ours, x = vitrim.models.convert(theirs, to="timm").eval(), images(16)
    one, other = (_net(model, x) for model in (ours, theirs))
    torch.testing.assert_close(predicted(ours, x), predicted(theirs, x), rtol=1e-4, atol=1e-4)
    for ours_unit, theirs_unit in zip(one.chain.units.values(), other.chain.units.values(), strict=True):
        assert ours_unit.rule == theirs_unit.rule
    for index in (len(one.chain) // 2, -1):
        torch.testing.assert_close(predicted(one.cut(index), x), predicted(other.cut(index), x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["dinov3", "hf_dinov3"])
def test_a_network_that_lost_pairs_alone_is_not_converted(name: str) -> None:
    model = _model(name)
    set_widths(model, [replace(full, query_dim=4) for full in widths_of(model)])
    with pytest.raises(UnsupportedModelError, match=r"widths of this .* were cut"):
        vitrim.models.convert(model, to="timm" if name == "hf_dinov3" else "transformers")


def test_training_goes_on_with_the_same_pairs() -> None:
    model, x = redrawn(MODELS["dinov3"]()), images(16)
    wpac(model, [x], num_images=16, width_multiple=4, say=lambda _: None)
    config = Piad(grow_epochs=1, num_images=16, probe_images=8, max_saving=0.6, labels=False, width_multiple=4)
    with Stratifier(model, config) as stratifier:
        stratifier.start_epoch(0, [x])
        for term in stratifier.losses(x[:2], torch.tensor([1, 2]), step=0):
            term.loss.backward()
        state = stratifier.state_dict()
    net = stratifier.finish()
    other = redrawn(MODELS["dinov3"]())
    other.load_state_dict(model.state_dict())
    resumed = Stratifier(other, config)
    with resumed:
        resumed.load_state_dict(json.loads(json.dumps(state)))
    small = net.cut(-1)
    assert any(query_dim(attn) < 12 for attn in _attentions(small) if hasattr(attn, "head_dim"))
    torch.testing.assert_close(predicted(resumed.finish().cut(-1), x), predicted(small, x))


def test_folders_that_name_wrong_pairs_are_refused(tmp_path: Path) -> None:
    model: Any = _model("dinov3").float()
    set_widths(model, [BlockWidths(12, 8, 5, 4)] * 3)
    for wrong in (6, -1, 0):
        broken = copy.deepcopy(model)
        broken.blocks[1].attn.kept_pairs[1, 1] = wrong
        vitrim.save(broken, tmp_path / "model", overwrite=True)
        with pytest.raises(CheckpointError, match=r"names rotary pairs that blocks\.1\.attn does not have"):
            load(tmp_path / "model")
    net = _net(_model("dinov3").float(), images(16))
    net.save(tmp_path / "net")
    raw = json.loads((tmp_path / "net" / "chain.json").read_text())
    assert raw["schema"] == 5
    for key, value in (("order", [[0, 0, 1, 2, 3, 4]] * 3), ("pairs", [0] * 13), ("values", [0, 1]), ("order", 3),
                       ("pairs", ["a"] * 13)):  # fmt: skip
        chain = copy.deepcopy(raw)
        chain["units"]["blocks.0.attn"]["rule"][key] = value
        (tmp_path / "net" / "chain.json").write_text(json.dumps(chain))
        with pytest.raises(CheckpointError, match=r"stratify again|not a chain of sub-networks|does not cost"):
            SuperNet.load(tmp_path / "net")


def test_super_networks_without_rules_keep_their_pairs() -> None:
    """Chains that older versions wrote know no rules: their networks lose dims of the values alone, as before."""
    model, x = _model("dinov3"), images(16, dtype=torch.float64)
    old = start_chain(model, width_multiple=4)
    raw = json.loads(grow_evenly(old, 0.4).to_json()) | {"schema": 4}
    for unit in raw["units"].values():
        for name in ("rule", "pair_macs", "pair_macs_linear_only", "pair_params"):
            unit.pop(name)
    chain = Chain.from_json(json.dumps(raw))
    ordered = _net(model, x)
    small = SuperNet(copy.deepcopy(ordered.model), chain).cut(-1)
    assert all(query_dim(attn) == 12 > value_dim(attn) for attn in _attentions(small) if hasattr(attn, "head_dim"))
