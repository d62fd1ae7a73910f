"""Options for images reach what each verb does, or are refused: image size, limit, the images of a run."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import vitrim
from vitrim.cli import main
from vitrim.data.data_sets import look_for, open_images
from vitrim.data.images import Images
from vitrim.data.seeding import permutation
from vitrim.data.specs import AugmentSpec, DataSpec
from vitrim.data.splits import make_splits, plain_stream
from vitrim.data.streams import Stream
from vitrim.errors import DataError, UnsupportedModelError
from vitrim.models import attached, open_model
from vitrim.train import figures
from vitrim.train.loop import train
from vitrim.train.recipe import Recipe
from vitrim.verbs.images import override_data

DATA = ["--data.name", "digits", "--data.workers", "0"]
SIZES = {"depth": 2, "embed_dim": 24, "num_heads": 2}


@pytest.fixture
def saved(tmp_path: Path) -> str:
    """A model for 8 px with a reduction; its head gives opinions."""
    model = vitrim.build_model("vitrim_digits_vit", **SIZES)
    torch.nn.init.normal_(model.head.weight)
    vitrim.attach(model, "TopK() @ KeepRate(0.5, at=(1,))")
    return str(vitrim.save(model, tmp_path / "saved"))


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(list(words))
    err = capsys.readouterr().err
    assert (end.value.code, err.count("\n")) == (2, 1)
    return err


def tokens(table: Path) -> list[str]:
    return re.findall(r"\b\d+ \d+\b", table.read_text())


def test_every_verb_that_opens_a_model_opens_it_at_the_size_given(saved: str, tmp_path: Path):
    main(["eval", saved, "--method", "own", "dense", *DATA, "--data.image_size", "12", "--out", f"{tmp_path}/e.md"])
    assert tokens(tmp_path / "e.md") == ["145 73", "145 145"]
    words = ["--vary", "{a: [0.5]}", *DATA, "--data.image_size", "12", "--out", f"{tmp_path}/s.md"]
    main(["sweep", saved, "--method", "TopK() @ KeepRate({a}, at=(1,))", *words])
    assert "145 " in (tmp_path / "s.md").read_text()
    bench = ["bench", saved, "--method", "dense", "--batch_size", "1", "--rounds", "1", "--device", "cpu"]
    gmacs = []
    for size in ([], ["--image_size", "12"]):
        main([*bench, *size, "--out", f"{tmp_path}/b{len(size)}.json"])
        found = re.search(r'"macs": (\d+)', (tmp_path / f"b{len(size)}.json").read_text())
        assert found is not None
        gmacs.append(int(found[1]))
    assert gmacs[1] > 2 * gmacs[0]
    Image.new("L", (20, 20)).save(tmp_path / "a.png")
    main(["show", saved, "--images", f"{tmp_path}/a.png", "--image_size", "12", "--out", f"{tmp_path}/shown"])
    assert (tmp_path / "shown" / "a.png").exists()
    words = [*DATA, "--data.limit", "16", "--data.image_size", "12", "--out", f"{tmp_path}/family"]
    vitrim.save(vitrim.build_model("vitrim_digits_vit", **SIZES), tmp_path / "dense")
    main(["stratify", f"{tmp_path}/dense", *words])
    assert vitrim.load(tmp_path / "family").patch_embed.img_size == (12, 12)


def test_a_saved_model_opens_at_another_size_with_its_weights_and_its_reduction(saved: str):
    small, large = open_model(saved), open_model(saved, 12)
    assert (small.patch_embed.img_size, large.patch_embed.img_size) == ((8, 8), (12, 12))
    handle = attached(large)
    assert handle is not None
    assert list(handle.token_counts) == [145, 73]
    assert torch.equal(small.head.weight, large.head.weight)
    again = open_model(saved, 8)
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(again(images), small(images))
    vitrim.save(vitrim.build_model("vitrim_digits_vit"), f"{saved}-whole")
    assert open_model(f"vitrim_digits_vit@{saved}-whole", 12).pos_embed.shape[1] == 145


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_fixed_size_says_so(tmp_path: Path):
    vitrim.save(vitrim.build_model("vit_tiny_patch16_224", depth=1, img_size=32), tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match="smaller than one patch"):
        open_model(str(tmp_path / "model"), 8)
    assert open_model(str(tmp_path / "model"), 64).pos_embed.shape[1] == 17


@pytest.mark.parametrize(
    ("verb", "option", "why"),
    [
        ("eval", "limit", "reads the test images; --data.limit would have no effect"),
        ("eval", "holdout", "reads the test images; --data.holdout would have no effect"),
        ("eval", "train_split", "--data.train_split would have no effect"),
        ("sweep", "limit", "reads the test images; --data.limit would have no effect"),
        ("stratify", "holdout", "reads training images only, unless it trains"),
        ("stratify", "test_split", "--data.test_split would have no effect"),
    ],
)
def test_options_without_effect_are_refused(
    verb: str, option: str, why: str, saved: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    value = {"limit": "9", "holdout": "0.2"}.get(option, "other")
    more = {
        "sweep": ["--method", "TopK() @ KeepRate({a})", "--vary", "{a: [0.5]}"],
        "stratify": ["--out", f"{tmp_path}/x"],
    }
    assert why in refused(capsys, verb, saved, *DATA, f"--data.{option}", value, *more.get(verb, []))


def test_stratify_uses_as_many_images_as_the_limit_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    vitrim.save(vitrim.build_model("vitrim_digits_vit", **SIZES), tmp_path / "model")
    main(["stratify", f"{tmp_path}/model", *DATA, "--data.limit", "24", "--out", f"{tmp_path}/family"])
    assert "ordered by 24 images, in" in capsys.readouterr().out


def test_limited_images_are_those_that_training_uses():
    model, spec = vitrim.build_model("vitrim_digits_vit", **SIZES), DataSpec(limit=30, holdout=0.2)
    both = open_images(spec, True), open_images(spec, False)
    splits = make_splits(*both, model, spec, AugmentSpec(), seed=3)
    assert splits.select is not None
    limited = plain_stream(model, spec, train=True, seed=3)
    assert limited.indices == sorted(splits.train.indices + splits.select.indices)
    assert len(plain_stream(model, spec)) == len(splits.test) == len(both[1])


def test_the_size_of_a_run_is_not_forced_upon_other_models(saved: str, tmp_path: Path):
    given = {"model": {"name": "vitrim_digits_vit", "args": SIZES}, "epochs": 1, "batch_size": 20}
    train(Recipe.from_dict({**given, "data": {"limit": 40, "workers": 0, "image_size": 12}}), tmp_path / "run")
    main(["eval", f"{tmp_path}/run", saved, "--data.workers", "0", "--method", "dense", "--out", f"{tmp_path}/e.md"])
    assert tokens(tmp_path / "e.md") == ["145 145", "65 65"]


def test_a_folder_for_digits_is_refused():
    for check in (look_for, lambda spec: open_images(spec, True)):
        with pytest.raises(DataError, match=r"data\.root is images, but data\.name is digits"):
            check(DataSpec("digits", root="images"))


def test_a_root_alone_is_a_folder_in_every_verb():
    assert (DataSpec().name, DataSpec(root="images").name) == ("digits", "folder")
    assert Recipe.from_dict({"data": {"root": "images"}}).data.name == "folder"
    for name in ("digits", "digits-moved"):
        assert override_data(DataSpec(name, limit=9), {"root": "images"}) == DataSpec("folder", "images", limit=9)
    moved = override_data(DataSpec("torch/cifar10", "here"), {"root": "there"})
    assert (moved.name, moved.root) == ("torch/cifar10", "there"), "another place for the same data set"


def test_too_small_a_part_to_hold_out_is_refused_with_what_to_do():
    model, spec = vitrim.build_model("vitrim_digits_vit", **SIZES), DataSpec(limit=3, holdout=0.1)
    with pytest.raises(DataError, match=r"3 training images are too few to hold 10% of them out; use more images, or"):
        make_splits(open_images(spec, True), open_images(spec, False), model, spec, AugmentSpec(), 0)


class Sorted:
    """Images of ten classes in the order of their classes, each in the colour of its class."""

    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("L", (8, 8), index // 40), index // 40


def test_a_sample_is_spread_over_all_classes_and_always_the_same():
    def pixels(image: Image.Image) -> Tensor:
        return torch.tensor(image.getpixel((0, 0)))

    stream = Stream(Images(Sorted(), mode="L"), pixels, seed=1)
    found = stream.sample(64)
    assert set(found.tolist()) == set(range(10))
    assert torch.equal(found, stream.sample(64))
    assert not torch.equal(found, Stream(Images(Sorted(), mode="L"), pixels, seed=2).sample(64))
    assert len(stream.sample(1000)) == 400
    assert len(set(permutation(400, "entropy", 1)[:64])) == 64


def test_attention_entropy_is_measured_on_images_of_all_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for split in ("train", "val"):
        for label in range(3):
            for number in range(100 if split == "train" else 1):
                path = tmp_path / "images" / split / f"{label}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8), 100 * label).save(path)
    seen: list[Any] = []

    def record(model: Any, images: Tensor) -> float:
        seen.append(images)
        return 0.5

    monkeypatch.setitem(figures._MEASURES, "attention_entropy", record)
    data = {"name": "folder", "root": f"{tmp_path}/images", "workers": 0, "holdout": 0.5}
    given = {"model": {"name": "vitrim_digits_vit", "args": SIZES}, "data": data, "epochs": 3, "batch_size": 50}
    text = "TopK() @ KeepRate(0.5) @ Adaptive(entropy)"
    train(Recipe.from_dict({**given, "reduction": text}), tmp_path / "run")
    measured = [images for images in seen if len(images) > 1]  # Before training, one blank image is tried.
    assert [len(images) for images in measured] == [64] * 3
    assert len(measured[0].mean((1, 2, 3)).unique()) == 3
