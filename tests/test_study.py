"""Comparisons, sweeps and studies: rows, ratios, seeds, and what is not run twice. And the tables they end in."""

import functools
import json
import math
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from vitrim import cli
from vitrim.data import digits
from vitrim.data.specs import DataSpec
from vitrim.distill import Terms
from vitrim.errors import DataError, RecipeError, ScheduleError, UnknownNameError, VitrimError
from vitrim.measure.cost import cost
from vitrim.measure.table import Column, Table
from vitrim.models import OWN, open_model
from vitrim.study import study_check
from vitrim.study.compare import compare
from vitrim.study.published import Published
from vitrim.study.run_study import COLUMNS, run_study
from vitrim.study.study import Study, run_folder
from vitrim.study.sweep import sweep
from vitrim.study.sweep_plan import Plan
from vitrim.tokens import Reduction
from vitrim.train.loop import train
from vitrim.train.recipe import Recipe
from vitrim.verbs.images import images_of

pytestmark = pytest.mark.usefixtures("few_test_digits")
ROOT = Path(__file__).parents[1]
DATA = {"workers": 0, "limit": 60}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("study") / "run"
    model = {"args": {"depth": 2, "embed_dim": 24, "num_heads": 2}}
    train(Recipe.from_dict({"model": model, "data": DATA, "epochs": 1, "batch_size": 16}), folder)
    return str(folder)


def test_images_of_the_first_run_unless_given(run: str):
    assert images_of([run], {}) == DataSpec(**DATA)
    assert images_of([run], {"workers": 3, "name": "folder"}) == DataSpec(workers=3, limit=60, name="folder")
    assert images_of([run], {"limit": None, "workers": 2}) == DataSpec()  # Defaults too, once they are given.
    assert images_of(["vitrim_digits_vit"], {"limit": 5, "name": "digits"}) == DataSpec(limit=5)
    with pytest.raises(DataError, match=r"no images are given; add --data\.root FOLDER"):
        images_of(["vitrim_digits_vit"], {"limit": 5})


def test_place_and_splits_go_with_the_data_set(tmp_path: Path):
    own = {"name": "folder", "root": "there", "train_split": "a", "test_split": "b", "image_size": 48, "limit": 9}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"data": own}))
    run = [str(tmp_path)]
    # The size is the model's own: each saved model knows it.
    assert images_of(run, {"name": "folder", "root": "here"}) == DataSpec(**{**own, "root": "here", "image_size": None})
    assert images_of(run, {"name": "digits"}) == DataSpec(limit=9)


def test_compare_gives_ratios_to_the_first_row(run: str):
    table = compare([run], images_of([run], {}), ["dense", OWN, "TopK() @ KeepRate(0.5, at=[0])"])
    dense, saved, reduced = table.rows
    assert (dense["speed"], dense["macs_ratio"]) == (1, 1)
    assert (
        saved["accuracy"] == dense["accuracy"] == json.loads((Path(run) / "result.json").read_text())["test_accuracy"]
    )
    assert reduced["macs_ratio"] == pytest.approx(dense["gmacs"] / reduced["gmacs"])
    assert reduced["macs_ratio"] > 1.2
    assert all(0 < row["entropy"] < math.log(10) for row in table.rows)


def test_grid(run: str):
    table = sweep([run], DataSpec(**DATA), "TopK() @ PowerLaw({r}, {alpha})", {"r": [0.2, 0.6], "alpha": [1.0, 2.0]})
    settings = [(row.get("r"), row.get("alpha")) for row in table.rows]
    assert settings == [(None, None), (0.2, 1.0), (0.2, 2.0), (0.6, 1.0), (0.6, 2.0)]
    assert table.rows[3]["tokens"] == [45, 1]  # floor(64 * 0.7) = 44 and CLS; then what the head reads.
    with pytest.raises(ScheduleError, match=r"does not use \{beta\}"):
        sweep([run], DataSpec(**DATA), "TopK() @ KeepRate({r})", {"r": [0.5], "beta": [1]})
    with pytest.raises(ScheduleError, match="names a setting that is not varied"):
        sweep([run], DataSpec(**DATA), "TopK() @ PowerLaw({r}, {alpha})", {"r": [0.5]})


def test_whole_numbers_from_the_command_line(run: str):
    table = sweep([run], DataSpec(**DATA), "ToMe() @ ConstantR({r})", {"r": [4.0, 8.0]})
    assert [row["tokens"][0] for row in table.rows] == [65, 61, 57]
    assert table.rows[1]["method"] == "ToMe() @ ConstantR(4)"


