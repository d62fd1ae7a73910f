"""Files that are not what they say: refused in one line, before memory is used and without anything of them running."""

import io
import json
import os
import pickle
import struct
import zipfile

import pytest
import timm
import torch
from safetensors.torch import save_file

import vitrim
from fuzzing import fault_of
from vitrim.errors import CheckpointError, VitrimError
from vitrim.models import open_model
from vitrim.models.files.checkpoints import read_weights

NAME = "vit_tiny_patch16_224"
SIZES = {"img_size": 32, "depth": 1, "embed_dim": 16, "num_heads": 2}


def refused(action, match):
    with pytest.raises(VitrimError, match=match) as refused:
        action()
    assert not fault_of(str(refused.value))


def build(path):
    return vitrim.build_model(NAME, checkpoint=path, **SIZES)


def state_dict():
    return timm.create_model(NAME, **SIZES).state_dict()


def holding_itself():
    content = {"epoch": 1}
    content["model"] = content
    content["state_dict"] = {"model": content}
    return content


CONTENTS = {
    "whole numbers as names": (lambda: {0: torch.ones(2), 1: torch.ones(2)}, "no state dict"),
    "tuples as names": (lambda: {"model": {("a", 1): torch.ones(2)}}, "no state dict"),
    "a dict that holds itself": (holding_itself, "no state dict"),
    "a list that holds itself": (lambda: (lambda a: a.append(a) or {"model": a})([]), "no state dict"),
    "a sparse tensor": (lambda: state_dict() | {"norm.bias": torch.ones(16).to_sparse()}, r"norm.bias is sparse"),
    "a tensor without data": (lambda: state_dict() | {"norm.bias": torch.ones(16, device="meta")}, "is without data"),
    "no tensor": (lambda: {"model": {}}, "no state dict"),
}


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("new", [True, False])
def test_contents_that_are_no_weights(name, new, tmp_path):
    content, match = CONTENTS[name]
    torch.save(content(), tmp_path / "w.pth", _use_new_zipfile_serialization=new)
    refused(lambda: build(tmp_path / "w.pth"), match)


@pytest.mark.filterwarnings("ignore::UserWarning:.*")
def test_quantised_tensors_are_refused(tmp_path):
    tensor = torch.quantize_per_tensor(torch.ones(16), 0.1, 0, torch.qint8)
    torch.save(state_dict() | {"norm.bias": tensor}, tmp_path / "w.pth")
    refused(lambda: build(tmp_path / "w.pth"), "norm.bias is quantised")


def with_pickle(path, data):
    """A file of torch.save with another pickle in it."""
    torch.save(state_dict(), path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, data if name.endswith("data.pkl") else content)


def pickled(*parts):
    return b"\x80\x02" + b"".join(parts) + b"."


def called(name, *args):
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n".encode() + pickle.dumps(tuple(args), 2)[2:-1] + b"R"


HUGE = 10**11
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ\x04\x00\x00\x00tQ"
BOMBS = {
    "a byte array": pickled(called("builtins.bytearray", HUGE)),
    "an empty tensor of a class": pickled(called("torch.FloatTensor", HUGE)),
    "a shape": pickled(
        b"ctorch._utils\n_rebuild_tensor_v2\n(", STORAGE, pickle.dumps(0, 2)[2:-1],
        pickle.dumps((HUGE,), 2)[2:-1], pickle.dumps((1,), 2)[2:-1], b"\x89N", b"tR",
    ),
    "a shape of steps of 0": pickled(
        b"ctorch._utils\n_rebuild_tensor_v2\n(", STORAGE, pickle.dumps(0, 2)[2:-1],
        pickle.dumps((HUGE,), 2)[2:-1], pickle.dumps((0,), 2)[2:-1], b"\x89N", b"tR",
    ),
    "a storage": pickled(STORAGE.replace(b"J\x04\x00\x00\x00", b"J\xff\xff\xff\x7f")),
    "a text": pickled(b"X\xff\xff\xff\x7f"),
    "bytes": b"\x80\x05\x96" + struct.pack("<Q", HUGE) + b".",
    "a memo": pickled(b"Nr\xff\xff\xff\x7f"),
    "a frame": b"\x80\x04\x95" + struct.pack("<Q", HUGE) + b"N.",
    "a dict of tuples in tuples": pickled(b"}(", b")" + b"\x94" * 0 + b"2\x86" * 60, b"Ku."),
    "numbers of many digits": pickled(b"I" + b"9" * 100_000 + b"\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_memory_or_time_is_spent(name, tmp_path):
    with_pickle(tmp_path / "w.pth", BOMBS[name])
    before = os.times().user
    refused(lambda: read_weights(tmp_path / "w.pth"), r"declares larger|damaged|no state dict|holds code")
    assert os.times().user - before < 5
    (tmp_path / "plain.pth").write_bytes(BOMBS[name])
    refused(lambda: read_weights(tmp_path / "plain.pth"), r"declares larger|damaged|no state dict|holds code")


def test_archives_that_unpack_to_more_than_they_have_are_refused(tmp_path):
    path = tmp_path / "w.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/0", b"\0" * (64 << 20))
    assert path.stat().st_size < 1 << 20
    refused(lambda: read_weights(path), "unpacks to more bytes than it has")


@pytest.mark.parametrize(
    "name",
    [
        "os.system", "posix.system", "builtins.eval", "builtins.getattr", "builtins.setattr", "subprocess.Popen",
        "torch.load", "torch.hub.load", "torch.storage._load_from_bytes", "functools.partial", "operator.attrgetter",
        "numpy.load", "pickle.loads", "copyreg.__newobj__", "timm.create_model", "__main__.Thing",
    ],
)  # fmt: skip
def test_names_of_functions_are_refused_whatever_they_are(name, tmp_path):
    for data in (
        pickled(called(name, "x")),
        pickled(b"c" + name.rpartition(".")[0].encode() + b"\n", name.rpartition(".")[2].encode() + b"\n"),
    ):
        with_pickle(tmp_path / "w.pth", data)
        refused(lambda: read_weights(tmp_path / "w.pth"), r"holds code \(")


def test_torchscript_programs_are_refused(tmp_path):
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", b"\x80\x02}.")
        archive.writestr("w/constants.pkl", b"\x80\x02).")
    refused(lambda: read_weights(path), "holds code .*TorchScript")


