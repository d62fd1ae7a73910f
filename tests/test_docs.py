"""Every example of the README and the pages is executed, in the order in which it stands there."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_digits, load_sample_images
from torch import nn

from vitrim import ToMe, TopK, compression, cost, demo, stratify
from vitrim.cli import main
from vitrim.compression import files
from vitrim.data import digits
from vitrim.data.specs import DataSpec
from vitrim.elastic import latency, measured_chain, supernet
from vitrim.elastic.chain import Chain
from vitrim.exporting import FORMATS
from vitrim.measure import speed
from vitrim.models import compiling, open_model, small_vits
from vitrim.showing import report
from vitrim.showing.runs import points
from vitrim.train.recipe import Recipe

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
    pictures = load_digits()
    for split, rows in (("train", range(120)), ("val", range(120, 160))):
        for row in rows:
            folder = place / "images" / split / f"digit{pictures.target[row]}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pictures.images[row] * 15).astype("uint8")).resize((32, 32)).save(folder / f"{row}.png")
    for name in ("recipes", "benchmarks"):
        (place / name).symlink_to(ROOT / name)
    options = "--epochs 1 --data.limit 150 --data.workers 0 --batch_size 32"
    main(["train", *options.split(), "--out", str(place / "runs" / "digits")])
    copytree(place / "runs" / "digits", place / "runs" / "first")
    return place


@pytest.fixture(scope="module", autouse=True)
def in_small() -> Iterator[None]:
    """A sixth of the digits, a network of fewer blocks, coarse pictures, and fewer repetitions of what takes time."""
    pixels, targets = digits._digits()
    recipe, bench, create, savefig = demo._recipe, demo.bench, small_vits._create, Figure.savefig
    interleave = speed.interleave
    chain_of = supernet.measured_chain

    def shallow(name: str, pretrained: bool, args: dict[str, Any], **own: Any) -> nn.Module:
        return create(name, pretrained, args, **(own | ({"depth": 3} if name == "vitrim_digits_vit" else {})))

    def few(*words: Any) -> Recipe:
        whole = recipe(*words)
        elastic = whole.elastic and replace(whole.elastic, images=32)
        return replace(whole, data=replace(whole.data, limit=100), elastic=elastic)

    def coarse(figure: Figure, file: Any, **options: Any) -> None:
        savefig(figure, file, **{**options, "dpi": 40})

    def measured_once(model: nn.Module, start: Chain, probes: list[Any], *rest: Any, **options: Any) -> Chain:
        return chain_of(model, start, probes[-2:], *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "FORMS", 1)
        patch.setattr(Figure, "savefig", coarse)
        patch.setattr(supernet, "measured_chain", measured_once)
        patch.setattr(measured_chain, "BUDGETS", 3)
        patch.setattr(latency, "milliseconds", lambda *models: torch.tensor([[cost(one).macs / 1e6 for one in models]]))
        for module in (compression.job, compression.verification, files):  # Whose intervals would depend on the load.
            patch.setattr(module, "sessions", lambda *models, **options: [(0.5, 2.0, 1.0), (0.6, 2.0, 1.2)])
        patch.setattr(compression.solver, "reducers", lambda has_cls: [TopK() if has_cls else ToMe()])
        patch.setattr(compression.solver, "first_shapes", lambda depth: compression.candidates.stages(depth)[:2])
        patch.setattr(compression.job, "stratify", partial(stratify, even=True))
        patch.setattr(compression.run, "MOST_UNSEEN", 60)
        patch.setattr(digits, "_digits", lambda: (pixels[:300], targets[:300]))
        patch.setattr(small_vits, "_create", shallow)
        patch.setattr(demo, "_recipe", few)
        patch.setattr(demo, "bench", lambda models, **options: bench(models, batch_sizes=(4,), rounds=1))
        patch.setattr(demo, "stratify", partial(stratify, even=True))
        patch.setattr(demo, "TRIALS", 0)
        patch.setattr(demo, "NUM_IMAGES", 64)
        patch.setattr(demo, "FOR_TOKENS", (0.75,))
        patch.setattr(demo, "FOR_WIDTH", (0.5,))
        patch.setitem(demo.NETWORK, "depth", 3)
        patch.setattr(speed, "_CALLS_AT_BATCH_1", 2)
        patch.setattr(
            speed, "interleave", lambda trials, calls, rounds, warmup, dice: interleave(trials, calls, 1, 0, dice)
        )
        patch.setitem(FORMATS, "onnx", replace(FORMATS["onnx"], write=written_once(FORMATS["onnx"].write)))
        yield
    torch._dynamo.reset()  # Which has given up on code that would take more forms.


def written_once(write: Callable[..., None]) -> Callable[..., None]:
    """Of a model that becomes an ONNX file twice, in float32 and to be quantised, the first file is copied."""
    made: dict[str, bytes] = {}

    def write_or_copy(program: Any, about: Any, path: Path) -> None:
        key = json.dumps({**about, "int8": None})
        if key not in made:
            write(program, about, path)
            made[key] = path.read_bytes()
        path.write_bytes(made[key])

    return write_or_copy


@pytest.fixture(autouse=True)
def few_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all plots of a kind the first is drawn; the others in the reports of a page are copies of that picture."""

    def drawn_once(draw: Callable[[Any, BytesIO], bool]) -> Callable[[Any, BytesIO], bool]:
        drawn: list[bytes] = []

        def drawn_or_copied(figures: Any, file: BytesIO) -> bool:
            if not drawn:
                wanted = draw(figures, file)
                if wanted:
                    drawn.append(file.getvalue())
                return wanted
            file.write(drawn[0])
            return True

        return drawn_or_copied

    for name in ("curves_plot", "cost_accuracy_plot"):
        monkeypatch.setattr(report, name, drawn_once(getattr(report, name)))