def test_the_title_shows_the_method_as_it_is_written(run: str):
    table = sweep([run], DataSpec(**DATA), "TopK() @ Stages({{0: 0.8, 1: {r}}})", {"r": [0.5]})
    assert table.title == "TopK() @ Stages({0: 0.8, 1: {r}}) over r"


def test_sweeps_without_anything_to_do(run: str):
    method = "TopK() @ KeepRate({r})"
    for vary, says in (({"r": []}, "there are no values for r"), ({}, "nothing to vary"), ({"r": [7]}, "keep rate")):
        with pytest.raises(ScheduleError, match=says):
            sweep([run], DataSpec(**DATA), method, vary)
    with pytest.raises(ScheduleError, match="trials is 1 or more, not 0"):
        sweep([run], DataSpec(**DATA), method, {"r": [0.2, 0.5]}, Plan("tpe", 0))


def test_tpe_stays_within_bounds_and_repeats_itself(run: str):
    def settings() -> list[tuple[float, float]]:
        vary = {"r": [0.2, 0.9], "alpha": [1.0, 2.0]}
        plan = Plan("tpe", 4, ("accuracy", "macs"), seed=3)
        table = sweep([run], DataSpec(**DATA), "TopK() @ PowerLaw({r}, {alpha})", vary, plan)
        assert any(row["model"].endswith("*") for row in table.rows)
        return [(row["r"], row["alpha"]) for row in table.rows[1:]]

    first = settings()
    assert len(first) == 4
    assert all(0.2 <= r <= 0.9 and 1 <= alpha <= 2 for r, alpha in first)
    assert settings() == first


def test_tpe_counts_in_whole_numbers(run: str):
    def tried(method: str, **vary: list[float]) -> list[float]:
        table = sweep([run], DataSpec(**DATA), method, vary, Plan("tpe", 3))
        return [row["r"] for row in table.rows[1:]]

    assert all(isinstance(r, int) and 2 <= r <= 12 for r in tried("ToMe() @ ConstantR({r})", r=[2.0, 12.0]))
    assert any(r != int(r) for r in tried("TopK() @ PowerLaw(0.5, {r})", r=[1, 4]))  # Whole bounds, but no count.


@pytest.fixture
def study_file(tmp_path: Path) -> Path:
    content = {
        "title": "tiny",
        "base": {
            "model": {"args": {"depth": 2, "embed_dim": 24, "num_heads": 2}},
            "data": DATA, "epochs": 1, "batch_size": 16,
        },
        "rows": {"dense": {}, "half": {"reduction": "TopK() @ KeepRate(0.5, at=[0])"}},
        "test": {"off": "dense", "on": "TopK() @ KeepRate(0.5, at=[0])"},
        "seeds": [0, 1],
        "published": {"dense, off": {"accuracy": 0.5}},
        "scales": {"smoke": {"seeds": [0]}},
    }  # fmt: skip
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_a_scale_that_does_not_exist_names_each_known_one_once(study_file: Path):
    study_file.write_text(study_file.read_text().replace("smoke:", "full:"))
    with pytest.raises(UnknownNameError, match=r"unknown scale 'nope'; known: full$"):
        Study.read(study_file, "nope")


