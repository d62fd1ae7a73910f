"""Extraction: masking, slicing and stock blocks agree; regression makes up for what is lost; reductions go on top."""

import copy

import numpy as np
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
from vitrim.errors import DataError, ScoreError, UnknownNameError, UnsupportedModelError, VitrimError
from vitrim.models import RemovedBranch, narrow
from vitrim.models.widths.compensation import Compensation, Moments, cholesky


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
        small_one = net.cut(index, compensate="none")
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
        for use in (
            lambda: net.cut(1),
            lambda: net.extract(macs=0.7),
            lambda: vitrim.attach(model, None, cls_only=True),
        ):
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
    hints = {(48, 48, 3): "permute", (1, 48, 48): "give 3 channels", (3, 40, 40): "resize them"}
    for size, hint in hints.items():
        with pytest.raises(DataError, match=rf"are of size .*, but the model takes \(3, .*{hint}"):
            vitrim.stratify(model, [torch.randn(4, *size)])
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


def inputs_of(model, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What enters the last projections of block 1, tokens in rows."""
    kept = {}
    block = model.blocks[1]
    for name, layer in (("blocks.1.attn", block.attn.proj), ("blocks.1.mlp", block.mlp.fc2)):
        hook = layer.register_forward_pre_hook(lambda module, args, name=name: kept.update({name: args[0]}))
        model(x)
        hook.remove()
    return {name: value.detach().flatten(0, 1) for name, value in kept.items()}


def columns_kept(name: str, width: int) -> list[int]:
    """Inputs of the last projection that a width keeps: leading dims of each of 3 heads of 16, or leading units."""
    return [head * 16 + dim for head in range(3) for dim in range(width)] if "attn" in name else list(range(width))


@pytest.mark.parametrize("ridge", [1e-9, 0.1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["blocks.1.attn", "blocks.1.mlp"])
def test_a_compensation_is_the_ridge_regression_of_the_lost_inputs_on_the_kept_ones(name, bias, ridge):
    """Reference: least squares in NumPy on the tokens themselves, the ridge as rows of data of their own."""
    model, x = small(proj_bias=bias), images(16)
    a = inputs_of(model, x)[name]
    weights = torch.rand(len(a), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    layer = model.get_submodule(name)
    last = layer.proj if "attn" in name else layer.fc2
    order = torch.tensor([head * 16 + dim for dim in range(16) for head in range(3)]) if "attn" in name else slice(None)
    moments = Moments.zeros(a.shape[1], a.device)
    moments.add(a[:40][:, order], weights[:40])
    moments.add(a[40:][:, order], weights[40:])
    compensation = Compensation(moments.mean, moments.factor(ridge, centred=bias))
    for width in (1, 5, 13):
        cut_one = copy.deepcopy(model)
        narrow(cut_one, {name: width}, {name: compensation})
        kept = columns_kept(name, width)
        lost = [column for column in range(a.shape[1]) if column not in kept]
        w, rows = (weights / weights.sum()).sqrt().numpy()[:, None], a.numpy()
        mean = np.average(rows, axis=0, weights=weights.numpy()) if bias else np.zeros(rows.shape[1])
        centred = w * (rows - mean)
        size = ridge * (centred**2).sum() / rows.shape[1]
        padded = np.vstack([centred[:, kept], size**0.5 * np.eye(len(kept))])
        goal = np.vstack([centred[:, lost], np.zeros((len(kept), len(lost)))])
        solution = np.linalg.lstsq(padded, goal, rcond=None)[0]
        full = last.weight.detach().numpy()
        expected = full[:, kept] + full[:, lost] @ solution.T
        found = cut_one.get_submodule(name)
        found = found.proj if "attn" in name else found.fc2
        np.testing.assert_allclose(found.weight.detach().numpy(), expected, rtol=1e-4, atol=1e-6)
        if bias:
            shift = last.bias.detach().numpy() + full @ mean - expected @ mean[kept]
            np.testing.assert_allclose(found.bias.detach().numpy(), shift, rtol=1e-4, atol=1e-6)
        if ridge < 1e-6:
            error = ((centred @ full.T - centred[:, kept] @ expected.T) ** 2).sum()
            unexplained = compensation.unexplained(last.weight[:, order])[len(kept)].item()
            assert unexplained == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("constant", [0.7, 1e-12, 0.0])
def test_layers_whose_inputs_never_change_have_a_factor(constant):
    """All that their spread holds is rounding, which may be negative."""
    x = torch.full((1000, 8), constant)
    spread = (x.T @ x / 1000).double() - torch.full((8, 8), constant, dtype=torch.float64) ** 2
    for rounding in (0.0, -1e-9, 1e-9):
        factor = cholesky(spread + rounding, 1e-3)
        assert factor.isfinite().all()
        assert (factor.diagonal() > 0).all()


def test_a_network_with_an_mlp_that_always_gives_the_same_is_stratified():
    model = small()
    fc1 = model.blocks[1].mlp.fc1
    with torch.no_grad():
        fc1.weight.zero_()
        fc1.bias.fill_(0.7)
    net = stratify(model, [images(16)], num_images=16, rounds=1, say=lambda _: None)
    assert net.extract(macs=0.6)(images(2)).isfinite().all()


@pytest.mark.parametrize("name", ["blocks.1.attn", "blocks.1.mlp"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_removed_sublayer_leaves_its_mean_output(name, bias):
    model, x = small(proj_bias=bias), images(16)
    full = output_of_layer(model, name, x)
    removed = copy.deepcopy(model)
    a = inputs_of(model, x)[name]
    order = [head * 16 + dim for dim in range(16) for head in range(3)] if "attn" in name else slice(None)
    narrow(removed, {name: 0}, {name: Compensation(a.mean(0)[order])})
    torch.testing.assert_close(removed.get_submodule(name).bias, full.mean((0, 1)), rtol=1e-10, atol=1e-10)


def test_images_that_say_nothing_are_refused_and_few_are_warned_of():
    model, lines = small(), []
    with pytest.raises(DataError, match="the images are all the same"):
        stratify(model, [images(1).expand(6, -1, -1, -1)], say=quiet)
    stratify(model, [images(4)], say=lines.append)
    assert lines[-1] == "warning: 68 tokens are few for a regression of 192 units; give more images"
    with torch.no_grad():
        model.head.weight.zero_()
    with pytest.raises(VitrimError, match="do not depend on any sub-layer"):
        stratify(model, [images(4)], say=quiet)


def test_regression_keeps_more_than_means_and_means_more_than_nothing():
    model, x = small(), images(64)
    net = stratify(model, [x], num_images=64, even=True, say=quiet)
    full = net.model(x)
    errors = [
        (net.extract(macs=0.6, compensate=each)(x) - full).square().mean().item()
        for each in ("regression", "means", "none")
    ]
    assert errors == sorted(errors)
    assert errors[0] < 0.9 * errors[1]
    with pytest.raises(UnknownNameError, match="did you mean means"):
        net.extract(macs=0.6, compensate="mean")


def test_budgets_are_met_within_one_group(net):
    full = vitrim.cost(net.model)
    for budget in (0.9, 0.7, 0.5):
        found = vitrim.cost(net.extract(macs=budget))
        largest_group = max(unit.macs * unit.step for unit in net.chain.units.values())
        assert budget * full.macs - largest_group <= found.macs <= budget * full.macs
    assert vitrim.cost(net.extract(params=0.8)).params <= 0.8 * full.params
    assert vitrim.cost(net.extract(macs=full.macs * 0.8)).macs <= full.macs * 0.8


BUDGETS = [
    ({}, "give exactly one budget"),
    ({"macs": 0.5, "params": 0.5}, "give exactly one budget"),
    ({"macs": 0.5, "latency": 1}, "give exactly one budget"),
    *(({"macs": most}, "macs is a fraction in") for most in (0, -1, float("nan"), "0.5", True)),
    *(
        ({"latency": most}, "latency is a fraction in")
        for most in (0, "0ms", "0.5", "0s", "1.2.3ms", ".ms", float("nan"), float("inf"), True, [0.5])
    ),
]


@pytest.mark.parametrize(("budget", "message"), BUDGETS)
def test_wrong_budgets_are_refused(net, budget, message):
    with pytest.raises(VitrimError, match=message):
        net.extract(**budget)


def test_impossible_budget_names_the_smallest_possible(net):
    with pytest.raises(VitrimError, match=f"{net.chain.macs_at(-1):,}"):
        net.extract(macs=0.01)
    with pytest.raises(VitrimError, match=r"macs is 70, a count that no model has; write .*, such as 0\.7"):
        net.extract(macs=70)


def test_deit_b_meets_a_budget():
    model = timm.create_model("deit_base_patch16_224").eval()
    chain = start_chain(model)
    curves = {name: torch.linspace(1, 0, unit.width + 1) for name, unit in chain.units.items()}
    net = SuperNet(model, grow(chain, curves, 0.5))
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
    torch.testing.assert_close(bare.cut(2)(x), net.cut(2, compensate="none")(x), rtol=0, atol=0)


class OwnMlp(Mlp):
    """An MLP that no table knows."""


def test_a_sublayer_of_an_unknown_class_is_refused_by_its_name():
    with pytest.raises(UnsupportedModelError, match=r"^the width of blocks\.0\.mlp cannot be cut: .*OwnMlp"):
        stratify(small(mlp_layer=OwnMlp), [images(2)], say=quiet)


def test_norms_behind_the_branches_forbid_other_widths():
    model = timm.create_model(
        "eva02_enormous_patch14_clip_224", img_size=28, depth=1, embed_dim=48, num_heads=3, num_classes=5
    )
    with pytest.raises(UnsupportedModelError, match="their norms follow attention and MLP"):
        stratify(model, [torch.randn(2, 3, 28, 28)], say=quiet)


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
