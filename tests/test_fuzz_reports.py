"""Damaged run folders: a report shows what is left and names the rest, or refuses in one line."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fuzzing import altered_bytes, altered_text, altered_value, fuzz, odd_value
from vitrim.showing import report as report_module
from vitrim.showing.report import write_report

TABLE = {
    "title": "methods",
    "columns": [{"key": "method", "heading": "method"}, {"key": "accuracy", "heading": "top-1", "form": ".1%"},
                {"key": "macs", "heading": "MACs", "form": ",d"}, "speedup"],
    "rows": [{"method": "dense", "accuracy": 0.9, "macs": 4600000000, "speedup": 1.0, "speedup_low": 0.9,
              "speedup_high": 1.1}, ["ToMe() @ ConstantR(8)", 0.88, 2900000000, 1.5]],
    "notes": ["Three seeds."], "environment": {"cpu": "x", "cores": 2},
}  # fmt: skip
DOCUMENTS: dict[str, Any] = {
    "result.json": {"title": "t", "test_accuracy": 0.9, "macs": 4608338304, "params": 21600000, "tokens": [65, 40],
                    "train_seconds": 5025.0, "unreadable": [], "table": TABLE},
    "table.json": TABLE,
    "environment.json": {"torch": "2.14", "cpu": "x", "cores": 2, "gpu": None},
}  # fmt: skip
METRICS = [{"epoch": epoch, "lr": 0.001, "train_loss": 2 / (epoch + 1), "train_accuracy": 0.1 * epoch,
            "val_loss": 1.0, "val_accuracy": 0.2 * epoch, "tokens": [65, 40 - epoch], "images_per_second": 900.0}
           for epoch in range(4)]  # fmt: skip
RECIPE = "model: {name: vitrim_digits_vit}\nepochs: 4\nreduction: TopK() @ KeepRate(0.7)\n"
COMMAND = "vitrim train --config recipe.yaml --out run\n"


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A study of two runs in which everything is in order."""
    for folder in (tmp_path / "whole", tmp_path / "whole" / "a-s0", tmp_path / "whole" / "a-s1"):
        folder.mkdir()
        for name, document in DOCUMENTS.items():
            (folder / name).write_text(json.dumps(document))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS))
        (folder / "recipe.yaml").write_text(RECIPE)
        (folder / "command.txt").write_text(COMMAND)
        Image.new("RGB", (9, 9), "red").save(folder / "tokens.png")
    return tmp_path / "whole"


def damage(folder: Path, rng: random.Random) -> None:
    """Change one to three files of a folder and of the runs below it."""
    for path in rng.sample(sorted(path for path in folder.rglob("*") if path.is_file()), rng.choice((1, 1, 2, 3))):
        match rng.randrange(6):
            case 0 if path.suffix == ".json":
                path.write_text(json.dumps(altered_value(json.loads(path.read_text()), rng)))
            case 1 if path.suffix == ".json":
                path.write_text(json.dumps(odd_value(rng)))
            case 2 if path.suffix == ".jsonl":
                lines = altered_value([json.loads(line) for line in path.read_text().splitlines()], rng)
                path.write_text(
                    "".join(json.dumps(line) + "\n" for line in (lines if isinstance(lines, list) else [lines]))
                )
            case 3 if path.suffix in (".yaml", ".txt"):
                path.write_text(altered_text(path.read_text(), rng))
            case 4:
                path.unlink()
                if rng.random() < 0.5:
                    path.mkdir()
            case _:
                path.write_bytes(altered_bytes(path.read_bytes(), rng))


def test_reports_on_damaged_runs(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plot = report_module._plot

    def report(rng: random.Random) -> None:
        folder = tmp_path / "run"
        # Drawing takes a second, so that most pages go without.
        drawn = rng.random() < 0.015
        monkeypatch.setattr(report_module, "_plot", plot if drawn else lambda label, draw: [])
        try:
            shutil.copytree(whole / "a-s0" if drawn or rng.random() < 0.5 else whole, folder)
            damage(folder, rng)
            page = write_report(folder).read_bytes()
            assert page.endswith(b"</html>")
            assert b"\x1b" not in page
            assert len(page) < 5_000_000
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    outcomes = fuzz(report)
    assert outcomes["accepted"] > outcomes["refused"]
