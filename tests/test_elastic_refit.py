"""Refitting the last projections of a cut network: against least squares on tokens, and what it is good for."""

import copy

import numpy as np
import pytest
import torch

import vitrim
from elastic_models import digits, images, small, trained
from hf_models import HF, MORE
from vitrim.elastic import SuperNet, stratify
from vitrim.elastic.block_tokens import branch_scale
from vitrim.elastic.chain import start_chain
from vitrim.elastic.growth import grow_evenly
from vitrim.elastic.probing import output_of
from vitrim.elastic.refit import RIDGES, Fit, Refitting, best_ridge, refit
from vitrim.errors import DataError, VitrimError
from vitrim.models import RemovedBranch, narrow
from vitrim.models.widths.sublayers import sublayers


def error(one: torch.nn.Module, other: torch.nn.Module) -> float:
    """KL divergence of the outputs for digits that neither was trained nor fitted on."""
    x = digits()[0][1400:]
    with torch.no_grad():
        wanted, found = other(x).log_softmax(1), one(x).log_softmax(1)
    return torch.nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True).item()


@pytest.mark.parametrize("init_values", [None, 1e-2])
def test_a_refitted_network_is_closer_to_the_full_one_on_other_images(init_values):
    model, data = trained(init_values), [digits()[0][:256]]
    net = stratify(model, data, num_images=256, width_multiple=1, even=True, say=lambda _: None)
    for macs in (0.4, 0.25):
        plain = net.extract(macs=macs, compensate="none")
        fitted = net.extract(macs=macs, compensate="none", data=data)
        assert vitrim.cost(fitted) == vitrim.cost(plain)
        assert error(fitted, model) < 0.3 * error(plain, model)
        assert error(net.extract(macs=macs, data=data), model) < 1.05 * error(net.extract(macs=macs), model)


