"""Text in files and options is plain data: it imports nothing, and it is bounded."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from vitrim import cli
from vitrim.errors import RecipeError, VitrimError
from vitrim.options import check_options, from_dict, read_yaml
from vitrim.train.recipe import Recipe
from vitrim.train.specs import ModelSpec
from vitrim.yaml_text import dump_yaml, parse_yaml

EVIL = {"class_path": "evil.Thing", "init_args": {"path": "x"}}
GROUPS = ("model", "data", "augment", "optim", "elastic", "teacher", "cache")
LEAVES = ("model.args", "teacher.args", "model.name", "teacher.name", "optim.lr", "reduction", "distill", "track")


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a module of the working folder writes when anything imports it."""
    (tmp_path / "evil.py").write_text("open('imported', 'w').close()\nclass Thing: pass\n")
    (tmp_path / "evil_callable.py").write_text("open('imported', 'w').close()\ndef thing(*a, **k): pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "imported"


def refused(*words: str) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([*words])
    assert end.value.code == 2


def nested(name: str, value: Any) -> dict[str, Any]:
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize("name", [*GROUPS, *LEAVES])
@pytest.mark.parametrize(
    "value", [EVIL, {"norm_layer": EVIL}, [EVIL], "evil.Thing", {"class_path": "evil_callable.thing"}], ids=str
)
def test_no_value_of_an_option_imports_anything(
    name: str, value: Any, evil: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"distill": "Logits()", "epochs": 1} | nested(name, value)
    if name.startswith("teacher"):
        data["teacher"] = {"name": "vitrim_digits_vit"} | (data["teacher"] if name != "teacher" else {"args": value})
    Path("r.yaml").write_text(yaml.safe_dump(data))
    refused("train", "--config", "r.yaml", "--out", "run")
    refused("train", "--out", "run", f"--{name}", str(value).replace("'", '"'))
    refused("train", "--config", str(value), "--out", "run")
    for verb in ("eval", "sweep", "stratify", "show", "bench", "list", "extract"):
        refused(verb, "vitrim_digits_vit", "--config", "r.yaml")
    assert not evil.exists()
    assert "evil" not in sys.modules
    said = capsys.readouterr().err
    assert all(len(line) < 500 for line in said.splitlines())
    assert "Traceback" not in said


def test_the_command_started_as_a_module_imports_nothing_from_the_working_folder(evil: Path) -> None:
    text = f"model: {EVIL}\nteacher: {EVIL}\nelastic: {EVIL}\n"
    Path("r.yaml").write_text(text.replace("'", ""))
    paths = [str(Path(cli.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    words = ["-m", "vitrim", "train", "--config", "r.yaml", "--out", "x"]
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
    assert (done.returncode, evil.exists()) == (2, False)
    assert "unknown option in model 'class_path'" in done.stderr


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("optim.ema", "a number"), ("data.name", "text"), ("optim.warmup_epochs", "a number"), ("data", "a mapping"),
        ("optim.accumulate", "a whole number"), ("batch_size", "a whole number"), ("model.args", "a mapping"),
        ("elastic.max_saving", "a number"), ("model", "a mapping of options"), ("epochs", "a whole number"),
        ("compile", "true or false"), ("phase", "one of 'both'"), ("cache.folder", "text"),
    ],
)  # fmt: skip
def test_null_is_refused_where_an_option_needs_a_value(name: str, says: str) -> None:
    with pytest.raises(RecipeError, match=rf"^{name} is None; it must be {says}"):
        Recipe.from_dict(nested(name, None)).check()
    if "." not in name:
        with pytest.raises(RecipeError, match=rf"^{name} is None"):
            check_options(Recipe(**{name: None}))


def numbers(options: Any, prefix: str = "") -> list[str]:
    """The names of the options that are numbers by default."""
    found: list[str] = []
    for name, value in vars(options).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            found.append(prefix + name)
        elif hasattr(value, "__dataclass_fields__"):
            found += numbers(value, f"{prefix}{name}.")
    return found


OPTIONAL = ("data.limit", "data.image_size", "data.crop_pct", "augment.views", "optim.layer_decay", "elastic.images",
            "elastic.grow_epochs", "elastic.width_multiple", "elastic.temperature", "elastic.max_saving",
            "cache.top_k")  # fmt: skip


@pytest.mark.parametrize("name", [*numbers(Recipe()), *OPTIONAL])
@pytest.mark.parametrize("value", [10**40, -1, float("nan"), float("inf"), 1e300, True, "1", [1]], ids=repr)
def test_every_number_has_bounds(name: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=rf"^{name} is .*; it must be ") as error:
        Recipe.from_dict(nested(name, value)).check()
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_a_denormal_alpha_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=rf"augment.{name} is 1e-320; it must be 0 \(off\), or 0.001 to 1000"):
        Recipe.from_dict({"augment": {name: 1e-320}}).check()
    Recipe.from_dict({"augment": {name: 0.001}}).check()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"pretrained": True}, "model.args holds pretrained; set model.pretrained instead"),
        ({1: 2}, "model.args has an entry named 1; names must be text"),
        ({"a": {None: 2}}, "model.args.a has an entry named None; names must be text"),
        ({"checkpoint_path": "/etc/passwd"}, "model.args holds checkpoint_path, which is not a size of the network"),
        ({"depth": 10**8}, "model.args.depth is 100000000; it must be at most 1,000"),
        ({"img_size": [224, 10**5]}, "model.args.img_size is 100000; it must be at most 8,192"),
        ({"embed_dim": 10**30}, "model.args.embed_dim is 1000000000000000000000000000000; it must be at most 65,536"),
        ({"norm_layer": object}, "model.args.norm_layer is <class 'object'>; it must be plain data"),
        ({"a": [1.0, float("nan")]}, "model.args.a is nan; it must be a finite number"),
        ({"a": {"b": float("-inf")}}, "model.args.a.b is -inf; it must be a finite number"),
        ({"embed_dim:50": None}, "model.args has an entry named 'embed_dim:50'; write {name: value}, with a space"),
    ],
)
def test_arguments_of_a_model_are_plain_and_not_options_of_their_own(args: dict[Any, Any], says: str) -> None:
    for made in (lambda: Recipe.from_dict({"model": {"args": args}}), lambda: Recipe(model=ModelSpec(args=args))):
        with pytest.raises(VitrimError) as error:
            made().check()
        assert str(error.value).startswith(says)


