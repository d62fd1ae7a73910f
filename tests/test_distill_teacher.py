"""Teachers of other size, patch, width, prefix and family see the student's batch in their own format."""

import copy
import math
from functools import partial

import pytest
import timm
import torch

import vitrim
from processes import start
from vitrim.distill import Distiller, Teacher, Wanted
from vitrim.distill.teacher import resample_tokens
from vitrim.errors import VitrimError
from vitrim.models import adapter_of
from vitrim.models.files.build import build_model
from vitrim.models.outputs import Cls, Logits, Patches, Stages

IMAGES = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)
EVERYTHING = Wanted.of(Logits(), Stages(3), Cls(), Patches())


def vit(name="vit_tiny_patch16_224", **args):
    options = {"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 5} | args
    return timm.create_model(name, **options).eval()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(3)


def triangle(old, new):
    """Weights (new, old) of bilinear resampling, averaging when it shrinks, from the definition."""
    scale = max(old / new, 1.0)
    rows = []
    for i in range(new):
        centre = (i + 0.5) * old / new
        raw = [max(0.0, 1 - abs(j + 0.5 - centre) / scale) for j in range(old)]
        rows.append([w / sum(raw) for w in raw])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(("old", "new"), [((4, 4), (7, 7)), ((9, 9), (4, 4)), ((3, 5), (6, 4)), ((4, 4), (4, 4))])
def test_tokens_are_resampled_like_an_image(old, new):
    x = torch.randn(2, old[0] * old[1], 3, dtype=torch.float64)
    down, across = triangle(old[0], new[0]), triangle(old[1], new[1])
    expected = torch.einsum("ih,jw,bhwc->bijc", down, across, x.unflatten(1, old)).flatten(1, 2)
    torch.testing.assert_close(resample_tokens(x, old, new), expected, rtol=1e-9, atol=1e-12)


def test_grids_follow_the_shape_of_the_image():
    model = vit(dynamic_img_size=True)
    assert adapter_of(model).grid(model, (64, 64)) == (4, 4)
    assert adapter_of(model).grid(model, (32, 64)) == (2, 4)
    with pytest.raises(VitrimError, match=r"8 patch tokens of a teacher do not fill its grid \(4, 4\)"):
        resample_tokens(torch.zeros(1, 8, 3), (4, 4), (2, 2))


def test_features_are_those_of_the_model():
    model = vit(depth=6, num_classes=5).double()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    seen = {}
    hooks = [
        block.register_forward_hook(lambda _m, _i, out, at=i: seen.update({at: out}))
        for i, block in enumerate(model.blocks)
    ]
    logits = model(images)
    for hook in hooks:
        hook.remove()
    found = adapter_of(model).outputs(model, images, EVERYTHING)
    final = model.norm(seen[5])
    torch.testing.assert_close(found["logits"], logits)
    torch.testing.assert_close(found["stages@3"], torch.stack([seen[1][:, 0], seen[3][:, 0]], 1))
    torch.testing.assert_close(found["cls"], final[:, 0])
    torch.testing.assert_close(found["tokens"], final[:, 1:])


@pytest.mark.parametrize(
    ("name", "args", "prefix"),
    [
        ("vit_tiny_patch16_224", {"img_size": 96, "embed_dim": 96}, 1),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 84, "depth": 4, "num_classes": 0}, 5),
        ("deit_tiny_distilled_patch16_224", {}, 2),
        ("vit_base_patch16_siglip_224", {"num_classes": 5}, 0),
        ("eva02_tiny_patch14_224", {"img_size": 56, "embed_dim": 48, "num_heads": 3}, 1),
    ],
)
def test_any_vit_teaches_on_the_students_grid(name, args, prefix):
    model = vit(name, **args)
    teacher = Teacher(model)
    has_cls, wanted = prefix > 0, EVERYTHING
    if not has_cls:
        wanted = Wanted.of(Logits(), Patches())
    if model.num_classes == 0:
        wanted = Wanted.of(Stages(3), Cls(), Patches())
    images = torch.randn(2, 3, 64, 64)
    found = teacher(images, wanted, grid=(4, 4))
    ready = (
        torch.nn.functional.interpolate(images, teacher.input_size, mode="bicubic", antialias=True, align_corners=False)
        if teacher.input_size != (64, 64)
        else images
    )
    with torch.no_grad():
        final = model.forward_features(ready)
    own = math.isqrt(final.shape[1] - prefix)
    torch.testing.assert_close(found["tokens"], resample_tokens(final[:, prefix:], (own, own), (4, 4)))
    assert found["tokens"].shape == (2, 16, model.embed_dim)
    if has_cls:
        torch.testing.assert_close(found["cls"], final[:, 0])
        assert found["stages@3"].shape == (2, 2, model.embed_dim)
    if model.num_classes:
        with torch.no_grad():
            torch.testing.assert_close(found["logits"], model(ready))
    assert teacher.info.num_prefix == prefix


