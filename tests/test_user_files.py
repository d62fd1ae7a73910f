"""`--import FILE` adds what a file of the user defines to the notation, the listing and the names of the package."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

import vitrim
from processes import start
from vitrim import user_files
from vitrim.cli import main
from vitrim.distill import TERMS
from vitrim.errors import VitrimError
from vitrim.study import local_workers as workers
from vitrim.tokens import REDUCERS
from vitrim.train.checkpoint import RunFolder
from vitrim.user_files import import_files, import_options, split_imports

MINE = '''
"""Methods of a user: one small addition each."""

from __future__ import annotations

from dataclasses import dataclass

from vitrim.distill.losses import feature_loss
from vitrim.distill.objective import Term, Weight
from vitrim.models.outputs import Logits
from vitrim.tokens import Assignment, Curriculum, Evidence, Figure, KeepRate, Reducer, Schedule, score


@score(needs="hidden")
def my_spread(e: Evidence):
    """Standard deviation over channels of the hidden state."""
    return e.hidden_BTC[:, e.num_prefix :].std(-1)


@dataclass(frozen=True)
class MyStride(Reducer):
    """Keep evenly spaced tokens."""

    offset: int = 0
    needs = "nothing"

    def assign(self, evidence: Evidence, keep: int) -> Assignment:
        import torch

        rows = (torch.arange(keep) * evidence.num_patches // keep).expand(len(evidence.hidden_BTC), -1)
        return Assignment.drop(evidence.num_patches, rows)


@dataclass(frozen=True)
class MyHalf(KeepRate):
    """Keep half of the tokens."""

    rate: float = 0.5


@dataclass(frozen=True)
class MyMargin(Curriculum):
    """Full strength once the spread of the pixels is above 0."""

    level: float = 0.0

    @property
    def reads(self):
        return (Figure("my_spread", best=(1.0, 1.0), measure=lambda model, images: float(images.std())),)

    def strength(self, epoch, history=()):
        return float(bool(history) and history[-1]["my_spread"] > self.level)


@dataclass(frozen=True)
class MyPenalty(Term):
    """Mean squared logit of the student."""

    def of_student(self):
        return (Logits(),)

    def of_teacher(self):
        return ()

    def compare(self, batch, project):
        return batch.student["logits"].square().mean()


@feature_loss
def my_l1(student, target):
    """Mean absolute difference."""
    return (student - target).abs().mean(-1)
'''


@pytest.fixture
def mine(tmp_path: Path, entries_stay: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's file; what it adds is gone after the test."""
    monkeypatch.setattr(user_files, "_imported", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "my_methods.py"
    path.write_text(MINE)
    yield path
    for name in [
        name for name, module in sys.modules.items() if Path(getattr(module, "__file__", None) or "/") == path
    ]:
        del sys.modules[name]


@pytest.mark.parametrize("before", [True, False])
def test_what_a_user_adds_is_listed(mine: Path, before: bool, capsys: pytest.CaptureFixture[str]) -> None:
    option = ["--import", str(mine)]
    main([*option, "list"] if before else ["list", *option])
    listed = capsys.readouterr().out
    for name, says in (
        ("my_spread", "Standard deviation over channels"), ("MyStride", "Keep evenly spaced"), ("MyHalf", "Keep half"),
        ("MyMargin", "Full strength once"), ("MyPenalty", "Mean squared logit"), ("my_l1", "Mean absolute"),
    ):  # fmt: skip
        assert f"  {name:<22}{says}" in listed


def test_what_a_user_adds_is_a_name_of_the_package(mine: Path) -> None:
    with pytest.raises(AttributeError, match="no attribute 'MyStride'"):
        _ = vitrim.MyStride
    import_files([str(mine)])
    assert vitrim.MyStride(offset=1).offset == 1
    assert vitrim.MyPenalty is TERMS["MyPenalty"]
    assert {"MyStride", "MyHalf", "MyMargin", "MyPenalty"} <= set(dir(vitrim))
    model = vitrim.build_model("vitrim_digits_vit").eval()
    for method in ("MyStride() @ MyHalf()", "TopK(my_spread) @ KeepRate(0.5)", "ToMe() @ MyHalf(at=(1,)) @ MyMargin()"):
        with vitrim.attach(model, method) as handle:
            assert vitrim.Reduction.parse(str(handle.reduction)) == handle.reduction
    with pytest.raises(VitrimError, match="MyStride: offset is a whole number, not 'x'"):
        vitrim.Reduction.parse("MyStride(x) @ MyHalf()")


def test_a_run_uses_what_a_user_adds(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (
        f"train --out {tmp_path / 'run'} --epochs 2 --batch_size 32 --data.limit 100 --data.holdout 0.2 "
        f"--data.workers 0 --import {mine} --optim.warmup_epochs 0"
    ).split()
    words += ["--distill", "Labels() + MyPenalty(0.1)", "--reduction", "MyStride() @ MyHalf() @ MyMargin()"]
    monkeypatch.setattr(sys, "argv", ["vitrim", *words])
    main(None)
    first, second = RunFolder(tmp_path / "run").metrics
    assert (first["strength"], second["strength"]) == (0.0, 1.0)
    assert first["my_spread"] > 0
    assert f"--import {mine}" in (tmp_path / "run" / "command.txt").read_text()


def test_workers_of_a_study_import_the_same_files(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_files([str(mine)])
    assert import_options() == ["--import", str(mine)]
    started: list[list[str]] = []

    class Started:
        def __init__(self, command: list[str], **options: object) -> None:
            started.append(command)

        def wait(self, timeout: float | None = None) -> int:
            return 0

        def poll(self) -> int:
            return 0

    monkeypatch.setattr(workers.subprocess, "Popen", Started)
    study = Path(__file__).parents[1] / "recipes" / "system1" / "study.yaml"
    with workers.local_workers(2, str(study), str(tmp_path / "out"), "smoke", None, None):
        pass
    (command,) = started
    assert split_imports(command)[1] == [str(mine)]


SPAWNED = """
import multiprocessing, sys
from vitrim.user_files import import_files

if __name__ == "__main__":
    import_files([sys.argv[1]])
    import my_part
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(my_part.name_of, [my_part.Part()]))
"""


def test_a_process_that_a_data_loader_starts_knows_the_file(tmp_path: Path) -> None:
    """Processes that are spawned, as on macOS and Windows, import classes by the name of their module."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "my_part.py").write_text(
        "class Part: ...\n\n\ndef name_of(part):\n    return type(part).__name__\n"
    )
    (tmp_path / "main.py").write_text(SPAWNED)
    command = [sys.executable, str(tmp_path / "main.py"), str(tmp_path / "folder" / "my_part.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "['Part']", done.stderr


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("json.py", "", "there is another module named 'json'; rename the file"),
        ("a.b.py", "", "there is another module named 'a.b'; rename the file"),
        ("broken_one.py", "x = 1\ndef (", "broken_one.py, line 2: SyntaxError"),
        ("broken_two.py", "\n1 / 0", "broken_two.py, line 2: ZeroDivisionError: division by zero"),
        ("text.txt", "", "there is no Python file (.py) of that name"),
        (
            "twice.py",
            "from vitrim.tokens import score\n@score(needs='nothing')\ndef norm(e):\n    '''Mine.'''",
            "twice.py, line 2: there is a score named 'norm' already, vitrim.tokens.scores.norm; rename twice.norm",
        ),
    ],
)
def test_a_file_that_cannot_be_imported_is_one_line(
    name: str, text: str, says: str, mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (mine.parent / name).write_text(text)
    with pytest.raises(SystemExit) as raised:
        main(["list", "--import", str(mine.parent / name)])
    line = capsys.readouterr().err
    assert raised.value.code == 2
    assert says in line
    assert line.startswith("vitrim list: --import ")
    assert line.count("\n") == 1


@pytest.mark.parametrize("words", [["--import"], ["--import=", "list"], ["list", "--import", "--epochs"]])
def test_an_import_without_a_file_says_what_is_missing(words: list[str]) -> None:
    with pytest.raises(VitrimError, match=r"--import needs the path of a Python file, such as --import mine\.py"):
        import_files(split_imports(words)[1])


def test_no_file_can_import_anything(mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for key in ("import", "imports", "--import"):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"{key}: {mine}\nepochs: 1\n")
        with pytest.raises(SystemExit):
            main(["train", "--config", str(recipe), "--out", str(tmp_path / "run")])
        assert capsys.readouterr().err.count("\n") == 1
    assert "MyStride" not in REDUCERS


VERBS = """
import sys
from vitrim.cli import main

family, out, images = sys.argv[1:]
common = "--data.workers 0"
for words in (
    "list adapters",
    f"train --model.name toy_vit --out {out}/run --epochs 1 --batch_size 32 --data.name digits --data.limit 64 "
    f"{common}",
    f"train --model.name toy_vit --teacher.name {out}/run --distill Labels()+Pooled() --out {out}/student --epochs 1 "
    f"--batch_size 32 --data.name digits --data.limit 64 {common}",
    f"eval {out}/run --method TopK()@KeepRate(0.5,at=1) --batch_size 512 {common}",
    f"bench {out}/run --batch_size 4 --rounds 1",
    f"show {out}/run --images {images} --out {out}/pictures --method TopK()@KeepRate(0.5,at=1)",
    f"stratify {out}/run --out {out}/net --num_images 32 --width_multiple 4 {common}",
    f"extract {out}/net --macs 0.7 --out {out}/small",
    f"compress {out}/run --macs 0.8 --out {out}/cheap --using tokens --num_images 32 --num_test_images 64 --trials 0 "
    f"--batch_size 2 {common}",
):
    print("verb", words.split()[0], flush=True)
    main([*words.split(), "--import", family])
"""


def test_every_verb_takes_a_family_that_is_a_file_of_the_user(tmp_path: Path) -> None:
    Image.new("L", (8, 8), 90).save(tmp_path / "one.png")
    family, images = Path(__file__).with_name("toy_family.py"), tmp_path / "one.png"
    done = start(VERBS, str(family), str(tmp_path), str(images)).wait()
    assert done.returncode == 0, done.stderr[-2000:]
    assert "toy" in done.stdout
    assert (tmp_path / "small" / "model.safetensors").exists()
    assert list((tmp_path / "pictures").rglob("*.png"))
