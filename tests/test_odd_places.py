"""Places whose names are no UTF-8, or hold characters that terminals and URLs act on, in every verb that takes one."""

import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from sqlalchemy import make_url

import vitrim
from vitrim import cli
from vitrim.errors import VitrimError
from vitrim.exporting.run import check_place
from vitrim.measure.served import open_file
from vitrim.study.database_url import file_url, parse_url
from vitrim.verbs.delivery import say

ODD = os.fsdecode(b"caf\xe9\x1b[31m")
DIGITS = ["--data.name", "digits", "--num_images", "16", "--data.workers", "0"]
SMALL = ["--model.args", "{depth: 1, embed_dim: 24, num_heads: 2}", "--epochs", "1", "--data.workers", "0"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with an odd name, and in it two classes with odd names."""
    root = tmp_path / ODD
    for split in ("train", "test"):
        for number in range(2):
            folder = root / split / f"{ODD}{number}"
            folder.mkdir(parents=True)
            for each in range(4):
                Image.new("L", (8, 8), 100 * number + each).save(folder / f"{each}.png")
    return root


def test_a_run_in_an_odd_folder_on_images_of_an_odd_folder(
    images: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / f"run{ODD}"
    words = ["train", "--out", str(out), "--data.root", str(images), "--batch_size", "4", *SMALL]
    monkeypatch.setattr(sys, "argv", ["vitrim", *words])
    for _ in range(2):
        cli.main(words)
    cli.main(["train", "--config", str(out / "recipe.yaml"), "--out", f"{out}2"])
    text = "".join(capfd.readouterr())
    assert text.count("test accuracy") == 3
    assert all(line.isprintable() for line in text.splitlines())
    assert ODD.encode(errors="surrogateescape") in (out / "command.txt").read_bytes()
    assert len(vitrim.load(out).blocks) == 1  # pyright: ignore


def test_verbs_that_name_a_place_print_it_in_printable_characters(tmp_path: Path, capfd: Any):
    vitrim.save(timm.create_model("vitrim_digits_vit", depth=2, embed_dim=24, num_heads=2), tmp_path / "model")
    net, part = tmp_path / f"net{ODD}", tmp_path / f"part{ODD}"
    cli.main(["stratify", str(tmp_path / "model"), "--out", str(net), *DIGITS])
    cli.main(["extract", str(net), "--macs", "0.6", "--out", str(part)])
    text = "".join(capfd.readouterr())
    assert text.count("caf\\xe9\\x1b[31m") == 2
    assert all(line.isprintable() for line in text.splitlines())


def test_lines_are_printed_whatever_the_terminal_can_show(monkeypatch: pytest.MonkeyPatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    say(f"na\u00efve {ODD}\nnext")
    terminal.flush()
    assert terminal.buffer.getvalue().endswith(b"na\\xefve caf\\xe9\\x1b[31m\nnext\n")  # pyright: ignore


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_files_for_other_runtimes_need_names_that_these_can_open(format: Any, tmp_path: Path):
    path = tmp_path / f"{ODD}.{'onnx' if format == 'onnx' else 'pt2'}"
    with pytest.raises(VitrimError, match="has a name that is not UTF-8"):
        check_place(path, format)
    path.write_bytes(b"1")
    with pytest.raises(VitrimError, match="has a name that is not UTF-8"):
        open_file(str(path))


@pytest.mark.parametrize("name", ["a?b", "a#b", "100%41", "a@b", "a b+c", "caf\u00e9"])
def test_the_database_of_a_file_is_that_file(name: str):
    assert make_url(file_url(f"/tmp/{name}/t.db")).database == f"/tmp/{name}/t.db"


def test_a_database_whose_name_no_url_can_hold_is_refused(tmp_path: Path):
    with pytest.raises(VitrimError, match="not UTF-8; rename its folder"):
        file_url(tmp_path / ODD / "t.db")
    with pytest.raises(VitrimError, match="no UTF-8; choose another place"):
        parse_url(f"sqlite:///{ODD}.db")


def test_a_sweep_keeps_its_trials_next_to_its_table(images: Path, tmp_path: Path):
    model = timm.create_model("vitrim_digits_vit", depth=2, embed_dim=24, num_heads=2, num_classes=2)
    torch.nn.init.zeros_(model.head.weight)
    vitrim.save(model, tmp_path / "model")
    out = tmp_path / "a?b %41#" / "s.csv"
    words = ["--method", "TopK() @ KeepRate({r})", "--vary", "{r: [0.5]}", "--data.workers", "0"]
    cli.main(["sweep", str(tmp_path / "model"), "--data.root", str(images), *words, "--out", str(out)])
    assert sorted(path.name for path in out.parent.iterdir()) == ["s.csv", "s.csv.db"]
