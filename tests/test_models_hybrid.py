"""The small ViTs: sizes of the five systems, timm's protocol for patch embeddings, and whether they learn."""

import pytest
import timm
import torch
from timm.models import VisionTransformer
from torch.nn import functional as F

import vitrim
from vitrim.models.small_vits import ConvStem

SIZES = {  # name: image, patches, width, depth, heads
    "vitrim_cifar_vit": ((3, 48, 48), 144, 192, 8, 3),
    "vitrim_hybrid_vit": ((3, 32, 32), 256, 192, 6, 6),
    "vitrim_digits_vit": ((1, 8, 8), 64, 96, 8, 3),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_those_of_the_systems(name):
    image, patches, width, depth, heads = SIZES[name]
    model = timm.create_model(name).eval()
    assert type(model) is VisionTransformer
    assert model.pretrained_cfg["input_size"] == image
    assert len(model.pretrained_cfg["mean"]) == len(model.pretrained_cfg["std"]) == image[0]
    assert (model.patch_embed.num_patches, model.embed_dim, len(model.blocks)) == (patches, width, depth)
    assert {block.attn.num_heads for block in model.blocks} == {heads}
    assert {block.mlp.fc1.out_features for block in model.blocks} == {4 * width}
    assert model(torch.randn(2, *image)).shape == (2, model.num_classes)
    maps = model.forward_intermediates(torch.randn(2, *image), intermediates_only=True)
    assert maps[-1].shape == (2, width, *model.patch_embed.grid_size)


def test_defaults_yield_to_arguments():
    model = timm.create_model("vitrim_cifar_vit", embed_dim=48, num_heads=2, num_classes=7, depth=2)
    assert (model.embed_dim, model.blocks[0].attn.num_heads, model.num_classes, len(model.blocks)) == (48, 2, 7, 2)
    hybrid = timm.create_model("vitrim_hybrid_vit")
    assert hybrid.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    plain = timm.create_model("vitrim_hybrid_vit", drop_path_rate=0.0)
    assert isinstance(plain.blocks[-1].drop_path1, torch.nn.Identity)


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_stem_makes_one_token_per_patch(patch):
    stem = ConvStem(img_size=(16, 24), patch_size=patch, in_chans=2, embed_dim=16).eval()
    assert len([layer for layer in stem.proj if isinstance(layer, torch.nn.Conv2d)]) == 3
    tokens = stem(torch.randn(3, 2, 16, 24))
    assert tokens.shape == (3, stem.num_patches, 16)
    assert stem.num_patches == (16 // patch) * (24 // patch)
    assert stem.feat_ratio() == patch
    assert stem.dynamic_feat_size((32, 16)) == (32 // patch, 16 // patch)


def test_stem_refuses_other_patches():
    with pytest.raises(ValueError, match="1, 2, 4 or 8 px"):
        ConvStem(img_size=15, patch_size=3, embed_dim=16)
    stem = ConvStem(img_size=16, patch_size=2, embed_dim=16)
    with pytest.raises(ValueError, match="stay"):
        stem.set_input_size(patch_size=4)


def test_other_image_sizes():
    model = timm.create_model("vitrim_hybrid_vit", embed_dim=32, num_heads=2, depth=2).eval()
    model.set_input_size(img_size=(48, 32))
    assert model.patch_embed.grid_size == (24, 16)
    assert model(torch.randn(1, 3, 48, 32)).shape == (1, 100)
    dynamic = timm.create_model("vitrim_hybrid_vit", embed_dim=32, num_heads=2, depth=2, dynamic_img_size=True).eval()
    same = timm.create_model("vitrim_hybrid_vit", embed_dim=32, num_heads=2, depth=2).eval()
    same.load_state_dict(dynamic.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(dynamic(images), same(images))
    assert dynamic(torch.randn(1, 3, 40, 24)).shape == (1, 100)


@pytest.mark.parametrize("name", SIZES)
def test_reductions_and_costs_as_on_any_timm_model(name):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    image, patches, *_ = SIZES[name]
    images = torch.randn(2, *image)
    before, dense = model(images), vitrim.cost(model)
    with vitrim.attach(model, vitrim.TopK(), vitrim.KeepRate(0.5, at=(2,))) as handle:
        assert handle.token_counts[2:] == (patches // 2 + 1,) * (len(model.blocks) - 2)
        assert model(images).isfinite().all()
        assert vitrim.cost(model).macs < dense.macs
        assert model.forward_intermediates(images, intermediates_only=True)[-1].shape[2:] == model.patch_embed.grid_size
    assert torch.equal(model(images), before)


def test_counting_leaves_running_statistics_alone():
    model = timm.create_model("vitrim_digits_vit", depth=1).train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    assert vitrim.cost(model).macs > 0
    assert before
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_macs_of_the_stem_are_counted():
    one, two = (vitrim.cost(timm.create_model("vitrim_digits_vit", depth=depth)).macs for depth in (1, 2))
    stem = 64 * 9 * (1 * 24 + 24 * 48 + 48 * 96)
    assert one - (two - one) == stem + 96 * 10


def test_digits_are_learnt_in_seconds():
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    images = (images - 0.3053) / 0.3759
    assert images.mean().abs() < 1e-3
    assert (images.std() - 1).abs() < 1e-3
    labels, held = torch.tensor(digits.target), torch.arange(len(images)) % 5 == 0
    model = timm.create_model("vitrim_digits_vit", depth=2, embed_dim=48)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(4):
        for batch in torch.where(~held)[0][torch.randperm(int((~held).sum()))].split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        accuracy = (model.eval()(images[held]).argmax(1) == labels[held]).float().mean()
    assert accuracy > 0.7
