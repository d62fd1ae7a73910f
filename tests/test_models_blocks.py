"""timm's ViTs on parallel and post-norm blocks, and with differential attention."""

from typing import Any

import pytest
import torch
from torch import nn

import vitrim
from block_models import BLOCKS, MORE
from references import gradients_of_reference
from test_contract import Case, agrees_with_reference
from vitrim.errors import UnsupportedModelError, VitrimError, WidthError
from vitrim.models import find_adapter
from vitrim.models.widths.sublayers import sublayers
from vitrim.tokens import Reducer
from zoo import images, redrawn

REDUCERS = [vitrim.TopK(), vitrim.TopK(fuse="sum"), vitrim.ToMe()]
CUT = "ToMe() @ KeepRate(0.6, at=(0, 1))"
KINDS = ["differential", "post_norm", "parallel", "parallel_differential", "parallel_things"]


def _model(name: str) -> Any:
    return redrawn({**BLOCKS, **MORE}[name]()).double()


PLACED = [
    (name, reducer, ("inside", "before")[(row + column) % 2])
    for row, name in enumerate(sorted(MORE))
    for column, reducer in enumerate(REDUCERS)
]


@pytest.mark.parametrize(("name", "reducer", "place"), PLACED, ids=str)
def test_every_kind_of_block_equals_the_slow_reference(name: str, reducer: Reducer, place: str) -> None:
    model, case = _model(name), Case(reducer)
    agrees_with_reference(model, case.suited(model), case.cuts(0, 1, place=place))


@pytest.mark.parametrize("name", KINDS)
def test_scores_of_attention_read_the_heads_that_count(name: str) -> None:
    reducer = vitrim.TopK("mean_attention", fuse="mean", momentum=0.5)
    agrees_with_reference(_model(name), reducer, vitrim.KeepRate(0.6, at=(0, 1)))


@pytest.mark.parametrize("name", ["parallel", "parallel_things", "differential_norms"])
def test_cls_alone_in_the_last_block_and_tokens_that_return(name: str) -> None:
    model = _model(name)
    agrees_with_reference(model, vitrim.TopK(), vitrim.KeepRate(0.6, at=(0, 2)), cls_only=True)
    agrees_with_reference(model, vitrim.ToMe(), vitrim.KeepRate(0.6, at=(0, 1), reinstate=2))


@pytest.mark.parametrize("name", KINDS[1:])
def test_laws_without_a_cut_undone_copied_and_in_any_batch(name: str) -> None:
    model, x = _model(name), images(3, dtype=torch.float64)
    dense = model(x)
    with vitrim.attach(model, "ToMe() @ ConstantR(0)"):
        assert torch.equal(model(x), dense)
    with vitrim.attach(model, CUT) as handle:
        together = model(x)
        assert handle.states[-1].size.sum(1).tolist() == [25.0] * 3
        assert (model(x[1:2]) - together[1:2]).abs().max() < 1e-12
        gradients_of_plain_and_recomputed_passes_agree(model, x)
    assert torch.equal(model(x), dense)


def gradients_of_plain_and_recomputed_passes_agree(model: Any, x: torch.Tensor) -> None:
    model(x).square().sum().backward()
    plain = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    find_adapter(model).recompute(model)
    model(x).square().sum().backward()
    for parameter, expected in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["parallel_fused", "parallel_differential"])
def test_gradients_equal_those_of_the_reference(name: str) -> None:
    model, x, reducer = _model(name), images(2, dtype=torch.float64), vitrim.TopK("key_norm")
    with vitrim.attach(model, reducer, vitrim.KeepRate(0.6, at=(0, 1))) as handle:
        plan = handle.plan()
        model(x).square().sum().backward()
    fast = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, slow in gradients_of_reference(model, x, reducer, plan).items():
        precision = 1e-6 if "lambda" in name else 1e-9  # timm computes that number in float32.
        torch.testing.assert_close(fast[name], slow, rtol=precision, atol=precision)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # Norms inside timm's autocast.
@pytest.mark.parametrize("name", KINDS)
def test_half_precision_and_plain_attention(name: str) -> None:
    model, x = _model(name).float(), images(2)
    with vitrim.attach(model, CUT), torch.no_grad():
        full = model(x)
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        torch.testing.assert_close(model(x), full)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).isfinite().all()


@pytest.mark.parametrize("name", ["differential", "post_norm", "parallel", "parallel_things"])
def test_hooks_run_or_are_refused(name: str) -> None:
    model, x, calls = _model(name), images(2, dtype=torch.float64), []
    block = model.blocks[0]
    inner = block.in_proj if name == "parallel" else block.attns[0].attn.qkv if "things" in name else block.attn.qkv
    with vitrim.attach(model, CUT), torch.no_grad():
        expected = model(x)
        inner.register_forward_hook(lambda *_: calls.append("inner"))
        torch.testing.assert_close(model(x), expected)
        assert calls
        if name == "parallel_things":
            block.attns[1].register_forward_hook(lambda *_: None)
            with pytest.raises(VitrimError, match=r"attns\.1 of block 0 has a hook, which cannot run"):
                model(x)
        elif name != "parallel":
            block.attn.register_forward_hook(lambda *_: calls.append("whole"))
            torch.testing.assert_close(model(x), expected)
            assert "whole" in calls


@pytest.mark.parametrize("name", KINDS)
def test_widths_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(WidthError, match=r"^the width of the blocks of this \w+ cannot be cut: each is a "):
        sublayers(_model(name))


def test_a_layer_of_another_kind_is_named() -> None:
    model = _model("parallel_things")
    model.blocks[1].attns[1].attn = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1 holds a Identity, which the timm-vit-blocks adapter"):
        vitrim.attach(model, CUT)
