"""Pictures, plots and reports: what they show is what happened, and they hold up to untidy folders."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from matplotlib.axes import Axes
from PIL import Image, ImageChops
from sklearn.datasets import load_digits, load_sample_image
from timm.models.vision_transformer import VisionTransformer

import vitrim
from vitrim import cli
from vitrim.errors import DataError, ScheduleError, ScoreError, VitrimError
from vitrim.models.input_format import InputFormat
from vitrim.showing.draw import draw_scores, draw_tokens, make_canvas
from vitrim.showing.figures import format_figure
from vitrim.showing.files import picture_paths, spread_evenly
from vitrim.showing.plots import cost_accuracy_plot, curves_plot, frontier
from vitrim.showing.report import write_report
from vitrim.showing.runs import average_seeds
from vitrim.showing.view import View

pytestmark = pytest.mark.usefixtures("few_test_digits")

TINY = {"img_size": 64, "patch_size": 16, "depth": 3, "embed_dim": 24, "num_heads": 3, "num_classes": 5}


@pytest.fixture
def model():
    return timm.create_model("vit_tiny_patch16_224", **TINY).eval()


@pytest.fixture
def folder(tmp_path):
    """Photographs in nested folders, one of them cut off in the middle, and a file that is not an image."""
    root = tmp_path / "images"
    for name in ("china", "flower"):
        (root / "deep" / name).mkdir(parents=True)
        photo = Image.fromarray(load_sample_image(f"{name}.jpg"))
        photo.resize((160, 107)).save(root / "deep" / name / "photo.JPEG", "JPEG")
    photo.convert("L").resize((70, 90)).save(root / "grey.png")
    whole = (root / "deep" / "china" / "photo.JPEG").read_bytes()
    (root / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "notes.txt").write_text("no image")
    return root


def patches_of(picture, rows, columns):
    pixels = np.asarray(picture).astype(float)
    height, width = pixels.shape[0] // rows, pixels.shape[1] // columns
    return [
        pixels[r * height : (r + 1) * height, c * width : (c + 1) * width] for r in range(rows) for c in range(columns)
    ]


def canvas_of(rng, rows=4, columns=6, patch=24):
    pixels = rng.integers(0, 256, (rows * patch, columns * patch, 3), dtype=np.uint8)
    return make_canvas(pixels, (rows, columns), columns * patch)


# Drawing


def test_kept_patches_keep_their_pixels_and_dropped_ones_fade():
    rng = np.random.default_rng(0)
    canvas = canvas_of(rng)
    kept = np.sort(rng.permutation(24)[:9])
    origin = np.full(24, -1)
    origin[kept] = np.arange(9)
    before = patches_of(canvas.reshape(96, 144, 3), 4, 6)
    after = patches_of(draw_tokens(canvas, origin, np.zeros(9, bool)), 4, 6)
    for patch in range(24):
        if patch in kept:
            assert np.array_equal(before[patch], after[patch])
        else:
            assert after[patch].min() > 180
            assert np.ptp(after[patch]) < 60 < np.ptp(before[patch])


def test_dropped_patches_of_a_grey_image_are_not_grey():
    grey = np.random.default_rng(5).integers(0, 256, (64, 64, 1), dtype=np.uint8).repeat(3, axis=2)
    after = patches_of(draw_tokens(make_canvas(grey, (2, 2), 64), np.array([0, -1, -1, 1]), np.zeros(2, bool)), 2, 2)
    blue = [(patch[..., 2] - patch[..., 0]).min() for patch in after]
    assert [excess > 40 for excess in blue] == [False, True, True, False]


def test_merged_patches_take_their_mean_colour_inside_a_border():
    rng = np.random.default_rng(1)
    canvas = canvas_of(rng)
    origin = rng.integers(0, 7, 24)
    origin[:7] = np.arange(7)  # every token has a patch
    origin[23] = 0  # and token 0 two that do not touch
    before = patches_of(canvas.reshape(96, 144, 3), 4, 6)
    after = patches_of(draw_tokens(canvas, origin, np.zeros(7, bool)), 4, 6)
    for patch in range(24):
        group = [other for other in range(24) if origin[other] == origin[patch]]
        if len(group) == 1:
            assert np.array_equal(after[patch], before[patch])
            continue
        mean = np.mean([before[other].mean((0, 1)) for other in group], axis=0)
        assert np.abs(after[patch][12, 12] - mean).max() <= 1
        row, column = divmod(patch, 6)
        sides = {(-1, 0): after[patch][0, 12], (1, 0): after[patch][-1, 12],
                 (0, -1): after[patch][12, 0], (0, 1): after[patch][12, -1]}  # fmt: skip
        for (down, right), pixel in sides.items():
            r, c = row + down, column + right
            inside = 0 <= r < 4 and 0 <= c < 6 and origin[r * 6 + c] == origin[patch]
            assert (np.abs(pixel - mean).max() <= 1) == inside


def test_fused_patches_carry_a_dot_and_dropped_ones_none():
    canvas = make_canvas(np.full((64, 64, 3), (200, 30, 30), np.uint8), (2, 2), 64)
    origin = np.array([0, 1, 1, -1])
    after = patches_of(draw_tokens(canvas, origin, np.array([False, True])), 2, 2)
    assert np.array_equal(after[0], np.full_like(after[0], 1) * (200, 30, 30))
    middle, corner = after[1][16, 16], after[1][0, 0]
    assert middle[0] - middle[1] > 80  # red
    assert corner.min() > 150
    assert np.array_equal(after[1], after[2])
    assert np.ptp(after[3][..., 0]) == 0


def test_brightest_patch_of_a_heat_map_has_the_highest_score():
    rng = np.random.default_rng(2)
    canvas = make_canvas(np.full((64, 96, 3), 128, np.uint8), (4, 6), 144)
    score = rng.random(24)
    score[[3, 20]] = np.nan
    light = [patch.sum(axis=2).mean() for patch in patches_of(draw_scores(canvas, score), 4, 6)]
    known = [at for at in range(24) if at not in (3, 20)]
    assert max(known, key=lambda at: light[at]) == np.nanargmax(score)
    assert min(known, key=lambda at: light[at]) == np.nanargmin(score)


def test_small_images_are_enlarged_with_hard_pixels():
    pixels = np.random.default_rng(3).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    canvas = make_canvas(pixels, (4, 4), 288)
    assert canvas.shape == (4, 72, 4, 72, 3)
    assert np.array_equal(canvas.reshape(8, 36, 8, 36, 3)[:, 0, :, 0], pixels)
    assert np.ptp(canvas.reshape(8, 36, 8, 36, 3), axis=(1, 3)).max() == 0


# From model and images to files


def test_folder_gives_one_picture_per_readable_image(model, folder, tmp_path):
    vitrim.attach(model, "TopK() @ KeepRate(0.5, at=(1, 2))")
    model.train()
    before = model.eval()(torch.ones(1, 3, 64, 64))
    model.train()
    done = vitrim.show(model, folder, tmp_path / "out")
    names = {path.name for path in done.paths}
    assert names == {"deep-china-photo.png", "deep-flower-photo.png", "grey.png"}
    assert names == {path.name for path in (tmp_path / "out").iterdir()}
    assert list(done) == list(done.paths)
    assert len(done.skipped) == 1
    assert re.match(r"cannot read .*/broken\.jpg: image file is truncated", done.skipped[0])
    assert model.training
    assert torch.equal(model.eval()(torch.ones(1, 3, 64, 64)), before)
    with Image.open(done.paths[0]) as picture:
        assert picture.size[0] > 3 * 288  # the image and two cuts


def test_panels_show_the_patches_that_the_handle_kept(model, folder):
    """Reads the survivors back out of the picture."""
    handle = vitrim.attach(model, "TopK() @ KeepRate(0.5, at=(1, 2))")
    view = View(model, handle)
    (source,) = [s for s in view.sources(folder) if "flower" in s.name]
    batch = source.load()[None]
    ((tiles, _),) = list(view.draw(batch, torch.device("cpu"), None, False, 256))
    assert [tile.title for tile in tiles] == ["image", "inside block 1", "inside block 2"]
    assert [tile.note for tile in tiles] == ["16 patches", "8 of 16 tokens", "4 of 16 tokens"]
    whole = patches_of(tiles[0].picture, 4, 4)
    for tile, block in zip(tiles[1:], (1, 2), strict=True):
        seen = [np.array_equal(a, b) for a, b in zip(patches_of(tile.picture, 4, 4), whole, strict=True)]
        assert seen == (handle.states[block].origin[0] >= 0).tolist()


def test_the_picture_is_what_the_model_sees(model):
    handle = vitrim.attach(model, "TopK() @ KeepRate(0.5)")
    view = View(model, handle)
    photo = Image.fromarray(load_sample_image("china.jpg"))
    seen = photo
    for step in view.transform.transforms[:2]:  # resize and crop, before the tensor is made
        seen = step(seen)
    assert seen.size == (64, 64)
    assert np.abs(view._pixels(view.transform(photo)).astype(int) - np.asarray(seen)).max() <= 1


def test_fused_tokens_are_counted_apart(model):
    handle = vitrim.attach(model, "TopK(fuse=mean) @ KeepRate(0.5, at=(0, 2))")
    view = View(model, handle)
    ((tiles, _),) = list(view.draw(torch.randn(1, 3, 64, 64), torch.device("cpu"), [0, 1, 2], False, 128))
    kept = int((handle.states[2].size[0] == 1).sum())
    assert [tile.title for tile in tiles] == ["image", "inside block 0", "after block 1", "inside block 2"]
    assert tiles[1].note == "8 of 16 tokens + fused"
    assert tiles[3].note == f"{kept} of 16 tokens + fused"
    assert all(tile.swatch is not None for tile in tiles[1:])
    handle.remove()
    vitrim.attach(model, "TopK(fuse=mean) @ KeepRate(0.5, at=0, reinstate=2)")
    ((tiles, _),) = list(
        View(model, vitrim.attached(model)).draw(torch.randn(1, 3, 64, 64), torch.device("cpu"), [1, 2], False, 128)
    )
    assert [tile.note for tile in tiles[1:]] == ["8 of 16 tokens + fused", "16 of 16 tokens"]


@pytest.mark.parametrize("method", ["TopK(norm, fuse=mean) @ PowerLaw()", "ToMe() @ ConstantR(3)",
                                    "TopK(norm) @ Stages({1: 0.6, 2: 0.3})"])  # fmt: skip
@pytest.mark.parametrize("kind", ["digits", "registers", "no_cls", "wide"])
def test_any_model_any_grid(kind, method, tmp_path):
    small = {"embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    options = {
        "digits": {"img_size": 8, "patch_size": 1, "in_chans": 1},
        "registers": {"img_size": 32, "patch_size": 8, "reg_tokens": 4},
        "no_cls": {"img_size": 32, "patch_size": 8, "class_token": False, "global_pool": "avg"},
        "wide": {"img_size": (32, 96), "patch_size": (16, 8)},
    }[kind]
    model = VisionTransformer(**small, **options).eval()
    images = torch.randn(2, 3, *((32, 96) if kind == "wide" else (32, 32)))
    if kind == "digits":
        images = (torch.tensor(load_digits().images[:2]).float() / 16)[:, None]
    handle = vitrim.attach(model, method)
    done = vitrim.show(model, images, tmp_path, blocks=[2])
    assert [path.name for path in done] == ["image-000.png", "image-001.png"]
    rows, columns = {"digits": (8, 8), "wide": (2, 12)}.get(kind, (4, 4))
    assert handle.states[0].origin.shape[1] == rows * columns
    with Image.open(done.paths[0]) as picture:
        assert picture.mode == "RGB"
        tile = (picture.width - 2 * 20 - 12) // 2
    assert 280 <= tile <= 296


def test_montage_is_one_file_with_a_row_per_image(model, folder, tmp_path):
    vitrim.attach(model, "TopK(fuse=sum) @ KeepRate(0.5)")
    (path,) = vitrim.show(model, folder, tmp_path / "all.png", montage=True)
    (heat,) = vitrim.show(model, folder, tmp_path, montage=True, scores=True)
    assert (path.name, heat.name) == ("all.png", "montage.png")
    with Image.open(path) as picture, Image.open(heat) as tall:
        assert 3 * 192 < picture.height < 4 * 192 + 160
        assert tall.height > 6 * 192


def test_nothing_is_overwritten_unasked(model, folder, tmp_path):
    vitrim.attach(model, "TopK() @ KeepRate(0.5)")
    (tmp_path / "grey.png").write_text("mine")
    with pytest.raises(VitrimError, match=r"grey\.png exists.*--overwrite"):
        vitrim.show(model, folder, tmp_path)
    assert (tmp_path / "grey.png").read_text() == "mine"
    assert not (tmp_path / "deep-china-photo.png").exists()
    assert len(vitrim.show(model, folder, tmp_path, overwrite=True).paths) == 3


def test_bad_input_is_one_clear_line(model, folder, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(VitrimError, match="no reduction is attached"):
        vitrim.show(model, folder, out)
    vitrim.attach(model, "ToMe() @ ConstantR(2)")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"not a picture")
    cases = [
        ({"images": tmp_path / "nowhere"}, DataError, "nowhere is not a folder or an image"),
        ({"images": tmp_path / "empty"}, DataError, "empty holds no images"),
        (
            {"images": tmp_path / "bad"},
            DataError,
            r"none of the 1 images can be read; the first: cannot read .*a\.png: it",
        ),
        ({"images": []}, DataError, "empty"),
        ({"images": [tmp_path / "gone.jpg"]}, DataError, r"gone\.jpg is not a file"),
        ({"images": torch.ones(3, 64, 64)}, DataError, r"\(B, C, H, W\)"),
        ({"out": folder / "notes.txt"}, DataError, "is a file; pictures need a folder"),
        ({"blocks": [3]}, ScheduleError, "no block 3; the model has blocks 0 to 2"),
        ({"limit": 0}, DataError, "1 or more"),
        ({"scores": True}, ScoreError, "not decided on scores"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            vitrim.show(model, **{"images": folder, "out": out, **options})
        assert "\n" not in str(caught.value)
    assert not out.exists()


def test_a_reduction_of_training_alone_cuts_nothing_to_show(model, folder, tmp_path):
    vitrim.attach(model, vitrim.TopK(), vitrim.KeepRate(0.5), phase="train")
    with pytest.raises(ScheduleError, match="cuts nothing in evaluation"):
        vitrim.show(model, folder, tmp_path)


def test_limit_spreads_over_the_folder_and_names_never_collide():
    assert spread_evenly(list(range(100)), 4) == [0, 25, 50, 75]
    assert spread_evenly([1, 2], 4) == [1, 2]
    names = ["a.jpg", "a.png", "x/b.jpg", "x-b.jpg", "c.jpg", "c.jpg", "c.jpg-2.png", "d.e.jpg"]
    paths = picture_paths(names, Path("out"), montage=False)
    assert len(set(paths)) == len(names)
    assert all(path.suffix == ".png" and path.parent == Path("out") for path in paths)
    assert paths[-1] == Path("out/d.e.png")


# Plots


@pytest.mark.parametrize("cost", ["macs", "images_per_second"])
def test_frontier_is_what_nothing_beats(cost):
    rng = np.random.default_rng(4)
    rows = [{cost: float(c), "accuracy": float(a)} for c, a in zip(rng.random(40), rng.random(40), strict=True)]
    sign = -1 if cost == "macs" else 1

    def beaten(row):
        return any(
            other["accuracy"] >= row["accuracy"] and sign * other[cost] >= sign * row[cost]
            for other in rows
            if other is not row
        )

    expected = [row for row in rows if not beaten(row)]
    assert sorted(frontier(rows, cost), key=str) == sorted(expected, key=str)


def test_plots_are_drawn_where_there_is_something_to_draw(tmp_path):
    rows = [{"method": "dense", "accuracy": 0.9, "macs": 4.6e9}, {"method": "a$b$", "accuracy": 0.8, "macs": 2e9},
            {"method": "broken", "accuracy": None, "macs": float("nan")}]  # fmt: skip
    assert cost_accuracy_plot(rows, tmp_path / "one.png")
    assert cost_accuracy_plot([{**row, "images_per_second": 10.0} for row in rows], tmp_path / "two.png")
    metrics = [{"epoch": 0, "train_loss": 2.0}, {"epoch": 1, "train_loss": float("nan")},
               {"epoch": 2, "train_loss": 1.0, "tokens": [9, 4]}]  # fmt: skip
    assert curves_plot(metrics, tmp_path / "curves.png")
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert two.width == 2 * one.width
    assert not cost_accuracy_plot([{"method": "x", "accuracy": 0.5}], tmp_path / "no.png")
    assert not curves_plot([{"epoch": 0}], tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()


def test_report_and_plots_load_neither_torch_nor_pyplot():
    code = "import sys; import vitrim.showing.report; print({*sys.modules} & {'torch', 'timm', 'matplotlib.pyplot'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Reports


class Page(HTMLParser):
    """Tags in order with their attributes, text by tag, and a check that every tag is closed."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