def test_a_study_over_seeds_and_what_is_not_run_twice(study_file: Path, tmp_path: Path):
    events: list[str] = []
    out = tmp_path / "out"
    note = lambda event, figures: events.append(event)  # noqa: E731
    table = run_study(study_file, out, scale="smoke", report=note)
    assert events.count("done") == 2
    assert [row["n"] for row in table.rows] == [1] * 4
    events.clear()
    table = run_study(study_file, out, scale="full", report=note)
    assert events.count("done") == 2  # The second seed alone.
    names = [(row["row"], row["test"]) for row in table.rows]
    assert names == [("dense", "off"), ("dense", "on"), ("half", "off"), ("half", "on")]
    accuracies = [json.loads((out / f"dense-s{seed}" / "result.json").read_text())["test_accuracy"] for seed in (0, 1)]
    assert table.rows[0]["accuracy"] == pytest.approx(sum(accuracies) / 2)
    assert table.rows[0]["accuracy_std"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)
    assert [row.get("published_accuracy") for row in table.rows[:2]] == [0.5, None]
    assert (out / "table.md").exists()
    assert {row["params"] for row in table.rows} == {cost(open_model(str(out / "dense-s0"))).params}
    study_file.write_text(study_file.read_text().replace("batch_size: 16", "batch_size: 8"))
    with pytest.raises(RecipeError, match=r"another recipe \(batch_size: 16 -> 8\)"):
        run_study(study_file, out, scale="smoke")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_study_is_written_over_nothing_else(
    workers: str, study_file: Path, run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "table.md").write_text("my own")
    for folder, says in ((run, "holds a run, which a study would"), (tmp_path / "mine", "holds no study (table.md)")):
        before = {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
        with pytest.raises(SystemExit):
            cli.main(["study", str(study_file), "--out", str(folder), "--scale", "smoke", "--workers", workers])
        said = capsys.readouterr().err.strip()
        assert says in said
        assert "\n" not in said
        assert {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()} == before


def test_a_study_that_was_interrupted_goes_on(study_file: Path, tmp_path: Path):
    def stop(event: str, figures: Any) -> None:
        if event == "done":
            raise InterruptedError

    out, events = tmp_path / "out", []
    out.mkdir()
    (out / ".DS_Store").write_text("hidden files say nothing about a folder")
    with pytest.raises(InterruptedError):
        run_study(study_file, out, scale="smoke", report=stop)
    assert not (out / "table.md").exists()
    run_study(study_file, out, scale="smoke", report=lambda event, figures: events.append(event))
    assert events.count("run") == 1  # The other row alone.
    assert (out / "table.md").exists()


def test_every_row_is_tested_on_its_own_images(study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(digits.BUILT_IN, "digits", digits.Digits)  # All test images, so that accuracies differ.
    pictures = load_digits()
    for split, numbers in (("train", range(60)), ("test", range(60, 200))):
        for number in numbers:
            folder = tmp_path / "images" / split / str(pictures.target[number])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pictures.images[number] * 15).astype("uint8")).save(folder / f"{number}.png")
    content = yaml.safe_load(study_file.read_text())
    content["base"] |= {"optim": {"lr": 0.003, "warmup_epochs": 0}, "epochs": 3, "data": DATA | {"holdout": 0.0}}
    content["rows"] = {
        "plain": {},
        "few": {"data": {"limit": 30, "holdout": 0.2}},
        "cropped": {"data": {"crop_pct": 0.5}},
        "files": {"data": {"name": "folder", "root": str(tmp_path / "images")}},
    }
    method = "TopK() @ KeepRate({r}, at=[0])"
    lines = {"cut": {"row": "cropped", "ordering": "wpac"}, "alone": [*content["rows"]]}
    content |= {
        "test": {"as trained": "own"}, "seeds": [0], "published": None,
        "sweep": {"method": method, "vary": {"r": [0.5]}},
        "curve": {"lines": lines, "budgets": [1], "images": 32, "width_multiple": 2},
    }  # fmt: skip
    study_file.write_text(yaml.safe_dump(content, sort_keys=False))
    out = tmp_path / "out"
    table = run_study(study_file, out)
    own = {row: json.loads((out / f"{row}-s0" / "result.json").read_text()) for row in content["rows"]}
    accuracies = {row: figures["test_accuracy"] for row, figures in own.items()}
    assert {row["row"]: row["accuracy"] for row in table.rows} == pytest.approx(accuracies)
    assert len({*accuracies.values()}) >= 3  # Else equal figures would say nothing.
    assert (table.rows[0]["speed"], table.rows[3]["speed"]) == (1, 1)  # Each the first on its images.
    assert "24 to 60 images (140 to 364 test images)" in table.notes[0]
    said = f"Test images are not the same (digits: plain, few, cropped; folder {tmp_path / 'images'}: files)."
    assert table.notes[-1].startswith(said)
    swept = json.loads((out / "sweep.json").read_text())
    dense = {row["model"]: row["accuracy"] for row in swept["rows"] if row["method"] == "dense"}
    assert dense == pytest.approx({f"{row}-s0": accuracy for row, accuracy in accuracies.items()})
    traced = json.loads((out / "curve.json").read_text())
    points = {(row["curve"], row["row"]): row["accuracy"] for row in traced["rows"]}
    assert points["cut", "cropped"] == pytest.approx(accuracies["cropped"], abs=0.01)
    assert {row: points["alone", row] for row in accuracies} == pytest.approx(accuracies)


