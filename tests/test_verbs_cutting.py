"""The verbs stratify and extract: what they keep of the model they are given, and what they refuse."""

from pathlib import Path

import pytest

import vitrim
from vitrim.cli import main
from vitrim.data.specs import DataSpec
from vitrim.elastic import SuperNet
from vitrim.models.files.classes import classes_of
from vitrim.study.compare import compare
from vitrim.train.recipe import Recipe

DATA = ["--data.name", "digits", "--data.workers", "0"]
BACKWARDS = [str(digit) for digit in reversed(range(10))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model that was saved with the names of its classes."""
    model = vitrim.build_model("vitrim_digits_vit", depth=1, embed_dim=24, num_heads=2)
    return vitrim.save(model, tmp_path / "model", classes=BACKWARDS)


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line in which a command is refused."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    err = capsys.readouterr().err
    assert (end.value.code, err.count("\n")) == (2, 1)
    return err


def test_names_of_classes_go_along(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    named = f"vitrim_digits_vit@{folder}"
    for number, spec in enumerate((folder, folder / "model.safetensors")):
        family, half = tmp_path / f"family{number}", tmp_path / f"half{number}"
        main(["stratify", str(spec), *DATA, "--num_images", "16", "--out", str(family)])
        main(["extract", str(family), "--macs", "0.6", "--out", str(half)])
        assert classes_of(family) == classes_of(half) == BACKWARDS
        with pytest.raises(vitrim.errors.DataError, match="was trained on class 9 where the images have 0"):
            compare([str(half)], DataSpec(workers=0), ["dense"])
    assert classes_of(named) == BACKWARDS
    run = tmp_path / "run"
    SuperNet.load(tmp_path / "family0").save(run / "model", classes=BACKWARDS)
    main(["extract", str(run), "--macs", "0.6", "--out", str(tmp_path / "cut")])
    assert classes_of(tmp_path / "cut") == BACKWARDS
    words = ["stratify", folder, *DATA, "--labels", "--out", tmp_path / "no"]
    assert "was trained on class 9" in refused(capsys, *words)
    vitrim.save(vitrim.load(folder), tmp_path / "nameless")
    main(["stratify", str(tmp_path / "nameless"), *DATA, "--num_images", "16", "--out", str(tmp_path / "family")])
    assert classes_of(tmp_path / "family") is None


def test_options_that_would_be_ignored_are_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = ["--out", tmp_path / "out"]
    for labels in ("--labels", "--labels=false"):
        said = refused(capsys, "stratify", folder, *DATA, "--epochs", "1", labels, *out)
        assert said.endswith("wherever the model has classes; leave --labels out\n")
    said = refused(capsys, "stratify", "vitrim_digits_vit", *DATA, *out)
    assert "weights are random; write vitrim_digits_vit@pretrained or vitrim_digits_vit@FILE" in said
    assert "unknown model" in refused(capsys, "stratify", "vitrim_digits_vti", *DATA, *out)
    assert not (tmp_path / "out").exists()


def test_the_number_of_images_is_that_of_those_there_are(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    vitrim.save(vitrim.load(folder), tmp_path / "nameless")
    for number, (given, said) in enumerate((("16", "16"), ("5000", "100"))):
        words = ["--num_images", given, "--data.limit", "100", "--labels", "--out", str(tmp_path / f"family{number}")]
        main(["stratify", str(tmp_path / "nameless"), *DATA, *words])
        assert f"ordered by {said} images, in" in capsys.readouterr().out
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{elastic: {grow_epochs: 1}, epochs: 1, batch_size: 16, data: {workers: 0, holdout: 0}}")
    words = ["--recipe", str(recipe), "--num_images", "8", "--data.limit", "40", "--out", str(tmp_path / "run")]
    main(["stratify", str(tmp_path / "nameless"), *DATA, *words])
    assert "ordered by 8 images, in" in capsys.readouterr().out
    assert Recipe.read(tmp_path / "run" / "recipe.yaml").elastic.images == 8
