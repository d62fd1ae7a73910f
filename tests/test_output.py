"""Where results go: told before the work, in one line, with nothing left behind."""

from pathlib import Path

import pytest
import torch

from limits import no_file_above
from vitrim import cli, load, save
from vitrim.errors import CheckpointError, OutputError, VitrimError
from vitrim.measure.table import Column, Table
from vitrim.models import build_model, check_place
from vitrim.output import check_file, check_folder


def test_files(tmp_path: Path):
    check_file(tmp_path / "a" / "b" / "t.md", [".md"])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(VitrimError, match=r"t\.txt should end in \.md, \.csv"):
        check_file(tmp_path / "t.txt", [".md", ".csv"])
    (tmp_path / "t.md").write_text("x")
    with pytest.raises(VitrimError, match="exists; choose another name"):
        check_file(tmp_path / "t.md", [".md"])
    check_file(tmp_path / "t.md", [".md"], overwrite=True)
    with pytest.raises(VitrimError, match="there is a file of this name"):
        check_file(tmp_path / "t.md" / "u.md", [".md"])


def test_folders(tmp_path: Path):
    check_folder(tmp_path)
    check_folder(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(VitrimError, match="there is a file of this name"):
        check_folder(tmp_path / "file")
    if Path("/proc/self").exists():
        with pytest.raises(VitrimError, match=r"cannot write to /proc/x \("):
            check_folder("/proc/x")


def test_models(tmp_path: Path):
    model = build_model("vitrim_digits_vit", depth=1, embed_dim=8, num_heads=1)
    check_place(tmp_path / "run" / "model")
    save(model, tmp_path / "run" / "model")
    with pytest.raises(CheckpointError, match="holds a model already"):
        check_place(tmp_path / "run" / "model")
    check_place(tmp_path / "run" / "model", overwrite=True)
    size = {"depth": 1, "embed_dim": 8, "num_heads": 1}
    again = build_model("vitrim_digits_vit", checkpoint=tmp_path / "run", **size)
    for found in (load(tmp_path / "run"), build_model(tmp_path / "run"), again):
        torch.testing.assert_close(found.state_dict(), model.state_dict(), rtol=0, atol=0)
    (tmp_path / "file").write_text("x")
    with pytest.raises(VitrimError, match="there is a file of this name"):
        save(model, tmp_path / "file")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("eval m --out t.txt", "should end in"),
        ("eval m --out file/t.md", "there is a file of this name"),
        ("bench m --out old.md", "exists"),
        ("sweep m --method x --vary {} --out old.md", "exists"),
        ("stratify m --out file", "there is a file of this name"),
        ("extract m --out file", "there is a file of this name"),
        ("study s.yaml --out file", "there is a file of this name"),
        ("demo --out file", "there is a file of this name"),
        ("demo --out full", "is not empty and holds no demo"),
        ("demo --out new --epochs 0", "epochs is 0; it must be 1 or more"),
        ("study full --out new", "full cannot be read (Is a directory)"),
        ("report full --out full/inner", "full"),
    ],
)  # fmt: skip
def test_verbs_refuse_at_once(
    words: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("file", "old.md", "full/inner"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("x")
    with pytest.raises(SystemExit) as end:
        cli.main(words.split())
    err = capsys.readouterr().err
    assert end.value.code == 2
    assert says in err.splitlines()[-1]
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "inner", "old.md"]


def test_a_write_that_fails_is_told_by_whoever_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    table = tmp_path / "t.md"
    with no_file_above(10), pytest.raises(OutputError, match=r"t.md \(File too large\); allow larger files"):
        Table("t", [Column("a", "a")], [{"a": 1}]).write(table)
    assert not list(tmp_path.iterdir())
    table.write_text("old")
    with no_file_above(10), pytest.raises(OutputError, match=r"\(File too large\); the one before is kept; allow"):
        Table("t", [Column("a", "a")], [{"a": 1}]).write(table, overwrite=True)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
    model = build_model("vitrim_digits_vit", depth=1, embed_dim=8, num_heads=1)
    with no_file_above(1000), pytest.raises(OutputError, match=r"model.safetensors \(.*File too large"):
        save(model, tmp_path / "model")
    save(model, tmp_path / "model")
    (tmp_path / "model" / "result.json").write_text('{"macs": 1}')
    with no_file_above(1000), pytest.raises(SystemExit) as end:
        cli.main(["report", str(tmp_path / "model")])
    err = capsys.readouterr().err
    assert (end.value.code, err.count("\n")) == (2, 1)
    assert err.startswith(f"vitrim report: cannot write {tmp_path}/model/report.html (File too large)")
