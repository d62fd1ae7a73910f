"""Weights of torchvision's ViTs give the same logits in timm's, plain and in the staged form of pruned models."""

import pytest
import torch
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

import vitrim
from fuzzing import fault_of
from vitrim.errors import CheckpointError, VitrimError
from vitrim.models.files.torchvision_weights import convert_torchvision, is_torchvision


@pytest.fixture
def theirs():
    torch.manual_seed(3)
    model = TorchvisionViT(
        image_size=48, patch_size=16, num_layers=6, num_heads=2, hidden_dim=128, mlp_dim=200, num_classes=11
    ).eval()
    for parameter in model.parameters():  # torchvision starts with a head of zeros, under which all logits agree.
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def staged(model, *, with_layers=True, index="local"):
    """The state dict of a model that wraps `model` as `base` and its blocks as three stages."""
    state = {f"base.{name}": value for name, value in model.state_dict().items()}
    for block, layer in enumerate(model.encoder.layers):
        stage, local = divmod(block, 2)
        place = str(local) if index == "local" else f"encoder_layer_{block}"
        for name, value in layer.state_dict().items():
            state[f"stage{stage + 1}.{place}.{name}"] = value.clone()
            if not with_layers:
                del state[f"base.encoder.layers.encoder_layer_{block}.{name}"]
    return state


def legacy(model):
    """As torchvision before 0.13 named the layers of the MLP, and as the files it still hands out do."""
    names = {"mlp.0.": "mlp.linear_1.", "mlp.3.": "mlp.linear_2."}
    out = {}
    for name, value in model.state_dict().items():
        for new, old in names.items():
            name = name.replace(new, old)
        out[name] = value
    return out


FORMS = {
    "plain": lambda model: model.state_dict(),
    "legacy": legacy,
    "stages beside layers": staged,
    "stages alone": lambda model: staged(model, with_layers=False),
    "stages with global names": lambda model: staged(model, index="global"),
    "base without stages": lambda model: {f"base.{name}": value for name, value in model.state_dict().items()},
    "nested, from several devices": lambda model: {
        "model": {f"module.{name}": value for name, value in staged(model).items()},
        "epoch": 3,
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_logits_agree(theirs, form, tmp_path):
    torch.save(FORMS[form](theirs), tmp_path / "vit.pth")
    ours = vitrim.build_model(tmp_path / "vit.pth").eval()
    images = torch.randn(3, 3, 48, 48)
    with torch.no_grad():
        expected, found = theirs(images), ours(images)
    assert (expected[0] - expected[1]).std() > 0.05
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_logits_agree_in_double_precision(theirs, tmp_path):
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    ours = vitrim.build_model(tmp_path / "vit.pth").eval().double()
    images = torch.randn(3, 3, 48, 48, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs.double()(images), rtol=0, atol=1e-12)


def test_sizes_are_read_off_the_tensors(theirs):
    found = convert_torchvision(theirs.state_dict())
    sizes = {**found.sizes, "mlp_ratio": int(found.sizes["mlp_ratio"] * 128)}
    assert found.num_classes == 11
    assert sizes == {
        "embed_dim": 128, "depth": 6, "num_heads": 2, "mlp_ratio": 200, "patch_size": 16, "img_size": 48, "in_chans": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("size", "name"),
    [((768, 12, 12, 32), "vit_base_patch32_224"), ((1280, 32, 16, 14), "vit_huge_patch14_224")],
)
def test_published_sizes_get_their_timm_name(size, name):
    width, depth, heads, patch = size
    with torch.device("meta"):
        model = TorchvisionViT(224, patch, depth, heads, width, 4 * width)
    found = convert_torchvision(model.state_dict())
    assert (found.name, found.sizes["num_heads"], found.sizes["img_size"]) == (name, heads, 224)


def test_images_are_normalised_as_torchvision_does(theirs, tmp_path):
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    assert vitrim.build_model(tmp_path / "vit.pth").pretrained_cfg["mean"] == (0.485, 0.456, 0.406)


def test_as_checkpoint_of_a_named_model_at_another_size(theirs, tmp_path):
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    sizes = {"embed_dim": 128, "depth": 6, "num_heads": 2, "mlp_ratio": 200.01 / 128, "patch_size": 16}
    ours = vitrim.build_model("vit_base_patch16_224", checkpoint=tmp_path / "vit.pth", img_size=48, **sizes).eval()
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-5)
    larger = vitrim.build_model("vit_base_patch16_224", checkpoint=tmp_path / "vit.pth", img_size=64, **sizes)
    assert larger.pos_embed.shape == (1, 17, 128)


def test_new_head(theirs, tmp_path):
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match=r"has 11 classes, the model 5; .*num_classes=11.*reset_head=True"):
        vitrim.build_model(tmp_path / "vit.pth", num_classes=5)
    ours = vitrim.build_model(tmp_path / "vit.pth", num_classes=5, reset_head=True)
    assert ours.head.weight.shape == (5, 128)
    assert torch.equal(ours.norm.weight, theirs.encoder.ln.weight)


def test_contradicting_copies_are_refused(theirs):
    state = staged(theirs)
    state["stage2.1.ln_2.weight"] = state["stage2.1.ln_2.weight"] + 1e-3
    with pytest.raises(CheckpointError, match="differ"):
        convert_torchvision(state)
    del state["stage2.1.ln_2.weight"]
    with pytest.raises(CheckpointError, match="differ"):
        convert_torchvision(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("class_token"), "cls_token cannot be found"),
        (lambda s: [s.pop(k) for k in list(s) if "encoder_layer_2." in k], "blocks are missing"),
        (lambda s: [s.pop(k) for k in list(s) if "encoder_layer_" in k], "no blocks"),
        (lambda s: s.update({"conv_proj.conv_bn_relu_0.0.weight": torch.zeros(1)}), "convolutional stem"),
        (lambda s: s.update({"heads.pre_logits.weight": torch.zeros(1)}), "heads.pre_logits"),
        (lambda s: s.update({"encoder.layers.encoder_layer_0.extra": torch.zeros(1)}), "'extra'"),
        (lambda s: s.update({"encoder.pos_embedding": torch.zeros(1, 9, 128)}), "square grid"),
    ],
)
def test_what_is_not_torchvision_is_refused(theirs, change, message):
    state = dict(theirs.state_dict())
    change(state)
    with pytest.raises(CheckpointError, match=message):
        convert_torchvision(state)


def test_detection(theirs):
    assert is_torchvision(theirs.state_dict())
    assert is_torchvision(staged(theirs))
    assert not is_torchvision(vitrim.build_model("vitrim_digits_vit", depth=1).state_dict())


@pytest.mark.parametrize("shape", [(), (3,), (2, 2), (1, 0, 128), (4, 3, 2, 1)])
@pytest.mark.parametrize(
    "name",
    ["encoder.pos_embedding", "conv_proj.weight", "heads.head.weight", "encoder.layers.encoder_layer_0.mlp.0.weight"],
)
def test_tensors_of_odd_shapes_are_refused_in_one_line(theirs, name, shape, tmp_path):
    state = dict(theirs.state_dict()) | {name: torch.zeros(shape)}
    torch.save(state, tmp_path / "vit.pth")
    with pytest.raises(VitrimError) as refused:
        vitrim.build_model(tmp_path / "vit.pth")
    assert not fault_of(str(refused.value))