SWEEP = {"method": "TopK() @ KeepRate({r}, at=[0])", "vary": {"r": [0.5]}}


def test_mistakes_in_a_study(study_file: Path):
    with pytest.raises(UnknownNameError, match="unknown scale 'smok'; did you mean smoke"):
        Study.read(study_file, "smok")
    study_file.write_text("title: x\nrow: {}\n")
    with pytest.raises(UnknownNameError, match="unknown part of a study 'row'; did you mean rows"):
        Study.read(study_file, "full")
    study_file.write_text("title: x\nbase: {}\n")
    with pytest.raises(RecipeError, match="has no 'rows'"):
        Study.read(study_file, "full")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rows": {"a/b": {}}}, "row 'a/b' cannot be a folder"),
        ({"rows": {".a": {}}}, "row '.a' cannot be a folder"),
        ({"rows": {"a b": {}, "a-b": {}}}, "rows 'a b' and 'a-b' would share a folder"),
        ({"rows": {True: {}}}, "YAML reads a name as True; put names"),
        ({"test": {False: "dense"}}, "YAML reads a name as False; put names"),
        ({"seeds": 3}, "seeds is 3; it must list whole numbers"),
        ({"seeds": [1, 1]}, "name a seed twice"),
        ({"test": {"t": "TopKk() @ KeepRate(0.5)"}}, "did you mean TopK"),
        ({"rows": {"a": {}, "b": {"reduction": "TopK() @ KeepRate(2)"}}}, "keep rate lies in"),
        ({"rows": {"a": {}, "b": {"epochs": 0}}}, "epochs is 0"),
        ({"rows": {"a": {}, "b": {"distill": "Cls("}}}, "cannot read 'Cls\\('"),
        ({"rows": 3}, "has no 'rows' with options in it"),
        ({"rows": {"a": 3}}, "row 'a' is 3; it must be a mapping of options"),
        ({"rows": {"a": {"data": {1: 2}}}}, "row 'a': unknown option in data '1'"),
        ({"rows": {"a": {}, "b": {"model": {"name": "vitrim_digit_vit"}}}}, "did you mean vitrim_digits_vit"),
        ({"rows": {"a": {}, "b": {"teacher": {"name": "no/such"}, "distill": "Logits()"}}}, "nothing at no/such"),
        ({"rows": {"a": {}, "b": {"augment": {"randaugment": "rand-9"}}}}, "row 'b': augment.randaugment is 'rand-9'"),
        ({"rows": {"a": {"model": {"args": {"num_classes": 0}}}}}, "no row of the study learns classes"),
        ({"test": ["dense"]}, "test is \\['dense'\\]; it must be a mapping"),
        ({"test": {"a": 3}}, "test 'a' is 3; it must be a method"),
        ({"scales": 3}, "scales is 3; it must be a mapping"),
        ({"scales": {"smoke": 3}}, "scale smoke is 3; it must be a mapping"),
        ({"scales": {"smoke": {"row": {}}}}, "unknown part of a study 'row'; did you mean rows"),
        ({"sweep": 3}, "sweep is 3; it must be a mapping"),
        ({"sweep": {"method": "TopK() @ KeepRate({r})"}}, "there is nothing to vary"),
        ({"sweep": {"vary": {"r": [0.5]}}}, "the sweep of the study has no method"),
        ({"sweep": {"method": "TopK() @ KeepRate({r})", "vary": 3}}, "sweep.vary is 3; it must be a mapping"),
        ({"sweep": {"method": "TopK() @ KeepRate({r})", "vary": {"r": 0.5}}}, "sweep.vary.r is 0.5; it must list"),
        ({"published": {"dense, of": {"accuracy": 0.5}}}, "in published 'dense, of'; did you mean dense, off"),
        ({"published": {"dense, off": 0.5}}, "published 'dense, off' is 0.5; it must be a mapping"),
        ({"published": {"dense, off": {"acc": 0.5}}}, "option in published 'dense, off' 'acc'; did you mean accu"),
        ({"published": {"dense, off": {"accuracy": "good"}}}, "'dense, off'.accuracy is 'good'; it must be a number"),
        ({"published": {"dense, off": {"accuracy": 71.68}}}, "accuracy is 71.68; it must be 0 or more, at most 1"),
        ({"published": {"dense, off": {"params": 1.5}}}, "'dense, off'.params is 1.5; it must be a whole number"),
        ({"published": {"dense, off": {"gmacs": -1}}}, "'dense, off': gmacs is -1.0; it must be 0 or more"),
        ({"sweep": SWEEP | {"published": 3}}, "sweep.published is 3; it must be a mapping"),
        ({"sweep": SWEEP | {"published": {"dense, r 0.6": {}}}}, "unknown row and setting in sweep.published"),
        ({"sweep": SWEEP | {"published": {"half, r 0.5": {"params": 3}}}}, "unknown column of a sweep in published"),
        ({"pictures": ["half"]}, "pictures is \\['half'\\]; it must be a mapping"),
        ({"pictures": {"rows": ["halv"]}}, "unknown row 'halv'; did you mean half"),
        ({"pictures": {"rows": ["dense"]}}, "the model of row 'dense' reduces no tokens"),
        ({"pictures": {"rows": ["half"], "images": 0}}, "one image or more"),
        ({"sweep": {"method": "TopK() @ KeepRate({r})", "vary": {"r": [2.0]}}}, "keep rate lies in"),
        ({"test": {"t": "TopK() @ KeepRate(0.5, at=[9])"}}, "test 't', row 'dense': .*block 9, but"),
        ({"test": {"t": "TopK() @ KeepRate(0.5, at=[0]) @ Delayed(1)"}}, "Delayed.* acts only in training"),
        ({"test": {"t": "TopK(gradient) @ KeepRate(0.5, at=[0])"}}, "test 't', row 'dense': .*gradient"),
        ({"sweep": {"method": "TopK() @ KeepRate({r}, at=[7])", "vary": {"r": [0.5]}}}, "sweep, row 'dense': .* 7"),
        ({"rows": {"a": {}, "b": {"reduction": "TopK() @ KeepRate(0.5, at=[9])"}}}, "row 'b': .*block 9, but"),
        ({"rows": {"a": {}, "b": {"model": {"args": {"global_pool": "avg", "class_token": False}}, "data": DATA}},
          "test": {"t": "TopK() @ KeepRate(0.5, at=[0])"}}, "test 't', row 'b': .*has no CLS token"),
        ({"rows": {"a": {}, "b": {"data": {"image_size": 9}, "model": {"args": {"img_size": 8}}}}}, "row 'b': .*8 px"),
        ({"rows": {"a": {}, "b": {"model": {"args": {"depht": 3}}}}}, "row 'b': .*depht"),
        ({"rows": {"a": {}, "b": {"model": {"checkpoint": "no/such.safetensors"}}}}, "row 'b': no weights at no/such"),
        ({"rows": {"a": {}, "b": {"data": {"name": "folder"}}}}, "row 'b': folder needs data.root"),
        ({"rows": {"a": {}, "b": {"data": {"name": "folder", "root": "no/such"}}}}, "row 'b': no/such is not a folder"),
        ({"rows": {"a": {}, "b": {"model": {"name": "{row:a}", "args": {}},
                                  "reduction": "TopK() @ KeepRate(0.5, at=[5])"}}}, "row 'b': .*block 5, but"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_the_first_training(
    changes: dict[str, Any], says: str, study_file: Path, tmp_path: Path
):
    study_file.write_text(yaml.safe_dump(yaml.safe_load(study_file.read_text()) | changes))
    with pytest.raises(VitrimError, match=says):
        run_study(study_file, tmp_path / "out", scale="full")
    assert not (tmp_path / "out").exists()


def test_the_scale_is_the_file_as_it_is_unless_given(study_file: Path, tmp_path: Path):
    for text in (study_file.read_text(), study_file.read_text().split("scales:")[0]):
        study_file.write_text(text)
        assert signature(cli.VERBS["study"]).parameters["scale"].default == "full"
        assert Study.read(study_file, "full").seeds == [0, 1]


SIZES = {"depth": 2, "embed_dim": 24, "num_heads": 2}


def chained(**rows: Any) -> dict[str, Any]:
    """A study whose rows learn from each other; the file names them in another order than they must be trained in."""
    base = {"model": {"args": SIZES}, "data": DATA, "epochs": 1, "batch_size": 16}
    known = {
        "tuned": {"model": {"checkpoint": "{row:large, no labels}", "reset_head": True}},
        "large, no labels": {
            "model": {"args": {"num_classes": 0}},
            "distill": "Cls()",
            "teacher": {"name": "{row:teacher}"},
        },
        "teacher": {"model": {"args": {"embed_dim": 32}}},
    }
    return {"title": "chain", "base": base, "rows": known | rows, "seeds": [0, 1]}


def test_rows_learn_from_rows_of_the_same_seed(tmp_path: Path):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(chained(), sort_keys=False))
    out = tmp_path / "out"
    table = run_study(tmp_path / "study.yaml", out, scale="full")
    assert [row["row"] for row in table.rows] == ["tuned", "teacher"]  # The one without classifier is in no table.
    assert [row["n"] for row in table.rows] == [2, 2]
    for seed in (0, 1):
        middle = Recipe.read(out / f"large,-no-labels-s{seed}" / "recipe.yaml")
        assert middle.teacher is not None
        assert middle.teacher.name == str(out / f"teacher-s{seed}" / "model")
        tuned = Recipe.read(out / f"tuned-s{seed}" / "recipe.yaml")
        assert tuned.model.checkpoint == str(out / f"large,-no-labels-s{seed}" / "model")
    again = run_study(tmp_path / "study.yaml", out, scale="full")
    assert [row["accuracy"] for row in again.rows] == [row["accuracy"] for row in table.rows]