def write_run(path, **files):
    path.mkdir(parents=True)
    for name, content in files.items():
        other = {"command": "command.txt", "recipe": "recipe.yaml", "metrics": "metrics.jsonl"}
        (path / other.get(name, f"{name}.json")).write_text(
            content if isinstance(content, str) else json.dumps(content)
        )


def metrics_of(epochs):
    lines = [{"epoch": e, "train_loss": 2 / (e + 1), "val_accuracy": 1 - 1 / (e + 2)} for e in range(epochs)]
    return "".join(json.dumps(line) + "\n" for line in lines)


def test_report_of_a_run_is_one_page_that_needs_nothing_else(tmp_path):
    run = tmp_path / "my run"
    table = {
        "title": "methods",
        "columns": ["method", "accuracy", "macs"],
        "rows": [["dense", 0.9, 4.6e9], ["<script>alert(1)</script>", 0.875, 2.9e9]],
    }
    write_run(
        run, recipe="model: <b>x</b>\n", command='vitrim train --out "a & b"', metrics=metrics_of(3),
        environment={"torch": "2.15", "cpu": "x & y"},
        result={"test_accuracy": 0.9012, "macs": 4608338304, "table": table},
    )  # fmt: skip
    Image.new("RGB", (9, 9), "red").save(run / "tokens.png")
    assert write_report(run) == run / "report.html"
    page = Page(run / "report.html")
    assert {name for name, _ in page.tags} & {"script", "link", "iframe", "b"} == set()
    assert all(attrs["src"].startswith("data:image/png;base64,") for name, attrs in page.tags if name == "img")
    assert "http" not in page.source
    assert "@import" not in page.source
    assert "url(" not in page.source
    assert page.count("img") == 3  # accuracy against cost, curves, picture
    for text in ("my run", 'vitrim train --out "a & b"', "90.12 %", "4.608 G", "87.50 %", "<script>alert(1)</script>",
                 "model: <b>x</b>", "x & y", "2.15"):  # fmt: skip
        assert text in page.text
    assert any(name == "td" and attrs.get("class") == "n" for name, attrs in page.tags)
    assert "prefers-color-scheme: dark" in page.source


