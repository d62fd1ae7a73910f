"""Images: folders that are not what they should be, damaged files, channels and sizes."""

import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits

from vitrim.compression.images import read
from vitrim.data.data_sets import open_both, open_images
from vitrim.data.readable import ReadableBatches
from vitrim.data.specs import AugmentSpec, DataSpec
from vitrim.data.splits import make_splits, plain_stream
from vitrim.data.streams import Stream, make_loader, shuffled_batches
from vitrim.data.transforms import transforms_for
from vitrim.errors import CheckpointError, DataError, UnknownNameError, VitrimError
from vitrim.measure.accuracy import evaluate
from vitrim.train.loop import train
from vitrim.train.recipe import Recipe

MODEL = {"name": "vitrim_digits_vit", "args": {"depth": 2, "embed_dim": 24, "num_heads": 2}}


def tiny(**args: Any) -> torch.nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **sizes | args)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes of ten digits for training and four for testing, as grey PNG files."""
    digits = load_digits()
    for split, first, count in (("train", 0, 10), ("val", 10, 4)):
        for label in range(3):
            folder = tmp_path / "images" / split / f"digit{label}"
            folder.mkdir(parents=True)
            for number, pixels in enumerate(digits.images[digits.target == label][first : first + count]):
                Image.fromarray((pixels * 15).astype("uint8")).save(folder / f"{number}.png")
    return tmp_path / "images"


def spec(root: Path, **options: Any) -> DataSpec:
    return DataSpec(name="folder", root=str(root), workers=0, **options)


def recipe(root: Path, **options: Any) -> Recipe:
    given = {"name": "folder", "root": str(root), "workers": 0, "holdout": 0.2, **options}
    return Recipe.from_dict({"model": MODEL, "data": given, "epochs": 2, "batch_size": 6})


def skipping(root: Path) -> Stream:
    return plain_stream(tiny(), spec(root, on_corrupt="skip"), train=True)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def test_a_good_folder(root: Path):
    images, test = open_both(spec(root))
    assert images.classes == test.classes == ["digit0", "digit1", "digit2"]
    assert (len(images), len(test)) == (30, 12)
    image, label = images.load(29)
    assert (image.size, image.mode, label) == ((8, 8), "RGB", 2)
    assert images.name(29) == str(root / "train" / "digit2" / "9.png")


def test_missing_things_are_named(root: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"nowhere is not a folder"):
        open_images(spec(tmp_path / "nowhere"), True)
    with pytest.raises(DataError, match=r"has no folder training; folders there: train, val"):
        open_images(spec(root, train_split="training"), True)
    with pytest.raises(DataError, match=r"needs data\.root"):
        open_images(DataSpec(name="folder"), True)
    (root / "train" / "digit9").mkdir()
    with pytest.raises(DataError, match=r"class folder .*digit9 holds no images"):
        open_images(spec(root), True)
    Image.new("L", (8, 8)).save(root / "train" / "digit9" / "a.png")
    with pytest.raises(DataError, match="different classes: digit9"):
        open_both(spec(root))


def test_unknown_and_unavailable_data_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(UnknownNameError, match="did you mean torch/cifar100 or torch/cifar10"):
        open_images(DataSpec(name="cifar100"), True)
    with pytest.raises(DataError, match=r"needs data\.root"):
        open_images(DataSpec(name="torch/cifar10"), True)
    with pytest.raises(DataError, match=r"cannot open data set 'torch/cifar10' .*--data\.download"):
        open_images(DataSpec(name="torch/cifar10", root=str(tmp_path)), True)
    for kind, package, brings in (
        ("hfds", "datasets", r"'vitrim\[hf\]'"),
        ("tfds", "tensorflow", "tensorflow-datasets tensorflow"),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(sys.modules, f"timm.data.readers.reader_{kind}", raising=False)
        with pytest.raises(DataError, match=f"needs the package {package}; pip install {brings}"):
            open_images(DataSpec(name=f"{kind}/cifar10"), True)
    assert capsys.readouterr().out == ""  # timm prints advice of its own.


def test_a_torchvision_data_set(root: Path):
    images = open_images(DataSpec(name="torch/image_folder", root=str(root)), True)
    assert images.classes == ["digit0", "digit1", "digit2"]
    assert images.load(11)[1] == 1
    assert images.name(11).startswith(str(root / "train" / "digit1"))
    truncate(Path(images.name(11)))
    with pytest.raises(DataError, match=f"cannot read {images.name(11)}"):
        images.load(11)


@pytest.mark.parametrize("damage", ["truncated", "no image", "empty", "gone"])
def test_a_damaged_image_is_refused_by_name(damage: str, root: Path):
    images = open_images(spec(root), True)
    path = root / "train" / "digit1" / "3.png"
    if damage == "truncated":
        truncate(path)
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"" if damage == "empty" else b"hello")
    with pytest.raises(DataError, match=str(path)) as refused:
        images.load(13)
    assert "\n" not in str(refused.value)
    if damage != "gone":
        with pytest.raises(DataError, match=str(path)):
            train(recipe(root, limit=None, holdout=0.0), root.parent / "run")


def test_damaged_images_are_skipped_and_counted_once(root: Path):
    broken = [root / "train" / "digit0" / "0.png", root / "val" / "digit2" / "1.png"]
    for path in broken:
        truncate(path)
    result = train(recipe(root, on_corrupt="skip"), root.parent / "run")
    assert result["unreadable"] == [str(path) for path in broken]
    assert result["test_images"] == 11
    images = open_images(spec(root), False)
    stream = Stream(images, transforms_for(tiny(), spec(root)), skip=True)
    pixels, label, index = stream[9]
    assert index == -1 - 9
    assert torch.equal(pixels, stream[10][0])
    assert label == 2
    found = evaluate(tiny(), stream, batch_size=5)
    assert (found.num_images, found.unreadable) == (11, (str(broken[1]),))
    for path in root.rglob("*.png"):
        path.write_bytes(b"hello")
    with pytest.raises(DataError, match="none of the 12 images can be read"):
        stream[0]


def test_shuffled_batches_leave_damaged_images_out(root: Path):
    truncate(root / "train" / "digit0" / "0.png")
    stream = skipping(root)
    first, again, other = (list(shuffled_batches(stream, 0, seed)) for seed in (0, 0, 1))
    assert torch.cat([classes for _, classes in first]).bincount().tolist() == [9, 10, 10]
    assert all(torch.equal(one[0], two[0]) for one, two in zip(first, again, strict=True))
    assert not torch.equal(first[0][1], other[0][1])


def test_a_batch_of_damaged_images_alone_is_left_out_and_named(root: Path, caplog: pytest.LogCaptureFixture):
    truncate(broken := root / "train" / "digit0" / "0.png")
    stream = skipping(root)
    batches = ReadableBatches(make_loader(stream, 1, 0)[0], stream.images)
    assert [len(images) for images, _ in batches] == [1] * 29
    assert batches.seen == 29
    assert caplog.messages == [f"images that could not be read and were left out: 1 ({broken})"]
    assert len(read(stream, 30, 0)) == 29


def test_figures_against_single_images(root: Path):
    torch.manual_seed(1)
    model, stream = tiny().eval(), plain_stream(tiny(), spec(root))
    with torch.no_grad():
        torch.nn.init.normal_(model.head.weight)  # Opinions that differ from image to image.
        answers = [model(stream[i][0][None]).double().softmax(1)[0] for i in range(len(stream))]
    labels = [stream[i][1] for i in range(len(stream))]
    right = [i for i, label in enumerate(labels) if int(answers[i].argmax()) == label]
    entropies = [-sum(float(p) * math.log(float(p)) for p in answers[i]) for i in right]
    found = evaluate(model, stream, batch_size=5)
    assert 0 < len(right) < len(labels)
    assert found.accuracy == pytest.approx(len(right) / len(labels))
    assert found.loss == pytest.approx(
        -sum(math.log(float(a[y])) for a, y in zip(answers, labels, strict=True)) / len(labels), rel=1e-4
    )
    assert found.entropy == pytest.approx(sum(entropies) / len(right), rel=1e-4)


def test_a_worker_names_the_damaged_image(root: Path):
    truncate(root / "train" / "digit0" / "0.png")
    options = recipe(root, workers=1, holdout=0.0)
    with pytest.raises(DataError, match=r"cannot read .*digit0/0\.png"):
        train(options, root.parent / "run")


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_images_come_with_the_channels_of_the_model(channels: int, mode: str, root: Path):
    model = tiny(in_chans=channels)
    stream = plain_stream(model, spec(root))
    assert stream.images.mode == mode
    image, _, index = stream[3]
    assert image.shape == (channels, 32, 32)
    assert index == 3
    assert torch.isfinite(model(image[None])).all()


def test_input_size(root: Path):
    with pytest.raises(DataError, match=r"takes images of 32 px, but data\.image_size is 64"):
        plain_stream(tiny(), spec(root, image_size=64))
    sized = recipe(root, image_size=16)
    result = train(sized, root.parent / "sized")
    assert result["tokens"] == [257, 257]
    small = Recipe.from_dict(
        {"model": {"name": "vit_tiny_patch16_224", "args": {"depth": 1}}, "data": {"image_size": 8}}
    )
    with pytest.raises(VitrimError, match="smaller than one patch"):
        train(small, root.parent / "small")
    assert not (root.parent / "small").exists()


def test_wrong_number_of_classes_against_a_checkpoint(root: Path):
    train(recipe(root), root.parent / "three")
    again = {"model": {"name": str(root.parent / "three" / "model")}, "data": {"workers": 0, "limit": 50}}
    with pytest.raises(CheckpointError, match="has 3 classes, not the 10 asked for"):
        train(Recipe.from_dict(again), root.parent / "ten")
    again["model"]["reset_head"] = True
    again |= {"epochs": 1, "batch_size": 16}
    assert train(Recipe.from_dict(again), root.parent / "ten")["test_images"] == 364


def test_streams_depend_on_seed_epoch_and_index_alone(root: Path):
    varied = AugmentSpec(crop="resized", flip=True, randaugment="rand-m9-n2", erasing=0.5)
    train_images, test_images = open_both(spec(root))
    varied_streams = [
        make_splits(train_images, test_images, tiny(), spec(root, holdout=0.2), varied, seed).train
        for seed in (0, 0, 1)
    ]
    length = len(varied_streams[0])
    torch.manual_seed(1)
    first = varied_streams[0][5][0]
    torch.rand(7)
    assert torch.equal(first, varied_streams[1][5][0])
    assert not torch.equal(first, varied_streams[0][5 + length][0])
    assert not torch.equal(first, varied_streams[2][5][0])
    splits = make_splits(train_images, test_images, tiny(), spec(root, holdout=0.2), varied, 0)
    assert not set(splits.train.indices) & set(splits.select.indices if splits.select else ())
    assert len(splits.train) == 24


def test_too_few_images_to_hold_out(root: Path):
    with pytest.raises(DataError, match="1 training images are too few"):
        train(recipe(root, limit=1), root.parent / "run")
    assert not os.path.exists(root.parent / "run")