def test_rows_that_cannot_learn_from_rows(tmp_path: Path):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(chained(teacher={"model": {"checkpoint": "{row:tune}"}})))
    with pytest.raises(UnknownNameError, match="unknown row 'tune'; did you mean tuned"):
        run_study(path, tmp_path / "out", scale="full")
    path.write_text(yaml.safe_dump(chained(teacher={"model": {"checkpoint": "{row:tuned}"}})))
    with pytest.raises(RecipeError, match=r"wait for each other: .*teacher") as caught:
        run_study(path, tmp_path / "out", scale="full")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_architecture_without_a_classifier_gets_one_unless_told_otherwise(tmp_path: Path):
    sizes = {"depth": 1, "embed_dim": 24, "num_heads": 2, "img_size": 28}
    base = {"model": {"name": "vit_small_patch14_dinov2", "args": sizes}, "data": {"name": "digits"}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"base": base, "rows": {"a": {}}}))
    study_check.check_study(Study.read(tmp_path / "study.yaml", "full"), tmp_path / "out")


def check_recipe(recipe: Recipe) -> None:
    recipe.check()
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe
    if recipe.reduction is not None:
        reduction = Reduction.parse(recipe.reduction, recipe.phase)
        assert Reduction.parse(str(reduction), recipe.phase) == reduction
    if recipe.distill is not None:
        assert any(term.of_teacher() for term in Terms.parse(recipe.distill).terms)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_recipe_and_study_can_be_read_at_every_scale(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if path.stem != "study":
        return check_recipe(Recipe.read(path))
    monkeypatch.setattr(study_check, "look_for", lambda data: None)  # The images are elsewhere.
    monkeypatch.chdir(tmp_path)  # So are the weights of which it is only checked that they are there.
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "vits14.safetensors").touch()
    for scale in {"smoke", "small", "full", *yaml.safe_load(path.read_text())["scales"]}:
        study = Study.read(path, scale)
        study_check.check_study(study, tmp_path / "out")
        assert sorted(study.order()) == sorted(study.rows)
        for row in study.rows:
            check_recipe(study.recipe(row, 0, Path("out")))
        known = {f"{row}, {test}" for row in study.rows for test in study.test}
        assert set(study.published) <= known
        assert len(study.seeds) in {"smoke": (1,), "small": (1, 2, 3), "real": (2, 3)}.get(scale, (3,))


