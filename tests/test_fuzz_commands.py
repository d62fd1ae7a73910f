"""Fuzzed command lines: each calls its verb with checked arguments, or ends with one line and exit code 2."""

import io
import random
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from fuzzing import altered_text, altered_value, fuzz, odd_value
from vitrim import cli
from vitrim.errors import VitrimError
from vitrim.options import describe, typed
from vitrim.verb_options import options_of
from vitrim.verbs import VERBS
from vitrim.yaml_text import dump_yaml

COMMANDS = [
    "demo --out runs/demo",
    "show vitrim_digits_vit --method TopK()@KeepRate(0.7) --images cat.png --out tokens.png --image_size 8",
    "bench vitrim_digits_vit deit_tiny_patch16_224@w.pth@128x288 --batch_size 1 32 --compile --dtype bfloat16",
    "eval runs/a runs/b --method dense TopK()@KeepRate(0.7) --data.name folder --data.root images --device cpu",
    'train --out runs/a --config recipe.yaml --optim.lr 1e-3 --model.args {"depth":2} --reduction null --compile false',
    'sweep runs/a --method TopK()@PowerLaw({r},1) --vary {"r":[0.5,0.7]} --search tpe --trials 5 --out t.md',
    "study study.yaml --out runs/study --scale smoke --workers 2 --database sqlite:///leases.db",
    "stratify runs/a --out runs/s --num_images 64 --data.limit 100 --labels true --overwrite",
    "extract runs/s --out runs/e --macs 0.5 --latency 0.5ms --compensate means --refit true --num_images 64",
    "report runs/study --out report.html",
    "list scores",
]
FILES = {
    "train": {"model": {"name": "x", "args": {"depth": 2}}, "data": {"limit": 40}, "optim": {"lr": 1e-3}, "epochs": 3},
    "eval": {"method": ["dense"], "data": {"name": "digits", "image_size": 8}, "batch_size": 4},
    "bench": {"batch_size": [1, 2], "dtype": "float16", "compile": True, "rounds": 3},
    "sweep": {"method": "x", "vary": {"r": [0.5, 0.7]}, "search": "grid", "trials": 3},
}


def checked(function: Callable[..., None]) -> Callable[..., None]:
    """In place of a verb: its arguments are of the types that its options take."""
    hints = {option.name: option.hint for option in options_of(function)}

    @wraps(function)
    def verb(**arguments: Any) -> None:
        for name, value in arguments.items():
            if name in hints:
                assert typed(hints[name], value, name) == value, f"{name} is {value!r}, not {describe(hints[name])}"

    return verb


@pytest.fixture(autouse=True)
def _verbs_that_do_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name, function in VERBS.items():
        monkeypatch.setitem(VERBS, name, checked(function))


def run(words: list[str]) -> None:
    """One command line, whose message becomes an exception."""
    said, code = io.StringIO(), None
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(said):
            cli.main(words)
    except SystemExit as end:
        code = end.code
    if code == 2:
        raise VitrimError(said.getvalue().removesuffix("\n"))
    assert (code or 0, said.getvalue()) == (0, "")


def altered(words: list[str], rng: random.Random) -> list[str]:
    """One to three words removed, repeated, moved, altered, or replaced by an odd value or another option."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        place = rng.randrange(len(words))
        match rng.randrange(6):
            case 0:
                del words[place]
            case 1:
                words.insert(rng.randrange(len(words)), words[place])
            case 2:
                words[place] = altered_text(words[place], rng)
            case 3:
                words[place] = str(odd_value(rng))[: 1 << 17]  # As long as the system lets a word be.
            case 4:
                verb = words[0] if words[0] in VERBS else "train"
                words[place:place] = [f"--{rng.choice(options_of(VERBS[verb])).name}", str(odd_value(rng))[: 1 << 17]]
            case _:
                words.insert(
                    place, rng.choice(["--help", "--print_config", "--config", "--import", "--", "-", "-x", "@"])
                )
        words = words or [""]
    return words


def test_the_commands_themselves_are_accepted(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("epochs: 3\n")
    for command in COMMANDS:
        run(command.split())


def test_words_of_commands(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text("epochs: 3\n")

    def surface(rng: random.Random) -> None:
        run(altered(rng.choice(COMMANDS).split(), rng))

    outcomes = fuzz(surface)
    assert min(outcomes["accepted"], outcomes["refused"]) > 20


def test_files_of_options(tmp_path: Path):
    path = tmp_path / "options.yaml"
    needed = {"train": ["--out", "x"], "eval": ["m"], "bench": ["m"], "sweep": ["m"]}

    def surface(rng: random.Random) -> None:
        verb = rng.choice([*FILES][1:]) if rng.random() < 0.9 else "train"  # Which has the most options, by far.
        try:
            text = dump_yaml(altered_value(FILES[verb], rng) if rng.random() < 0.5 else FILES[verb])
        except RecursionError:  # Values of 900 levels can be written by hand, but not by this dumper.
            return
        text = (text if rng.random() < 0.5 else altered_text(text, rng))[:20_000]  # Long text takes long to parse.
        path.write_text(text, encoding="utf-8", errors="replace")
        run([verb, *needed[verb], "--config", str(path)])

    outcomes = fuzz(surface)
    assert min(outcomes["accepted"], outcomes["refused"]) > 20
