"""A saved model comes back whole: sizes, head, widths, reduction; and a folder is never half written or lost."""

import json
from dataclasses import replace

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import vitrim
from eva_models import EVA
from eva_models import MORE as EVA_MORE
from relative_models import BEIT, RELPOS
from vitrim.errors import CheckpointError, OutputError, UnknownNameError, VitrimError
from vitrim.models import BlockWidths, open_model, set_widths, widths_of
from vitrim.models.files import store as store_module
from vitrim.models.files.checkpoints import read_tensors
from vitrim.models.files.description import SCHEMA

SIZES = {"img_size": 32, "depth": 3, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
MODELS = {
    "vit_tiny_patch16_224": SIZES,
    "deit_tiny_distilled_patch16_224": SIZES,
    "deit3_small_patch16_224": SIZES,
    "vit_small_patch14_dinov2": {**SIZES, "img_size": 28, "num_classes": 0},
    "vit_small_patch14_reg4_dinov2": {**SIZES, "img_size": (28, 56)},
    "vit_base_patch16_siglip_224": {**SIZES},
    "vit_base_patch16_clip_quickgelu_224": {**SIZES, "dynamic_img_size": True},
    "vit_small_patch16_dinov3": {**SIZES},
    "vit_pe_core_tiny_patch16_384": {**SIZES},
    "vitrim_hybrid_vit": {**SIZES, "drop_path_rate": 0.3},
    "vitrim_digits_vit": {"depth": 2},
    "resnet10t": {"num_classes": 3},
}


def image_of(model):
    height, width = getattr(getattr(model, "patch_embed", None), "img_size", None) or (64, 64)
    return torch.randn(2, getattr(model, "in_chans", 3), height, width)


def tiny(**args):
    return timm.create_model("vit_tiny_patch16_224", **{**SIZES, **args}).eval()


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_comes_back(name, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(name, **MODELS[name]).eval()
    vitrim.save(model, tmp_path / "m")
    loaded = vitrim.load(tmp_path / "m")
    images = image_of(model)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert torch.equal(loaded(images), model(images))
    for key in ("mean", "std", "interpolation", "crop_pct"):
        assert loaded.pretrained_cfg[key] == model.pretrained_cfg[key]
    vitrim.save(loaded, tmp_path / "again")
    described = [json.loads((tmp_path / folder / "vitrim.json").read_text()) for folder in ("m", "again")]
    assert described[0] == described[1]


def test_changes_after_construction_come_back(tmp_path):
    model = tiny()
    model.reset_classifier(9, global_pool="avg")
    model.set_input_size(img_size=(48, 32))
    vitrim.save(model, tmp_path)
    loaded, images = vitrim.load(tmp_path), torch.randn(2, 3, 48, 32)
    assert loaded.num_classes == 9
    assert torch.equal(loaded(images), model(images))


def test_weights_of_another_normalisation_keep_it(tmp_path):
    model = tiny(pretrained_cfg_overlay={"mean": (0.1, 0.2, 0.3), "crop_pct": 0.5})
    vitrim.save(model, tmp_path)
    assert vitrim.load(tmp_path).pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
    assert vitrim.load(tmp_path).pretrained_cfg["crop_pct"] == 0.5


@pytest.mark.parametrize(
    "reduction",
    [
        "TopK(fuse=sum) @ KeepRate(0.5, at=(1,))",
        "ToMe() @ ConstantR(1)",
        "TopK(score=norm) @ Budget(macs=0.8)",
    ],
)
def test_reduction_comes_back_at_work(reduction, tmp_path):
    torch.manual_seed(1)
    model = tiny(img_size=64)
    before = type(model)
    handle = vitrim.attach(model, reduction)
    vitrim.save(model, tmp_path)
    loaded, images = vitrim.load(tmp_path), torch.randn(2, 3, 64, 64)
    assert vitrim.attached(loaded).token_counts == handle.token_counts
    assert handle.token_counts[-1] < 17
    assert torch.equal(loaded(images), model(images))
    assert vitrim.cost(loaded) == vitrim.cost(model)
    vitrim.attached(loaded).remove()
    handle.remove()
    assert type(loaded) is before
    assert torch.equal(loaded(images), model(images))


def test_phase_strength_and_cls_only_come_back(tmp_path):
    model = tiny(img_size=64)
    reduction = replace(vitrim.Reduction.parse("TopK() @ KeepRate(0.5, at=(1,)) @ Delayed(5)"), phase="train")
    handle = vitrim.attach(model, reduction, cls_only=True)
    handle.set_epoch(7)
    vitrim.save(model, tmp_path / "late")
    handle.set_epoch(1)
    vitrim.save(model, tmp_path / "early")
    late, early = (vitrim.attached(vitrim.load(tmp_path / folder)) for folder in ("late", "early"))
    assert (late.strength, early.strength) == (1.0, 0.0)
    assert late.cls_only
    assert late.reduction.phase == "train"
    assert late.plan(training=True).token_counts == (17, 9, 1)
    assert early.plan(training=True).token_counts == (17, 17, 1)
    assert late.plan(training=False).token_counts == (17, 17, 1)


def test_cls_only_alone_comes_back(tmp_path):
    model = tiny()
    vitrim.attach(model, None, cls_only=True)
    vitrim.save(model, tmp_path)
    handle = vitrim.attached(vitrim.load(tmp_path))
    assert handle.cls_only
    assert handle.reduction is None


def test_uneven_widths_come_back(tmp_path):
    torch.manual_seed(2)
    model, images = tiny(), torch.randn(2, 3, 32, 32)
    set_widths(model, [BlockWidths(16, 128), BlockWidths(5, 0), BlockWidths(0, 17)])
    vitrim.attach(model, "TopK(score=norm) @ KeepRate(0.5, at=(1,))")
    vitrim.save(model, tmp_path)
    loaded = vitrim.load(tmp_path)
    assert json.loads((tmp_path / "vitrim.json").read_text())["widths"][1] == {"head_dim": 5, "hidden": 0}
    assert torch.equal(loaded(images), model(images))
    vitrim.attached(loaded).remove()
    assert widths_of(loaded) == (BlockWidths(16, 128), BlockWidths(5, 0), BlockWidths(0, 17))


def test_dtype_and_strides_survive(tmp_path):
    model = tiny().to(torch.bfloat16)
    model.head.weight = torch.nn.Parameter(torch.randn(32, 5, dtype=torch.bfloat16).t())
    vitrim.save(model, tmp_path)
    loaded = vitrim.load(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(loaded.head.weight, model.head.weight)


def test_arguments_at_loading(tmp_path):
    vitrim.save(tiny(drop_path_rate=0.2), tmp_path)
    assert vitrim.load(tmp_path).blocks[2].drop_path1.drop_prob == pytest.approx(0.2)
    assert vitrim.load(tmp_path, drop_path_rate=0.4).blocks[2].drop_path1.drop_prob == pytest.approx(0.4)


def test_description_is_readable_and_the_weights_are_enough(tmp_path):
    vitrim.save(tiny(), tmp_path, accuracy=0.5, note="held out")
    described = json.loads((tmp_path / "vitrim.json").read_text())
    assert described["schema"] == SCHEMA
    assert described["architecture"] == "vit_tiny_patch16_224"
    assert described["extra"] == {"accuracy": 0.5, "note": "held out"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "vitrim.json"]
    (tmp_path / "vitrim.json").unlink()
    assert vitrim.load(tmp_path).num_classes == 5


def test_nothing_is_overwritten_unasked(tmp_path):
    first, second = tiny(), tiny()
    vitrim.save(first, tmp_path)
    with pytest.raises(CheckpointError, match="holds a model already"):
        vitrim.save(second, tmp_path)
    assert torch.equal(vitrim.load(tmp_path).head.weight, first.head.weight)
    vitrim.save(second, tmp_path, overwrite=True)
    assert torch.equal(vitrim.load(tmp_path).head.weight, second.head.weight)


def test_a_full_disk_leaves_the_old_model(tmp_path, monkeypatch):
    first = tiny()
    vitrim.save(first, tmp_path)

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module, "save_file", full)
    with pytest.raises(OutputError, match="No space left"):
        vitrim.save(tiny(), tmp_path, overwrite=True)
    assert torch.equal(vitrim.load(tmp_path).head.weight, first.head.weight)
    assert len(list(tmp_path.iterdir())) == 2


def test_models_that_cannot_be_described_are_refused(tmp_path):
    by_hand = timm.models.VisionTransformer(**SIZES)
    with pytest.raises(CheckpointError, match=r"not made by timm.create_model"):
        vitrim.save(by_hand, tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"not made by timm.create_model"):
        vitrim.save(torch.nn.Linear(2, 2), tmp_path / "b")
    changed = tiny()
    changed.head = torch.nn.Sequential(changed.head)
    with pytest.raises(CheckpointError, match=r"differs from the vit_tiny_patch16_224.*head.0.weight"):
        vitrim.save(changed, tmp_path / "c")
    callable_argument = tiny(act_layer=torch.nn.ReLU)
    with pytest.raises(CheckpointError, match=r"act_layer=.*give a plain value or a name"):
        vitrim.save(callable_argument, tmp_path / "d")
    with pytest.raises(CheckpointError, match="JSON cannot hold confusion="):
        vitrim.save(tiny(), tmp_path / "e", confusion=torch.zeros(2))
    assert not any(tmp_path.iterdir())


def rewrite(folder, **changes):
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["vitrim"]) | changes
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(state, path, metadata={"vitrim": json.dumps(record)})


def test_folders_that_are_not_what_they_should_be(tmp_path):
    with pytest.raises(CheckpointError, match="no model at"):
        vitrim.load(tmp_path / "absent")
    vitrim.save(tiny(), tmp_path)
    rewrite(tmp_path, schema=SCHEMA + 1)
    with pytest.raises(CheckpointError, match="update vitrim"):
        vitrim.load(tmp_path)
    rewrite(tmp_path, schema=1, architecture="vit_tiny_patch16_2244")
    with pytest.raises(UnknownNameError, match="vit_tiny_patch16_224"):
        vitrim.load(tmp_path)
    rewrite(tmp_path, architecture="vit_tiny_patch16_224", args={**SIZES, "depth": 4})
    with pytest.raises(CheckpointError, match=r"does not fit its own description: 12 missing"):
        vitrim.load(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"not written by vitrim.save"):
        vitrim.load(tmp_path)
    content = b"\x08\x00\x00\x00\x00\x00\x00\x00{half"
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        vitrim.load(tmp_path)


def test_unmerged_lora_is_to_be_merged_first(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["qkv"]))
    for given in (model, model.base_model, model.base_model.model):
        with pytest.raises(CheckpointError, match=r"merge the adapters .*merge_and_unload\(\)"):
            vitrim.save(given, tmp_path / "lora")
    vitrim.save(model.merge_and_unload(), tmp_path / "merged")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_quantised_model_is_refused_by_save_and_compress(tmp_path):
    model = torch.ao.quantization.quantize_dynamic(tiny(), {torch.nn.Linear}, torch.qint8)
    for call in (
        lambda: vitrim.save(model, tmp_path / "saved"),
        lambda: vitrim.compress(model, torch.zeros(64, 3, 32, 32), macs=0.7, using=("tokens",)),
    ):
        with pytest.raises(CheckpointError, match=r"not all plain tensors .*after vitrim has compressed or saved it"):
            call()