def test_published_figures_stand_beside_those_found(study_file: Path, tmp_path: Path):
    content = yaml.safe_load(study_file.read_text()) | {"seeds": [0]}
    table = run_study(study_file, tmp_path / "out", scale="smoke")
    assert [c.heading for c in table.columns if c.heading.startswith("published")] == ["published accuracy"]
    costs = {"train_seconds": 49200, "params": 21_600_000, "gmacs": 6.1272, "images_per_second": 940.9}
    content["published"]["half, on"] = {"speed": 1.37, **costs}
    method, vary = "TopK() @ KeepRate({rate}, at=[0])", {"rate": [0.5, 0.75]}
    content["sweep"] = {"method": method, "vary": vary, "published": {"half, rate 0.75": {"accuracy": 0.25}}}
    study_file.write_text(yaml.safe_dump(content, sort_keys=False))
    table = run_study(study_file, tmp_path / "out")
    assert [row.get("published_accuracy") for row in table.rows] == [0.5, None, None, None]
    keys = [column.key for column in table.columns]
    for key, figure in {"speed": 1.37, **costs}.items():
        assert [row.get(f"published_{key}") for row in table.rows] == [None, None, None, figure]
        assert keys.index(f"published_{key}") == keys.index(key) + 1
    lines = [line for line in table.markdown().splitlines() if line.startswith("| half | on |")]
    assert all(f"| {shown} |" in lines[0] for shown in ("1.37", "49200", "21,600,000", "6.1272", "940.9"))
    swept = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [row.get("published_accuracy") for row in swept["rows"]] == [None] * 5 + [0.25]
    assert [column["heading"] for column in swept["columns"]].count("published accuracy") == 1


