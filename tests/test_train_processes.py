"""Two processes give the loss curve of one with the same global batch, and continue where they were stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
OPTIONS = (
    "train --model.name vit_tiny_patch16_224 --data.limit 96 --data.holdout 0.25 --data.workers 0 --batch_size 12 "
    "--epochs 3 --reduction TopK(gradient)@KeepRate(0.5,at=0,reinstate=1) --phase train"
)
SIZES = "{img_size: 32, embed_dim: 24, depth: 2, num_heads: 2, patch_size: 8}"
KEYS = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")
LAUNCHERS = {
    "accelerate": ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                   "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no",
                   "--num_cpu_threads_per_process", "1", "-m"],
    "torchrun": ["torchrun", "--standalone", "--nproc_per_node", "2", "-m"],
}  # fmt: skip

STOPPER = """
import os, signal
from contextlib import contextmanager
from vitrim.show import progress

def report(event, figures):
    if event == "step" and (figures["epoch"], figures["step"], os.environ["RANK"]) == (1, 2, "0"):
        os.kill(os.getpid(), signal.SIGTERM)

@contextmanager
def quiet(**options):
    yield report

progress.live = quiet
from vitrim.cli import main
main()
"""


COUNTED = """
import os
from pathlib import Path
from vitrim.train import loop

check = loop.Recipe.check_processes

def counted(recipe, number):
    Path(f"{__file__}.{os.environ['RANK']}").write_text(str(number))  # A stream of both could be interleaved.
    check(recipe, number)

loop.Recipe.check_processes = counted
from vitrim.cli import main
main()
"""


def run(launcher: list[str], module: str, out: Path, options: str = "") -> subprocess.CompletedProcess[str]:
    words = [*OPTIONS.split(), *options.split(), "--model.args", SIZES, "--out", str(out)]
    command = [str(BIN / launcher[0]), *launcher[1:], module, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(out.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def curve(folder: Path) -> list[list[float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[line[key] for key in KEYS] for line in lines]


@pytest.mark.parametrize("options", ["", "--optim.ema 0.9"])
def test_two_processes_equal_one_and_continue(options: str, tmp_path: Path):
    (tmp_path / "stopper.py").write_text(STOPPER)
    (tmp_path / "counted.py").write_text(COUNTED)
    alone = run(["python", "-m"], "vitrim.cli", tmp_path / "alone", options)
    assert alone.returncode == 0, alone.stderr
    whole = curve(tmp_path / "alone")
    assert len(whole) == 3
    stopped = run(LAUNCHERS["torchrun"], "stopper", tmp_path / "parts", options)
    assert stopped.returncode != 0
    assert "stopped by SIGTERM at epoch 2, step 2 of 6" in stopped.stderr
    assert len(curve(tmp_path / "parts")) == 1
    continued = run(LAUNCHERS["accelerate"], "counted", tmp_path / "parts", options)
    assert continued.returncode == 0, continued.stderr
    assert [path.read_text() for path in tmp_path.glob("counted.py.*")] == ["2", "2"]
    assert (continued.stdout.count("test accuracy"), continued.stderr.count("epoch 3/3")) == (1, 1)
    for one, two in zip(whole, curve(tmp_path / "parts"), strict=True):
        assert two == pytest.approx(one, rel=2e-4)
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("alone", "parts"))
    assert two["test_loss"] == pytest.approx(one["test_loss"], rel=2e-4)
    assert two["test_images"] == one["test_images"] == 364
