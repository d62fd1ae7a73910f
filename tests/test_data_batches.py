"""Images in any form give the same batches to every public function, and pixels that no model takes are refused."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import vitrim
from vitrim.compression.images import gather
from vitrim.data.batches import SIZE, batches_in, images_of
from vitrim.data.seeding import permutation
from vitrim.elastic.probing import check_pixels
from vitrim.elastic.refit import refit
from vitrim.errors import DataError
from zoo import build

SHAPE = (3, 40, 40)
PIXELS = torch.randn(40, *SHAPE, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(40) % 5


class Alone(Dataset[Tensor]):
    def __len__(self) -> int:
        return len(PIXELS)

    def __getitem__(self, row: int) -> Tensor:
        return PIXELS[row]


class InTurn(IterableDataset[tuple[Tensor, int]]):
    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        yield from zip(PIXELS, CLASSES.tolist(), strict=True)


FORMS = {
    "tensor": PIXELS,
    "pair": (PIXELS, CLASSES),
    "data set": TensorDataset(PIXELS, CLASSES),
    "data set of images": Alone(),
    "iterable data set": InTurn(),
    "loader": DataLoader(TensorDataset(PIXELS, CLASSES), 16),
    "list of batches": [PIXELS[:30], PIXELS[30:]],
    "list of pairs": [(PIXELS[:30], CLASSES[:30]), (PIXELS[30:], CLASSES[30:])],
    "two batches of one size": [PIXELS[:20], PIXELS[20:]],
}
WITHOUT_CLASSES = ("tensor", "data set of images", "list of batches", "two batches of one size")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_all_images_with_their_classes(form: str) -> None:
    found = list(batches_in(FORMS[form]))
    images = torch.cat([images_of(batch) for batch in found])
    by_index = form in ("tensor", "pair", "data set", "data set of images")
    rows = permutation(40, "compress", 0) if by_index else list(range(40))
    assert torch.equal(images, PIXELS[rows])
    assert max(len(images_of(batch)) for batch in found) <= SIZE
    if form in WITHOUT_CLASSES:
        assert all(isinstance(batch, Tensor) for batch in found)
    else:
        assert torch.equal(torch.cat([batch[1] for batch in found]), CLASSES[rows])


@pytest.mark.parametrize("form", FORMS)
def test_public_functions_take_every_form(form: str) -> None:
    model, data = build("timm-vit", "vit"), FORMS[form]
    family = vitrim.stratify(model, data, num_images=40, rounds=1, say=lambda line: None)
    assert vitrim.cost(family.extract(params=0.8, data=data)).params <= 0.8 * vitrim.cost(model).params
    refit(family.cut(-1), family.model, data)
    assert len(gather(data, SHAPE, 24)) == 24
    if form not in WITHOUT_CLASSES:
        assert gather(data, SHAPE, 24, "val", 5).classes is not None
        labelled = vitrim.stratify(model, data, labels=True, num_images=40, rounds=1, say=lambda line: None)
        assert set(labelled.chain.units) == set(family.chain.units)


@pytest.mark.parametrize("kind", [torch.uint8, torch.uint16, torch.int32, torch.int64])
def test_pixels_that_are_whole_numbers_are_refused(kind: torch.dtype) -> None:
    model, whole = build("timm-vit", "vit"), (PIXELS.abs() * 100).to(kind)
    for data in (whole, [whole], TensorDataset(whole)):
        with pytest.raises(DataError, match=r"the images are u?int\d+; give them as the model takes them"):
            vitrim.stratify(model, data, say=lambda line: None)
        with pytest.raises(DataError, match=r"the images are u?int\d+; give them as the model takes them"):
            vitrim.compress(model, data, macs=0.5)


@pytest.mark.parametrize("scale", [255, 65535])
def test_pixels_that_were_never_scaled_are_refused(scale: int) -> None:
    model, raw = build("timm-vit", "vit"), torch.rand(64, *SHAPE) * scale
    for run in (vitrim.stratify, lambda model, data: vitrim.compress(model, data, macs=0.5)):
        with pytest.raises(DataError, match=r"scale them to \[0, 1\], then subtract mean="):
            run(model, raw)
    check_pixels(model, torch.rand(2, *SHAPE) * 10 - 5)


def test_what_holds_no_images_is_refused_in_one_line() -> None:
    for data in (3, None, "a", {"a": PIXELS}):
        with pytest.raises(DataError, match="val: give a tensor, a data set, a DataLoader or batches, not a"):
            batches_in(data, "val")
    with pytest.raises(DataError, match=r"a tensor of images is \(N, channels, height, width\), not \(3, 40, 40\)"):
        batches_in(PIXELS[0])
    with pytest.raises(DataError, match="9 labels for 40 images"):
        batches_in((PIXELS, CLASSES[:9]))
    with pytest.raises(DataError, match="give it a transform that makes tensors"):
        list(batches_in(TensorDataset(CLASSES)))


class Labelled(Dataset[tuple[Tensor, object]]):
    """Images with labels of any kind."""

    def __init__(self, label: object) -> None:
        self.label = label

    def __len__(self) -> int:
        return len(PIXELS)

    def __getitem__(self, row: int) -> tuple[Tensor, object]:
        return PIXELS[row], self.label


@pytest.mark.parametrize("label", ["a/b.png", 0.7, torch.eye(5)[0], torch.tensor(0.7), {"class": 1}, [0, 1]])
def test_labels_that_are_no_whole_numbers_are_no_classes(label: object) -> None:
    assert all(isinstance(batch, Tensor) for batch in batches_in(Labelled(label)))
    with pytest.raises(DataError, match="val has no whole numbers as classes"):
        gather(Labelled(label), SHAPE, 8, "val", 5)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([{"pixel_values": PIXELS, "labels": CLASSES}], r"a dict with pixel_values, labels; give \(batch\['pixel_val"),
        (list(PIXELS), r"a tensor \(3, 40, 40\); stack images: torch.stack"),
        (PIXELS.numpy(), r"a NumPy array \(3, 40, 40\); give torch.from_numpy"),
        ([("a.png", PIXELS)], "a tuple that begins with a str"),
    ],
)
def test_what_is_no_batch_is_named_with_the_way_out(data: object, words: str) -> None:
    with pytest.raises(DataError, match=words):
        gather(data, SHAPE, 8)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.eye(5)[CLASSES], r"not a tensor \(40, 5\)"),
        (CLASSES.tolist(), "not a list"),
        (CLASSES.numpy(), "not a NumPy array"),
    ],
)
def test_labels_of_another_form_are_not_taken_for_a_second_batch(labels: object, words: str) -> None:
    with pytest.raises(DataError, match=f"val: labels are a tensor .N,. of classes, {words}"):
        gather((PIXELS, labels), SHAPE, 8, "val", 5)