@pytest.mark.parametrize(
    ("system", "scale", "name", "figures"),
    [
        ("system1", "full", "baseline, pruning off", {"accuracy": 0.7168, "train_seconds": 3567}),
        ("system2", "full", "progressive, FAKD, as trained", {"accuracy": 0.896}),
        ("system2", "cifar10", "naive, logit KD, as trained", {"accuracy": 0.9345}),
        ("system3", "full", "PTD+, plain", {"accuracy": 0.7412, "train_seconds": 37200}),
        ("system4", "full", "EViT-S 0.7, scratch, as trained",
         {"accuracy": 0.669, "gmacs": 3.9637, "images_per_second": 1443.1}),
        ("system4", "intel", "ViT-S, all, frozen, as trained", {"accuracy": 0.873}),
    ],
)  # fmt: skip
def test_published_figures_of_the_systems(system: str, scale: str, name: str, figures: dict[str, float]):
    study = Study.read(ROOT / "recipes" / system / "study.yaml", scale)
    assert study.published[name].known == figures
    assert not Study.read(ROOT / "recipes" / system / "study.yaml", "smoke").published


def test_a_study_has_a_column_for_every_published_figure():
    assert {field.name for field in fields(Published)} <= {column.key for column in COLUMNS}


def test_a_name_that_is_given_twice_is_refused(study_file: Path):
    study_file.write_text("base: &base {epochs: 1}\nrows:\n  a: {<<: *base, epochs: 2}\n  b: {}\n  a: {}\n")
    with pytest.raises(RecipeError, match=r"study\.yaml, line 5: 'a' is given twice"):
        Study.read(study_file, "full")
    study_file.write_text("base: &base {epochs: 1}\nrows:\n  a: &a {<<: *base, epochs: 2}\n  b: {<<: *a, epochs: 3}\n")
    assert Study.read(study_file, "full").rows == {"a": {"epochs": 2}, "b": {"epochs": 3}}  # Anchors may be laid over.


SINGLE = {
    "system1": {"baseline": "baseline", "train": "trained with pruning"},
    "system2": {
        "teacher": "teacher", "naive-ce": "naive, CE", "naive-logit-kd": "naive, logit KD",
        "naive-feature-kd": "naive, feature KD", "progressive-ce": "progressive, CE",
        "progressive-fakd": "progressive, FAKD", "released-fakd": "progressive 0.75, FAKD",
        "dense-ce": "dense, CE", "dense-fakd": "dense, FAKD", "cls-attention-fakd": "CLS attention, FAKD",
        "evit-fakd": "EViT, FAKD", "tome-fakd": "ToMe, FAKD",
        "cifar10-teacher": "teacher", "cifar10-naive-ce": "naive, CE", "cifar10-naive-logit-kd": "naive, logit KD",
    },
    "system3": {"baseline": "baseline", "ptd": "PTD", "ptd-plus": "PTD+"},
    "system4": {
        "distil-cls": "distil ViT-S, cls", "distil-all": "distil ViT-S, all",
        "distil-evit-0.7-cls": "distil EViT-S 0.7, cls", "distil-evit-0.7-all": "distil EViT-S 0.7, all",
        "distil-evit-0.5-cls": "distil EViT-S 0.5, cls", "distil-evit-0.5-all": "distil EViT-S 0.5, all",
        "finetune": "ViT-S, all", "probe": "ViT-S, all, frozen", "scratch": "ViT-S, scratch",
    },
    "system5": {"piad": "PIAD sandwich + KD", "piad-original": "PIAD original"},
}  # fmt: skip
NO_ROWS = {"system5": {"finetune", "finetune-distil", "finetune-vits14", "finetune-vits14-rotary"}}
"""Recipes that start from what only an extraction makes, or that make what a benchmark measures."""


