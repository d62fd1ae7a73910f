"""Widths of models with rotary positions: MLPs, values and rotary pairs are cut; all networks are exact."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import eva_models
import hf_models
import vitrim
from test_contract import Case, agrees_with_reference
from vitrim.elastic import SuperNet, stratify
from vitrim.elastic.refit import refit
from vitrim.errors import CheckpointError, ScoreError, UnsupportedModelError, VitrimError
from vitrim.models import BlockWidths, RemovedBranch, find_adapter, load, set_widths, widths_of
from vitrim.models.files.checkpoints import read_header, read_tensors
from vitrim.models.shapes_only import shapes_only
from zoo import images, predicted, redrawn

# Interleaved pairs, the two halves, tables of each head's own, groups of heads, a gate, both forms of SwiGLU.
NAMES = ["eva02", "eva02_norms", "dinov3", "mixed", "grouped", "gated", "eva", "hf_dinov3", "hf_gated"]
HF = {"hf_dinov3": hf_models.MORE["dinov3"], "hf_gated": hf_models.MORE["dinov3_gated"]}


def _model(name: str) -> Any:
    return redrawn({**eva_models.EVA, **eva_models.MORE, **HF}[name]()).double().eval()


def _net(model: nn.Module, x: Tensor, max_saving: float = 0.7) -> SuperNet:
    return stratify(
        model, [x], num_images=16, width_multiple=4, max_saving=max_saving, rounds=1, even=True, say=lambda _: None
    )


def _halves(model: Any) -> list[tuple[Any, Any]]:
    return [
        (getattr(block, "attn", None) or block.attention, block.mlp)
        for block in vitrim.models.find_adapter(model).blocks(model)
    ]


def _masked(model: Any, widths: list[tuple[int, int]], x: Tensor) -> Tensor:
    """The wide model with trailing dims of values and hidden units set to zero by hooks on the last projections."""
    hooks = []

    def mask(last: nn.Module, parts: int, width: int) -> None:
        def zeros(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            kept = args[0].unflatten(-1, (parts, -1)).clone()
            kept[..., width:] = 0
            return (kept.flatten(-2),)

        hooks.append(last.register_forward_pre_hook(zeros))

    for (attn, mlp), (values, hidden) in zip(_halves(model), widths, strict=True):
        mask(getattr(attn, "proj", None) or attn.o_proj, attn.num_heads, values)
        mask(getattr(mlp, "fc2", None) or mlp.down_proj, 1, hidden)
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
    assert any("att" in unit for unit in net.chain.units) == (name != "gated")
    for index in (1, len(net.chain) // 2, len(net.chain) - 1):
        small = net.cut(index, compensate="none")
        with net.at(index) as running:
            torch.testing.assert_close(predicted(small, x), predicted(running, x), rtol=0, atol=1e-11)
        assert {width.head_dim for width in widths_of(small)} <= {*heads, 0}
        assert vitrim.cost(small).macs == net.chain.macs_at(index)
        assert vitrim.cost(small).macs_linear_only == net.chain.macs_linear_only_at(index)
        assert vitrim.cost(small).params == net.chain.params_at(index) == sum(p.numel() for p in small.parameters())
    assert any(width.value_dim for width in widths_of(small)) == (name != "gated")
    if name != "gated":  # Its gates were put in by hand, so that no description builds it again.
        read = load(vitrim.save(small, tmp_path)).double()
        torch.testing.assert_close(predicted(read, x), predicted(small, x), rtol=0, atol=1e-11)
    with vitrim.attach(small, "TopK(norm, fuse=mean) @ KeepRate(0.6, at=(0, 1))"):
        assert vitrim.cost(small).macs < net.chain.macs_at(-1)
        assert predicted(small, x).isfinite().all()


@pytest.mark.parametrize("name", ["eva02", "eva02_norms", "dinov3", "mixed", "grouped", "hf_dinov3", "hf_gated"])
def test_slicing_agrees_with_masking(name: str) -> None:
    model, x = _model(name), images(2, dtype=torch.float64)
    (full, *_) = widths_of(model)
    widths = [(full.head_dim, 5), (7, full.hidden), (1, full.hidden // 2)]
    if name == "eva02_norms":  # A norm over fewer hidden units is another one.
        widths = [(values, full.hidden) for values, _ in widths]
    expected = _masked(model, widths, x)
    set_widths(model, [BlockWidths(full.head_dim, hidden, values) for values, hidden in widths])
    torch.testing.assert_close(predicted(model, x), expected, rtol=0, atol=1e-11)
    again = [BlockWidths(full.head_dim, hidden, min(values, 1)) for values, hidden in widths]
    expected = _masked(model, [(1, hidden) for _, hidden in widths], x)
    set_widths(model, again)
    torch.testing.assert_close(predicted(model, x), expected, rtol=0, atol=1e-11)
    assert widths_of(model) == tuple(again)


@pytest.mark.parametrize("name", ["eva02", "eva02_norms", "dinov3", "grouped", "mixed", "hf_gated"])
def test_narrow_models_take_reductions_and_come_back_from_a_folder(name: str, tmp_path: Path) -> None:
    model = _model(name)
    dims = widths_of(model)[0].head_dim
    set_widths(model, [BlockWidths(dims, 0, 5), BlockWidths(dims, 12), BlockWidths(0, 7)])
    assert sum(isinstance(module, RemovedBranch) for module in model.modules()) == 2
    for reducer, place in ((vitrim.TopK(fuse="sum"), "inside"), (vitrim.ToMe(), "before")):
        agrees_with_reference(model, reducer, Case(reducer).cuts(0, 1, place=place))
    vitrim.attach(model, "TopK(fuse=sum) @ KeepRate(0.6, at=(0, 1))")
    model, x = model.float(), images(2)
    vitrim.save(model, tmp_path)
    found = load(tmp_path)
    assert torch.equal(predicted(found, x), predicted(model, x))
    assert widths_of(found) == widths_of(model)
    assert type(_halves(found)[0][0]) is type(_halves(model)[0][0])


def test_a_cut_that_needs_scores_is_refused_where_attention_was_removed() -> None:
    model = _model("dinov3")
    set_widths(model, [BlockWidths(0, 144), *widths_of(model)[1:]])
    with pytest.raises(ScoreError, match="the attention of block 0 was removed"):
        vitrim.attach(model, "TopK() @ KeepRate(0.6, at=(0, 1))")


@pytest.mark.parametrize("name", ["eva02", "eva02_norms", "perception", "grouped"])
def test_costs_agree_with_the_flop_counter(name: str) -> None:
    """Fused and separate projections; fused attention is spelled out on tensors without storage."""
    with shapes_only():
        model = {**eva_models.EVA, **eva_models.MORE}[name]().eval().requires_grad_(False)
        (full, *_) = widths_of(model)
        set_widths(
            model, [BlockWidths(full.head_dim, full.hidden, 3), BlockWidths(0, 9), BlockWidths(full.head_dim, 8)]
        )
    x = torch.empty(1, 3, 40, 40, device="meta")
    score = "" if find_adapter(model).geometry(model).has_cls else "mean_attention"
    for text in (None, f"TopK({score}) @ KeepRate(0.6, at=(0,))", "ToMe() @ KeepRate(0.6, at=(0, 2))"):
        handle = None if text is None else vitrim.attach(model, text)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x)
        assert vitrim.cost(model).macs == pytest.approx(counter.get_total_flops() // 2, rel=1e-3), text
        if handle is not None:
            handle.remove()


def test_fitting_to_images_brings_a_cut_network_nearer_to_the_full_one() -> None:
    for name in ("dinov3", "hf_gated"):
        model, x = _model(name), images(32, dtype=torch.float64)
        net = _net(model, x[:16], 0.4)
        small, fitted = net.cut(-1, compensate="none"), net.cut(-1, compensate="none")
        assert widths_of(small)[0].value_dim
        refit(fitted, net.model, [x], num_images=32)
        full, far, near = (predicted(one, x) for one in (model, small, fitted))
        assert (near - full).norm() < (far - full).norm()


def test_heads_keep_the_dims_that_scale_their_logits() -> None:
    for name in NAMES:
        model = _model(name)
        dims, hidden = widths_of(model)[0].head_dim, widths_of(model)[0].hidden
        before = predicted(model, images(1, dtype=torch.float64))
        why = "heads keep their .* its gate .* forbids" if name == "gated" else "heads are scaled by their"
        with pytest.raises(UnsupportedModelError, match=rf"{why}.*give head_dim={dims}"):
            set_widths(model, [BlockWidths(dims - 2, hidden)] * 3)
        with pytest.raises(VitrimError, match="can be narrowed from"):
            set_widths(model, [BlockWidths(dims, hidden, dims + 1)] * 3)
        assert torch.equal(predicted(model, images(1, dtype=torch.float64)), before)


@pytest.mark.parametrize("name", ["post_norm", "post_norm_rotary"])
def test_blocks_whose_norms_come_last_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="norms follow attention and MLP"):
        stratify(_model(name), [images(2, dtype=torch.float64)], say=lambda _: None)


@pytest.mark.parametrize(("name", "part"), [("gated", "gate"), ("no_prefix", "norm")])
def test_attention_stays_where_something_stands_between_values_and_projection(name: str, part: str) -> None:
    model, x = _model(name), images(16, dtype=torch.float64)
    assert f"its {part} between attention and output projection" in find_adapter(model).keeps_attention(model)
    net = _net(model, x)
    assert all(unit.endswith("mlp") for unit in net.chain.units)
    with pytest.raises(VitrimError, match=r"no sub-network has macs <= .* the smallest has"):
        net.extract(macs=0.1)


@pytest.mark.parametrize("name", ["dinov3", "hf_dinov3"])
def test_a_rotary_model_is_compressed_by_width(name: str) -> None:
    model, x = _model(name).float(), torch.randn(80, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    found = vitrim.compress(model, x, macs=0.4, using="width", trials=1)
    assert vitrim.cost(found.model).macs <= 0.4 * vitrim.cost(model).macs
    assert any(width.values < width.head_dim or not width.head_dim for width in widths_of(found.model))


def test_folders_of_older_versions_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    model, x = _model("eva02").float(), images(16)
    set_widths(model, [BlockWidths(12, hidden) for hidden in (0, 12, 7)])  # All that could change then.
    vitrim.save(model, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    record = json.loads(read_header(weights)[0]["vitrim"])
    assert record["widths"] == [{"head_dim": 12, "hidden": hidden} for hidden in (0, 12, 7)]
    save_file(read_tensors(weights), weights, metadata={"vitrim": json.dumps(record | {"schema": 1})})
    assert torch.equal(predicted(load(tmp_path / "model"), x), predicted(model, x))
    net = _net(_model("eva02").float(), x)
    net.save(tmp_path / "net")
    chain = json.loads((tmp_path / "net" / "chain.json").read_text())
    mlps = {name: unit for name, unit in chain["units"].items() if name.endswith("mlp")}
    for unit in mlps.values():
        unit.pop("fixed_macs"), unit.pop("fixed_macs_linear_only")
    old = chain | {"schema": 3, "units": mlps, "entries": []}
    (tmp_path / "net" / "chain.json").write_text(json.dumps(old))
    with pytest.raises(CheckpointError, match=r"chain.json differs from the model in blocks.0.attn.*; stratify again"):
        SuperNet.load(tmp_path / "net")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_transformers_run_narrow_values_in_their_own_ways(implementation: str) -> None:
    model: Any = _model("hf_dinov3")
    set_widths(model, [BlockWidths(12, 48, 5), BlockWidths(0, 48), BlockWidths(12, 48)])
    x = images(2, dtype=torch.float64)
    expected = predicted(model, x)
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(predicted(model, x), expected)
    with vitrim.attach(model, "TopK(norm) @ KeepRate(0.6, at=(0, 1))") as handle:
        states = model(x, output_hidden_states=True).hidden_states
        assert tuple(state.shape[1] for state in states[1:]) == handle.token_counts
    maps = model(x, output_attentions=True).attentions
    assert len(maps) == (2 if implementation == "eager" else 0)


@pytest.mark.parametrize("name", ["eva02", "mixed", "hf_dinov3"])
def test_narrow_values_train_without_fused_attention_and_in_half_precision(name: str) -> None:
    model, x = _model(name), images(2, dtype=torch.float64)
    full = widths_of(model)[0]
    set_widths(model, [BlockWidths(full.head_dim, full.hidden, 5)] * 3)
    expected = predicted(model, x)
    for attn, _ in _halves(model):
        if hasattr(attn, "fused_attn"):
            attn.fused_attn = False
    torch.testing.assert_close(predicted(model, x), expected)
    model.train()
    predicted(model, x).square().sum().backward()
    assert all(parameter.grad is not None for attn, _ in _halves(model) for parameter in attn.parameters())
    model.eval().float()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert predicted(model, x.float()).isfinite().all()
    assert predicted(model.bfloat16(), x.bfloat16()).isfinite().all()


@pytest.mark.parametrize("name", ["eva02", "dinov3"])
def test_timms_causal_masks_act_on_narrow_values_as_on_wide_ones(name: str) -> None:
    model, x = _model(name), torch.randn(2, 7, 36, dtype=torch.float64)
    attn: Any = model.blocks[0].attn
    wide = copy.deepcopy(attn)
    set_widths(model, [BlockWidths(12, full.hidden, 5) for full in widths_of(model)])
    wide.proj.weight.data.view(36, 3, 12)[..., 5:] = 0
    mask = torch.rand(7, 7) > 0.3
    for options in ({"is_causal": True}, {"attn_mask": mask | torch.eye(7, dtype=torch.bool)}):
        for fused in (True, False):
            attn.fused_attn = wide.fused_attn = fused
            torch.testing.assert_close(attn(x, **options), wide(x, **options), rtol=0, atol=1e-12)
