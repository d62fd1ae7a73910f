"""Files of others in a folder are never taken for files of vitrim, and never changed, whatever their names are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

import vitrim
from test_distill_cache import views
from vitrim.demo import run_demo
from vitrim.distill import Teacher, TeacherCache
from vitrim.errors import VitrimError
from vitrim.models import build_model, save
from vitrim.study.study_folder import check_study_folder, mark_folder
from vitrim.train.checkpoint import RunFolder
from vitrim.train.loop import train
from vitrim.train.recipe import Recipe


def cache(folder: Path) -> None:
    TeacherCache.build(folder, Teacher(tiny()), views(), "Cls()")


def tiny() -> torch.nn.Module:
    options = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **options)


def digits_model() -> torch.nn.Module:
    return build_model("vitrim_digits_vit", depth=1, embed_dim=24, num_heads=2)


def supernet(folder: Path) -> None:
    vitrim.stratify(digits_model(), [torch.randn(32, 1, 8, 8)], say=lambda _: None).save(folder)


def run(folder: Path) -> None:
    train(Recipe(epochs=1), folder)


def study(folder: Path) -> None:
    check_study_folder(folder)


PLACES: dict[str, tuple[Callable[[Path], Any], list[dict[str, str]]]] = {
    "cache": (cache, [
        {"done.npy": "mine", "logits.npy": "mine"}, {"lock": "mine"}, {"manifest.json": "{}"}, {"manifest.json": "["},
        {"manifest.json": '{"format": 3, "name": "a web page"}'}, {"manifest.json": "[" * 100_000},
    ]),
    "model": (lambda folder: save(digits_model(), folder), [{"vitrim.json": "{}"}]),
    "super-network": (supernet, [{"chain.json": "{}"}, {"compensation.safetensors": "mine"}]),
    "run": (run, [
        {"lock": "mine"}, {"metrics.jsonl": "{}"},
        {"recipe.yaml": "epochs: 1\n", "result.json": '{"accuracy": 1}'},
        {"recipe.yaml": "epochs: 1\n", "result.json": "[1]"},
    ]),
    "study": (study, [{".study": "mine"}, {".study": "\x80", "a": "b"}, {"leases.db": "mine"}]),
    "demo": (run_demo, [{"dense/net.py": "mine", "result.json": "{}"}, {"result.json": "{}"}]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("place", "files"), [(place, files) for place, (_, cases) in PLACES.items() for files in cases]
)
def test_files_of_others_are_refused_in_one_line_and_stay(place: str, files: dict[str, str], tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(VitrimError) as refused:
        PLACES[place][0](tmp_path)
    assert len(str(refused.value).splitlines()) == 1
    assert str(tmp_path) in str(refused.value)
    found = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == files


def test_a_study_knows_the_folder_that_it_has_marked(tmp_path: Path) -> None:
    mark_folder(tmp_path)
    (tmp_path / "table.md").write_text("of the study")
    check_study_folder(tmp_path)


def test_a_cache_that_was_not_laid_out_to_the_end_leaves_nothing_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("vitrim.output._finish", killed)  # All arrays are there, and none is in its place yet.
        with pytest.raises(KeyboardInterrupt):
            cache(tmp_path)
    assert not list(tmp_path.glob("*.npy"))
    left = tmp_path / ".vitrim-part-killed"
    left.mkdir()
    (left / "done.npy").write_bytes(b"\x00")
    cache(tmp_path)
    assert not left.exists()
    assert np.load(tmp_path / "done.npy").all()


def test_a_result_of_a_run_is_known(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"best_epoch": 0}))
    assert RunFolder(tmp_path).result == {"best_epoch": 0}
