"""Blocks of uneven width: slicing agrees with masking, removed branches add a constant, the impossible is refused."""

import pickle
import pickletools

import pytest
import timm
import torch
from torch import nn

import vitrim
from hf_models import MORE
from vitrim.errors import UnsupportedModelError, VitrimError
from vitrim.models import BlockWidths, RemovedBranch, find_adapter, set_widths, widths_of


def tiny(**args):
    sizes = {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 5} | args
    model = timm.create_model("vit_tiny_patch16_224", **sizes).eval().double()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def masked_logits(model, widths, images):
    """The wide model in plain matrix products, with the trailing dims of every head and hidden unit set to zero."""
    x = model._pos_embed(model.patch_embed(images))
    for block, width in zip(model.blocks, widths, strict=True):
        attn, mlp = block.attn, block.mlp
        q, k, v = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, attn.head_dim)).unbind(2)
        q, k, v = (torch.cat([t[..., : width.head_dim], 0 * t[..., width.head_dim :]], -1) for t in (q, k, v))
        weights = (torch.einsum("bihd,bjhd->bhij", q, k) / attn.head_dim**0.5).softmax(-1)
        x = x + attn.proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))
        hidden = mlp.act(mlp.fc1(block.norm2(x)))
        hidden[..., width.hidden :] = 0
        x = x + mlp.fc2(hidden)
    return model.head(model.norm(x)[:, 0])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bias", [True, False])
def test_slicing_agrees_with_masking(seed, bias):
    torch.manual_seed(seed)
    model, images = tiny(qkv_bias=bias), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    choice = torch.stack([torch.randint(0, 17, (3,)), torch.randint(0, 193, (3,))], 1).tolist()
    widths = [BlockWidths(*pair) for pair in choice]
    expected = masked_logits(model, widths, images)
    set_widths(model, widths)
    assert widths_of(model) == tuple(widths)
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-12)


def test_full_widths_change_nothing():
    torch.manual_seed(0)
    model, images = tiny(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    before, parameters = model(images), list(model.parameters())
    assert widths_of(model) == (BlockWidths(16, 192),) * 3
    set_widths(model, widths_of(model))
    assert torch.equal(model(images), before)
    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))


def test_narrowing_in_two_steps_is_narrowing_once():
    torch.manual_seed(1)
    one, images = tiny(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    two = tiny()
    two.load_state_dict(one.state_dict())
    set_widths(one, [BlockWidths(5, 7)] * 3)
    set_widths(two, [BlockWidths(11, 90)] * 3)
    set_widths(two, [BlockWidths(5, 7)] * 3)
    torch.testing.assert_close(two(images), one(images), rtol=0, atol=1e-12)


def test_removed_branch_is_a_constant_that_learns():
    torch.manual_seed(2)
    model = tiny()
    bias = model.blocks[1].attn.proj.bias.clone()
    set_widths(model, [BlockWidths(16, 192), BlockWidths(0, 0), BlockWidths(16, 192)])
    assert isinstance(model.blocks[1].attn, RemovedBranch)
    assert torch.equal(model.blocks[1].attn.bias, bias)
    model(torch.randn(2, 3, 64, 64, dtype=torch.float64)).sum().backward()
    assert model.blocks[1].attn.bias.grad.abs().sum() > 0
    assert torch.equal(RemovedBranch(4)(torch.randn(2, 3, 4), attn_mask=None), torch.zeros(2, 3, 4))


def test_narrow_blocks_stay_stock_and_take_reductions():
    torch.manual_seed(3)
    model = tiny()
    set_widths(model, [BlockWidths(9, 100), BlockWidths(8, 50), BlockWidths(7, 10)])
    assert {type(block.attn) for block in model.blocks} == {timm.layers.Attention}
    narrow = vitrim.cost(model)
    assert narrow.params == sum(parameter.numel() for parameter in model.parameters())
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with vitrim.attach(model, vitrim.TopK(), vitrim.KeepRate(0.5, at=(1,))) as handle:
        assert model(images).isfinite().all()
        assert handle.token_counts == (17, 9, 9)
        assert vitrim.cost(model).macs < narrow.macs


@pytest.mark.parametrize("widths", [[BlockWidths(17, 192)] * 3, [BlockWidths(16, 193)] * 3, [BlockWidths(-1, 1)] * 3])
def test_growing_is_refused(widths):
    with pytest.raises(VitrimError, match=r"block 0 can be narrowed"):
        set_widths(tiny(), widths)


def test_wrong_number_of_blocks_is_refused():
    with pytest.raises(VitrimError, match="2 widths for 3 blocks"):
        set_widths(tiny(), [BlockWidths(1, 1)] * 2)


def test_what_cannot_be_narrowed_is_refused_untouched():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, scale_attn_norm=True, scale_mlp_norm=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match="norm"):
        set_widths(model, [BlockWidths(8, 768)] * 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(UnsupportedModelError, match="ResNet"):
        widths_of(timm.create_model("resnet10t"))


def _classes_of_vitrim_in_a_pickle(model: nn.Module) -> set[str]:
    calls = pickletools.genops(pickle.dumps(model, 2))
    return {str(name) for code, name, _ in calls if code.name == "GLOBAL" and str(name).startswith("vitrim")}


@pytest.mark.parametrize("name", ["timm", "vit_bare", "dinov3", "clip"])
def test_pickles_of_narrow_models_name_classes_of_vitrim_only_where_a_branch_is_gone(name: str):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2) if name == "timm" else MORE[name]()
    own = widths_of(model)
    narrow = 4 if find_adapter(model).geometry(model).rotary is False else own[0].head_dim
    set_widths(model, [BlockWidths(narrow, 8)] * len(own))
    assert not _classes_of_vitrim_in_a_pickle(model)
    set_widths(model, [BlockWidths(0, 8), *widths_of(model)[1:]])
    assert any("Removed" in each for each in _classes_of_vitrim_in_a_pickle(model))
