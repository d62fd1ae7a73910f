"""Fuzzed recipes: each describes a run that can begin, or is refused in one line before anything is written."""

import json
import random
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fuzzing import COUNT, altered_text, altered_value, fault_of, fuzz, odd_value
from test_fuzz_notation import text as altered_notation
from vitrim.errors import VitrimError
from vitrim.models import build_model, open_model
from vitrim.models.files.classes import classes_of
from vitrim.options import flatten
from vitrim.train import loop
from vitrim.train.learner import reduction_of, terms_of
from vitrim.train.recipe import Recipe
from vitrim.yaml_text import dump_yaml, parse_yaml

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element"),
]
SIZES = {"depth": 2, "embed_dim": 8, "num_heads": 1}
NETWORK = {"name": "vitrim_digits_vit", "args": SIZES}
REDUCTIONS = ["TopK(fuse=sum) @ KeepRate(0.5, at=[1]) @ Delayed(1)", "ToMe() @ ConstantR(9) @ Polynomial(0, 2)"]
OBJECTIVES = ["Labels(0.5) + Logits(Linear(0.5, 0.2), temperature=4)", "Cls() + Tokens(loss=cosine)"]
ROOT = Path(__file__).parents[1] / "recipes"


def example(rng: random.Random, full: bool = True) -> dict[str, Any]:
    """A recipe of one of the kinds that there are; with `full`, some name all options."""
    data = asdict(Recipe()) if full and rng.random() < 0.3 else {}
    data |= {"model": deepcopy(NETWORK), "data": {"workers": 0, "limit": 40, "holdout": 0.2}, "epochs": 3}
    kind = rng.randrange(4)
    if kind == 1:
        data |= {
            "reduction": rng.choice(REDUCTIONS),
            "phase": "train",
            "optim": {"lr": 1e-3, "ema": 0.9, "accumulate": 2},
        }
    elif kind == 2:
        data |= {"distill": rng.choice(OBJECTIVES), "teacher": NETWORK | {"checkpoint": "nowhere.pth"}}
        data |= {
            "cache": {"folder": "cache", "top_k": 4},
            "augment": {"views": 2, "crop": "pad", "randaugment": "rand-m9-n2"},
        }
    elif kind == 3:
        data |= {
            "elastic": {"grow_epochs": 2, "max_saving": 0.5, "images": 8},
            "augment": {"mixup": 0.2, "cutmix": 1.0},
        }
    return data


def altered(rng: random.Random) -> Any:
    """A recipe with one or two places removed, renamed or replaced, or an option of it set to an odd value."""
    data: Any = example(rng)
    for _ in range(rng.choice((1, 1, 2))):
        if rng.random() < 0.5 or not isinstance(data, dict):
            data = altered_value(data, rng)
            continue
        *outer, last = rng.choice([*flatten(asdict(Recipe())), *(f"model.args.{name}" for name in SIZES)]).split(".")
        place = data
        for name in outer:
            if not isinstance(place.get(name), dict):
                place[name] = {}
            place = place[name]
        texts = {"reduction": REDUCTIONS, "distill": OBJECTIVES}
        place[last] = altered_notation(rng, texts[last]) if last in texts else odd_value(rng)
    return data


def checked(recipe: Recipe, rng: random.Random) -> None:
    """Everything about a recipe that needs no images, and what is written of it."""
    recipe.check()
    reduction_of(recipe)
    terms_of(recipe)
    assert Recipe.from_dict(parse_yaml(recipe.to_yaml(), "recipe")) == recipe
    assert rng.random() > 0.1 or recipe.differences(recipe) == []  # It takes longer than all else.
    assert all(isinstance(value, int | float | str) for value in recipe.flat().values())
    json.dumps(recipe.to_dict())


def test_values_of_recipes():
    def surface(rng: random.Random) -> None:
        data = altered(rng)
        checked(Recipe.from_dict(data if isinstance(data, dict) else {"model": data}), rng)

    outcomes = fuzz(surface)
    assert min(outcomes["accepted"], outcomes["refused"]) > 20


def test_texts_of_recipes(tmp_path: Path):
    texts = [path.read_text() for path in sorted(ROOT.glob("system*/[!s]*.yaml"))][:2]
    texts += [dump_yaml(example(random.Random(seed), full=False)) for seed in range(12)]
    path = tmp_path / "recipe.yaml"

    def surface(rng: random.Random) -> None:
        text = altered_text(rng.choice(texts), rng)
        path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
        checked(Recipe.read(path), rng)

    fuzz(surface)


def test_runs_that_are_prepared_and_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Networks, images, objective, mixing, optimiser and learning rates of a run are made; nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop._Run, "run", lambda run: {})

    def surface(rng: random.Random) -> None:
        data = altered(rng)
        recipe = Recipe.from_dict(data if isinstance(data, dict) else {"data": data})
        sizes = [recipe.model.args.get(name) for name in SIZES]
        if any(isinstance(size, int) and 100 < size < 100_000 for size in sizes):
            return  # A network that may be trained, and takes long to make.
        assert loop.train(recipe, tmp_path / "run") == {}

    fuzz(surface, count=max(60, COUNT // 5))  # Their values are those of the first test; here runs are built.
    assert not list(tmp_path.iterdir())


LONG = "x" * 300


@pytest.mark.parametrize(
    "options",
    [
        {"model": {"name": LONG}},
        {"model": {"checkpoint": LONG}},
        {"data": {"name": "folder", "root": LONG}},
        {"data": {"name": "folder", "root": ".", "train_split": LONG}},
        {"data": {"name": "folder", "root": ".", "test_split": LONG}},
        {"teacher": {"name": LONG}, "distill": "Cls()"},
        {"teacher": NETWORK | {"checkpoint": f"{LONG}.pth"}, "distill": "Cls()"},
        {"teacher": NETWORK, "distill": "Cls()", "augment": {"views": 1}, "cache": {"folder": LONG}},
    ],
)
def test_names_that_no_file_can_have_are_refused_in_one_line(options: dict[str, Any], tmp_path: Path):
    with pytest.raises(VitrimError) as refused:
        loop.train(Recipe.from_dict(options), tmp_path / "run")
    assert fault_of(str(refused.value)) == ""


@pytest.mark.parametrize("name", [LONG, f"{LONG}.pth", f"{LONG}/model", f"vitrim_digits_vit@{LONG}"])
def test_models_and_run_folders_of_names_that_no_file_can_have(name: str, tmp_path: Path):
    with pytest.raises(VitrimError):
        open_model(name)
    assert classes_of(name) is None
    with pytest.raises(VitrimError):
        loop.train(Recipe(epochs=1), tmp_path / name)


def test_a_width_that_leaves_a_convolutional_stem_no_channels_is_refused():
    with pytest.raises(VitrimError, match="a convolutional stem needs an embed_dim of 4 or more, not 1"):
        build_model("vitrim_digits_vit", embed_dim=1, num_heads=1)
