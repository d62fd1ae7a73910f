"""Models in company must get the figures that they get alone, and names must mean what they say."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from vitrim.data.specs import DataSpec
from vitrim.data.splits import plain_stream
from vitrim.errors import DataError, DivergedError, UncountableError, VitrimError
from vitrim.measure.accuracy import evaluate
from vitrim.measure.speed import bench
from vitrim.models import attach, build_model, save, variant
from vitrim.study import compare as compare_module
from vitrim.study.compare import CLS_ONLY_NOTE, compare
from vitrim.study.sweep import sweep

DIGITS = DataSpec(name="digits", workers=0)
SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 10}


def tiny(seed: int, **args: object) -> nn.Module:
    torch.manual_seed(seed)
    model = build_model("vitrim_digits_vit", **SIZES, **args)
    nn.init.normal_(model.head.weight)  # Fresh heads are zero and would tell nothing apart.
    return model.eval()


def test_each_model_sees_images_its_own_way(tmp_path: Path):
    other = {"pretrained_cfg_overlay": {"mean": (0.9,), "std": (0.1,)}}
    models = {"plain": tiny(0), "shifted": tiny(1, **other), "large": tiny(2, img_size=12)}
    for name, model in models.items():
        save(model, tmp_path / name)
    table = compare([str(tmp_path / name) for name in models], DIGITS, ["dense"], device="cpu")
    for row, model in zip(table.rows, models.values(), strict=True):
        alone = evaluate(model, plain_stream(model, DIGITS))
        assert row["accuracy"] == alone.accuracy
        assert row["loss"] == pytest.approx(alone.loss, rel=1e-5)
    assert len({row["loss"] for row in table.rows}) == 3
    first, *others = table.rows
    assert "gain" not in first
    for row in others:
        assert row["gain"] == pytest.approx(row["accuracy"] - first["accuracy"])
        assert row["gain_low"] < row["gain"] < row["gain_high"]
    assert "differences" not in others[0]


def test_a_curriculum_has_no_place_at_test_time():
    with pytest.raises(VitrimError, match=r"Delayed\(epoch=4\) acts only in training"):
        variant(tiny(0), "TopK() @ KeepRate(0.5) @ Delayed(4)")


def test_classes_by_other_names_are_refused(tmp_path: Path):
    save(tiny(0), tmp_path / "model", classes=[str(digit) for digit in reversed(range(10))])
    assert json.loads((tmp_path / "model" / "vitrim.json").read_text())["extra"]["classes"][0] == "9"
    with pytest.raises(DataError, match="was trained on class 9 where the images have 0"):
        compare([str(tmp_path)], DIGITS, ["dense"], device="cpu")


def test_rows_are_told_apart(tmp_path: Path):
    for place in ("a", "b"):
        save(tiny(0), tmp_path / place / "net")
    table = compare([str(tmp_path / place / "net") for place in ("a", "b")], DIGITS, ["dense"], device="cpu")
    assert len({row["model"] for row in table.rows}) == 2
    with pytest.raises(VitrimError, match="named twice"):
        compare([str(tmp_path / "a" / "net")], DIGITS, ["dense", "dense"], device="cpu")


def test_without_a_method_each_model_is_compared_as_it_is(tmp_path: Path):
    dense, reduced = tiny(0), tiny(0)
    attach(reduced, "TopK() @ KeepRate(0.5, at=(1,))", cls_only=True)
    for name, model in {"dense": dense, "reduced": reduced}.items():
        save(model, tmp_path / name)
    folders = [str(tmp_path / name) for name in ("dense", "reduced")]
    table = compare(folders, DIGITS, device="cpu")
    assert [(row["model"], row["method"]) for row in table.rows] == [("dense", "dense"), ("reduced", "own")]
    assert table.rows[1]["macs_ratio"] > 1.1
    assert CLS_ONLY_NOTE in table.notes
    assert CLS_ONLY_NOTE not in compare(folders[:1], DIGITS, device="cpu").notes
    timed = bench(folders, batch_sizes=(2,), rounds=1, warmup=0, device="cpu").measured
    assert [row.name for row in timed] == [f"{folders[0]}: dense", f"{folders[1]}: own"]
    assert timed[1].reference == timed[0].name, "with one method per model, the first row is the reference"
    assert timed[1].macs_ratio == pytest.approx(table.rows[1]["macs_ratio"])


@pytest.fixture
def overflowing(tmp_path: Path) -> str:
    """A model whose weights are finite, and whose outputs are not; the class of a NaN would be 0."""
    model = tiny(0)
    with torch.no_grad():
        model.get_parameter("blocks.0.mlp.fc1.weight").mul_(1e30)
        model.get_parameter("blocks.0.mlp.fc2.weight").mul_(1e30)
    save(model, tmp_path / "model")
    return str(tmp_path / "model")


def test_outputs_that_are_not_finite_have_no_accuracy(overflowing: str):
    with pytest.raises(DivergedError, match="model under 'dense' are not finite"):
        compare([overflowing], DIGITS, ["dense"], device="cpu")
    with pytest.raises(DivergedError, match="model are not finite"):
        sweep([overflowing], DIGITS, "TopK() @ KeepRate({r})", {"r": [0.5]}, device="cpu")


@pytest.mark.usefixtures("few_test_digits")
def test_a_model_without_tokens_is_evaluated_next_to_others(tmp_path: Path):
    for name, model in {"cnn": build_model("test_resnet", in_chans=1, num_classes=10), "vit": tiny(0)}.items():
        save(model, tmp_path / name)
    names = [str(tmp_path / name) for name in ("cnn", "vit")]
    table = compare(names, DIGITS, batch_size=60, device="cpu")
    cnn, vit = table.rows
    assert (cnn["tokens"], len(vit["tokens"])) == ([], 2)
    assert cnn["gmacs"] > 0 < cnn["macs_ratio"]
    assert "cnn" in table.text()


def test_what_a_model_costs_is_known_before_the_images_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tiny(0), tmp_path / "model")
    monkeypatch.setattr(compare_module, "evaluate_all", lambda *args, **options: pytest.fail("the work had begun"))
    monkeypatch.setattr(compare_module, "cost_of_any", _uncountable)
    with pytest.raises(UncountableError, match="cannot be counted"):
        compare([str(tmp_path / "model")], DIGITS, device="cpu")


def _uncountable(model: nn.Module) -> None:
    raise UncountableError("the MACs of this model cannot be counted")
