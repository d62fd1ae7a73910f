"""Folders as people have them: mixed formats, nested folders, stray files. Nothing is left out without a word."""

import logging
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitrim.data import data_sets, timm_readers
from vitrim.data.data_sets import open_both, open_images, open_unlabelled
from vitrim.data.folder import FolderImages, natural_key
from vitrim.data.images import Images
from vitrim.data.specs import DataSpec
from vitrim.data.splits import plain_stream
from vitrim.errors import DataError
from vitrim.measure.accuracy import evaluate
from vitrim.models import build_model, save
from vitrim.showing.files import find_images
from vitrim.study.compare import compare
from vitrim.train.loop import train
from vitrim.train.recipe import Recipe

SIZES = {"depth": 1, "embed_dim": 24, "num_heads": 2}


def draw(path: Path, value: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, value, value)).save(path)


def folder(root: Path, *classes: str, splits: tuple[str, ...] = ("train", "val"), count: int = 5) -> DataSpec:
    for split in splits:
        for label in classes:
            for number in range(count):
                draw(root / split / label / f"{number}.png", 20 * number)
    return DataSpec(name="folder", root=str(root), workers=0, holdout=0.2)


@pytest.fixture(autouse=True)
def _new_process() -> None:
    data_sets._report_once.cache_clear()


def test_a_folder_of_mixed_formats_is_read_whole(tmp_path: Path):
    suffixes = [".png", ".JPG", ".jpeg", ".jpe", ".webp", ".bmp", ".gif", ".tif", ".TIFF", ".ppm"]
    for suffix in suffixes:
        draw(tmp_path / "a" / f"x{suffix}")
    found = FolderImages(tmp_path)
    assert len(found) == len(suffixes)
    assert found.notes == []
    assert len(find_images(tmp_path)) == len(suffixes)


def test_what_is_not_read_is_counted_and_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    spec = folder(tmp_path, "a", "b")
    for name in ("a/notes.txt", "a/more.txt", "b/photo.heic", "b/._0.png", "b/.cache/1.png", "stray.png", "README"):
        path = tmp_path / "train" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    os.mkfifo(tmp_path / "train" / "a" / "pipe.png")
    (tmp_path / "train" / "a" / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "train" / "b" / "round").symlink_to(tmp_path / "train" / "b")
    with socket.socket(socket.AF_UNIX) as listening, caplog.at_level(logging.WARNING):
        monkeypatch.chdir(tmp_path / "train" / "b")  # Paths of sockets are short.
        listening.bind("s.png")
        images, _ = open_both(spec)
        open_both(spec)
    assert (len(images), images.classes) == (10, ["a", "b"])
    assert len(caplog.messages) == 2
    counted, outside = caplog.messages
    for part in (".txt: 2", ".heic: 1", "hidden files: 1", "hidden folders: 1", "links to a folder above: 1"):
        assert part in counted
    assert "broken links, FIFOs, sockets or devices: 3" in counted
    assert outside.endswith("/train: files not read (outside of class folders: 2)")


def test_a_run_and_a_table_name_what_was_not_read(tmp_path: Path):
    spec = folder(tmp_path / "images", "a", "b")
    for split in ("train", "val"):
        (tmp_path / "images" / split / "a" / "x.svg").write_text("")
    given = {"model": {"name": "vitrim_digits_vit", "args": SIZES}, "data": vars(spec), "epochs": 1, "batch_size": 4}
    result = train(Recipe.from_dict(given), tmp_path / "run")
    assert result["not_read"] == [f"{tmp_path}/images/{split}: files not read (.svg: 1)" for split in ("train", "val")]
    table = compare([str(tmp_path / "run")], spec, ["dense"], device="cpu")
    assert f"{tmp_path}/images/val: files not read (.svg: 1)" in table.notes


def test_a_folder_inside_a_class_folder_belongs_to_the_class(tmp_path: Path):
    spec = folder(tmp_path, "a", "b")
    draw(tmp_path / "train" / "b" / "more" / "deep" / "x.png")
    images = open_images(spec, True)
    assert len(images) == 11
    assert images.classes == ["a", "b"]
    assert [images.load(index)[1] for index in range(11)] == [0] * 5 + [1] * 6
    assert images.notes == [f"{tmp_path}/train: images in folders inside of class folders are taken for that class (1)"]


def test_a_folder_without_classes_is_read_as_one_with_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """By every verb that takes one: hidden files, such as those of macOS, are not images, and the rest is counted."""
    for name in ("1.png", "sub/2.png", ".hidden/3.png"):
        draw(tmp_path / name)
    for name in ("._1.png", "photo.heic", "notes.txt"):
        (tmp_path / name).write_bytes(b"text")
    os.symlink(tmp_path, tmp_path / "sub" / "loop")
    images = open_unlabelled(tmp_path)
    assert [images.name(index) for index in range(len(images))] == [f"{tmp_path}/1.png", f"{tmp_path}/sub/2.png"]
    assert [name for name, _ in find_images(tmp_path)] == ["1.png", "sub/2.png"]
    (line,) = caplog.messages
    for reason in ("hidden files: 1", "hidden folders: 1", ".heic: 1", ".txt: 1", "links to a folder above: 1"):
        assert reason in line


