"""Two processes give the loss curve of one with the same global batch, and continue where they were stopped."""

import json
from pathlib import Path

import pytest

from processes import Ended, start

OPTIONS = (
    "train --model.name vit_tiny_patch16_224 --data.limit 96 --data.holdout 0.25 --data.workers 0 --batch_size 12 "
    "--epochs 3 --reduction TopK(gradient)@KeepRate(0.5,at=0,reinstate=1) --phase train"
)
SIZES = "{img_size: 32, embed_dim: 24, depth: 2, num_heads: 2, patch_size: 8}"
KEYS = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")
TORCHRUN = ["--standalone", "--nproc_per_node", "2", "x"]
ACCELERATE = [
    "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", "x",
]  # fmt: skip
LAUNCHER = """
import os, sys
from torch.distributed import run

code, words = sys.argv[1], sys.argv[2].split(chr(10))
configured = run.config_from_args

def forking(options):
    config, _, _ = configured(options)
    config.start_method = "fork"
    return config, work, ()

def work():
    sys.argv = ["vitrim", *words]
    exec(code, {"__name__": "__main__"})

run.config_from_args = forking  # Else it starts interpreters.
sys.argv = sys.argv[2:]
"""
LAUNCHERS = {
    "torchrun": (LAUNCHER + "run.main(sys.argv[1:])", TORCHRUN),
    "accelerate": (LAUNCHER + "from accelerate.commands.accelerate_cli import main\nmain()", ACCELERATE),
}

STOPPER = """
import os, signal
from contextlib import contextmanager
from vitrim.showing import progress

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
    Path(f"counted.{os.environ['RANK']}").write_text(str(number))  # A stream of both could be interleaved.
    check(recipe, number)

loop.Recipe.check_processes = counted
from vitrim.cli import main
main()
"""


PLAIN = "from vitrim.cli import main\nmain()\n"


def run(launcher: str | None, code: str, out: Path, options: str) -> Ended:
    """Train by the command in one process, or in two that a launcher starts."""
    words = [*OPTIONS.split(), *options.split(), "--model.args", SIZES, "--out", str(out)]
    if launcher is None:
        return start(code, *words).wait()
    program, given = LAUNCHERS[launcher]
    return start(program, code, "\n".join(words), *given, CUDA_VISIBLE_DEVICES="").wait()


def curve(folder: Path) -> list[list[float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[line[key] for key in KEYS] for line in lines]


@pytest.mark.parametrize("options", ["", "--optim.ema 0.9"])
def test_two_processes_equal_one_and_continue(options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    alone = run(None, PLAIN, tmp_path / "alone", options)
    assert alone.returncode == 0, alone.stderr
    whole = curve(tmp_path / "alone")
    assert len(whole) == 3
    stopped = run("torchrun", STOPPER, tmp_path / "parts", options)
    assert stopped.returncode != 0
    assert "stopped by SIGTERM at epoch 2, step 2 of 6" in stopped.stderr
    assert len(curve(tmp_path / "parts")) == 1
    continued = run("accelerate", COUNTED, tmp_path / "parts", options)
    assert continued.returncode == 0, continued.stderr
    assert [path.read_text() for path in tmp_path.glob("counted.*")] == ["2", "2"]
    assert (continued.stdout.count("test accuracy"), continued.stderr.count("epoch 3/3")) == (1, 1)
    for one, two in zip(whole, curve(tmp_path / "parts"), strict=True):
        assert two == pytest.approx(one, rel=2e-4)
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("alone", "parts"))
    assert two["test_loss"] == pytest.approx(one["test_loss"], rel=2e-4)
    assert two["test_images"] == one["test_images"] == 364