@pytest.mark.parametrize("position", [0, 1, 8, 9, 12, 40, 200])
def test_a_flipped_byte_in_the_header(position, tmp_path):
    model = timm.create_model(NAME, **SIZES)
    path = vitrim.save(model, tmp_path / "m") / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[position] ^= 0x55
    path.write_bytes(data)
    refused(lambda: vitrim.load(tmp_path / "m"), "damaged|not written by")


def test_a_header_that_is_no_json_inside(tmp_path):
    for text in ("{", "[" * 100_000, "nul", '{"schema": ' + "1" * 10_000 + "}", '"text"', "[]", "3"):
        save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"vitrim": text})
        refused(lambda: vitrim.load(tmp_path), "description of the model in .* is damaged")
        refused(lambda: vitrim.build_model(NAME, checkpoint=tmp_path, **SIZES), "damaged")


def test_pipes_devices_and_folders_are_no_files_of_weights(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    refused(lambda: read_weights(tmp_path / "pipe.pth"), "a pipe, a socket or a device")
    refused(lambda: open_model(f"{NAME}@{tmp_path}/pipe.pth"), "a pipe, a socket or a device")
    refused(lambda: read_weights("/dev/zero"), "a pipe, a socket or a device")
    refused(lambda: read_weights(tmp_path), "is a folder")
    os.mkfifo(tmp_path / "model.safetensors")
    refused(lambda: vitrim.load(tmp_path), "is missing|a pipe, a socket or a device")
    refused(lambda: read_weights("a\0b"), "null byte")
    refused(lambda: read_weights("x" * 300), "File name too long|no file")


def test_files_of_others_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    path = vitrim.save(timm.create_model(NAME, **SIZES), tmp_path / "m") / "model.safetensors"
    assert path.stat().st_mode & 0o044
    opening = type(path).open

    def forbidden(self, *args, **options):
        if self.name == "model.safetensors":
            raise PermissionError(13, "Permission denied", str(self))
        return opening(self, *args, **options)

    monkeypatch.setattr(type(path), "open", forbidden)
    for action in (lambda: vitrim.load(tmp_path / "m"), lambda: read_weights(path)):
        refused(action, r"cannot read .*model.safetensors \(Permission denied\)")


def test_long_messages_are_bounded(tmp_path):
    state = state_dict() | {"x" * 50_000: torch.ones(1), "two\nlines\x1b[31m": torch.ones(1)}
    torch.save(state, tmp_path / "w.pth")
    refused(lambda: build(tmp_path / "w.pth"), "2 left over")
    refused(lambda: vitrim.build_model(NAME, act_layer="x" * 50_000), "cannot be built")
    refused(lambda: vitrim.build_model(NAME, **{"y" * 50_000: 1}), "does not take")
    header = json.dumps({"x" * 50_000: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    data = io.BytesIO()
    data.write(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    (tmp_path / "w.safetensors").write_bytes(data.getvalue())
    refused(lambda: build(tmp_path / "w.safetensors"), "missing")


def test_no_argument_reads_a_file_on_the_side(tmp_path):
    for name in ("checkpoint_path", "pretrained_cfg", "cache_dir"):
        with pytest.raises(VitrimError, match=f"{name} is not an argument"):
            vitrim.build_model(NAME, **{name: str(tmp_path)})


def test_the_head_of_another_number_of_classes_is_saved(tmp_path):
    model = timm.create_model(NAME, **SIZES).eval()
    model.head = torch.nn.Linear(16, 5)
    images = torch.randn(2, 3, 32, 32)
    vitrim.save(model, tmp_path / "five")
    assert torch.equal(vitrim.load(tmp_path / "five")(images), model(images))
    assert json.loads((tmp_path / "five" / "vitrim.json").read_text())["num_classes"] == 5
    model.head = torch.nn.Identity()
    vitrim.save(model, tmp_path / "none")
    assert torch.equal(vitrim.load(tmp_path / "none")(images), model(images))
    for other in (torch.nn.Sequential(torch.nn.Linear(16, 5)), torch.nn.Linear(16, 5, bias=False)):
        model.head = other
        with pytest.raises(CheckpointError, match=r"use model.reset_classifier\(CLASSES\)"):
            vitrim.save(model, tmp_path / "other")
