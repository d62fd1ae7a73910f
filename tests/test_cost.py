"""Cost against PyTorch's own FLOP counter on tensors without storage, and against published figures."""

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vitrim
from vitrim.models import build_model, find_adapter
from vitrim.models.shapes_only import shapes_only

MODELS = [
    "vit_tiny_patch16_224",
    "deit_small_patch16_224",
    "deit_base_distilled_patch16_224",
    "deit3_small_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_clip_224",
    "vit_base_patch16_siglip_224",
    "vit_giant_patch14_dinov2",
    "vit_small_r26_s32_224",
    "vit_medium_patch16_gap_240",
    "vit_small_patch16_dinov3",
    "eva02_tiny_patch14_224",
    "vit_pe_core_tiny_patch16_384",
    "vit_base_patch16_sapiens2",
    "beit_base_patch16_224",
    "vit_relpos_small_patch16_rpn_224",
    "vit_dwee_patch16_reg1_gap_256",
    "vit_pwee_patch16_reg1_gap_256",
    "vit_dpwee_patch16_reg1_gap_256",
    "vit_small_patch16_18x2_224",
]
REDUCTIONS = [
    "TopK() @ KeepRate(0.7, at=(1, 3))",
    "TopK(fuse=sum) @ KeepRate(0.5, place=before, at=(0, 2, 3))",
    "TopK(mean_attention) @ PowerLaw(0.6)",
    "TopK(norm, fuse=mean) @ Stages({1: 0.85, 2: 0.5})",
    "ToMe() @ ConstantR(4)",
    "TopK() @ KeepRate(0.5, at=(0, 1), reinstate=2)",
    "ToMe() @ ConstantR(4, reinstate=3)",
]


def meta(name: str, **options: object) -> nn.Module:
    with shapes_only():
        return timm.create_model(name, **options).eval().requires_grad_(False)


def counted(model: nn.Module) -> int:
    """MACs of one image as executed; fused attention is spelled out on tensors without storage."""
    size = find_adapter(model).geometry(model).input_size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, *size, device="meta"))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_the_flop_counter(name: str) -> None:
    """The whole model; and under reductions its first four blocks, since all that follow are like them."""
    model = meta(name)
    assert vitrim.cost(model).macs == pytest.approx(counted(model), rel=1e-3)
    model.blocks = model.blocks[:4]
    geometry = find_adapter(model).geometry(model)
    backbone = hasattr(model.patch_embed, "backbone")  # It is slow to count, and no reduction changes it.
    at, all_of_them = MODELS.index(name), name == MODELS[0]
    chosen = REDUCTIONS if all_of_them else [REDUCTIONS[(at + shift) % len(REDUCTIONS)] for shift in range(2)]
    for number, text in enumerate(REDUCTIONS[:2] if backbone else chosen):
        if not geometry.has_cls:
            text = text.replace("TopK()", "TopK(key_norm)").replace("TopK(fuse", "TopK(mean_attention, fuse")
        # With and without, in turns; of one model, all reductions both ways.
        for cls_only in (
            {False, geometry.head == "prefix"} if all_of_them else {geometry.head == "prefix" and number % 2 == 0}
        ):
            with vitrim.attach(model, text, cls_only=cls_only):
                assert vitrim.cost(model).macs == pytest.approx(counted(model), rel=1e-3), (text, cls_only)


@pytest.mark.parametrize(("patch", "size"), [(1, 8), (2, 10), (4, 12), (8, 24)])
def test_a_convolutional_stem_agrees_with_the_flop_counter(patch: int, size: int) -> None:
    with shapes_only():
        model = build_model("vitrim_digits_vit", depth=1, patch_size=patch, img_size=size).eval()
    assert vitrim.cost(model).macs == counted(model)


def test_published_figures() -> None:
    deit = meta("deit_small_patch16_224")
    assert vitrim.cost(deit).macs / 1e9 == pytest.approx(4.6, abs=0.05)
    assert vitrim.cost(deit).macs_linear_only / 1e9 == pytest.approx(4.26, abs=0.02)
    assert vitrim.cost(meta("deit_tiny_patch16_224")).macs / 1e9 == pytest.approx(1.26, abs=0.01)
    assert vitrim.cost(meta("deit_base_patch16_224")).macs / 1e9 == pytest.approx(17.6, abs=0.1)
    with vitrim.attach(deit, vitrim.ToMe(), vitrim.ConstantR(13)):
        assert vitrim.cost(deit).macs / 1e9 == pytest.approx(2.71, abs=0.03)
    small = meta("vit_small_patch14_dinov2", img_size=224, init_values=None)
    assert vitrim.cost(small).macs / 1e6 == pytest.approx(6127.2, rel=0.01)
    with vitrim.attach(small, vitrim.TopK(fuse="sum"), vitrim.KeepRate(0.7, at=(3, 6, 9))):
        assert vitrim.cost(small).macs / 1e6 == pytest.approx(3963.7, rel=0.01)


def test_formula_of_a_standard_block() -> None:
    model = meta("vit_tiny_patch16_224", depth=1, num_classes=0)
    n, width = 197, 192
    block = 3 * n * width**2 + 2 * n**2 * width + n * width**2 + 8 * n * width**2
    assert vitrim.cost(model).macs == block + 196 * 768 * width
    assert vitrim.cost(model).macs_linear_only == block - 2 * n**2 * width + 196 * 768 * width


def test_prefix_only_last_block_saves_what_it_should() -> None:
    model = meta("deit_small_patch16_224")
    dense = vitrim.cost(model)
    with vitrim.attach(model, None, cls_only=True):
        saved = 1 - vitrim.cost(model).macs / dense.macs
    assert saved == pytest.approx(0.069, abs=0.002)
    assert vitrim.cost(model) == dense
    assert dense.params == sum(parameter.numel() for parameter in model.parameters())
    assert "197 197" in str(dense)


def test_follows_the_mode_and_an_earlier_forward_pass_changes_nothing() -> None:
    model = timm.create_model("vit_base_patch16_siglip_224", img_size=64, embed_dim=24, num_heads=3, depth=4).eval()
    dense = vitrim.cost(model).macs
    with vitrim.attach(model, vitrim.ToMe(), vitrim.ConstantR(2), phase="train"):
        assert vitrim.cost(model).macs == dense
        model.train()
        reduced = vitrim.cost(model)
        assert reduced.macs < dense
        for batch in (1, 2):
            model(torch.randn(batch, 3, 64, 64))
            assert vitrim.cost(model) == reduced