@pytest.mark.parametrize("option", ["epochs", "reduction", "data", "model"])
def test_values_that_python_cannot_show_are_refused_in_one_line(option: str) -> None:
    deep: Any = 0
    for _ in range(2000):
        deep = [deep]
    for value in (deep, 10**5000):
        with pytest.raises(RecipeError, match=rf"^{option} is a (list|int) that is too long to show; it must be"):
            Recipe.from_dict({option: value}).check()


BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, "holds more than 20,000 values"),
        ("a: &a [*a]", "an alias in it repeats itself without end"),
        ("&a {b: *a}", "an alias in it repeats itself without end"),
        ("a: &a {b: &b [*a]}", "an alias in it repeats itself without end"),
        ("a: " + "[" * 900 + "]" * 900, "nested more than 40 levels deep"),
        ("".join(f"{'  ' * i}a:\n" for i in range(900)), "too long|nested more than 40 levels deep"),
        ("a: [" + "1," * 30_000 + "]", "holds more than 20,000 values"),
        ("a: " + "x" * 200_001, "too long"),
        ("a: " + "9" * 5000, "not YAML: a number of 5,000 digits"),
        ("a: !!python/object/apply:os.system [x]", "not YAML"),
        ("a: !!binary eA==", "not YAML"),
        ("? [1]\n: 2", "not YAML"),
        ("a: !!int x", "not YAML"),
        ("- 1", "does not hold options but list"),
        ("", "does not hold options but NoneType"),
    ],
    ids=lambda text: str(text)[:20],
)
def test_hostile_yaml_is_refused_in_one_line(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=says) as error:
        read_yaml(tmp_path / "r.yaml")
    assert "\n" not in str(error.value)


def test_pipes_and_devices_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(RecipeError, match="cannot be read"):
            read_yaml(path)
    with pytest.raises(RecipeError, match="cannot be the name of a file"):
        read_yaml("a\0b")


@pytest.mark.parametrize(
    "value",
    ["1e-3", "010", "1:30", "2024-01-01", "no", "null", "~", "0x1F", "1_000", ".5", "-", "", "a: b", "é\n", "<<", "=",
     1e-3, 10, -0.5, 1e30, None, True, [1, [2]], {"a": {"b": []}}],
    ids=repr,
)  # fmt: skip
def test_plain_data_is_read_back_as_it_was_written(value: Any) -> None:
    found = parse_yaml(dump_yaml({"a": value, "b": [value]}), "text")
    assert found == {"a": value, "b": [value]}
    assert type(found["a"]) is type(value)


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("010", 10), ("1:30", "1:30"), ("2024-01-01",) * 2])
def test_numbers_mean_what_they_look_like(text: str, value: Any) -> None:
    assert parse_yaml(f"a: {text}", "text") == {"a": value}


def test_shared_rows_and_merge_keys_still_work() -> None:
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: *a", "text") == {
        "a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2},
    }  # fmt: skip


def test_a_bare_no_is_the_word_where_one_of_several_words_is_wanted() -> None:
    assert from_dict(Recipe, parse_yaml("optim: {precision: no}", "text"), "recipe", "").optim.precision == "no"


def test_options_on_the_command_line_have_precedence_over_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, epochs in (("one", 7), ("two", 8)):
        (tmp_path / f"{name}.yaml").write_text(f"epochs: {epochs}\nmodel: {{args: {{depth: 2}}}}\nteacher: null\n")
    config = ["--config", str(tmp_path / "one.yaml"), "--config", str(tmp_path / "two.yaml")]
    for words, epochs in (([], 8), (["--epochs", "3"], 3)):
        with pytest.raises(SystemExit):
            cli.main(["train", *words, *config, "--teacher.name", "x", "--elastic", "{}", "--print_config"])
        found = Recipe.from_dict(yaml.safe_load(capsys.readouterr().out))
        assert (found.epochs, found.model.args, found.teacher) == (epochs, {"depth": 2}, ModelSpec("x"))
        assert found.elastic is not None
