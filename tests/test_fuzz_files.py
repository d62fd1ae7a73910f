"""Altered files of vitrim's own (studies, caches, super-networks, trials, tables, states of runs): read or refused."""

import json
import random
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

import vitrim
from fuzzing import COUNT, altered_bytes, altered_text, altered_value, fuzz, odd_value
from test_distill_cache import views
from vitrim.distill import Teacher, TeacherCache
from vitrim.elastic.chain import Chain
from vitrim.measure.table import Column, Table
from vitrim.models import build_model
from vitrim.study.study import Study
from vitrim.train.checkpoint import RunFolder

SIZES = {"depth": 1, "embed_dim": 24, "num_heads": 2}
TERMS = "Cls() + Logits()"
STUDY = {
    "title": "orderings", "seeds": [0, 1], "base": {"model": {"args": SIZES}, "data": {"limit": 80}, "epochs": 2},
    "rows": {"dense": {}, "half": {"reduction": "TopK() @ KeepRate(0.5, at=[0])"},
             "taught": {"distill": "Labels() + Logits()", "teacher": {"name": "{row:dense}"}}},
    "test": {"own": "own", "all": "dense"}, "sweep": {"method": "TopK() @ KeepRate({r})", "vary": {"r": [0.5, 0.7]}},
    "curve": {"lines": {"both": ["dense", "half"]}, "budgets": [0.5, 1]}, "pictures": {"rows": ["half"], "images": 2},
    "published": {"dense": {"accuracy": 0.98, "params": 5000}},
    "scales": {"smoke": {"base": {"epochs": 1}, "seeds": [0]}},
}  # fmt: skip


def document(text: str, rng: random.Random, write: Callable[[Any], str]) -> str:
    """The text of a document, in which a value, or anything, is altered."""
    if rng.random() < 0.5:
        return altered_text(text, rng)
    try:
        return write(altered_value(yaml.safe_load(text), rng))
    except RecursionError:  # 900 levels can be written by hand, but not by every writer.
        return altered_text(text, rng)


def test_files_of_studies(tmp_path: Path) -> None:
    path, text = tmp_path / "study.yaml", yaml.safe_dump(STUDY)

    def surface(rng: random.Random) -> None:
        path.write_text(document(text, rng, yaml.safe_dump)[:50_000], encoding="utf-8", errors="replace")
        study = Study.read(path, rng.choice(("full", "smoke")))
        for row in study.order():
            study.recipe(row, study.seeds[0], tmp_path / "out").check()

    outcomes = fuzz(surface)
    assert not outcomes or min(outcomes["accepted"], outcomes["refused"]) > 20


@pytest.fixture
def cache(tmp_path: Path) -> tuple[Path, Callable[[], TeacherCache]]:
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
    teacher, stream = Teacher(timm.create_model("vit_tiny_patch16_224", **options)), views()
    TeacherCache.build(tmp_path / "cache", teacher, stream, TERMS, top_k=3)
    return tmp_path / "cache", lambda: TeacherCache.open(tmp_path / "cache", teacher, stream, TERMS, top_k=3)


def test_manifests_of_caches(cache: tuple[Path, Callable[[], TeacherCache]]) -> None:
    folder, opened = cache
    path = folder / "manifest.json"
    text, whole = path.read_text(), {name: value.shape for name, value in opened()[0].items()}

    def surface(rng: random.Random) -> None:
        path.write_text(document(text, rng, json.dumps), encoding="utf-8", errors="replace")
        assert {name: value.shape for name, value in opened()[0].items()} == whole

    outcomes = fuzz(surface)
    assert outcomes["refused"] > outcomes["accepted"]