def test_the_first_projection_is_a_ridge_regression_on_what_the_cut_network_makes():
    """Reference: least squares in NumPy on all tokens, with the weights and ridges that the definition names."""
    model, x = small(), images(16)
    net = copy.deepcopy(model)
    narrow(net, {"blocks.1.mlp": 60, "blocks.0.mlp": 100})
    before = copy.deepcopy(net)
    gradients, goal = [], []
    hook = model.blocks[0].register_forward_hook(lambda m, a, out: (out.retain_grad(), gradients.append(out))[1])
    model(x).amax(1).sum().backward()
    hook.remove()
    with torch.no_grad():
        goal.append(gradients[0])
        size = gradients[0].grad.square().sum(-1)
        weights = (1 + size / size.mean(1, keepdim=True)).numpy()
        kept = []
        hooks = [
            before.blocks[0].mlp.fc2.register_forward_pre_hook(lambda m, args: kept.append(args[0])),
            before.blocks[0].norm2.register_forward_pre_hook(lambda m, args: kept.append(args[0])),
        ]
        before(x)
        for hook in hooks:
            hook.remove()
    residual, inputs = (t.numpy() for t in kept)
    wanted = goal[0].detach().numpy() - residual  # What the MLP would have to add.
    old = before.blocks[0].mlp.fc2
    errors = wanted - inputs @ old.weight.detach().numpy().T - old.bias.detach().numpy()
    apart = np.arange(16) % 4 == 3

    def solve(rows: np.ndarray, ridge: float):
        a, e, w = (t[rows].reshape(-1, t.shape[-1]) for t in (inputs, errors, weights[..., None]))
        w = w / w.sum()
        mean, shift = (w * a).sum(0), (w * e).sum(0)
        centred, root = a - mean, np.sqrt(w)
        size = ridge * (w * centred**2).sum() / a.shape[1]
        padded = np.vstack([root * centred, np.sqrt(size) * np.eye(a.shape[1])])
        change = np.linalg.lstsq(
            padded, np.vstack([root * (e - shift), np.zeros((a.shape[1], e.shape[1]))]), rcond=None
        )[0]
        return change.T, shift - change.T @ mean

    def left(rows: np.ndarray, change: np.ndarray, shift: np.ndarray) -> float:
        return (weights[rows][..., None] * (errors[rows] - inputs[rows] @ change.T - shift) ** 2).sum()

    best = min(RIDGES, key=lambda ridge: left(apart, *solve(~apart, ridge)))
    change, shift = solve(np.ones(16, bool), best)
    refit(net, model, [x[:8], x[8:]], num_images=16)
    # Attention before it is whole, so nothing changed there but by rounding.
    torch.testing.assert_close(net.blocks[0].attn.proj.weight, model.blocks[0].attn.proj.weight, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(
        net.blocks[0].mlp.fc2.weight.detach().numpy(), old.weight.detach().numpy() + change, rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(
        net.blocks[0].mlp.fc2.bias.detach().numpy(), old.bias.detach().numpy() + shift, rtol=1e-5, atol=1e-7
    )


def test_several_networks_fitted_to_one_original_are_those_that_are_fitted_alone():
    model, x = small(), images(20)
    refitting = Refitting(model, [x[:8], x[8:]], num_images=20)
    for widths in ({"blocks.1.mlp": 60}, {"blocks.0.attn": 0, "blocks.1.mlp": 40}, {"blocks.1.mlp": 60}):
        together, alone = copy.deepcopy(model), copy.deepcopy(model)
        narrow(together, widths)
        narrow(alone, widths)
        refitting.fit(together)
        refit(alone, model, [x[:8], x[8:]], num_images=20)
        for one, other in zip(together.parameters(), alone.parameters(), strict=True):
            assert torch.equal(one, other)
    with pytest.raises(VitrimError, match="these are the same"):
        refitting.fit(model)


def test_a_removed_sublayer_gets_the_constant_that_is_best():
    model = trained()
    net = copy.deepcopy(model)
    narrow(net, {"blocks.1.attn": 0, "blocks.2.mlp": 0})
    before = error(net, model)
    refit(net, model, [digits()[0][:256]])
    assert isinstance(net.blocks[1].attn, RemovedBranch)
    assert net.blocks[1].attn.bias.abs().max() > 0
    assert error(net, model) < before


def test_a_branch_counts_as_added_with_a_scale_or_not_at_all():
    generator = torch.Generator().manual_seed(0)
    before, output = (torch.randn(2, 5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    scale = torch.tensor([1.0, 1e-3, -2.0, 0.0], dtype=torch.float64)
    found = branch_scale(before, output, before + scale * output)
    torch.testing.assert_close(found, torch.tensor([1.0, 1e3, -0.5, 0.0], dtype=torch.float64))
    assert branch_scale(before, output, before + output.softmax(-1)) is None


def test_a_change_that_held_out_images_do_not_bear_out_is_not_made():
    one = torch.randn(40, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = [Fit.zeros(30, 30, torch.device("cpu")) for _ in range(2)]
    for each, seed in zip(sums, (1, 2), strict=True):
        noise = torch.randn(40, 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        each.add(one, noise, torch.ones(40, dtype=torch.float64))
    change, shift = sums[0].solve(0.01, True)
    assert sums[0].gain(change, shift) > 0 > sums[1].gain(change, shift)
    assert best_ridge(sums[0], sums[1], True) is None
    assert best_ridge(sums[0], sums[0], True) == min(RIDGES)


def test_what_cannot_be_refitted_is_refused_in_one_line():
    model = small()
    net = SuperNet(model, grow_evenly(start_chain(model), 0.5)).extract(macs=0.7)
    with pytest.raises(VitrimError, match="other blocks"):
        refit(net, small(depth=2), [images(2)])
    with pytest.raises(VitrimError, match="these are the same"):
        refit(model, model, [images(2)])
    with pytest.raises(DataError, match="no images"):
        refit(net, model, [])
    with pytest.raises(DataError, match="15 images are too few to fit and to check on; give 16 or more"):
        refit(net, model, [images(15)])
    handle = vitrim.attach(net, "TopK() @ KeepRate(0.5, at=[1])")
    with pytest.raises(VitrimError, match="before tokens are reduced"):
        refit(net, model, [images(2)])
    handle.remove()
    with torch.no_grad():
        net.blocks[1].mlp.fc1.bias[0] = float("nan")
    with pytest.raises(VitrimError, match="not finite"):
        refit(net, model, [images(16)])


def test_both_networks_are_left_as_they_were_but_for_the_projections():
    model = small().train()
    net = SuperNet(model, grow_evenly(start_chain(model), 0.5)).extract(macs=0.7)
    net.head.weight.requires_grad_(False)
    weights, kinds = copy.deepcopy(net.state_dict()), [type(module) for module in net.modules()]
    originals = copy.deepcopy(model.state_dict())
    refit(net, model, [images(16)])
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, weights[name])}
    assert changed
    assert all(name.rsplit(".", 1)[0].endswith(("proj", "fc2")) for name in changed)
    assert all(torch.equal(value, originals[name]) for name, value in model.state_dict().items())
    assert [type(module) for module in net.modules()] == kinds
    assert (model.training, net.training, net.head.weight.requires_grad) == (True, False, False)
    assert all(parameter.grad is None for one in (model, net) for parameter in one.parameters())
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for one in (model, net) for module in one.modules()
    )


@pytest.mark.parametrize("name", ["hf_vit", "beit", "dinov2", "clip", "siglip_headless"])
def test_networks_of_transformers_are_refitted(name: str) -> None:
    """Their attention layers return a pair, and a tower without a head returns no pooled features."""
    model = (HF | MORE)[name]().eval()
    net = copy.deepcopy(model)
    narrow(net, {part.name: 2 if part.kind == "attention" else 8 for part in sublayers(net)})
    x = torch.randn(32, 3, 40, 40, generator=torch.Generator().manual_seed(0))

    def difference() -> float:
        with torch.no_grad():
            return (output_of(net, x) - output_of(model, x)).square().mean().item()

    before = difference()
    refit(net, model, [x])
    assert difference() < 0.9 * before
