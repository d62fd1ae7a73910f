"""Extraction: masking, slicing and stock blocks agree; means make up for what is lost; reductions go on top."""

import copy

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vitrim
from elastic_models import VARIANTS, images, small, variants
from vitrim.elastic import SuperNet, stratify
from vitrim.elastic.chain import start_chain
from vitrim.elastic.extract import cut
from vitrim.elastic.growth import grow
from vitrim.elastic.sampler import narrowed
from vitrim.errors import DataError, ScoreError, UnsupportedModelError, VitrimError
from vitrim.models import RemovedBranch, narrow


def quiet(_: str) -> None:
    """Swallow what would be printed."""


def supernet(**options) -> SuperNet:
    return stratify(small(**options), [images(8)], num_images=8, width_multiple=4, max_saving=0.6, rounds=2, say=quiet)


@pytest.fixture(scope="module")
def net() -> SuperNet:
    return supernet()


@variants
def test_slicing_at_run_time_and_extraction_agree_for_every_network(variant):
    net, x = supernet(**VARIANTS[variant]), images(4, seed=9)
    for index in {*range(0, len(net.chain), 7), len(net.chain) - 1}:
        small_one = net.cut(index, compensate=False)
        with net.at(index) as running:
            expected = running(x)
        assert torch.allclose(small_one(x), expected, atol=1e-11, rtol=1e-11)
        assert all(type(block) is Block for block in small_one.blocks)
        assert vitrim.cost(small_one).macs == net.chain.macs_at(index)
        assert vitrim.cost(small_one).params == net.chain.params_at(index)
        assert vitrim.cost(small_one).macs_linear_only == net.chain.macs_linear_only_at(index)