def test_manifests_of_caches_whose_digest_was_made_again(cache: tuple[Path, Callable[[], TeacherCache]]) -> None:
    folder, opened = cache
    path = folder / "manifest.json"
    data, whole = json.loads(path.read_text()), {name: value.shape for name, value in opened()[0].items()}
    data.pop("digest")

    def surface(rng: random.Random) -> None:
        name = rng.choice([*data])
        altered = {**data, name: odd_value(rng) if rng.random() < 0.5 else altered_value(data[name], rng)}
        digest = sha256(json.dumps(altered, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps({**altered, "digest": digest}))
        assert {name: value.shape for name, value in opened()[0].items()} == whole

    outcomes = fuzz(surface)
    assert outcomes["refused"] > outcomes["accepted"]


def test_arrays_of_caches(cache: tuple[Path, Callable[[], TeacherCache]]) -> None:
    folder, opened = cache
    files = {path: path.read_bytes() for path in sorted(folder.glob("*.npy"))}
    rows = len(opened())

    def surface(rng: random.Random) -> None:
        path, data = rng.choice(list(files.items()))
        end = 128 if rng.random() < 0.7 else len(data)  # Most of all in the header.
        path.write_bytes(altered_bytes(data[:end], rng) + data[end:])
        try:
            found = opened()
            assert len([found[row] for row in range(len(found))]) == rows
        finally:
            path.write_bytes(data)

    fuzz(surface)


def test_super_networks(tmp_path: Path) -> None:
    model = build_model("vitrim_digits_vit", **SIZES)
    vitrim.stratify(model, [torch.randn(32, 1, 8, 8)], say=lambda _: None).save(tmp_path)
    path, compensation = tmp_path / "chain.json", tmp_path / "compensation.safetensors"
    text, data = path.read_text(), compensation.read_bytes()

    def surface(rng: random.Random) -> None:
        altered = rng.random() < 0.7
        path.write_text(document(text, rng, json.dumps) if altered else text, encoding="utf-8", errors="replace")
        compensation.write_bytes(data if altered else altered_bytes(data, rng))
        net = vitrim.SuperNet.load(tmp_path)
        assert Chain.from_json(net.chain.to_json()) == net.chain
        assert net.cut(-1)(torch.zeros(1, 1, 8, 8)).isfinite().all()

    fuzz(surface, count=max(60, COUNT // 4))  # Each loads a model.


def test_tables(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    columns = [Column("method", "method"), Column("accuracy", "top-1", ".1%"), Column("macs", "MACs", ",d")]
    Table("t", columns, [{"method": "dense", "accuracy": 0.9, "macs": 3}], notes=["n"]).write(path)
    text = path.read_text()

    def surface(rng: random.Random) -> None:
        path.write_text(document(text, rng, json.dumps), encoding="utf-8", errors="replace")
        Table.read(path).text()

    fuzz(surface)


def test_states_of_runs(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.save_state({"epoch": 1, "model": {"a": torch.arange(9.0)}, "history": [{"loss": 0.5}]})
    data = folder.state_path.read_bytes()

    def surface(rng: random.Random) -> None:
        folder.state_path.write_bytes(altered_bytes(data, rng))
        assert folder.load_state() is not None

    fuzz(surface)


def test_figures_of_runs(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_metrics([{"epoch": 0, "loss": 0.5}, {"epoch": 1, "loss": 0.25}])
    folder.write_result({"best_epoch": 1, "test_accuracy": 0.9})
    texts = {path: path.read_text() for path in sorted(tmp_path.iterdir())}

    def surface(rng: random.Random) -> None:
        for path, text in texts.items():
            path.write_text(altered_text(text, rng), encoding="utf-8", errors="replace")
        assert all(isinstance(line, dict) for line in folder.metrics)
        assert folder.result is None or "best_epoch" in folder.result

    fuzz(surface)


def test_what_is_not_altered_is_accepted(cache: tuple[Path, Callable[[], TeacherCache]], tmp_path: Path) -> None:
    assert cache[1]()[0]["cls"].isfinite().all()
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    assert Study.read(tmp_path / "study.yaml", "smoke").seeds == [0]
