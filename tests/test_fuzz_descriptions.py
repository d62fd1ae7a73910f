"""Fuzzed descriptions of saved models: each builds the model that was saved, or is refused in one line."""

import json
import random
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import vitrim
from fuzzing import altered_text, altered_value, fuzz
from hf_models import HF
from vitrim.models import num_classes
from vitrim.models.files.classes import classes_of
from vitrim.models.files.description import parse

SIZES = {"depth": 1, "embed_dim": 8, "num_heads": 1}


FAMILIES = {
    "own": lambda: vitrim.build_model("vitrim_digits_vit", **SIZES),
    "naflex": lambda: timm.create_model("naflexvit_base_patch16_gap", num_classes=10, **SIZES),
    **{name: HF[name] for name in ("hf_vit", "hf_dinov2", "hf_siglip2")},
}


def saved(folder: Path, family: str = "own") -> tuple[dict[str, torch.Tensor], str]:
    torch.manual_seed(0)
    model = FAMILIES[family]()
    vitrim.attach(model, "TopK(score=norm) @ KeepRate(0.5, at=(0,))")
    vitrim.save(model, folder, classes=[str(digit) for digit in range(num_classes(model))])
    return dict(model.state_dict()), (folder / "vitrim.json").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_values_of_descriptions(family: str, tmp_path: Path):
    """Whatever loads is of the saved shapes, takes images, and has the saved weights."""
    state, text = saved(tmp_path / "m", family)
    record = json.loads(text)

    def surface(rng: random.Random) -> None:
        altered = record
        for _ in range(rng.choice((1, 1, 2))):
            altered = altered_value(altered, rng)
        try:
            text = json.dumps(altered)
        except RecursionError:  # Two values of 900 levels, one in the other, which this writer cannot write.
            return
        save_file(state, tmp_path / "model.safetensors", metadata={"vitrim": text})
        model = vitrim.load(tmp_path)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert vitrim.cost(model).macs > 0
        known = classes_of(tmp_path / "model.safetensors")
        assert known is None or all(isinstance(name, str) for name in known)

    outcomes = fuzz(surface)
    assert min(outcomes["accepted"], outcomes["refused"]) > 20


def test_texts_of_descriptions(tmp_path: Path):
    _, text = saved(tmp_path / "m")

    def surface(rng: random.Random) -> None:
        record = parse(altered_text(text, rng), "a/file")
        assert parse(record.to_json(), "a/file").to_json() == record.to_json()

    fuzz(surface)


def test_bytes_of_saved_models(tmp_path: Path):
    """Headers and weights with flipped, missing and repeated bytes."""
    saved(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")

    def surface(rng: random.Random) -> None:
        header = bytearray(data[:end])
        header[rng.randrange(end)] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(header) + data[end:] if rng.random() < 0.8 else data[: rng.randrange(len(data))])
        model = vitrim.load(tmp_path / "m")
        assert vitrim.cost(model).macs > 0

    fuzz(surface)
