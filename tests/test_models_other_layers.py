"""A model whose layers differ from what its description builds is refused where no weight shows the difference."""

import pytest
import timm
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import vitrim
from vitrim.errors import CheckpointError

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


def of_timm(**options):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **{**SMALL, **options}).eval()


def of_transformers():
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    return ViTForImageClassification(ViTConfig(intermediate_size=48, **sizes)).eval()


def relu(model):
    model.blocks[1].mlp.act = nn.ReLU()


def eps(model):
    model.blocks[0].norm1.eps = 0.1


def scale(model):
    model.blocks[0].attn.scale = 0.5


def norm(model):
    model.blocks[0].attn.norm = nn.LayerNorm(24, elementwise_affine=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (relu, "blocks.1.mlp.act is a ReLU, not a GELU"),
        (eps, "blocks.0.norm1.eps is 0.1, not 1e-06"),
        (scale, "blocks.0.attn.scale is 0.5"),
        (norm, "blocks.0.attn.norm is a LayerNorm, not a Identity"),
    ],
)
@pytest.mark.parametrize("method", [None, "TopK(norm) @ KeepRate(0.5, at=(0,))"])
def test_what_no_weight_shows_is_refused_and_not_lost(change, words, method, tmp_path):
    model = of_timm()
    change(model)
    if method:
        vitrim.attach(model, method)
    with pytest.raises(CheckpointError, match=words):
        vitrim.save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_an_activation_of_transformers_that_was_exchanged_is_refused(tmp_path):
    model = of_transformers()
    for module in list(model.modules()):
        for name, part in module.named_children():
            if "GELU" in type(part).__name__:
                setattr(module, name, nn.ReLU())
    with pytest.raises(CheckpointError, match="is a ReLU, not a GELU"):
        vitrim.save(model, tmp_path / "m")


def test_an_activation_that_was_asked_for_comes_back(tmp_path):
    model, images = of_timm(act_layer="relu"), torch.randn(2, 3, 32, 32)
    vitrim.save(model, tmp_path / "m")
    assert torch.equal(vitrim.load(tmp_path / "m")(images), model(images))


def test_what_changes_nothing_in_eval_mode_is_no_difference(tmp_path):
    model, images = of_timm(), torch.randn(2, 3, 32, 48)
    model.head_drop, model.blocks[0].drop_path1 = nn.Dropout(0.5), nn.Dropout(0.1)
    model.set_grad_checkpointing(True)
    model.set_input_size(img_size=(32, 48))
    for block in model.blocks:
        block.attn.fused_attn = False
    vitrim.attach(model.train(), "ToMe() @ ConstantR(4)")
    vitrim.save(model, tmp_path / "m")
    again = vitrim.load(tmp_path / "m")
    torch.testing.assert_close(again(images), model.eval()(images))
