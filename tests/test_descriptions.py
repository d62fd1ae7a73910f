"""The description of a saved model is checked whole before anything is built from it."""

import copy
import json
import threading

import pytest
import timm
from safetensors import safe_open
from safetensors.torch import save_file

import vitrim
from fuzzing import fault_of
from hf_models import HF
from vitrim.errors import CheckpointError, VitrimError
from vitrim.models.files.classes import classes_of
from vitrim.models.files.description import parse
from vitrim.models.files.rebuild import describe
from zoo import ZOO

NAME = "vit_tiny_patch16_224"
SIZES = {"img_size": 32, "depth": 2, "embed_dim": 16, "num_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = timm.create_model(NAME, num_classes=3, **SIZES)
    vitrim.attach(model, "TopK(score=norm) @ KeepRate(0.5, at=(1,))")
    return vitrim.save(model, tmp_path_factory.mktemp("model") / "m", classes=["a", "b", "c"])


def contents(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return json.loads(file.metadata()["vitrim"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def changed(folder, tmp_path, change):
    record, state = contents(folder)
    record = copy.deepcopy(record)
    record = change(record) or record
    save_file(state, tmp_path / "model.safetensors", metadata={"vitrim": json.dumps(record)})
    return tmp_path


def put(*path, value):
    def change(record):
        for key in path[:-1]:
            record = record[key]
        record[path[-1]] = value

    return change


def deep(length):
    value = 1
    for _ in range(length):
        value = [value]
    return value


ALTERED = {
    "schema is text": put("schema", value="1"),
    "schema is true": put("schema", value=True),
    "no architecture": lambda r: r.pop("architecture") and None,
    "no args": lambda r: r.pop("args") and None,
    "an architecture on a hub": put("architecture", value="hf-hub:someone/model"),
    "an architecture in a folder": put("architecture", value="local-dir:/tmp"),
    "an architecture that is a list": put("architecture", value=["vit_tiny_patch16_224"]),
    "an unknown architecture": put("architecture", value="vit_tiny_patch16_2244"),
    "an unknown family": put("family", value="vit"),
    "args is a list": put("args", value=[1]),
    "a file among the arguments": put("args", "checkpoint_path", value="/etc/passwd"),
    "a configuration among the arguments": put("args", "pretrained_cfg", value={"file": "/etc/passwd"}),
    "weights to download": put("args", "pretrained", value=True),
    "a folder to download to": put("args", "cache_dir", value="x"),
    "a path in an argument": put("args", "act_layer", value="../../x"),
    "a class in an argument": put("args", "norm_layer", value={"class_path": "os.system"}),
    "an unknown argument": put("args", "keep_rate", value=0.5),
    "an argument of another type": put("args", "embed_dim", value="16"),
    "millions of blocks": put("args", "depth", value=5_000_000),
    "more blocks than weights": put("args", "depth", value=900),
    "terabytes": put("args", "embed_dim", value=65_536),
    "terabytes of positions": put("args", "img_size", value=8192),
    "endless images": put("args", "img_size", value=10**9),
    "no patch": put("args", "patch_size", value=0),
    "a truth in place of a number": put("args", "num_heads", value=True),
    "heads below zero": put("args", "num_heads", value=-1),
    "no head": put("args", "num_heads", value=0),
    "a negative width": put("args", "embed_dim", value=-16),
    "not a number": put("args", "mlp_ratio", value=float("nan")),
    "deep nesting": put("args", "img_size", value=deep(50)),
    "deeper nesting": put("args", "img_size", value=deep(900)),
    "a long list": put("args", "img_size", value=[32] * 10_000),
    "many arguments": put("args", value={f"a{number}": 1 for number in range(1000)}),
    "classes that are not a number": put("num_classes", value="3"),
    "a mean of text": put("data", "mean", value="0.5"),
    "a std of zero": put("data", "std", value=[0, 0, 0]),
    "an unknown crop mode": put("data", "crop_mode", value="centre"),
    "an unknown interpolation": put("data", "interpolation", value="bycubic"),
    "unknown data": put("data", "file", value="x"),
    "widths of another form": put("widths", value=[{"head_dim": 8}]),
    "widths that are a number": put("widths", value=3),
    "too few widths": put("widths", value=[{"head_dim": 8, "hidden": 64}]),
    "wider than it is": put("widths", value=[{"head_dim": 8, "hidden": 65_536}] * 2),
    "values of another width": put("widths", value=[{"head_dim": 8, "hidden": 64, "value_dim": 4}] * 2),
    "values of no number": put("widths", value=[{"head_dim": 8, "hidden": 64, "value_dim": None}] * 2),
    "values below zero": put("widths", value=[{"head_dim": 8, "hidden": 64, "value_dim": -1}] * 2),
    "another width": put("widths", value=[{"head_dim": 8, "hidden": 64, "query_dim": 4}] * 2),
    "strength is a list": put("reduction", "strength", value=[]),
    "strength above 1": put("reduction", "strength", value=7),
    "strength is not a number": put("reduction", "strength", value=float("nan")),
    "an unknown phase": put("reduction", "phase", value="sometimes"),
    "no text of a reduction": put("reduction", "text", value=7),
    "another reduction": put("reduction", "text", value="TopKK() @ KeepRate(0.5)"),
    "a deep reduction": put("reduction", "text", value="(" * 1900),
    "a reduction without a phase": lambda r: r["reduction"].pop("phase") and None,
    "cls_only is text": put("reduction", "cls_only", value="no"),
    "classes that are numbers": put("extra", "classes", value=[1, 2, 3]),
    "classes that are text": put("extra", "classes", value="abc"),
    "extra is a list": put("extra", value=[1]),
    "versions is a list": put("versions", value=[1]),
    "not a mapping": lambda r: [r],
}


@pytest.mark.parametrize("name", ALTERED)
def test_altered_descriptions_are_refused_in_one_line(name, folder, tmp_path):
    altered = changed(folder, tmp_path, ALTERED[name])
    with pytest.raises(VitrimError) as refused:
        vitrim.load(altered)
    assert not fault_of(str(refused.value))


@pytest.mark.parametrize("adapter", ["timm-eva", "transformers"])
def test_altered_widths_of_values_are_refused_in_one_line(adapter, tmp_path):
    name = next(name for name in ZOO[adapter] if name.endswith("narrow_values"))
    stored = vitrim.save(ZOO[adapter][name](), tmp_path / "m")
    for changes in ({"value_dim": 13}, {"value_dim": 4}, {"head_dim": 6}, {"head_dim": 0}, {"value_dim": 0}):
        altered = changed(stored, tmp_path, lambda record, changes=changes: record["widths"][0].update(changes))
        with pytest.raises(VitrimError) as refused:
            vitrim.load(altered)
        assert not fault_of(str(refused.value)), changes


BAD_SIZES = ([], [16], "", "x", 0, True, 0.5, [[]], [16, None], [1, 2, 3])


@pytest.mark.parametrize("name", ["hf_vit", "hf_dinov2", "hf_siglip2"])
def test_altered_sizes_of_hugging_face_models_are_refused_in_one_line(name, tmp_path):
    stored = vitrim.save(HF[name](), tmp_path / "m")
    for key in ("img_size", "patch_size", "position_size"):
        for value in BAD_SIZES:
            altered = changed(stored, tmp_path, put("args", key, value=value))
            with pytest.raises(VitrimError) as refused:
                vitrim.load(altered)
            assert not fault_of(str(refused.value))


def test_images_below_one_patch_are_refused(tmp_path):
    stored = vitrim.save(HF["hf_dinov2"](), tmp_path / "m")
    with pytest.raises(VitrimError, match="images of 3 x 3 px are smaller than one patch"):
        vitrim.load(changed(stored, tmp_path, put("args", "img_size", value=[3, 3])))


def test_an_unaltered_description_is_read(folder, tmp_path):
    again = changed(folder, tmp_path, lambda record: None)
    assert vitrim.attached(vitrim.load(again)).token_counts == (5, 3)
    assert classes_of(again / "model.safetensors") is None or classes_of(folder) == ["a", "b", "c"]


def test_a_description_without_family_is_still_read(folder, tmp_path):
    assert vitrim.load(changed(folder, tmp_path, lambda record: record.pop("family") and None)) is not None


def test_what_is_described_reads_back_as_it_was(folder):
    record = describe(vitrim.load(folder))
    assert describe(vitrim.load(folder)) == record
    again = parse(record.to_json(), "x")
    assert again.to_json() == record.to_json()
    assert (again.args, again.images, again.reduction, again.widths) == (
        record.args, record.images, record.reduction, record.widths,
    )  # fmt: skip


def test_of_many_that_save_into_one_folder_one_succeeds(tmp_path):
    models = [timm.create_model(NAME, **SIZES) for _ in range(4)]
    ready, saved, refused = threading.Barrier(4), [], []

    def run(index):
        ready.wait()
        try:
            vitrim.save(models[index], tmp_path / "m")
            saved.append(index)
        except CheckpointError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(saved) == 1
    assert all("holds a model already" in text for text in refused)
    assert (vitrim.load(tmp_path / "m").head.weight == models[saved[0]].head.weight).all()
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["model.safetensors", "vitrim.json"]
