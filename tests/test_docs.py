"""Every example of the README and the pages is executed, in the order in which it stands there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from vitrim.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples presuppose: a folder of photos, one of labelled images, and a short run on digits."""
    place = tmp_path_factory.mktemp("docs")
    (place / "photos").mkdir()
    for name, pixels in zip(("china", "flower"), load_sample_images().images, strict=True):
        Image.fromarray(pixels).save(place / "photos" / f"{name}.jpg")
    digits = load_digits()
    for split, rows in (("train", range(120)), ("val", range(120, 160))):
        for row in rows:
            folder = place / "images" / split / f"digit{digits.target[row]}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[row] * 15).astype("uint8")).resize((32, 32)).save(folder / f"{row}.png")
    for name in ("recipes", "benchmarks"):
        (place / name).symlink_to(ROOT / name)
    options = "--epochs 1 --data.limit 150 --data.workers 0 --batch_size 32"
    for name in ("digits", "first"):
        main(["train", *options.split(), "--out", str(place / "runs" / name)])
    return place


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run(page: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(place)
    names: dict[str, object] = {}
    examples = FENCE.findall(page.read_text())
    for language, text in examples:
        if language == "python":
            exec(compile(text, f"{page.name} example", "exec"), names)
        elif language == "sh":
            for line in text.replace("\\\n", " ").strip().splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    assert words[0] == "vitrim", f"{page.name}: only vitrim commands belong in a sh block, not {line}"
                    main(words[1:])
    assert examples, f"{page.name} shows no example"


FRESH = """
import os, sys, timm, torch
for number, text in enumerate(sys.stdin.read().split(chr(0))):
    if not os.fork():
        exec(compile(text, f"example {number}", "exec"), {})
        os._exit(0)
    assert os.wait()[1] == 0, text
"""


def test_pages_that_begin_with_python_run_in_an_interpreter_of_their_own():
    """Nothing that another page has imported helps them."""
    first = [examples[0] for page in PAGES if (examples := FENCE.findall(page.read_text()))]
    texts = [text for language, text in first if language == "python"]
    assert len(texts) > 4
    done = subprocess.run([sys.executable, "-c", FRESH], input=chr(0).join(texts), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_page_and_file_that_is_linked_exists():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_every_command_has_a_page():
    from vitrim.cli import VERBS

    for verb in VERBS:
        assert (ROOT / "docs" / f"{verb}.md").exists(), f"docs/{verb}.md is missing"