def run_once(words: list[str], done: dict[tuple[str, ...], Path]) -> None:
    """Run a command; a study or a super-network that another page has made is copied."""
    whole = (words[0] == "study" and "--database" not in words) or (words[0] == "stratify" and "--epochs" not in words)
    at = words.index("--out") + 1 if whole else 0
    if at and (known := done.get((*words[:at], *words[at + 1 :]))):
        copytree(known, words[at], dirs_exist_ok=True)
        return
    main(words)
    if at:
        done[(*words[:at], *words[at + 1 :])] = Path(words[at]).absolute()


MADE: dict[tuple[str, ...], Path] = {}
"""Command without its folder -> what it made."""


def check_system_1(folder: Path) -> None:
    found = {name: json.loads((folder / f"{name}.json").read_text())["rows"] for name in ("table", "sweep")}
    tests = ("pruning off", "pruning on")
    names = [(row["row"], row["test"]) for row in found["table"]]
    assert names == [(row, test) for row in ("baseline", "trained with pruning") for test in tests]
    assert found["table"][1]["macs_ratio"] > 1.2
    lines = (folder / "trained-with-pruning-s0" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["strength"] for line in lines] == [0.0] * 4 + [1.0] * 2
    assert [row.get("alpha") for row in found["sweep"]] == [None, 1.0, 2.0] * 2


def check_system_5(folder: Path) -> None:
    table, written = (json.loads((folder / f"{name}.json").read_text()) for name in ("table", "curve"))
    rows, said = written["rows"], " ".join(written["notes"])
    assert "trained longer: WPAC, trained on | PIAD original | PIAD sandwich + KD." in said
    assert "Compared with networks trained alone, where both are known, curves are " in said
    assert "Published figures" not in said
    assert (folder / "curve.md").exists()
    assert (folder / "curve.csv").exists()
    orderings = ["random", "magnitude", "Taylor", "WPAC", "WPAC + compensation"]
    even = ["random, even", "magnitude, even", "WPAC, even"]
    trained = ["PIAD original", "PIAD sandwich + KD"]
    cut = [*orderings, *even, "WPAC, trained on", *trained]
    assert list(dict.fromkeys(row["curve"] for row in rows)) == [*cut, "trained alone"]
    tested = {row["row"]: row["accuracy"] for row in table["rows"]}
    for name in cut:
        full = tested.get(name.removeprefix("WPAC, "), tested["full"])
        found = {row["budget"]: row for row in rows if row["curve"] == name}
        assert list(found) == [1, 0.6, 0.4]
        assert found[1]["accuracy"] == pytest.approx(full, abs=0.01)  # Orderings do not change the full network.
        assert all(row["gmacs"] <= budget * found[1]["gmacs"] for budget, row in found.items())
    alone = {row["row"]: row["accuracy"] for row in rows if row["curve"] == "trained alone"}
    assert alone == pytest.approx({row: value for row, value in tested.items() if row not in (*trained, "trained on")})
    assert {point["method"] for point in points(rows)} == {*cut, "trained alone"}
    page = report.write_report(folder).read_text()
    assert "accuracy against cost: One super-network" in page
    assert "Compared with networks trained alone, where both are known, curves are " in page


def check_demo(folder: Path) -> None:
    table, certificate = json.loads((folder / "result.json").read_text())["tables"]
    dense, *others = table["rows"]
    assert (dense["method"], dense["macs_ratio"]) == ("dense", 1)
    assert [(row["method"], row["budget"]) for row in others] == [
        *((name, budget) for name in demo.TOKENS for budget in demo.FOR_TOKENS),
        *((f"width, {how}", budget) for how in ("no training", "super-network") for budget in demo.FOR_WIDTH),
        ("tokens and width", 0.5),
    ]
    for row in others:
        assert row["macs_ratio"] >= 1 / row["budget"]
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
        assert row["drop_low"] <= row["drop"] <= row["drop_high"]
        assert row["drop"] == pytest.approx(dense["accuracy"] - row["accuracy"])
    assert "at most 0.5 of the MACs, met" in certificate["title"]
    page = (folder / "report.html").read_text()
    assert page.index(table["title"]) < page.index(certificate["title"])
    model = open_model(str(folder / "dense"))
    with pytest.MonkeyPatch.context() as patch:  # Only another network is compressed again.
        patch.setattr(demo, "Job", None)
        again = partial(demo._compressed, Console(), data=DataSpec(), known=None, test=None, out=folder)
        assert cost(again(model).model).macs == others[-1]["macs"]
        model.head.bias.data += 1
        with pytest.raises(TypeError):
            again(model)


CHECKS = {"system1": check_system_1, "system5": check_system_5, "demo": check_demo}
"""Page -> what its study, or the demonstration, finds in miniature."""


@pytest.mark.usefixtures("entries_stay")
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
                    run_once(words[1:], MADE)
    assert examples, f"{page.name} shows no example"
    if check := CHECKS.get(page.stem):
        check(Path("runs") / f"{page.stem}-smoke")


FRESH = """
import ast, os, sys, types, timm, torch
for text in sys.stdin.read().split(chr(0)):
    if not os.fork():
        names, tree = {}, ast.parse(text)
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), "imports", "exec"), names)
        for node in ast.walk(tree):
            parts = []
            while isinstance(node, ast.Attribute):
                parts.insert(0, node.attr)
                node = node.value
            found = names.get(node.id) if isinstance(node, ast.Name) else None
            for part in parts:
                if not isinstance(found, types.ModuleType):
                    break
                found = getattr(found, part)
        os._exit(0)
    assert os.wait()[1] == 0, text
"""


def test_pages_that_begin_with_python_import_what_they_use():
    """In an interpreter of their own, where nothing that another page has imported helps them."""
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
