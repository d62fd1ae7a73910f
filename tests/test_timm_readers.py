"""Data sets that timm reads: webdatasets, and the split that is for testing where none is named."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from vitrim.data.data_sets import open_both, open_images
from vitrim.data.specs import DataSpec
from vitrim.errors import DataError, NoSplitError


def webdataset(folder: Path, shapes: dict[str, int], unlabelled: str = "") -> None:
    """A data set with so many images in each split; those of one of them may have no classes."""
    package = pytest.importorskip("webdataset")
    for split, count in shapes.items():
        with package.TarWriter(str(folder / f"tiny-{split}-0000.tar")) as tar:
            for number in range(count):
                grey = Image.new("RGB", (9, 9), (20 * number, 0, 0))
                target = -1 if split == unlabelled else number % 3
                tar.write({"__key__": f"{number:04d}", "png": grey, "cls": target})
    splits = {
        split: {
            "name": split, "num_samples": count, "filenames": [f"tiny-{split}-0000.tar"], "shard_lengths": [count],
        }
        for split, count in shapes.items()
    }  # fmt: skip
    (folder / "_info.json").write_text(json.dumps({"splits": splits}))


@pytest.mark.filterwarnings("ignore")
def test_a_webdataset_stream_is_read_like_any_other(tmp_path: Path):
    webdataset(tmp_path, {"train": 7, "validation": 3})
    train_images, test_images = open_both(DataSpec(name="wds/tiny", root=str(tmp_path)))
    assert (len(train_images), len(test_images), train_images.classes) == (7, 3, ["0", "1", "2"])
    pixels, target = train_images.load(5)
    assert (pixels.getpixel((4, 4)), target) == ((100, 0, 0), 2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("names", [("test", "val", "validation"), ("val", "validation"), ("validation",)])
def test_the_first_test_split_that_exists_is_read(names: tuple[str, ...], tmp_path: Path):
    webdataset(tmp_path, {"train": 7, **dict.fromkeys(names, 3)})
    spec = DataSpec(name="wds/tiny", root=str(tmp_path))
    assert open_images(spec, False).place == f"wds/tiny, {names[0]}"
    assert open_images(replace(spec, test_split=names[-1]), False).place == f"wds/tiny, {names[-1]}"


@pytest.mark.filterwarnings("ignore")
def test_a_test_split_without_classes_is_read_only_where_it_is_named(tmp_path: Path):
    webdataset(tmp_path, {"train": 7, "test": 3, "validation": 4}, unlabelled="test")
    spec = DataSpec(name="wds/tiny", root=str(tmp_path))
    assert open_images(spec, False).place == "wds/tiny, validation"
    assert len(open_images(replace(spec, test_split="test"), False)) == 3
    webdataset(tmp_path, {"train": 7, "test": 3}, unlabelled="test")
    with pytest.raises(
        NoSplitError, match=r"no classes in its split test; tried test, val, validation, and data\.test_spl"
    ):
        open_images(spec, False)
    webdataset(tmp_path, {"train": 7})
    with pytest.raises(
        NoSplitError, match=r"no split test: split test not found .*'train'.*; tried test, val, validation"
    ):
        open_images(spec, False)
    (tmp_path / "_info.json").unlink()
    with pytest.raises(DataError, match="cannot open data set 'wds/tiny'"):
        open_images(spec, False)


class HubDataset:
    """As timm reads one from the hub with the splits train and test, as hfds/uoft-cs/cifar10 has them."""

    def __init__(self, name: str, split: str, **options: object) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"Unknown split \"{split}\". Should be one of ['train', 'test'].")
        self.reader = self
        self.class_to_idx = {"cat": 0, "dog": 1}

    def iter_targets(self):
        yield 1


def test_a_data_set_of_the_hub_is_tested_on_the_split_that_it_has(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vitrim.data.timm_readers.create_dataset", HubDataset)
    train_images, test_images = open_both(DataSpec(name="hfds/uoft-cs/cifar10"))
    assert (train_images.place, test_images.place) == ("hfds/uoft-cs/cifar10, train", "hfds/uoft-cs/cifar10, test")