def test_a_class_without_a_readable_image_is_refused_with_what_it_holds(tmp_path: Path):
    spec = folder(tmp_path, "a")
    (tmp_path / "train" / "b").mkdir()
    with pytest.raises(DataError, match=r"class folder .*/b holds no images that can be read; fill it"):
        open_images(spec, True)
    for number in range(3):
        (tmp_path / "train" / "b" / f"{number}.heic").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds no images that can be read \(\.heic: 3\)"):
        open_images(spec, True)


def test_test_classes_of_other_case_are_those_of_training(tmp_path: Path):
    spec = folder(tmp_path / "images", "Cat", "dog", "Éclair", splits=("train",))
    folder(tmp_path / "images", "cat", "Dog", "e\u0301clair", splits=("val",))  # A decomposed letter, as on macOS.
    images, tested = open_both(spec)
    assert images.classes == tested.classes
    assert set(images.classes) == {"Cat", "dog", "Éclair"}
    for index in range(len(tested)):
        name = Path(tested.name(index)).parent.name
        assert tested.classes[tested.load(index)[1]].casefold()[:2] in (name.casefold()[:2], "éc")
    assert "differ in case" in tested.notes[0]
    model = build_model("vitrim_digits_vit", num_classes=3, **SIZES)
    save(model, tmp_path / "model", classes=images.classes)
    assert compare([str(tmp_path / "model")], spec, ["dense"], device="cpu").rows[0]["num_images"] == 15


def test_classes_that_differ_in_case_alone_stay_two(tmp_path: Path):
    spec = folder(tmp_path, "a", "A", "b")
    images, tested = open_both(spec)
    assert images.classes == tested.classes == ["A", "a", "b"]
    folder(tmp_path / "other", "a", "A", splits=("train",))
    folder(tmp_path / "other", "a", "b", splits=("val",))
    with pytest.raises(DataError, match="different classes: A, b"):
        open_both(DataSpec(name="folder", root=str(tmp_path / "other")))
    folder(tmp_path / "fewer", "Ant", "bee", splits=("train",))
    folder(tmp_path / "fewer", "ant", splits=("val",))
    with pytest.raises(DataError, match=r"different classes: bee$"):  # Not Ant and ant.
        open_both(DataSpec(name="folder", root=str(tmp_path / "fewer")))


def test_names_sort_in_natural_order_whatever_digits_they_have():
    names = ["img10", "img2", "IMG2", "²", "1²", "x", "٣", "", "10", "9" * 200]
    backwards = names[::-1]
    assert sorted(names, key=natural_key) == sorted(backwards, key=natural_key)
    assert sorted(["b10", "b9", "a"], key=natural_key) == ["a", "b9", "b10"]


def test_links_to_images_and_folders_are_followed(tmp_path: Path):
    draw(tmp_path / "store" / "many" / "0.png")
    draw(tmp_path / "store" / "one.png")
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "one.png").symlink_to(tmp_path / "store" / "one.png")
    (tmp_path / "train" / "a" / "many").symlink_to(tmp_path / "store" / "many")
    (tmp_path / "train" / "b").symlink_to(tmp_path / "store")
    assert len(FolderImages(tmp_path / "train")) == 4


@pytest.mark.parametrize("name", ["torch/image_folder", "torch/folder", "TORCH/image_folder"])
def test_folders_of_torchvision_are_read_by_the_same_door(name: str, tmp_path: Path):
    spec = folder(tmp_path, "a", "b")
    deep = np.full((8, 8), 30000, np.uint16)
    Image.fromarray(deep).save(tmp_path / "val" / "a" / "0.png")
    images = open_images(DataSpec(name=name, root=spec.root), False)
    assert images.load(0)[0].getpixel((3, 3)) == (117, 117, 117)


def test_files_of_other_data_sets_of_torchvision_are_read_by_the_same_door(tmp_path: Path):
    from torchvision.datasets import DatasetFolder

    folder(tmp_path, "a", splits=("train",), count=1)
    Image.fromarray(np.full((8, 8), 30000, np.uint16)).save(tmp_path / "train" / "a" / "0.png")
    source = DatasetFolder(str(tmp_path / "train"), loader=lambda path: path, extensions=(".png",))
    assert timm_readers.through_one_door(source)[0][0].getpixel((3, 3)) == (117, 117, 117)


class FailingBombs(torch.utils.data.Dataset):
    """The second item raises as a decoder does on a decompression bomb."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index == 1:
            raise Image.DecompressionBombError("too many pixels")
        return Image.new("L", (8, 8)), index


@pytest.mark.filterwarnings("ignore")
def test_bombs_are_skipped_and_counted_like_any_unreadable_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec = folder(tmp_path, "a", "b")
    Image.new("L", (30, 30)).save(tmp_path / "val" / "a" / "3.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    model = build_model("vitrim_digits_vit", num_classes=2, **SIZES)
    spec.on_corrupt = "skip"
    found = evaluate(model, plain_stream(model, spec))
    assert (found.num_images, found.unreadable) == (9, (str(tmp_path / "val" / "a" / "3.png"),))
    with pytest.raises(DataError, match="image 1: too many pixels"):
        Images(FailingBombs()).load(1)
