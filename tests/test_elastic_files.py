"""The folder of a super-network: what it holds, and that nothing damaged, mixed up or half replaced passes for one."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.layers import SwiGLU

import vitrim
from elastic_models import images
from killing import killed
from test_elastic_extract import supernet
from vitrim.elastic import SuperNet
from vitrim.elastic.supernet import CHAIN, COMPENSATION
from vitrim.errors import CheckpointError, RecipeError, VitrimError
from vitrim.models.files.store import DESCRIPTION, WEIGHTS
from vitrim.verbs.cutting import extract


@pytest.fixture(scope="module")
def net() -> SuperNet:
    return supernet()


def test_supernet_folder_holds_chain_and_weights_and_notices_other_weights(net, tmp_path):
    folder = net.save(tmp_path / "net")
    again = SuperNet.load(folder)
    assert again.chain == net.chain
    x = images(2)
    assert torch.equal(again.extract(macs=0.6)(x), net.extract(macs=0.6)(x))
    assert not torch.equal(net.extract(macs=0.6)(x), net.extract(macs=0.6, compensate="none")(x))
    assert torch.equal(vitrim.load(folder)(x), net.model(x))
    with pytest.raises(CheckpointError):
        net.save(folder)
    other = copy.deepcopy(net.model)
    other.head.bias.data += 1
    vitrim.save(other, folder, overwrite=True)
    with pytest.raises(CheckpointError, match="other weights"):
        SuperNet.load(folder)
    with pytest.raises(CheckpointError, match=r"no chain\.json"):
        SuperNet.load(tmp_path)


def test_damaged_files_are_told(net, tmp_path):
    folder = net.save(tmp_path / "net")
    (folder / COMPENSATION).write_bytes((folder / COMPENSATION).read_bytes()[:40])
    with pytest.raises(CheckpointError, match=r"compensation\.safetensors is damaged"):
        SuperNet.load(folder)
    (folder / CHAIN).write_bytes(b"\xff\xfe" + (folder / CHAIN).read_bytes())
    with pytest.raises(CheckpointError, match="not a chain"):
        SuperNet.load(folder)


def rename(chain: dict) -> None:
    chain["units"]["blocks.0.other"] = chain["units"].pop("blocks.0.attn")
    chain["entries"] = []


DAMAGE = {
    "a unit of another name": rename,
    "a unit that is missing": lambda chain: (chain["units"].pop("blocks.0.attn"), chain.update(entries=[])),
    "another cost of a unit": lambda chain: (chain["units"]["blocks.0.attn"].update(macs=1), chain.update(entries=[])),
    "another linear cost of a unit": lambda chain: chain["units"]["blocks.0.attn"].update(macs_linear_only=1),
    "no MACs": lambda chain: chain.update(macs=None, entries=[]),
    "other linear MACs": lambda chain: chain.update(macs_linear_only=5),
    "a unit that is none": lambda chain: chain["units"].update({"blocks.0.attn": None}),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_chain_that_does_not_fit_its_model_is_refused(net, name, tmp_path, capsys):
    folder = net.save(tmp_path / "net")
    chain = json.loads((folder / CHAIN).read_text())
    DAMAGE[name](chain)
    (folder / CHAIN).write_text(json.dumps(chain))
    with pytest.raises(CheckpointError, match=r"differs from the model in|not a chain of sub-networks") as refused:
        SuperNet.load(folder)
    assert "\n" not in str(refused.value)


def test_a_chain_of_endless_depth_is_refused(net, tmp_path):
    folder = net.save(tmp_path / "net")
    (folder / CHAIN).write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="not a chain"):
        SuperNet.load(folder)
    (folder / CHAIN).write_text('{"schema": ' + "1" * 5000 + "}")
    with pytest.raises(CheckpointError, match="not a chain"):
        SuperNet.load(folder)


def test_compensations_of_other_weights_are_refused(net, tmp_path):
    folder, other = net.save(tmp_path / "net"), supernet(seed=3).save(tmp_path / "other")
    own = (folder / COMPENSATION).read_bytes()
    (folder / COMPENSATION).write_bytes((other / COMPENSATION).read_bytes())
    with pytest.raises(CheckpointError, match=r"compensation\.safetensors belongs to other weights"):
        SuperNet.load(folder)
    metadata = {"weights": SuperNet.load(other).chain.weights}
    tensors = load_file(other / COMPENSATION)
    for wrong in ({}, {name: each[:-1].contiguous() for name, each in tensors.items()}):
        save_file(wrong, other / COMPENSATION, metadata=metadata)
        with pytest.raises(CheckpointError, match=r"compensation\.safetensors belongs to other weights"):
            SuperNet.load(other)
    (folder / COMPENSATION).write_bytes(own)
    assert SuperNet.load(folder).compensations.keys() == net.compensations.keys()
    bare = SuperNet(net.model, net.chain).save(folder, overwrite=True)
    assert SuperNet.load(bare).compensations is None


def test_killed_while_a_super_network_takes_the_place_of_another(net, tmp_path, monkeypatch):
    """What is found afterwards is the old one or the new one, whole, wherever the process dies."""
    old, found = supernet(seed=3), []
    for at in range(12):
        folder = old.save(tmp_path / str(at))
        died = killed(lambda folder=folder: net.save(folder, overwrite=True), at, monkeypatch)
        again = SuperNet.load(folder)
        found.append(torch.equal(again.model.head.bias, net.model.head.bias))
        whole = (net if found[-1] else old).compensations
        assert all(torch.equal(each.factor, whole[name].factor) for name, each in again.compensations.items())
        if not died:
            break
    assert (found[0], found[-1]) == (False, True)
    net.save(folder, overwrite=True)
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, DESCRIPTION, COMPENSATION, CHAIN}


def test_no_command_puts_a_network_where_another_would_be_lost(net, tmp_path):
    folder = net.save(tmp_path / "net")
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(VitrimError, match="holds a super-network"):
        extract(str(folder), {}, str(folder), macs=0.6, overwrite=True)
    assert {path: path.read_bytes() for path in folder.iterdir()} == kept
    extract(str(folder), {}, str(tmp_path / "run" / "model"), macs=0.6, compensate="none")
    torch.testing.assert_close(
        vitrim.load(tmp_path / "run" / "model")(images(2)), net.extract(macs=0.6, compensate="none")(images(2))
    )
    with pytest.raises(CheckpointError, match="is a run, whose model is"):
        net.save(tmp_path / "run", overwrite=True)


def test_a_class_among_the_arguments_cannot_be_saved(tmp_path):
    with pytest.raises(CheckpointError, match="JSON cannot hold mlp_layer="):
        supernet(mlp_layer=SwiGLU).save(tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_images_without_refit_are_refused(net, tmp_path):
    for options in ({"num_images": 32}, {"data": {"name": "digits"}}):
        with pytest.raises(RecipeError, match="images are used by --refit true only"):
            extract(str(tmp_path), options.get("data", {}), str(tmp_path / "out"), num_images=options.get("num_images"))
    with pytest.raises(RecipeError, match=r"training images only; --data\.test_split would have no effect"):
        extract(str(tmp_path), {"test_split": "val"}, str(tmp_path / "out"), macs=0.5, refit=True)


def test_a_flipped_bit_in_the_compensations_is_noticed(net, tmp_path):
    net.save(tmp_path)
    path = tmp_path / COMPENSATION
    data = bytearray(path.read_bytes())
    data[-1] ^= 1 << 5  # In the exponent of a number, which stays finite.
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"compensation\.safetensors is damaged; stratify again"):
        SuperNet.load(tmp_path)


def test_a_super_network_stays_what_it_was_when_its_files_change(net, tmp_path):
    net.save(tmp_path)
    loaded = SuperNet.load(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(b"")  # Touching mapped memory would end the process.
    compensations = {name: (each.mean, each.factor) for name, each in (loaded.compensations or {}).items()}
    assert compensations
    for name, (mean, factor) in compensations.items():
        torch.testing.assert_close(mean, net.compensations[name].mean.float())
        torch.testing.assert_close(factor.tril(), factor)