def test_report_of_a_study_holds_every_run(tmp_path):
    study = tmp_path / "study"
    given = {
        "title": "Four ways",
        "columns": [{"key": "row", "heading": "weights"}, {"key": "accuracy", "heading": "top-1", "form": ".1%"}],
        "rows": [{"row": "base", "accuracy": 0.717, "gmacs": 0.5}, {"row": "pruned", "accuracy": 0.708, "gmacs": 0.2}],
        "notes": ["Three seeds."],
        "environment": {"gpu": "none at all"},
    }  # fmt: skip
    write_run(study, command="vitrim study system1", table=given)
    for name in ("base-s0", "pruned-s0"):
        write_run(study / name, recipe=f"name: {name}\n", metrics=metrics_of(4), result={"test_accuracy": 0.7})
        (study / name / "model").mkdir()
        (study / name / "model" / "result.json").write_text("{}")
    page = Page(write_report(study, tmp_path / "out" / "page.html"))
    for text in ("Four ways", "71.7%", "top-1", "Three seeds.", "none at all", "base-s0", "pruned-s0", "name: base-s0"):
        assert text in page.text
    assert "base-s0/model" not in page.text
    assert page.count("img") == 4  # cost plot, compared curves, the curves of both runs


def test_curves_of_many_runs_are_compared_by_row(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("vitrim.showing.report.curves_plot", lambda metrics, file: seen.append(metrics) or False)
    for row in range(7):
        for seed in range(3):
            write_run(tmp_path / f"row{row}-s{seed}", metrics=metrics_of(4 + seed))
    write_run(tmp_path / "alone-s0", metrics=metrics_of(2))
    write_report(tmp_path)
    compared = next(metrics for metrics in seen if isinstance(metrics, dict))
    assert list(compared) == ["alone-s0", *(f"row{row}, mean of 3 seeds" for row in range(7))]
    mean = average_seeds({"a-s0": [{"loss": 1.0, "tokens": [3]}, {"loss": 3}], "a-s1": [{"loss": 2.0, "tokens": [3]}]})
    assert mean == {"a, mean of 2 seeds": [{"loss": 1.5, "tokens": [3]}]}  # Over the epochs that both have.


def test_curves_that_cannot_be_told_apart_are_left_out_with_a_word(tmp_path, monkeypatch):
    monkeypatch.setattr("vitrim.showing.report.curves_plot", lambda metrics, file: False)
    for row in range(33):
        write_run(tmp_path / f"row{row}-s0", metrics=metrics_of(2))
    assert "The curves of 33 runs are too many for one plot" in Page(write_report(tmp_path)).text
    runs = {f"row{row}": [{"epoch": 0, "val_loss": row}, {"epoch": 1, "val_loss": 0}] for row in range(32)}
    drawn = []
    plot = Axes.plot
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Axes, "plot", lambda self, *args, **options: drawn.append(options) or plot(self, *args, **options)
        )
        assert curves_plot(runs, tmp_path / "curves.png")
    assert len({(options["color"], options["linestyle"]) for options in drawn}) == 32


