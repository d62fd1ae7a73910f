"""Fuzzed files of weights: each loads the right weights, or is refused in one line, quickly and in little memory."""

import copy
import pickle
import random
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import vitrim
from fuzzing import altered_bytes, fuzz, odd_value
from vitrim.models.files.checkpoints import read_weights
from vitrim.models.files.weights import aligned, load_weights

NAME, SIZES = "vitrim_digits_vit", {"depth": 1, "embed_dim": 8, "num_heads": 1}


def model_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return vitrim.build_model(NAME, **SIZES).state_dict()


def written(content: object, path: Any, form: str) -> bytes:
    if form == "safetensors":
        save_file(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    return path.read_bytes()


def odd_tensor(value: torch.Tensor, rng: random.Random) -> Any:
    value = value.to_dense()  # A sparse one, from a change before this one, has no shapes to change.
    return rng.choice((
        lambda: value.to(rng.choice((torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float16))),
        lambda: value.reshape(-1)[: rng.randrange(3)],
        lambda: value[None],
        lambda: torch.tensor(1.0),
        lambda: value * float("nan"),
        lambda: value.to_sparse(),
        lambda: value.to("meta"),
        lambda: value.t() if value.ndim == 2 else value.flip(0),
        lambda: odd_value(rng),
    ))()  # fmt: skip


def odd_content(state: dict[str, torch.Tensor], rng: random.Random) -> Any:
    """A training checkpoint with names, values, nests and prefixes changed."""
    content: Any = dict(state)
    for _ in range(rng.randrange(3)):
        name = rng.choice(list(content))
        match rng.randrange(5):
            case 0:
                del content[name]
            case 1:
                content[rng.choice((1, ("a", 2), f"{name}.x", "", "model", "x" * 1000))] = content.pop(name)
            case 2 | 3 if isinstance(content[name], torch.Tensor):
                content[name] = odd_tensor(content[name], rng)
            case _:
                content[rng.choice(("epoch", "model", "ema", "state_dict"))] = odd_value(rng)
    if rng.random() < 0.5:
        prefix = rng.choice(("module.", "model.", "net.backbone.", "ema."))
        content = {f"{prefix}{name}": value for name, value in content.items()}
    for _ in range(rng.randrange(3)):
        nest = rng.choice(("model", "state_dict", "ema", "net", "student", "teacher", "mine"))
        content = {nest: content, rng.choice(("epoch", "args", "optimizer", "model_ema")): odd_value(rng)}
        if rng.random() < 0.1:
            content["model"] = content
    return content


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_bytes_of_files_of_weights(form: str, tmp_path: Any):
    state, path = model_state(), tmp_path / "w.pth"
    data = written(state, path, form)

    def surface(rng: random.Random) -> None:
        path.write_bytes(altered_bytes(data, rng))
        read = read_weights(path)
        assert all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in read.items())
        sum(float(value.double().sum()) for value in read.values() if value.is_floating_point())  # All can be read.

    outcomes = fuzz(surface)
    assert outcomes["refused"] > outcomes["accepted"]


def test_pickles_in_files_of_weights(tmp_path: Any):
    path = tmp_path / "w.pth"
    torch.save(model_state(), path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    main = next(name for name in records if name.endswith("data.pkl"))

    def surface(rng: random.Random) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in records.items():
                archive.writestr(name, altered_bytes(content, rng) if name == main else content)
        for value in read_weights(path).values():
            assert value.numel() * value.element_size() < 1 << 21

    fuzz(surface)


def test_contents_of_training_checkpoints(tmp_path: Any):
    """Whatever is around the weights, a model that opens holds the weights that were written, at their names."""
    state, path = model_state(), tmp_path / "w.pth"
    model = vitrim.build_model(NAME, **SIZES)  # Building it takes longer than all else.
    fresh = copy.deepcopy(model.state_dict())

    def surface(rng: random.Random) -> None:
        content = odd_content(state, rng)
        try:
            torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.8)
        except (RuntimeError, pickle.PicklingError, RecursionError, NotImplementedError):
            return  # torch cannot write it.
        model.load_state_dict(fresh)
        load_weights(model, aligned(read_weights(path), fresh, path), path)
        assert all(value.isfinite().all() for value in model.state_dict().values())
        found = sum(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert found >= len(state) - 2, "other weights than those written"

    outcomes = fuzz(surface)
    assert outcomes["accepted"] > 20


FORMS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "plain": lambda state: state,
    "nested": lambda state: {"epoch": 1, "ema": {f"module.{name}": value for name, value in state.items()}},
}


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_altered_is_accepted(form: str, tmp_path: Any):
    state, path = model_state(), tmp_path / "w.pth"
    torch.save(FORMS[form](state), path)
    loaded = vitrim.build_model(NAME, checkpoint=path, **SIZES).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.items())