def test_images_of_too_many_patches_are_refused_before_memory_is_taken(tmp_path):
    vitrim.save(tiny(), tmp_path / "saved")
    for spec in ("vit_tiny_patch16_224", str(tmp_path / "saved")):
        with pytest.raises(
            VitrimError, match=r"16000 x 16000 px give 1,000,000 patches .* choose a smaller image size"
        ):
            open_model(spec, image_size=16000)


TABLES = {**EVA, "eva02": EVA_MORE["eva02"], **BEIT, **RELPOS}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TABLES)
def test_half_precision_comes_back_with_its_tables(name, dtype, tmp_path):
    model, images = TABLES[name]().eval().to(dtype), torch.randn(2, 3, 40, 40).to(dtype)
    vitrim.save(model, tmp_path)
    loaded = vitrim.load(tmp_path)
    assert [value.dtype for value in loaded.buffers()] == [value.dtype for value in model.buffers()]
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


def test_a_table_that_a_description_names_in_vain_is_refused(tmp_path):
    vitrim.save(tiny(), tmp_path)
    for tables, words in (
        ({"rope": "float16"}, "names a table rope that it does not have"),
        ({"rope": "int8"}, "must be"),
    ):
        altered = json.loads((tmp_path / "vitrim.json").read_text()) | {"tables": tables}
        save_file(
            read_tensors(tmp_path / "model.safetensors"),
            tmp_path / "model.safetensors",
            {"vitrim": json.dumps(altered)},
        )
        with pytest.raises(CheckpointError, match=words):
            vitrim.load(tmp_path)