@pytest.mark.parametrize("variant", ["plain", "swiglu", "no_bias"])
def test_masking_and_slicing_agree_for_every_width(variant):
    model, x = small(**VARIANTS[variant]), images(2)
    for name, full in {name: unit.width for name, unit in start_chain(model).units.items()}.items():
        if not name.startswith("blocks.1"):
            continue
        for width in {0, 1, 5, full // 2, full - 1, full}:
            masked = copy.deepcopy(model)
            with torch.no_grad():
                if name.endswith("attn"):
                    masked.blocks[1].attn.qkv.weight.view(3, 3, 16, 48)[:, :, width:] = 0
                    if masked.blocks[1].attn.qkv.bias is not None:
                        masked.blocks[1].attn.qkv.bias.view(3, 3, 16)[:, :, width:] = 0
                else:
                    masked.blocks[1].mlp.fc2.weight[:, width:] = 0
            with narrowed(model, {name: width}):
                assert torch.allclose(model(x), masked(x), atol=1e-12)


def test_every_width_of_stock_attention_keeps_the_softmax_scale():
    model, x = small(), images(2)
    for width in range(0, 17):
        sliced = copy.deepcopy(model)
        narrow(sliced, {"blocks.0.attn": width})
        with narrowed(model, {"blocks.0.attn": width}):
            assert torch.allclose(sliced(x), model(x), atol=1e-12)
        assert width == 0 or sliced.blocks[0].attn.head_dim == width


def test_what_is_cut_is_in_eval_mode():
    net = supernet()
    net.model.train()
    assert not any(module.training for module in net.extract(macs=0.5).modules())
    assert not any(module.training for module in net.cut(-1).modules())


def test_a_running_subnetwork_says_to_leave_its_context_first(net):
    with net.at(-1) as model:
        for use in (lambda: net.cut(1), lambda: net.extract(macs=0.7), lambda: vitrim.attach(model, cls_only=True)):
            with pytest.raises(VitrimError, match="leave that context first"):
                use()
    with pytest.raises(VitrimError, match="there is no network 10000"):
        net.cut(10000)


def tied(what: str):
    model = small()
    if what == "blocks":
        model.blocks[2] = model.blocks[0]
    else:
        model.get_submodule(what).weight = model.blocks[0].get_submodule(what.split(".", 2)[2]).weight
    return model


@pytest.mark.parametrize("what", ["blocks", "blocks.2.mlp.fc1", "blocks.2.norm1"])
def test_shared_parameters_are_refused_by_their_names(what):
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0\..* and blocks\.2\..* are one parameter"):
        stratify(tied(what), [images(2)], say=quiet)


def test_numbers_out_of_range_are_told_before_any_image_is_looked_at():
    def looked_at():
        raise AssertionError("an image was asked for")
        yield

    wrong = {
        "num_images": 4.5, "rounds": 1.5, "width_multiple": 0, "groups": {"mlp": 0}, "max_saving": "0.5",
    }  # fmt: skip
    for name, value in wrong.items():
        with pytest.raises(VitrimError, match=name.removesuffix("s")):
            stratify(small(), looked_at(), say=quiet, **{name: value})


def test_nothing_to_cut_and_nothing_to_look_at_are_told():
    model = small()
    with pytest.raises(DataError, match="a batch holds no images"):
        stratify(model, [images(0), images(4)], say=quiet)
    narrow(model, dict.fromkeys(start_chain(model).units, 0))
    with pytest.raises(VitrimError, match="every sub-layer of this network was removed"):
        stratify(model, [images(2)], say=quiet)


def test_full_network_is_bit_equal(net):
    x = images(3)
    assert torch.equal(net.cut(0)(x), net.model(x))


def test_the_given_model_stays_as_it_was_and_so_does_the_supernet(net):
    model, x = small(), images(2)
    before, weights = model(x), copy.deepcopy(net.model.state_dict())
    stratify(model, [x], num_images=2, rounds=1, say=quiet)
    net.extract(macs=0.7)
    assert torch.equal(model(x), before)
    assert all(torch.equal(value, weights[name]) for name, value in net.model.state_dict().items())


def output_of_layer(model, name: str, x: torch.Tensor) -> torch.Tensor:
    kept = []
    hook = model.get_submodule(name).register_forward_hook(lambda module, args, out: kept.append(out))
    model(x)
    hook.remove()
    return kept[0]


def means_of(model, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Plain means over tokens of what enters the last projections of block 1."""
    kept = {}
    block = model.blocks[1]
    for name, layer in (("blocks.1.attn", block.attn.proj), ("blocks.1.mlp", block.mlp.fc2)):
        hook = layer.register_forward_pre_hook(lambda module, args, name=name: kept.update({name: args[0]}))
        model(x)
        hook.remove()
    return {name: value.detach().mean((0, 1)) for name, value in kept.items()}


def test_means_of_one_layer_give_its_mean_output_back():
    model, x = small(), images(16)
    net = stratify(model, [x], num_images=16, say=quiet)
    plain_means = means_of(net.model, x)
    for name in ("blocks.1.attn", "blocks.1.mlp"):
        for width in (0, 8):
            full = output_of_layer(net.model, name, x)
            outputs = []
            for means in (None, plain_means):
                small_one = copy.deepcopy(net.model)
                narrow(small_one, {name: width}, means)
                outputs.append(output_of_layer(small_one, name, x))
            plain, compensated = outputs
            assert (compensated - full).square().mean() < (plain - full).square().mean()
            if name.endswith("mlp") or width == 0:
                assert (compensated - full).mean((0, 1)).abs().max() < 1e-10 * full.abs().max()


@pytest.mark.parametrize("name", ["blocks.1.attn", "blocks.1.mlp"])
def test_means_stay_where_there_was_no_bias_once_the_sublayer_is_gone(name):
    model, x = small(proj_bias=False), images(16)
    net = stratify(model, [x], num_images=16, say=quiet)
    full = output_of_layer(net.model, name, x)
    removed = copy.deepcopy(net.model)
    narrow(removed, {name: 0}, means_of(net.model, x))
    torch.testing.assert_close(removed.get_submodule(name).bias, full.mean((0, 1)), rtol=1e-10, atol=1e-10)


def test_budgets_are_met_within_one_group(net):
    full = vitrim.cost(net.model)
    for budget in (0.9, 0.7, 0.5):
        found = vitrim.cost(net.extract(macs=budget))
        largest_group = max(unit.macs * unit.step for unit in net.chain.units.values())
        assert budget * full.macs - largest_group <= found.macs <= budget * full.macs
    assert vitrim.cost(net.extract(params=0.8)).params <= 0.8 * full.params
    assert vitrim.cost(net.extract(macs=full.macs * 0.8)).macs <= full.macs * 0.8


BUDGETS = [
    {}, {"macs": 0.5, "params": 0.5}, {"macs": 0}, {"macs": -1}, {"macs": float("nan")}, {"macs": "0.5"},
    {"macs": 0.5, "latency": 1},
    {"latency": 0}, {"latency": "0ms"}, {"latency": "0.5"}, {"latency": "0.5s"}, {"latency": "1.2.3ms"},
    {"latency": float("nan")},
]  # fmt: skip


@pytest.mark.parametrize("budget", BUDGETS)
def test_wrong_budgets_are_refused(net, budget):
    with pytest.raises(VitrimError):
        net.extract(**budget)


def test_impossible_budget_names_the_smallest_possible(net):
    with pytest.raises(VitrimError, match=f"{net.chain.macs_at(-1):,}"):
        net.extract(macs=0.01)


def test_deit_b_meets_a_budget():
    model = timm.create_model("deit_base_patch16_224").eval()
    chain = start_chain(model)
    shares = {name: torch.linspace(1, 0.1, unit.width) for name, unit in chain.units.items()}
    net = SuperNet(model, grow(chain, shares, dict.fromkeys(chain.units, 0.1), 0.5))
    assert 0.58 * chain.macs < vitrim.cost(net.extract(macs=0.6)).macs <= 0.6 * chain.macs


def test_removed_sublayers_cost_nothing_and_cost_agrees_with_the_counter():
    model = small(torch.float32)
    narrow(model, {"blocks.0.attn": 0, "blocks.1.mlp": 0, "blocks.2.attn": 5, "blocks.2.mlp": 17})
    assert isinstance(model.blocks[0].attn, RemovedBranch)
    assert isinstance(model.blocks[1].mlp, RemovedBranch)
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        copy.deepcopy(model).to("meta")(torch.empty(1, 3, 64, 64))
    assert vitrim.cost(model).macs == pytest.approx(counter.get_total_flops() / 2, rel=1e-3)


def test_extracted_network_saves_loads_and_trains(net, tmp_path):
    found, x = net.extract(macs=0.5), images(4)
    vitrim.save(found, tmp_path / "small")
    loaded = vitrim.load(tmp_path / "small")
    assert torch.equal(loaded(x), found(x))
    state = load_file(tmp_path / "small" / "model.safetensors")
    found.load_state_dict(state)
    loaded.train()
    optimizer = torch.optim.SGD(loaded.parameters(), 0.05)
    losses = []
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(loaded(x), torch.tensor([0, 1, 2, 3]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_no_parameter_of_an_extracted_network_is_idle_so_that_data_parallel_training_takes_it():
    for options in ({}, {"proj_bias": False, "qkv_bias": False, "init_values": 0.5}):
        model = small(**options)
        chain = start_chain(model)
        narrow(model, {"blocks.0.attn": 0, "blocks.1.mlp": 0, "blocks.2.attn": 0, "blocks.2.mlp": 0})
        assert not list(model.blocks[0].norm1.parameters())
        model.train()(images(2)).square().sum().backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
        removed = ("blocks.0.attn", "blocks.1.mlp", "blocks.2.attn", "blocks.2.mlp")
        saved = sum(chain.units[name].saved(chain.units[name].width, 0)[1] for name in removed)
        assert vitrim.cost(model).params == chain.params - saved


def test_gradient_hooks_meet_removed_sublayers():
    model = small(torch.float32)
    narrow(model, {"blocks.0.attn": 0, "blocks.1.mlp": 0})
    # The counter knows no formula for the fused attention of a CPU.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(images(1, dtype=torch.float32))
    assert vitrim.cost(model).macs == pytest.approx(counter.get_total_flops() / 2, rel=1e-3)


def test_chain_of_another_model_is_refused(net):
    with pytest.raises(VitrimError, match="another model or input size"):
        cut(small(img_size=96), net.chain, 3)


def test_one_shot_iterators_and_labelled_batches_serve(net):
    batches = ((images(4, seed=seed), torch.arange(4)) for seed in range(3))
    made = stratify(small(), batches, labels=True, num_images=12, rounds=1, groups={"attention": 4}, say=quiet)
    assert made.chain.macs_at(-1) < made.chain.macs
    x, bare = images(2), SuperNet(net.model, net.chain)
    torch.testing.assert_close(bare.cut(2)(x), net.cut(2, compensate=False)(x), rtol=0, atol=0)


class OwnMlp(Mlp):
    """An MLP that no table knows."""


def test_a_sublayer_of_an_unknown_class_is_refused_by_its_name():
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0\.mlp is a OwnMlp, whose width cannot change"):
        stratify(small(mlp_layer=OwnMlp), [images(2)], say=quiet)


ROTARY = {
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 1},
    "vit_small_patch16_dinov3": {"img_size": 32, "depth": 1},
}


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_models_are_refused_by_their_name(name):
    model = timm.create_model(name, embed_dim=48, num_heads=3, **ROTARY[name])
    with pytest.raises(UnsupportedModelError, match=r"no adapter for timm\.models\.eva\.Eva; adapters: timm-vit"):
        stratify(model, [torch.randn(2, *model.pretrained_cfg["input_size"])], say=quiet)


def test_stratify_refuses_an_attached_reduction():
    model = small()
    with vitrim.attach(model, vitrim.TopK(), vitrim.KeepRate(0.5, at=(1,))), pytest.raises(VitrimError, match="remove"):
        stratify(model, [images(2)], say=quiet)


REDUCTIONS = [
    "TopK(cls_attention) @ KeepRate(0.5, at=(1,))",
    "TopK(norm, fuse=mean) @ Stages({1: 0.5})",
    "ToMe @ ConstantR(3)",
]


@pytest.mark.parametrize("text", REDUCTIONS)
def test_reduction_on_top_obeys_the_laws(text):
    model, x = small(), images(4)
    narrow(model, {"blocks.0.attn": 8, "blocks.0.mlp": 40, "blocks.1.attn": 4, "blocks.2.mlp": 0})
    before, macs = model(x), vitrim.cost(model).macs
    keys = list(model.state_dict())
    with vitrim.attach(model, text) as handle:
        reduced = model(x)
        assert vitrim.cost(model).macs < macs
        assert not torch.equal(reduced, before)
        assert torch.allclose(model(x[2:3]), reduced[2:3], atol=1e-12)
        assert [state.size.shape[1] + 1 for state in handle.states] == list(handle.token_counts)
        assert list(model.state_dict()) == keys
        assert torch.allclose(copy.deepcopy(model)(x), reduced, atol=1e-12)
    assert torch.equal(model(x), before)
    assert type(model.blocks[1]) is Block
    with vitrim.attach(model, "TopK(cls_attention) @ Counts([16, 16, 16])"):
        assert torch.equal(model(x), before)


def test_reduction_on_a_block_without_attention():
    model, x = small(), images(4)
    narrow(model, {"blocks.1.attn": 0})
    with vitrim.attach(model, "TopK(norm) @ KeepRate(0.5, at=(1,))") as handle:
        assert handle.token_counts == (17, 9, 9)
        assert model(x).isfinite().all()
    with pytest.raises(ScoreError, match="attention of block 1 was removed"):
        vitrim.attach(model, "TopK(cls_attention) @ KeepRate(0.5, at=(1,))")
    assert type(model.blocks[1]) is Block


def test_extracted_network_exports(net):
    found, x = net.extract(macs=0.5), images(2)
    program = torch.export.export(found, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=16)},))
    more = images(3, seed=4)
    assert torch.allclose(program.module()(more), found(more), atol=1e-12)