@pytest.mark.parametrize("system", SINGLE)
def test_a_recipe_says_what_the_row_of_the_study_does(system: str):
    """But for where weights lie, and for options that say nothing because those they belong to are off.

    A file whose name begins with that of a scale is a row at that scale, all others at full scale.
    """
    folder = ROOT / "recipes" / system
    files = {path.stem for path in folder.glob("*.yaml")} - {"study"}
    assert files == {*SINGLE[system]} | NO_ROWS.get(system, set())
    scales = yaml.safe_load((folder / "study.yaml").read_text())["scales"]
    for file, row in SINGLE[system].items():
        study = Study.read(folder / "study.yaml", next((scale for scale in scales if file.startswith(scale)), "full"))
        one, other = Recipe.read(folder / f"{file}.yaml"), study.recipe(row, 0, Path("runs"))
        apart = {"model.checkpoint", "model.reset_head", "teacher.name", "data.workers"}
        apart |= {"augment.mix_prob"} if not one.augment.mixup and not one.augment.cutmix else set()
        apart |= {"phase"} if one.reduction is None else set()
        if system == "system5":  # The study gives all rows the drop path of its base.
            apart |= {"model.args", "model.args.drop_path_rate"}
        assert [text for text in one.differences(other) if text.split(":")[0] not in apart] == []


def test_committed_results_are_those_of_the_studies_as_they_are():
    """Every recipe that stands beside results is what the study still does at that scale, wherever its images lie."""
    read = functools.cache(lambda system, scale: Study.read(ROOT / "recipes" / system / "study.yaml", scale))
    paths = sorted((ROOT / "results").glob("system*-*/*-s*/recipe.yaml"))
    assert {path.parts[-3].rpartition("-")[2] for path in paths} == {"small", "real"}
    for path in paths:
        study = read(path.parts[-3].split("-")[0], path.parts[-3].rpartition("-")[2])
        seed = path.parent.name.rpartition("-s")[2]
        row = {run_folder(Path(), row, int(seed)).name: row for row in study.rows}[path.parent.name]
        found = Recipe.read(path).differences(study.recipe(row, int(seed), Path("runs")))
        apart = {"data.root", "model.checkpoint", "teacher.name", "data.test_split"}
        assert [text for text in found if text.split(":")[0] not in apart] == [], path


WIDE = Table(
    "A title [with brackets]",
    (Column("name", "model"), Column("method", "method"), Column("none", "never filled", ".2f"),
     Column("accuracy", "accuracy", ".2%"), Column("time", "time [s]", ".2f"), Column("macs", "MACs", ",d"),
     Column("speed", "images/s", ".0f"), Column("tokens", "tokens leaving each block")),
    [{"name": "deit_small_patch16_224", "method": "TopK() @ PowerLaw(r_max=0.6, alpha=2.0)", "accuracy": 0.5,
      "time": 1.0, "macs": 4_600_000_000, "speed": 1234, "tokens": [65, 40, 14]}],
    notes=["One note."],
)  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 200])
def test_tables_fit_the_terminal(width: int):
    text = WIDE.text(width)
    assert max(map(len, text.splitlines())) <= width
    words = {word for line in text.splitlines() for word in line.split()}
    assert {"deit_small_patch16_224", "PowerLaw(r_max=0.6,", "accuracy", "4,600,000,000", "[s]", "brackets]"} <= words
    assert "65 .. 14" in text
    assert "never" not in words


def test_tables_are_whole_in_files(tmp_path: Path):
    for suffix, expected in ((".md", "65 40 14"), (".csv", "65 40 14"), (".html", "65 40 14"), (".json", "4600000000")):
        WIDE.write(tmp_path / f"t{suffix}")
        assert expected in (tmp_path / f"t{suffix}").read_text()
    loaded: Any = json.loads((tmp_path / "t.json").read_text())
    assert loaded["rows"][0]["tokens"] == [65, 40, 14]
    with pytest.raises(VitrimError, match="exists"):
        WIDE.write(tmp_path / "t.md")
    with pytest.raises(VitrimError, match="should end in"):
        WIDE.write(tmp_path / "t.txt")