def test_a_study_without_a_table_gets_an_overview(tmp_path):
    for name, accuracy in (("one", 0.5), ("two", 0.75)):
        write_run(tmp_path / name, result={"test_accuracy": accuracy, "macs": 1e9, "unreadable": []})
    page = Page(write_report(tmp_path))
    assert page.text.count("50.00 %") >= 2
    assert page.text.count("75.00 %") >= 2
    both = Page(write_report([tmp_path / "one", tmp_path / "two"], tmp_path / "both.html"))
    assert both.count("h1") == 2


@pytest.mark.parametrize("kept", ["command", "recipe", "metrics", "environment", "result"])
def test_every_file_of_a_run_may_be_missing_or_spoilt(kept, tmp_path):
    whole = {"command": "vitrim x", "recipe": "a: 1", "metrics": metrics_of(2), "environment": {"cpu": "c"},
             "result": {"accuracy": 0.5}}  # fmt: skip
    alone, spoilt = tmp_path / "alone", tmp_path / "spoilt"
    write_run(alone, **{kept: whole[kept]})
    write_run(spoilt, **{**whole, kept: '{"epoch": 0, "train_lo'})
    if kept == "command":
        with pytest.raises(DataError, match="nothing of a run"):
            write_report(alone)
    else:
        assert "alone" in Page(write_report(alone)).text
    text = Page(write_report(spoilt)).text
    assert ("cannot be read" in text) == (kept in ("metrics", "environment", "result"))