def test_images_are_normalised_anew():
    pixels = torch.rand(2, 3, 64, 64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    model = vit()  # timm normalises this one with 0.5.
    teacher = Teacher(model, images_mean=mean.flatten().tolist(), images_std=std.flatten().tolist())
    given = teacher((pixels - mean) / std, Wanted.of(Logits()))["logits"]
    with torch.no_grad():
        torch.testing.assert_close(given, model((pixels - 0.5) / 0.5), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(Teacher(model).prepare(pixels), pixels, rtol=0, atol=0)


def test_grey_images_reach_a_colour_teacher():
    grey = torch.randn(2, 1, 64, 64)
    teacher = Teacher(vit(), images_mean=(0.5,), images_std=(0.25,))
    expected = ((grey * 0.25 + 0.5) - 0.5) / 0.5
    torch.testing.assert_close(teacher.prepare(grey), expected.expand(-1, 3, -1, -1))


def test_a_convolutional_teacher_gives_logits_alone():
    teacher = Teacher(timm.create_model("resnet10t", num_classes=5), input_size=(64, 64))
    images = torch.randn(2, 3, 64, 64)
    assert teacher(images, Wanted.of(Logits()))["logits"].shape == (2, 5)
    with pytest.raises(VitrimError, match="reads tokens of the teacher, but resnet10t gives logits only"):
        Distiller(vit(), teacher, "Tokens()")


def test_teacher_stays_frozen_and_in_eval_mode_and_out_of_checkpoints():
    teacher = Teacher(timm.create_model("resnet10t", num_classes=5).train(), input_size=(64, 64))
    distiller = Distiller(vit(), teacher, "Logits()").train()
    assert distiller.student.training
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    distiller(torch.randn(2, 3, 64, 64)).loss.backward()
    assert all(torch.equal(before[name], value) for name, value in teacher.model.state_dict().items())
    state = distiller.state_dict()
    assert not any("teacher" in name for name in state)
    other = Distiller(vit(), Teacher(timm.create_model("resnet10t", num_classes=5)), "Logits()")
    other.load_state_dict(state)
    assert torch.equal(other.student.head.weight, distiller.student.head.weight)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({name: value for name, value in state.items() if name != "student.head.bias"})


def test_fingerprint_tells_teachers_apart():
    model = vit()
    first = Teacher(model).fingerprint()
    assert Teacher(copy.deepcopy(model)).fingerprint() == first
    assert Teacher(model, images_mean=(0.1, 0.2, 0.3)).fingerprint() != first
    assert Teacher(model, input_size=(64, 80)).fingerprint() != first
    with torch.no_grad():
        model.blocks[1].mlp.fc1.bias[3] += 1e-6
    assert Teacher(model).fingerprint() != first


@pytest.mark.parametrize(
    "args",
    [
        {"num_heads": 6},
        {"act_layer": "relu"},
        {"norm_layer": partial(torch.nn.LayerNorm, eps=1e-3)},
        {"global_pool": "avg"},
    ],
)
def test_fingerprint_tells_settings_apart_that_are_in_no_weight(args):
    model, other = vit(fc_norm=False), vit(fc_norm=False, **args)
    other.load_state_dict(model.state_dict())
    assert not torch.equal(other(IMAGES), model(IMAGES))
    assert Teacher(other).fingerprint() != Teacher(model).fingerprint()


class Shifted(torch.nn.Module):
    """Holds a constant that no checkpoint carries."""

    def __init__(self, shift):
        super().__init__()
        self.num_classes, self.layer = 5, torch.nn.Linear(3, 5)
        self.register_buffer("offset", torch.full((3,), shift), persistent=False)

    def forward(self, images):
        return self.layer(images.mean((2, 3)) + self.offset)


def test_fingerprint_covers_constants_that_no_checkpoint_carries():
    one, two = Shifted(0.0), Shifted(1.0)
    two.load_state_dict(one.state_dict())
    images = {"input_size": (64, 64), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    assert Teacher(one, **images).fingerprint() != Teacher(two, **images).fingerprint()
    with pytest.raises(VitrimError, match="what images this Shifted expects is not known; give"):
        Teacher(one)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "resnet10t"])
def test_fingerprint_stays_where_the_answers_stay(name, tmp_path):
    sizes = {"img_size": 56, "depth": 3, "embed_dim": 48, "num_heads": 3} if "resnet" not in name else {}
    model = timm.create_model(name, num_classes=5, drop_path_rate=0.1, **sizes)
    given = {"input_size": (56, 56)}
    first = Teacher(model, **given).fingerprint()

    def after(change):
        change()
        return Teacher(model, **given).fingerprint()

    assert after(model.train) == after(model.eval) == first
    assert after(lambda: model.requires_grad_(True)) == first
    assert after(lambda: model.to(memory_format=torch.channels_last)) == first
    assert after(lambda: model(torch.randn(2, 3, 56, 56))) == first
    assert after(lambda: model.set_grad_checkpointing(True)) == first
    assert after(lambda: model.register_forward_hook(lambda *_: None)) == first
    assert after(lambda: model.compile(backend="eager")) == first
    assert Teacher(vitrim.load(vitrim.save(model, tmp_path / "model")), **given).fingerprint() == first


def test_fingerprint_is_the_same_in_another_process(tmp_path):
    model = vit()
    vitrim.save(model, tmp_path / "model")
    line = (
        "import sys, vitrim; from vitrim.distill import Teacher; print(Teacher(vitrim.load(sys.argv[1])).fingerprint())"
    )
    told = start(line, str(tmp_path / "model")).wait()
    assert (told.returncode, told.stdout.strip()) == (0, Teacher(model).fingerprint()), told.stderr


def test_a_reduced_teacher_is_refused():
    model = vit()
    with (
        vitrim.attach(model, "TopK() @ KeepRate(0.5, at=(1,))"),
        pytest.raises(VitrimError, match="a teacher is dense"),
    ):
        Teacher(model)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(VitrimError, match="no file of weights at") as refused:
        Teacher(build_model("vit_tiny_patch16_224", checkpoint=tmp_path / "none.safetensors"))
    assert "\n" not in str(refused.value)
