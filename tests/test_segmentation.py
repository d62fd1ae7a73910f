"""The benchmark of dense prediction: what its figures are made of."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import vitrim
from vitrim.data.digits import MovedDigits
from vitrim.errors import DataError
from vitrim.measure.table import Table
from vitrim.tokens import TokenState
from zoo import build, images

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from linear_head import CLASSES, Scores, patches_of, scored, trained
from segmentation import at_own_places, line, pictures


def test_pixels_of_a_patch_are_read_row_by_row() -> None:
    mask = np.arange(48).reshape(1, 6, 8)
    found = patches_of(mask, 2)
    assert found.shape == (1, 12, 4)
    assert found[0, 0].tolist() == [0, 1, 8, 9]
    assert found[0, 5].tolist() == [18, 19, 26, 27]


def test_scores_are_those_of_counting_by_hand() -> None:
    head = torch.nn.Linear(1, 2 * CLASSES)
    with torch.no_grad():  # Says class 0 for the first pixel of a patch and class 3 for the second.
        head.weight.zero_()
        head.bias.zero_()
        head.bias[0] = head.bias[CLASSES + 3] = 1
    pixels = torch.tensor([[[0, 3], [3, 3]], [[0, 0], [0, 1]]])
    found = scored(head, torch.zeros(2, 2, 1), pixels)
    assert found.right.tolist() == [0.75, 0.5]
    assert found.intersection[:, [0, 1, 3]].tolist() == [[1, 0, 2], [2, 0, 0]]
    assert found.union[:, [0, 1, 3]].tolist() == [[2, 0, 3], [3, 1, 2]]


def test_intervals_of_what_is_lost_are_paired_by_image() -> None:
    rng = np.random.default_rng(0)
    union = rng.integers(50, 90, (200, CLASSES))
    one = Scores((union * 0.8).astype(int), union, rng.random(200))
    other = replace(one, intersection=(union * 0.7).astype(int), right=one.right - 0.05)
    lost = one.iou_lost(other)
    assert lost.value == pytest.approx(one.mean_iou - other.mean_iou)
    assert lost.low < lost.value < lost.high
    assert lost.high - lost.low < 0.002  # Far less than between images.
    assert one.accuracy_lost(other).value == pytest.approx(0.05)
    row = line(other, one)
    assert row["iou_lost_low"] == lost.low
    assert row["iou"] == other.mean_iou
    assert [one.iou_lost(one).low, one.iou_lost(one).high] == [0, 0]


def test_a_head_learns_what_is_linear_in_the_features() -> None:
    pixels = torch.randint(CLASSES, (2560, 4, 1), generator=torch.Generator().manual_seed(0))
    features = torch.nn.functional.one_hot(pixels.squeeze(2), CLASSES).float()
    head = trained(features, pixels)
    assert scored(head, features, pixels).accuracy == 1
    assert torch.equal(trained(features, pixels).weight, head.weight)


@torch.no_grad()
@pytest.mark.parametrize("reducer", [vitrim.TopK("norm"), vitrim.TopK("norm", fuse="mean"), vitrim.ToMe()], ids=str)
def test_tokens_are_put_at_one_place_of_their_own(reducer: vitrim.TopK | vitrim.ToMe) -> None:
    model, x = build("timm-vit", "vit"), images(2)
    with vitrim.attach(model, reducer, vitrim.KeepRate(0.6, at=(0, 1))) as handle:
        tokens = model.forward_features(x)
        state: TokenState = handle.state_of(tokens)
    fused = reducer.extra_tokens > 0
    spread = at_own_places(tokens[:, 1:], state, fused)
    for image in range(2):
        full = [patch for patch in range(25) if spread[image, patch].any()]
        slots = [int(state.origin[image, patch]) for patch in full]
        assert sorted(slots) == list(range(state.size.shape[1] - fused))
        for patch, slot in zip(full, slots, strict=True):
            assert torch.equal(spread[image, patch], tokens[image, 1 + slot])
            members = (state.origin[image] == slot).nonzero().flatten()
            places = torch.stack([members // 5, members % 5], 1).float()
            away = (places - places.mean(0)).norm(dim=1)
            assert away[members == patch] == pytest.approx(away.min().item(), abs=1e-3)


def test_images_and_masks_come_in_the_format_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segmentation.MovedDigits", Few)
    model = vitrim.build_model("vitrim_digits_vit", img_size=32, patch_size=4, depth=1, embed_dim=24, num_heads=2)
    found, pixels = pictures(model, 4, is_training=False)
    assert found.shape == (3, 1, 32, 32)
    assert pixels.shape == (3, 64, 16)
    data = Few(train=False)
    for at in range(3):
        assert torch.equal(pixels[at, 9].view(4, 4), torch.from_numpy(data.with_mask(at)[1]).long()[4:8, 4:8])
    small = vitrim.build_model("vitrim_digits_vit", depth=1, embed_dim=24, num_heads=2)
    with pytest.raises(DataError, match="masks are of 32 x 32 px, but the model takes images of 8 x 8"):
        pictures(small, 1, is_training=False)


class Few(MovedDigits):
    """The first three."""

    def __len__(self) -> int:
        return 3


def test_the_page_shows_the_figures_of_the_committed_table() -> None:
    root = Path(__file__).parents[1]
    table, page = (
        Table.read(root / "results" / "segmentation-digits-cpu.json"),
        (root / "docs" / "dense.md").read_text(),
    )
    column = next(column for column in table.columns if column.key == "iou_lost")
    dense, *rows = table.rows
    assert f"mean IoU of {dense['iou']:.1%}".replace("%", " %") in page
    assert f"{dense['accuracy']:.1%} of the pixels".replace("%", " %") in page
    for start in range(0, len(rows), 3):
        first, *_ = three = rows[start : start + 3]
        assert [(row["places"], row["head"]) for row in three] == [
            ("zeros", "the same"), ("restored", "the same"), ("restored", "dense"),
        ]  # fmt: skip
        name = first["reducer"].replace("'", "")
        assert " | ".join([f"| `{name}`", str(first["keep"]), *map(column.show, three)]) + " |" in page
    assert len(rows) == 27