def test_report_replaces_reports_only(tmp_path):
    write_run(tmp_path / "run", result={"accuracy": 0.5})
    path = write_report(tmp_path / "run")
    (tmp_path / "run" / "result.json").write_text('{"accuracy": 0.25}')
    assert "25.00 %" in Page(write_report(tmp_path / "run")).text
    path.write_text("<html>mine</html>")
    with pytest.raises(VitrimError, match="is not a report of vitrim"):
        write_report(tmp_path / "run")
    assert path.read_text() == "<html>mine</html>"
    with pytest.raises(DataError, match="nowhere is not a folder"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds nothing of a run"):
        write_report(tmp_path / "empty")
    Image.new("RGB", (4, 4)).save(tmp_path / "empty" / "photo.png")
    with pytest.raises(DataError, match="holds nothing of a run"):  # A page would be written among somebody's photos.
        write_report(tmp_path / "empty")
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["photo.png"]
    with pytest.raises(VitrimError, match="--out"):
        write_report([tmp_path / "run", tmp_path / "run"])


def test_figures_are_said_as_people_read_them():
    said = {
        ("test_accuracy", 0.7168): "71.68 %", ("macs", 4608338304): "4.608 G", ("params", 912345): "912.3 k",
        ("train_seconds", 5025.0): "1 h 24 min", ("seconds", 83): "1 min 23 s", ("seconds", 0.1234): "0.123 s",
        ("loss", 0.123456): "0.1235", ("tokens", (65, 20)): "65 20", ("val_accuracy", None): "-",
        ("macs_ratio", 0.5): "0.5", ("resumed", True): "yes", ("loss", float("nan")): "nan",
    }  # fmt: skip
    assert {key: format_figure(*key) for key in said} == said


def test_a_study_draws_its_rows_on_the_same_images(tmp_path: Path):
    options = {"args": {"depth": 2, "embed_dim": 24, "num_heads": 2}}
    half = {"reduction": "TopK() @ KeepRate(0.5, at=[0])"}
    content = {
        "base": {"model": options, "data": {"workers": 0, "limit": 60}, "epochs": 1, "batch_size": 16},
        "rows": {"dense": {}, "half": half, "half again": {**half, "data": {"limit": 30}}},
        "pictures": {"rows": ["half", "half again"], "images": 3},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    cli.main(["study", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out")])
    names = ["tokens-half-again-s0.png", "tokens-half-s0.png"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == names
    one, other = (Image.open(tmp_path / "out" / name) for name in names)
    assert one.size == other.size
    assert ImageChops.difference(one, other).crop((0, 0, 190, one.size[1])).getbbox() is None  # The images themselves.
    assert ImageChops.difference(one, other).getbbox() is not None
    assert "tokens half s0" in (tmp_path / "out" / "report.html").read_text()


def test_a_name_of_a_picture_is_no_folder(tmp_path):
    for out, montage, message in (("a.png", False, "need a folder, unless"), ("a.jpg", True, "montage is a PNG")):
        with pytest.raises(DataError, match=message):
            picture_paths(["one.jpg"], tmp_path / out, montage)
    assert picture_paths(["one.jpg"], tmp_path / "v1.2", montage=False) == [tmp_path / "v1.2" / "one.png"]


def test_images_that_are_left_out_are_counted(model, tmp_path):
    vitrim.attach(model, "TopK() @ KeepRate(0.5)")
    drawn = vitrim.show(model, torch.rand(3, *InputFormat.of(model).size), tmp_path / "pictures", limit=2)
    assert (len(drawn.paths), drawn.left_out) == (2, 1)
