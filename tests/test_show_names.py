"""Names from outside: bytes that are no UTF-8, control characters, markup and great length, wherever they are shown."""

import os
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from rich.console import Console

import vitrim
from vitrim import cli
from vitrim.errors import DataError, RecipeError, VitrimError
from vitrim.measure.table import Column, Table
from vitrim.showing import progress
from vitrim.showing.files import picture_paths
from vitrim.showing.report import write_report
from vitrim.study.study import Study
from vitrim.study.study_check import check_study
from vitrim.text import message, printable

ODD = {
    "bytes": b"caf\xe9-\xff.png", "escape": b"red\x1b[31m.png", "line": b"two\nlines.png",
    "long": b"x" * 240 + b".png", "wide": "\u00e9".encode() * 120 + b".png", "turned": "a\u202egnp.png".encode(),
}  # fmt: skip


@pytest.fixture
def model() -> torch.nn.Module:
    return timm.create_model("vitrim_digits_vit", depth=2, embed_dim=24, num_heads=2).eval()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images with odd names, and one odd name that is not an image."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ODD.values():
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            Image.new("L", (8, 8), 200).save(file, "PNG")
    with open(os.path.join(os.fsencode(folder), b"bad\x1b[2J\xfe.png"), "wb") as file:
        file.write(b"no picture")
    return folder


@pytest.mark.parametrize("montage", [False, True])
def test_images_with_odd_names_are_all_drawn(montage: bool, model: Any, photos: Path, tmp_path: Path):
    with vitrim.attach(model, "TopK() @ KeepRate(0.5)"):
        done = vitrim.show(model, photos, tmp_path / "out", montage=montage)
    assert len(done.paths) == (1 if montage else len(ODD))
    assert len({*done.paths}) == len(done.paths)
    assert all(path.is_file() and path.name.isprintable() and len(os.fsencode(path.name)) < 143 for path in done.paths)
    assert len(done.skipped) == 1
    assert done.skipped[0].isprintable()


def test_the_command_prints_no_control_characters(model: Any, photos: Path, tmp_path: Path, capfd: Any):
    vitrim.save(model, tmp_path / "model")
    words = ["show", str(tmp_path / "model"), "--images", str(photos), "--method", "TopK() @ KeepRate(0.5)"]
    cli.main([*words, "--out", str(tmp_path / "pictures"), "--device", "cpu"])
    out, err = capfd.readouterr()
    lines = out.strip("\n").split("\n")
    assert len(lines) == len(ODD) + 1
    assert all(line.isprintable() for line in [*lines, *err.splitlines()])


def test_pictures_of_names_that_become_equal_are_kept_apart():
    names = ["a\x01.png", "a\x02.png", "y" * 300 + "1.png", "y" * 300 + "2.png", "caf\udce9.png"]
    paths = picture_paths(names, Path("out"), montage=False)
    assert len({*paths}) == len(names)
    assert all(path.name.isprintable() and len(path.name) <= 130 for path in paths)


def test_a_picture_that_appears_during_the_drawing_is_not_overwritten(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from vitrim.showing import pictures

    real = pictures.sheet

    def late(*args: Any) -> Any:
        (tmp_path / "image-000.png").write_text("mine")
        return real(*args)

    monkeypatch.setattr(pictures, "sheet", late)
    with vitrim.attach(model, "TopK() @ KeepRate(0.5)"), pytest.raises(VitrimError, match="exists"):
        vitrim.show(model, torch.zeros(1, 1, 8, 8), tmp_path)
    assert (tmp_path / "image-000.png").read_text() == "mine"


def test_messages_are_printable_and_of_bounded_length():
    error = DataError("caf\udce9 \x1b[31m" + "x" * 45_000)
    assert "\\xe9" in str(error)
    assert str(error).isprintable()
    assert len(str(error)) < 500
    assert message("one\ntwo\x07") == "one\ntwo\\x07"
    assert printable("\u202e\x9b\n") == "\\u202e\\x9b\\n"


def test_tables_are_printable_everywhere():
    table = Table("a\x1btitle", [Column("model", "model"), Column("a", "a", ".2f")],
                  [{"model": "red\x1b[31m|x", "a": 1.0}], notes=["n\x07"])  # fmt: skip
    for text in (table.text(80), table.markdown()):
        assert all(line.isprintable() for line in text.splitlines())
    assert "\\|x | 1.00 |" in table.markdown()  # A bar would begin another cell.


def test_progress_shows_names_as_they_are_written():
    file = StringIO()
    with progress.live(Console(file=file, width=200), label="[red]x[/red]") as report:
        report("run", {"name": "[bold]row[/bold]\x1b[2J"})
        report("outage", {"line": "the database is away"})
    text = file.getvalue()
    assert "[bold]row[/bold]" in text
    assert "\x1b[2J" not in text
    assert "the database is away" in text


@pytest.mark.parametrize("row", ["a\x1b[31m", "x" * 200, "\u00e9" * 100])
def test_row_names_that_no_folder_should_have_are_refused(row: str, tmp_path: Path):
    study = Study("t", {}, {row: {}}, {"own": "own"}, [0], None, None, None, {})
    with pytest.raises(RecipeError, match="cannot be a folder; names have at most 120 bytes"):
        check_study(study, tmp_path / "out")


def test_a_report_shows_odd_names_and_reads_no_pipe(tmp_path: Path):
    folder = os.path.join(os.fsencode(tmp_path), b"run\xff\x1b")
    os.mkdir(folder)
    with open(os.path.join(folder, b"result.json"), "w") as file:
        file.write('{"accuracy": 0.5, "name": "\\ud800\\u001b[31m"}')
    os.mkfifo(os.path.join(folder, b"metrics.jsonl"))
    os.mkfifo(os.path.join(folder, b"a.png"))
    page = write_report(os.fsdecode(folder)).read_text(encoding="utf-8")
    assert "50.00 %" in page
    assert "\x1b" not in page
    os.mkfifo(tmp_path / "pipe.html")
    with pytest.raises(VitrimError, match="is not a report of vitrim"):
        write_report(os.fsdecode(folder), tmp_path / "pipe.html")


@pytest.mark.parametrize("form", ["999999999", "<99999999d", "0100000000f", ".99999999f", "x" * 9, "{}"])
def test_column_formats_that_fill_memory_are_left_out(form: str, tmp_path: Path):
    import json

    table = {"columns": [{"key": "a", "form": form}], "rows": [{"a": 12.5}]}
    (tmp_path / "result.json").write_text(json.dumps({"table": table}))
    page = write_report(tmp_path).read_text()
    assert "12.5" in page
    assert len(page) < 100_000
