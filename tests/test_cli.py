"""The command: instant help, one line per mistake, options in any of their forms."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from calling import call
from vitrim import cli, save
from vitrim.arguments import parse_words
from vitrim.errors import DataError, RecipeError, VitrimError
from vitrim.models import build_model
from vitrim.train.recipe import Recipe
from vitrim.train.stopping import Stopped
from vitrim.variables import check_variables
from vitrim.verb_options import options_of


@pytest.mark.parametrize("verb", [None, *cli.VERBS])
def test_help_names_the_verb(verb: str | None, capsys: pytest.CaptureFixture[str]):
    words = ["--help"] if verb is None else [verb, "--help"]
    code, out, err = call(capsys, *words)
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: vitrim {verb or 'verb'}")
    assert "with every verb: --import FILE run this Python file of yours first" in " ".join(out.split())


@pytest.mark.parametrize("verb", cli.VERBS)
def test_each_option_is_explained_by_whole_sentences(verb: str):
    for option in options_of(cli.VERBS[verb]):
        if not option.group:
            assert option.help.endswith("."), f"{option.name}: {option.help!r} ends in the air"
            assert option.help.split()[0] not in ("of", "in", "by"), f"{option.name}: {option.help!r} begins in the air"
        if option.heading:
            assert option.heading.count("(") == option.heading.count(")")
            assert not option.heading.endswith((":", ",", "whose.")), option.heading


def test_help_is_instant_and_without_torch():
    script = (
        "import sys, time; from vitrim.cli import VERBS, main\n"
        "for verb in VERBS:\n"
        "    try: main([verb, '--help'])\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'timm', 'numpy', 'accelerate', 'matplotlib', 'PIL', 'optuna'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert time.process_time() < len(VERBS)\n"  # All helps in one go; each alone takes far under a second.
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_package_is_the_command():
    done = subprocess.run([sys.executable, "-m", "vitrim", "--version"], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "vitrim 0.1.0\n")


def test_version(capsys: pytest.CaptureFixture[str]):
    assert call(capsys, "--version")[:2] == (0, "vitrim 0.1.0\n")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("trian", "vitrim: unknown verb trian; did you mean train or extract?"),
        ("compress --model x --macs 0.5", "vitrim compress: model is given without --model: vitrim compress MODEL"),
        ("train --out x --optim.lrr 1", "vitrim train: unknown option --optim.lrr; did you mean --optim.lr"),
        ("train --out x --optim.lr fast", "vitrim train: optim.lr is 'fast'; it must be a number"),
        ("train --out x --epochs 1.5", "vitrim train: epochs is 1.5; it must be a whole number"),
        ("train --out x --data.limit 0.5", "vitrim train: data.limit is 0.5; it must be a whole number or null"),
        ("train --out x --augment.flip maybe", "vitrim train: augment.flip is 'maybe'; it must be true or false"),
        ("train --out x --phase bth", "vitrim train: phase is 'bth'; it must be one of 'both', 'train', 'eval'"),
        ("train", "vitrim train: missing: --out"),
        ("eval", "vitrim eval: missing: model"),
        ("", "vitrim: missing: one of demo, show"),
        ("list scor", "vitrim list: kind is 'scor'; it must be one of 'all', 'reducers', 'scores'"),
        ("train --out x --config none.yaml", "vitrim train: none.yaml does not exist"),
        ("eval vitrim_digit_vit", "vitrim eval: unknown model 'vitrim_digit_vit'; did you mean vitrim_digits_vit"),
        ("train --out x --reduction TopK()@KeepRat(0.5)", "vitrim train: unknown reducer, schedule or curriculum 'Kee"),
        ("train --out x --reduction TopK()@KeepRate(1.5)", "vitrim train: "),
        ("train --out x --epochs 2 --reduction TopK()@KeepRate()@Delayed(2)", "vitrim train: Delayed(epoch=2) never "
         "acts within 2 epochs"),
        ("train --out x --reduction TopK()@KeepRate()@Polynomial(40,140)", "vitrim train: Polynomial(start=40, "
         "end=140) never acts within 10 epochs, which count from 0; let it start earlier"),
        ("train --out x --reduction TopK(gradient)@KeepRate()", "vitrim train: TopK(score='gradient') uses gradients"),
        ("train --out x --data.name cifar10", "vitrim train: unknown data set 'cifar10'; did you mean torch/cifar10"),
        ("train --out x --batch_size 10 --optim.accumulate 4", "vitrim train: batch_size 10 is not a multiple"),
        ("train --out x --augment.mixup -1", "vitrim train: augment.mixup is -1; it must be 0 or more"),
        ("train --out x --augment.erasing 2", "vitrim train: augment.erasing is 2; it must be 0 or more, at most 1"),
        ("train --out x --data.test_split foo", "vitrim train: digits come with splits of their own"),
        ("eval vitrim_digits_vit --data.workers -1", "vitrim eval: data.workers is -1; it must be 0 or more"),
        ("eval vitrim_digits_vit --data.crop_pct 0", "vitrim eval: data.crop_pct is 0; it must be 0.01 or more"),
        ("eval vitrim_digits_vit@", "vitrim eval: vitrim_digits_vit@ names no weights; write vitrim_digits_vit@FILE"),
        ("bench vitrim_digits_vit --threads 0", "vitrim bench: threads is 0; it must be 1 or more, at most"),
        ("show vitrim_digit_vit --images . --out x", "vitrim show: unknown model 'vitrim_digit_vit'"),
        ("show vitrim_digits_vit --images . --out x", "vitrim show: vitrim_digits_vit reduces no tokens by itself"),
        ("train --out x --seed -1", "vitrim train: seed is -1; it must be 0 or more"),
        ("train --out x --track foo", "vitrim train: unknown tracker 'foo'; known: aim, "),
        ("train --out x --augment.randaugment rand-foo", "vitrim train: augment.randaugment is 'rand-foo'; it must be"),
        ("train --out x --augment.randaugment rand-p1.2.3", "vitrim train: augment.randaugment is 'rand-p1.2.3'; it m"),
        ("train --out x --augment.randaugment rand-p2", "vitrim train: augment.randaugment is 'rand-p2'; it must be"),
        ("train --out x --augment.randaugment rand-n0", "vitrim train: augment.randaugment is 'rand-n0'; it must be"),
        ("train --out x --augment.randaugment rand-mstd.", "vitrim train: augment.randaugment is 'rand-mstd.'; it mus"),
        ("train --out x --augment.randaugment rand-tfoo", "vitrim train: augment.randaugment is 'rand-tfoo'; it must"),
        ("train --out x --teacher.chekpoint 1", "vitrim train: unknown option --teacher.chekpoint; did you mean --tea"),
        ("train --out x --config teacher.yaml", "vitrim train: teacher.yaml: teacher is 3; it must be a mapping"),
        ("train --out x --elastic.rule foo", "vitrim train: elastic.rule is 'foo'; it must be one of 'sandwich', 'un"),
        ("train --out x --cache.top_k foo", "vitrim train: cache.top_k is 'foo'; it must be a whole number"),
        ("train --out x --model [3]", "vitrim train: model is [3]; it must be a mapping of options"),
        ("train --out x --data.name foo/bar", "vitrim train: unknown data set 'foo/bar'; known: digits, "),
        ("train --out x --data.name wds/a", "vitrim train: wds/a needs data.root, the folder that holds it"),
        ("train --out x --data.name wds/a --data.root .", "vitrim train: cannot open data set 'wds/a' in .: "),
        (
            "train --out x --distill Logits() --teacher.name saved --augment.views 2 --cache.folder ./x",
            "vitrim train: cache.folder is x, the folder of a run; choose another for the cache",
        ),
        ("train --out x --config optim.yaml", "vitrim train: optim.yaml: optim is 3; it must be a mapping of options"),
        ("eval vitrim_digits_vit --config data.yaml", "vitrim eval: data.yaml: data is 3; it must be a mapping"),
        ("train --out x --optim.name adamx", "vitrim train: unknown optimiser 'adamx'; did you mean"),
        ("train --out x --optim.lr 0", "vitrim train: optim.lr is 0; it must be more than 0, at most 1,000,000"),
        ("train --out x --optim.min_lr 1", "vitrim train: optim.min_lr is 1.0; it must be at most optim.lr, 0.001"),
        ("train --out x --optim.warmup_epochs 11", "vitrim train: optim.warmup_epochs is 11.0, but epochs is 10"),
        ("train --out x --augment.mixup 0.2 --batch_size 1", "vitrim train: images are mixed in pairs, but one comes"),
        (
            'train --out x --model.args {"num_classes":3}',
            "vitrim train: the network has 3 classes, the images have 10;",
        ),
        ("train --out x --model.name resnet10t", "vitrim train: no adapter for"),
        (
            "train --out x --optim.freeze --distill Cls() --teacher.name vitrim_digits_vit",
            "vitrim train: optim.freeze trains the classifier alone, which no term of distill reads",
        ),
        ("train --out x --optim.name adahessian", "vitrim train: the optimiser 'adahessian' needs second derivatives"),
        (
            "train --out x --data.holdout 0 --reduction TopK()@KeepRate(0.5)@Adaptive()",
            "vitrim train: Adaptive(threshold=0.01) follows figures on held-out images, but data.holdout is 0",
        ),
        ("train --out x --distill Logits(", "vitrim train: cannot read 'Logits('"),
        ("train --out x --model.args {embed_dim:50}", "vitrim train: model.args has an entry named 'embed_dim:50'; w"),
        ('train --out x --model.args {"depth":0}', "vitrim train: model.args.depth is 0; it must be a whole number fr"),
        ('train --out x --model.args {"norm_layer":{"eps":1}}', "vitrim train: model.args.norm_layer is a dict; it m"),
        ('train --out x --model.args {"a":[1,{"b":2}]}', "vitrim train: model.args.a is a dict; it must be a plain va"),
        ('train --out x --model.args {"dtype":"float16"}', "vitrim train: model.args.dtype may name a file or code,"),
        (
            'train --out x --distill Logits() --teacher.name saved --teacher.args {"norm_layer":[{"eps":1}]}',
            "vitrim train: teacher.args.norm_layer is a dict; it must be a plain value or a short list of them",
        ),
        ('train --out x --model.args {"drop_path_rate":2}', "vitrim train: drop_path_rate is 2; it must be 0 or more"),
        ('train --out x --model.args {"in_chans":2}', "vitrim train: the model takes 2 channels; images have 1 (grey)"),
        (
            'train --out x --model.name saved --model.args {"foo":1}',
            "vitrim train: vitrim_digits_vit does not take these arguments: ",
        ),
        (
            'train --out x --model.name saved --model.args {"drop_path_rate":-1}',
            "vitrim train: drop_path_rate is -1; it must be 0 or more, at most 1",
        ),
        (
            'train --out x --distill Logits() --teacher.name saved --teacher.args {"foo":1}',
            "vitrim train: no teacher: vitrim_digits_vit does not take these arguments: ",
        ),
        (
            "eval --method dense vitrim_digits_vit",
            "vitrim eval: missing: model; --method takes all words that follow it, so begin with model",
        ),
        (
            "bench --batch_size 1 2 vitrim_digits_vit --rounds 1",
            "vitrim bench: missing: model; --batch_size takes all words that follow it, so begin with model",
        ),
        ("eval vitrim_digits_vit --batch_size 0", "vitrim eval: batch_size is 0; it must be 1 or more"),
        ("study . --out x", "vitrim study: . cannot be read (Is a directory)"),
        ("study none.yaml --out x", "vitrim study: none.yaml does not exist"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    words: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for group in ("optim", "data", "teacher"):
        Path(f"{group}.yaml").write_text(f"{group}: 3\n")
    if "saved" in words:
        save(build_model("vitrim_digits_vit", depth=1, embed_dim=8, num_heads=1), "saved")
    before = set(tmp_path.iterdir())
    code, out, err = call(capsys, *words.split())
    assert code == 2
    assert err.strip().startswith(line)
    assert err.strip().count("\n") == 0
    assert "Traceback" not in out + err
    assert set(tmp_path.iterdir()) == before


def test_unknown_option_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "r.yaml").write_text("optim: {lrr: 1}\n")
    code, _, err = call(capsys, "train", "--config", str(tmp_path / "r.yaml"), "--out", "x")
    assert code == 2
    assert err.startswith(f"vitrim train: {tmp_path}/r.yaml: unknown option in optim 'lrr'; did you mean lr?")


def test_a_wrong_value_in_a_file_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "recipe.yaml"
    for text, said in (
        ("epochs: three", "epochs is 'three'; it must be a whole number"),
        ("data: {rot: x}", "unknown option in data 'rot'; did you mean root or crop_pct?"),
    ):
        file.write_text(text)
        code, _, err = call(capsys, "train", "--config", str(file), "--out", str(tmp_path / "run"))
        assert (code, err) == (2, f"vitrim train: {file}: {said}\n")
        with pytest.raises(RecipeError, match=r"recipe\.yaml: "):
            Recipe.read(file)


def test_a_name_that_a_file_gives_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "r.yaml").write_text("epochs: 2\nseed: 1\nepochs: 3\n")
    code, _, err = call(capsys, "train", "--config", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run"))
    assert code == 2
    assert err.endswith("r.yaml, line 3: 'epochs' is given twice; remove or rename one\n")
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "r.yaml").write_bytes(b"a: \xff")
    code, _, err = call(capsys, "train", "--config", str(tmp_path / "r.yaml"), "--out", "x")
    assert code == 2
    assert "r.yaml is not text in UTF-8 (invalid start byte at byte 3)" in err
    assert err.count("\n") == 1


def test_config_overrides_and_print_config_round_trip(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = Recipe.from_dict({"optim": {"lr": 0.01}, "model": {"args": {"depth": 2}}, "epochs": 7})
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    words = ["train", "--config", str(tmp_path / "r.yaml"), "--epochs", "3", "--augment.flip", "--out", "runs/a"]
    code, out, _ = call(capsys, *words, "--print_config")
    assert code == 0
    printed = yaml.safe_load(out)
    assert printed.pop("out") == "runs/a"
    expected = Recipe.from_dict({**recipe.to_dict(), "epochs": 3, "augment": {"flip": True}})
    assert Recipe.from_dict(printed) == expected
    (tmp_path / "again.yaml").write_text(out)
    assert call(capsys, "train", "--config", str(tmp_path / "again.yaml"), "--print_config")[1] == out


@pytest.mark.parametrize(("words", "value"), [("", False), ("--montage", True), ("--montage false", False)])
def test_booleans_are_flags(words: str, value: bool, capsys: pytest.CaptureFixture[str]):
    for order in (["m", *words.split()], [*words.split(), "m"]):
        options = parse_words(cli.VERBS["show"], "vitrim show", ["--images", "i", "--out", "o", *order])
        assert (options["model"], options.get("montage", False)) == ("m", value)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_option_is_explained_in_whole_sentences(verb: str, capsys: pytest.CaptureFixture[str]):
    for option in options_of(cli.VERBS[verb]):
        for text in (option.help, *filter(None, [option.heading])):
            assert text, f"{verb} {option.name} has no help"
            assert text[-1] not in ":;,-(", f"{verb} {option.name}: {text}"
            assert text.count("(") == text.count(")"), f"{verb} {option.name}: {text}"
            assert text.count("`") % 2 == 0, f"{verb} {option.name}: {text}"
    _, out, _ = call(capsys, verb, "--help")
    about = out.partition("\n\n")[2].partition("\n\n")[0]
    assert about.endswith("."), about
    for title in re.findall(r"^(?! )\S.*:$", out, re.M):  # Headings of sections.
        assert title.count(":") <= 2, title
        assert title[-2] not in ":;,-(", title


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (VitrimError("no such thing"), 2, "vitrim list: no such thing"),
        (DataError("Caught DataError in DataLoader worker process 0.\nTraceback:\n  x\nvitrim.errors.DataError: cannot"
                   " read a.png: broken"), 2, "vitrim list: cannot read a.png: broken"),
        (KeyboardInterrupt(), 130, "vitrim list: interrupted"),
        (MemoryError(), 2, "vitrim list: there is not enough memory for this; lower --batch_size (in training, optim."),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee"), 2,
         "vitrim list: there is not enough memory for this; lower --batch_size"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), 2,
         "vitrim list: there is not enough memory for this; lower --batch_size"),
        (RuntimeError("DataLoader worker (pid 1) is killed by signal: Bus error. It is possible that dataloader's "
                      "workers are out of shared memory."), 2, "vitrim list: the processes that read images ran out"),
        (Stopped(15, "epoch 2, step 3 of 9"), 143, "vitrim list: stopped by SIGTERM at epoch 2, step 3 of 9; the"),
    ],
)  # fmt: skip
def test_ends(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def fail(kind: str = "all") -> None:
        """Fail.

        Args:
            kind: nothing.
        """
        raise error

    monkeypatch.setitem(cli.VERBS, "list", fail)
    found, _, err = call(capsys, "list")
    assert found == code
    assert err.startswith(line)
    assert err.count("\n") == 1


def test_train_then_eval_takes_the_images_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = ["--model.args", "{depth: 2, embed_dim: 24, num_heads: 2}", "--data.workers", "0", "--data.limit", "60"]
    run, out = str(tmp_path / "run"), tmp_path / "table.json"
    code, said, _ = call(capsys, "train", *model, "--epochs", "1", "--out", run)
    assert code == 0
    assert "test accuracy" in said
    code, said, err = call(
        capsys, "eval", run, "--method", "dense", "TopK() @ KeepRate(0.5, at=[1])", "--out", str(out)
    )
    assert code == 0, err
    table = yaml.safe_load(out.read_text())
    dense, reduced = table["rows"]
    assert (dense["method"], dense["tokens"]) == ("dense", [65, 65])
    assert reduced["tokens"][-1] < dense["tokens"][-1]
    assert reduced["gmacs"] < dense["gmacs"]
    assert dense["num_images"] == 364
    assert all(len(line) <= 80 for line in said.splitlines() if not line.startswith("written"))
    (tmp_path / "run" / "recipe.yaml").write_text("data: {name: folder, root: nowhere}\n")
    assert call(capsys, "eval", run)[::2] == (2, "vitrim eval: nowhere is not a folder\n")
    for verb, *more in (["eval"], ["sweep", "--method", "TopK() @ KeepRate({r})", "--vary", "{r: [0.5]}"]):
        words = [verb, run, *more, "--data.name", "digits", "--data.workers", "0", "--out", str(tmp_path / verb)]
        code, _, err = call(capsys, *words[:-1], words[-1] + ".json")
        assert code == 0, err
        assert yaml.safe_load((tmp_path / f"{verb}.json").read_text())["rows"][0]["accuracy"] == dense["accuracy"]
    (tmp_path / "data.yaml").write_text("data: {name: digits, workers: 0}\n")
    words = ["stratify", run, "--config", str(tmp_path / "data.yaml"), "--num_images", "32"]
    code, _, err = call(capsys, *words, "--out", str(tmp_path / "super"))
    assert code == 0, err
    code, _, err = call(capsys, "eval", run, "--out", str(out))
    assert code == 2
    assert "exists; choose another name" in err
    code, _, err = call(capsys, "eval", run, "vit_tiny_patch16_224", "--data.name", "digits")
    assert (code, "has 1000 classes, but the images have 10" in err) == (2, True)


LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"OMP_NUM_THREADS": "99999999999"}, "OMP_NUM_THREADS is '99999999999'; it must be a whole number, 1 to 1024"),
        ({"OMP_NUM_THREADS": "0"}, "OMP_NUM_THREADS is '0'"),
        ({"OMP_NUM_THREADS": "-1"}, "OMP_NUM_THREADS is '-1'"),
        ({"OMP_NUM_THREADS": "4,many"}, "OMP_NUM_THREADS is '4,many'"),
        ({"MKL_NUM_THREADS": "1e9"}, "MKL_NUM_THREADS is '1e9'"),
        ({"OPENBLAS_NUM_THREADS": "5000"}, "OPENBLAS_NUM_THREADS is '5000'"),
        ({"RANK": "first"}, "RANK is 'first'; it must be a whole number, 0 or more"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'; it must be a whole number, 1 or more"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set; start processes with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "WORLD_SIZE is 2, but MASTER_ADDR is not set"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is '99999'"),
    ],
)
def test_absurd_environment_variables_are_refused_in_one_line(
    variables: dict[str, str], line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", *LAUNCHED):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, out, err = call(capsys, "list")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"the environment variable {line}" in err


def test_usual_environment_variables_are_accepted():
    check_variables({})
    check_variables({"OMP_NUM_THREADS": "", "MKL_NUM_THREADS": " 8 "})
    check_variables({"OMP_NUM_THREADS": "4,2", **LAUNCHED, "WORLD_SIZE": "64", "RANK": "63"})


REFUSED = {
    "eval": ("train_split", "holdout", "limit"),
    "sweep": ("train_split", "holdout", "limit"),
    "extract": ("test_split", "holdout"),
}
SUBJECTS = {"sweep": ["m", "--method", "x", "--vary", "{a: [1]}"], "extract": ["m", "--out", "x"], "eval": ["m"],
            "stratify": ["m", "--out", "x"], "bench": ["m"], "train": ["--out", "x"]}  # fmt: skip


@pytest.mark.parametrize("verb", REFUSED)
def test_help_and_advice_name_only_options_that_the_verb_takes(verb: str, capsys: pytest.CaptureFixture[str]):
    out = call(capsys, verb, "--help")[1]
    for name in REFUSED[verb]:
        assert f"--data.{name}" not in out
        code, _, err = call(capsys, verb, *SUBJECTS[verb], f"--data.{name}x", "1")
        assert code == 2
        assert not re.search(rf"--data\.{name}( |\?|$)", err.partition("mean")[2])
    assert "--data.image_size" in out


@pytest.mark.parametrize("verb", SUBJECTS)
def test_the_printed_options_of_a_verb_can_be_its_file(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Images that were not asked for stay those of the model, and options that the verb refuses are not printed."""
    words, path = [verb, *SUBJECTS[verb]], tmp_path / "options.yaml"
    more = ["--data.image_size", "8"] if verb in REFUSED else []
    code, out, _ = call(capsys, *words, *more, "--print_config")
    assert code == 0
    path.write_text(out)
    expected = parse_words(cli.VERBS[verb], verb, [*words[1:], *more])
    given = parse_words(cli.VERBS[verb], verb, [*words[1:], "--config", str(path)])
    assert given.get("data") == expected.get("data")
    assert call(capsys, *words, "--config", str(path), "--print_config")[1] == out


def test_help_says_null_of_no_option_that_is_unset_without_it(capsys: pytest.CaptureFixture[str]):
    for verb in cli.VERBS:
        out = " ".join(call(capsys, verb, "--help")[1].split())
        assert "or null" not in out
        assert "default: null" not in out
