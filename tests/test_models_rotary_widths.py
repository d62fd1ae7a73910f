"""Widths of models with rotary positions: the MLP is cut, attention stays, and every network is exact."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eva_models
import hf_models
import vitrim
from test_contract import Case, agrees_with_reference
from vitrim.elastic import SuperNet, stratify
from vitrim.elastic.refit import refit
from vitrim.errors import UnsupportedModelError, VitrimError
from vitrim.models import BlockWidths, RemovedBranch, load, set_widths, widths_of
from zoo import images, predicted, redrawn

# Interleaved pairs, the two halves, tables of each head's own, groups of heads, a gate, both forms of SwiGLU.
NAMES = ["eva02", "eva02_norms", "dinov3", "mixed", "grouped", "gated", "eva", "hf_dinov3", "hf_gated"]
HF = {"hf_dinov3": hf_models.MORE["dinov3"], "hf_gated": hf_models.MORE["dinov3_gated"]}


def _model(name: str) -> Any:
    return redrawn({**eva_models.EVA, **eva_models.MORE, **HF}[name]()).double().eval()


def _net(model: nn.Module, x: Tensor) -> SuperNet:
    return stratify(model, [x], num_images=16, width_multiple=4, max_saving=0.4, rounds=1, say=lambda _: None)


def _masked(model: Any, widths: list[int], x: Tensor) -> Tensor:
    """The wide model with the trailing hidden units of each MLP set to zero by a hook on its last layer."""
    hooks = []
    for block, width in zip(vitrim.models.find_adapter(model).blocks(model), widths, strict=True):
        last = getattr(block.mlp, "fc2", None) or block.mlp.down_proj

        def mask(_: nn.Module, args: tuple[Tensor], width: int = width) -> tuple[Tensor]:
            return (torch.cat([args[0][..., :width], 0 * args[0][..., width:]], -1),)

        hooks.append(last.register_forward_pre_hook(mask))
    try:
        return predicted(model, x)
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", NAMES)
def test_every_network_is_exact_and_costs_what_the_chain_says(name: str, tmp_path: Path) -> None:
    model, x = _model(name), images(16, dtype=torch.float64)
    before = predicted(model, x)
    heads = {width.head_dim for width in widths_of(model)}
    net = _net(model, x)
    torch.testing.assert_close(predicted(net.cut(0), x), before, rtol=0, atol=1e-10)
    assert all(name.endswith("mlp") for name in net.chain.units)
    for index in (1, len(net.chain) // 2, len(net.chain) - 1):
        small = net.cut(index, compensate="none")
        with net.at(index) as running:
            torch.testing.assert_close(predicted(small, x), predicted(running, x), rtol=0, atol=1e-11)
        assert {width.head_dim for width in widths_of(small)} == heads
        assert vitrim.cost(small).macs == net.chain.macs_at(index)
        assert vitrim.cost(small).params == net.chain.params_at(index) == sum(p.numel() for p in small.parameters())
    if name != "gated":  # Its gates were put in by hand, so that no description builds it again.
        read = load(vitrim.save(small, tmp_path)).double()
        torch.testing.assert_close(predicted(read, x), predicted(small, x), rtol=0, atol=1e-11)
    with vitrim.attach(small, "ToMe() @ ConstantR(1)"):
        assert vitrim.cost(small).macs < net.chain.macs_at(-1)
        assert predicted(small, x).isfinite().all()


@pytest.mark.parametrize("name", ["eva02", "dinov3", "mixed", "hf_dinov3", "hf_gated"])
def test_slicing_agrees_with_masking(name: str) -> None:
    model, x = _model(name), images(2, dtype=torch.float64)
    full = widths_of(model)
    hidden = [full[0].hidden, 5, full[2].hidden // 2]
    expected = _masked(model, hidden, x)
    set_widths(model, [BlockWidths(one.head_dim, width) for one, width in zip(full, hidden, strict=True)])
    torch.testing.assert_close(predicted(model, x), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["eva02", "dinov3", "grouped", "hf_gated"])
def test_narrow_models_take_reductions_and_come_back_from_a_folder(name: str, tmp_path: Path) -> None:
    model = _model(name)
    head_dim = widths_of(model)[0].head_dim
    set_widths(model, [BlockWidths(head_dim, hidden) for hidden in (0, 12, 7)])
    assert sum(isinstance(module, RemovedBranch) for module in model.modules()) == 1
    agrees_with_reference(model, vitrim.TopK(fuse="sum"), Case(vitrim.TopK()).cuts(0, 1))
    vitrim.attach(model, "TopK(fuse=sum) @ KeepRate(0.6, at=(0, 1))")
    model, x = model.float(), images(2)
    vitrim.save(model, tmp_path)
    found = load(tmp_path)
    assert torch.equal(predicted(found, x), predicted(model, x))
    assert widths_of(found) == widths_of(model)


def test_fitting_to_images_brings_a_cut_network_nearer_to_the_full_one() -> None:
    model, x = _model("dinov3"), images(32, dtype=torch.float64)
    net = _net(model, x[:16])
    small, fitted = net.cut(-1, compensate="none"), net.cut(-1, compensate="none")
    attention = [parameter.clone() for name, parameter in fitted.named_parameters() if ".attn." in name]
    refit(fitted, net.model, [x], num_images=32)
    after = [parameter for name, parameter in fitted.named_parameters() if ".attn." in name]
    assert all(torch.equal(one, other) for one, other in zip(attention, after, strict=True))
    full, far, near = (predicted(one, x) for one in (model, small, fitted))
    assert (near - full).norm() < (far - full).norm()


def test_heads_keep_their_dims() -> None:
    for name in NAMES:
        model = _model(name)
        head_dim, hidden = widths_of(model)[0].head_dim, widths_of(model)[0].hidden
        before = predicted(model, images(1, dtype=torch.float64))
        with pytest.raises(UnsupportedModelError, match=f"keep their {head_dim} dims.*give head_dim={head_dim}"):
            set_widths(model, [BlockWidths(head_dim - 2, hidden)] * 3)
        assert torch.equal(predicted(model, images(1, dtype=torch.float64)), before)


@pytest.mark.parametrize("name", ["post_norm", "post_norm_rotary"])
def test_blocks_whose_norms_come_last_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="norms follow attention and MLP"):
        stratify(_model(name), [images(2, dtype=torch.float64)], say=lambda _: None)


def test_a_budget_below_what_attention_costs_is_refused_with_the_smallest() -> None:
    model, x = _model("eva02"), images(16, dtype=torch.float64)
    with pytest.raises(VitrimError, match=r"no sub-network has macs <= .* the smallest has"):
        _net(model, x).extract(macs=0.1)


def test_a_rotary_model_is_compressed_by_width_and_no_latency_is_promised() -> None:
    model, x = _model("dinov3").float(), torch.randn(80, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    found = vitrim.compress(model, x, macs=0.8, using="width", trials=1)
    assert vitrim.cost(found.model).macs <= 0.8 * vitrim.cost(model).macs
    with pytest.raises(UnsupportedModelError, match=r"cannot be timed by halves.*give macs= or params="):
        vitrim.compress(model, x, latency=0.8, trials=1)
