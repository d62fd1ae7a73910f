"""The digits that are built in: as they are, and turned, shifted and scaled, always in the same way."""

import random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitrim.data import digits
from vitrim.data.data_sets import look_for, open_both, open_images
from vitrim.data.digits import COPIES, FINE, SCALE, SHIFT, SIDE, TURN, Digits, MovedDigits
from vitrim.data.specs import DataSpec
from vitrim.data.splits import plain_stream
from vitrim.errors import DataError, UnknownNameError
from vitrim.models import build_model


class Fixed(random.Random):
    """Draws that are given: angle, exponent of the scale, shift to the right, shift down."""

    def __init__(self, *draws: float) -> None:
        super().__init__()
        self.draws, self.ranges = list(draws), list[tuple[float, float]]()

    def uniform(self, a: float, b: float) -> float:
        self.ranges.append((a, b))
        return self.draws.pop(0)


def pattern() -> Image.Image:
    """A bar to the right of the middle."""
    pixels = np.zeros((SIDE, SIDE), dtype=np.uint8)
    pixels[3:5, 4:6] = 200
    return Image.fromarray(pixels)


def about(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Centre of the light, from that of the image, in pixels of a digit (x, y); and its spread."""
    light = np.asarray(image, dtype=float)
    places = (np.arange(len(light)) + 0.5 - len(light) / 2) * SIDE / len(light)
    weights = [light.sum(axis) / light.sum() for axis in (0, 1)]
    centre = np.array([weight @ places for weight in weights])
    spread = np.array([(weight @ (places - at) ** 2) ** 0.5 for weight, at in zip(weights, centre, strict=True)])
    return centre, spread


def test_a_digit_that_is_not_moved_is_only_enlarged():
    found = digits._moved(pattern(), Fixed(0, 0, 0, 0))
    assert found.size == (FINE * SIDE, FINE * SIDE)
    assert np.abs(np.asarray(found, int) - np.asarray(pattern().resize(found.size, Image.Resampling.BICUBIC))).max() < 2


@pytest.mark.parametrize(
    ("draws", "expected"),
    [((0, 0, 1, 0), (1, 0)), ((0, 0, 0, -0.5), (0, -0.5)), ((20, 0, 0, 0), None), ((-20, 0, 0.5, 0.5), None)],
)
def test_digits_are_turned_about_the_middle_and_then_shifted(draws: tuple[float, ...], expected: Any):
    start, _ = about(digits._moved(pattern(), Fixed(0, 0, 0, 0)))
    found, _ = about(digits._moved(pattern(), Fixed(*draws)))
    angle = np.deg2rad(draws[0])
    turned = np.array([np.cos(angle) * start[0] - np.sin(angle) * start[1],
                       np.sin(angle) * start[0] + np.cos(angle) * start[1]])  # fmt: skip
    assert found == pytest.approx(turned + draws[2:], abs=0.05)
    assert expected is None or found - start == pytest.approx(np.array(expected), abs=0.05)


@pytest.mark.parametrize("exponent", [-1, 1])
def test_digits_are_scaled_about_the_middle(exponent: int):
    centre, spread = about(digits._moved(pattern(), Fixed(0, 0, 0, 0)))
    moved, wider = about(digits._moved(pattern(), Fixed(0, exponent, 0, 0)))
    assert moved == pytest.approx(centre * SCALE**exponent, abs=0.05)
    assert wider == pytest.approx(spread * SCALE**exponent, rel=0.06)


def test_moves_are_drawn_from_their_whole_range():
    digits._moved(pattern(), draw := Fixed(0, 0, 0, 0))
    assert draw.ranges == [(-TURN, TURN), (-1, 1), (-SHIFT, SHIFT), (-SHIFT, SHIFT)]


def test_moved_digits_are_the_same_at_every_reading_and_copies_differ():
    one, other, plain = MovedDigits(train=True), MovedDigits(train=True), Digits(train=True)
    assert len(one) == COPIES * len(plain)
    copies = [one[7 + copy * len(plain)] for copy in range(COPIES)]
    assert {target for _, target in copies} == {plain[7][1]}
    assert len({image.tobytes() for image, _ in copies}) == COPIES
    assert [other[7 + copy * len(plain)][0].tobytes() for copy in range(COPIES)] == [
        image.tobytes() for image, _ in copies
    ]


def test_the_same_digits_are_for_testing_whether_they_are_moved_or_not():
    plain, moved = (open_both(DataSpec(name=name)) for name in ("digits", "digits-moved"))
    assert plain[0].classes == moved[0].classes == [str(digit) for digit in range(10)]
    test = moved[1].source
    assert [test[index][1] for index in range(len(test))] == plain[1].source.targets.tolist()
    assert not {*plain[0].source.numbers} & {*test.digits.numbers}


def test_test_digits_are_moved_and_come_in_the_size_of_the_model():
    model = build_model("vitrim_digits_vit", depth=1, embed_dim=24, num_heads=2)
    streams = [plain_stream(model, DataSpec(name=name, workers=0)) for name in ("digits", "digits-moved")]
    assert len(streams[0]) == len(streams[1])
    (plain, label, *_), (moved, same, *_) = (stream[3] for stream in streams)
    assert (plain.shape, label) == (moved.shape, same) == ((1, 8, 8), label)
    assert (plain - moved).abs().mean() > 0.05


def test_options_that_moved_digits_cannot_take_are_refused_by_their_name():
    for check in (look_for, lambda spec: open_images(spec, True)):
        with pytest.raises(DataError, match=r"data\.name is digits-moved, which come with scikit-learn"):
            check(DataSpec(name="digits-moved", root="images"))
        with pytest.raises(DataError, match="digits-moved come with splits of their own"):
            check(DataSpec(name="digits-moved", test_split="val"))
    with pytest.raises(UnknownNameError, match="did you mean digits-moved"):
        open_images(DataSpec(name="digits-move"), True)


def test_masks_are_moved_with_their_images_and_name_the_digit():
    data, overlaps = MovedDigits(train=True), list[float]()
    for index in range(0, len(data), 97):
        image, mask = data.with_mask(index)
        plain, target = data[index]
        assert image.tobytes() == plain.tobytes()
        assert mask.shape == (FINE * SIDE, FINE * SIDE)
        assert mask.dtype == np.uint8
        assert {*np.unique(mask)} == {0, 1 + target}
        assert np.array_equal(mask, data.with_mask(index)[1])
        bright, ink = np.asarray(image) >= digits.INK, mask > 0
        overlaps.append((bright & ink).sum() / (bright | ink).sum())
    assert min(overlaps) > 0.8  # Edges of brightness and of ink lie apart by less than a pixel.


def test_the_mask_of_a_digit_that_is_not_moved_is_its_ink(monkeypatch: pytest.MonkeyPatch):
    data = MovedDigits(train=False)
    monkeypatch.setattr(data, "_drawn", lambda index: (pattern(), 7, Fixed(0, 0, 0, 0)))
    _, mask = data.with_mask(0)
    assert np.array_equal(mask > 0, np.asarray(digits._enlarged(pattern())) >= digits.INK)
    assert 3 * FINE**2 < (mask == 8).sum() < 5 * FINE**2
    assert (mask[3 * FINE + 1 : 5 * FINE - 1, 4 * FINE + 1 : 6 * FINE - 1] == 8).all()
    assert not mask[: 2 * FINE].any()
