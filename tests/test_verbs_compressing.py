"""`vitrim compress` and `vitrim verify` as commands: what they refuse, list, warn about and write."""

import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import vitrim
from calling import call
from vitrim import Certificate, ToMe, TopK, attach, attached, build_model, load, save
from vitrim.compression import finetune, job, solver, verification
from vitrim.compression.candidates import power, stages
from vitrim.compression.images import read
from vitrim.compression.searched import NOT_KNOWN, Searched
from vitrim.data.specs import DataSpec
from vitrim.data.streams import Stream
from vitrim.elastic.chain import hash_of
from vitrim.models import open_model
from vitrim.train.stopping import Stopped
from vitrim.verbs.images import known_images, training_stream
from vitrim.verbs.verifying import _original
from vitrim.verbs.verifying import _pictures as pictures


@pytest.fixture(scope="module", autouse=True)
def few() -> Iterator[None]:
    """Two reducers, and times that do not depend on the load."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (job, verification):
            patch.setattr(module, "sessions", lambda *models, **options: [(0.5, 2.0, 1.0), (0.6, 2.0, 1.2)])
        patch.setattr(solver, "reducers", lambda has_cls: [TopK(), ToMe()])
        patch.setattr(solver, "first_shapes", lambda depth: [power(1.4), *stages(depth)[:1]])
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    network = build_model("vitrim_digits_vit", depth=2, embed_dim=16, num_heads=2)
    nn.init.normal_(network.head.weight, std=0.5)
    return str(save(network, tmp_path_factory.mktemp("model") / "digits"))


FEW = ("--num_images", 40, "--trials", 0, "--batch_size", 2, "--data.workers", 0, "--using", "tokens")
QUICK = (*FEW, "--data.name", "digits")
DRY = ("--macs", 0.5, "--data.name", "digits", "--data.workers", 0, "--num_images", 80, "--dry_run")


def test_a_folder_is_written_and_verified_and_never_overwritten(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cheaper"
    code, said, _ = call(capsys, "compress", model, "--macs", 0.6, "--max_drop", 1, *QUICK, "--out", out)
    assert code == 0
    assert "at most 0.6 of the MACs, met" in said
    found = Certificate.read(out)
    assert found.load[-1] == f"model = vitrim.load({str(out)!r})"
    assert found["macs"].met
    assert found["drop"].asked == 1, "digits are of the classes of this model"
    assert load(out)
    named = known_images(str(out), {"workers": 1})
    assert named is not None, "a file of this model is compared on the images of the certificate"
    assert (named.name, named.workers) == ("digits", 1)
    assert call(capsys, "compress", model, "--macs", 0.6, *QUICK, "--out", out)[0] == 2
    code, said, _ = call(capsys, "verify", out, "--out", tmp_path / "verified.md")
    assert code == 0, said
    assert "holds here" in said
    assert "not measured" not in said.replace("not measured: only", "")
    code, _, err = call(capsys, "verify", out, "--original", "vitrim_digits_vit")
    assert (code, "another model" in err) == (2, True)
    torch.manual_seed(3)
    save(load(out), tmp_path / "other")
    (tmp_path / "other" / "certificate.json").write_text((out / "certificate.json").read_text().replace("0", "1"))
    code, _, err = call(capsys, "verify", tmp_path / "other")
    assert code == 2, "numbers were changed"


def test_a_line_that_does_not_hold_ends_with_1(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cheaper"
    call(capsys, "compress", model, "--macs", 0.6, *QUICK, "--out", out)
    file = out / "certificate.json"
    macs = f'"value": {Certificate.read(out)["macs"].value:.0f}'
    assert macs in file.read_text()
    file.write_text(file.read_text().replace(macs, '"value": 12345'))
    code, said, _ = call(capsys, "verify", out)
    assert code == 1
    assert "DOES NOT HOLD" in said


def test_an_answer_can_learn_from_the_model_afterwards(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "learnt"
    words = ("--finetune.epochs", 1, "--finetune.lr", 0.01, "--data.limit", 60)
    code, _, err = call(capsys, "compress", model, "--macs", 0.6, *QUICK, *words, "--out", out)
    assert code == 0, err
    before, after = Certificate.read(out / "start"), Certificate.read(out)
    # A learning rate so high takes it further away, so that it stays as it was.
    assert after.weights == before.weights
    assert after["macs"] == before["macs"]
    assert after.notes[-1].startswith("Learnt from the given model after the search, epochs: 1.")
    assert (out / "finetune" / "result.json").exists()
    assert str(attached(load(out)).reduction) == after.reduction  # type: ignore[union-attr]
    assert call(capsys, "verify", out)[0] == 0
    assert call(capsys, "compress", model, "--macs", 0.6, *QUICK, *words, "--out", out)[0] == 2


def test_a_model_of_other_classes_than_the_images_learns_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = build_model("vitrim_digits_vit", depth=2, embed_dim=16, num_heads=2, num_classes=3)
    nn.init.normal_(network.head.weight, std=0.5)
    model, out = save(network, tmp_path / "model", classes=["ant", "bee", "cat"]), tmp_path / "learnt"
    words = ("--finetune.epochs", 1, "--data.limit", 60, "--out", out)
    code, _, err = call(capsys, "compress", model, "--macs", 0.6, *QUICK, *words)
    assert code == 0, err
    found = Certificate.read(out)
    assert "Learnt from the given model" in found.notes[-1]
    assert "accuracy" not in found
    assert load(out).head.out_features == 3


def test_learning_that_was_interrupted_goes_on_and_another_search_starts_over(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "learnt"
    words = (*QUICK, "--finetune.epochs", 1, "--data.limit", 60, "--out", out)

    def stopped(*args: object, **options: object) -> None:
        raise Stopped(signal.SIGINT, "epoch 1, step 1 of 2")

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "train", stopped)
        code, _, err = call(capsys, "compress", model, "--macs", 0.6, *words)
    assert (code, "repeat the same command" in err) == (130, True)
    code, _, err = call(capsys, "compress", model, "--macs", 0.5, *words)
    assert (code, "another search; choose another folder" in err) == (2, True)
    with monkeypatch.context() as patch:
        patch.setattr(job.Job, "run", lambda *args, **options: pytest.fail("the search was finished"))
        code, said, err = call(capsys, "compress", model, "--macs", 0.6, *words)
    assert (code, f"is in {out / 'start'} already" in said) == (0, True), err
    assert "epochs: 1" in Certificate.read(out).notes[-1]
    (out / "finetune" / "mine.txt").write_text("of the run before")
    assert call(capsys, "compress", model, "--macs", 0.5, *words, "--overwrite")[0] == 0
    assert not (out / "finetune" / "mine.txt").exists(), "weights of the run before would be taken for those of this"
    assert Certificate.read(out / "start").asked == Certificate.read(out).asked == "at most 0.5 of the MACs"


def test_what_cannot_learn_is_refused_before_the_search(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "Job", None)
    bare = save(build_model("vitrim_digits_vit", depth=2, embed_dim=16, num_heads=2, num_classes=0), tmp_path / "bare")
    words = ("--macs", 0.6, *FEW, "--finetune.epochs", 1, "--out", tmp_path / "out")
    code, _, err = call(capsys, "compress", bare, *words, "--data.name", "digits")
    assert (code, "has no classifier; leave finetune.epochs out" in err) == (2, True)
    code, _, err = call(capsys, "compress", model, *words, "--data.root", photos(tmp_path / "photos"))
    assert (code, "has no folder train" in err) == (2, True)
    code, _, err = call(capsys, "compress", "vitrim_digits_vit", *words, "--data.name", "digits")
    assert (code, "has learnt nothing" in err) == (2, True)
    assert not (tmp_path / "out").exists()


def photos(folder: Path, number: int = 40) -> Path:
    """Images of noise in three folders."""
    for index in range(number):
        (folder / f"{index % 3}").mkdir(parents=True, exist_ok=True)
        noise = torch.randint(0, 255, (9, 9), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{index % 3}" / f"{index}.png")
    return folder


def test_photos_without_classes_do(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("compress", model, "--data.root", photos(tmp_path / "photos"), "--macs", 0.6, *FEW)
    code, said, err = call(capsys, *words, "--out", tmp_path / "cheaper")
    assert code == 0, err
    assert "accuracy" not in said
    assert Certificate.read(tmp_path / "cheaper")["divergence"].number == 20
    code, _, err = call(capsys, *words, "--max_drop", 0.1, "--out", tmp_path / "again")
    assert (code, "max_drop needs test images" in err) == (2, True)
    (tmp_path / "photos" / "0" / "bad.png").write_bytes(b"no image")
    code, _, err = call(capsys, *words, "--out", tmp_path / "again")
    assert code == 2
    assert "bad.png" in err
    assert not (tmp_path / "again").exists()
    skip = ("--data.on_corrupt", "skip")
    assert call(capsys, *words, *skip, "--dry_run")[0] == 0


def test_verify_leaves_out_the_images_that_the_search_used(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = photos(tmp_path / "photos", 50), tmp_path / "cheaper"
    assert call(capsys, "compress", model, "--data.root", folder, "--macs", 0.6, *FEW, "--out", out)[0] == 0
    network, used = load(out), Searched.of(Certificate.read(out))
    assert used is not None
    assert used.number == 20
    spec = DataSpec(root=str(folder), workers=0)
    stream = training_stream(network, spec)
    searched = read(stream, 20, 0).images
    found, _, notes = pictures(network, str(out), used, spec, None)
    assert len(found) == 30
    assert not any((image == one).all() for image in found.images for one in searched)
    assert notes == ("The images that the search used are left out: 20 of 50.",)
    (folder / "0" / "0.png").unlink()
    found, _, notes = pictures(network, str(out), used, spec, None)
    assert (len(found), notes) == (49, (NOT_KNOWN,))
    _, _, notes = pictures(network, str(out), used, DataSpec(workers=0), 30)
    assert "any of them that are among the images here are not left out" in notes[0]
    code, said, _ = call(capsys, "verify", out, "--data.workers", 0, "--num_images", 16)
    assert code in (0, 1)
    assert "which of them the search used is not known" in " ".join(said.split())


def test_a_test_split_that_cannot_be_opened_is_no_missing_one(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "photos"
    photos(root / "train")
    words = ("compress", model, "--data.root", root, "--macs", 0.6, *FEW)
    code, said, err = call(capsys, *words, "--out", tmp_path / "without")
    assert (code, err) == (0, "")
    assert "has no folder test or val or validation; folders there: train: training images stand in" in said
    assert f"Measured on 20 images that are not test images: {root}/train.".replace(" ", "") in "".join(said.split())
    photos(root / "val")
    code, said, _ = call(capsys, *words, "--num_test_images", 17, "--out", tmp_path / "with")
    assert (code, "stand in" in said) == (0, False)
    record = {"place": f"{root}/val", "split": "test", "number": 17}
    assert Certificate.read(tmp_path / "with").source["measured"] == record
    _, said, _ = call(capsys, "verify", tmp_path / "with")
    assert f"Measured on 40 test images: {root}/val.".replace(" ", "") in "".join(said.split())
    (root / "val" / "3").mkdir()
    file = tmp_path / "model.onnx"
    for verb in (words, ("verify", tmp_path / "with", "--data.root", root), ("export", model, "--data.root", root)):
        code, _, err = call(capsys, *verb, *([] if verb[0] == "verify" else ["--out", file]))
        assert (code, "3 holds no images that can be read" in err) == (2, True)
    _, said, _ = call(capsys, "verify", tmp_path / "with")
    assert "The images of the certificate cannot be read here: class folder" in " ".join(said.split())
    (root / "val" / "3").rmdir()
    shutil.rmtree(root / "train")
    code, _, err = call(capsys, *words, "--data.test_split", "val", "--out", tmp_path / "again")
    assert (code, "has no folder train" in err) == (2, True)


def test_relative_folders_of_images_are_those_of_where_a_command_ran(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("here", "there"):
        for split in ("train", "val"):
            photos(tmp_path / place / "photos" / split, 40 if place == "here" else 24)
    monkeypatch.chdir(tmp_path / "here")
    small = ("--epochs", 1, "--batch_size", 10, "--data.workers", 0, "--data.image_size", 8)
    network = ("--model.name", model, "--model.reset_head", "--data.root", "photos")
    assert call(capsys, "train", *network, *small, "--out", "run")[0] == 0
    assert call(capsys, "compress", "run", "--macs", 0.6, *FEW, "--out", "cheaper")[0] == 0
    assert "photos" in Path("run/recipe.yaml").read_text()
    assert str(tmp_path) not in Path("cheaper/certificate.json").read_text()
    monkeypatch.chdir(tmp_path / "there")
    for folder in ("../here/run", "../here/cheaper"):
        found = known_images(folder, {})
        assert found is not None
        assert found.root == str(tmp_path / "here" / "photos")
        assert known_images(folder, {"root": "photos"}).root == "photos"  # pyright: ignore
    _, said, _ = call(capsys, "verify", "../here/cheaper")
    assert "Measured on 40 test images: /" in " ".join(said.split())
    (tmp_path / "here" / "photos").rename(tmp_path / "gone")
    for folder in ("../here/run", "../here/cheaper"):
        code, _, err = call(capsys, "eval", folder)
        assert code == 2
        assert err.endswith(
            f"the images of {folder} are not here: photos, which was {tmp_path}/here/photos when it was made; give "
            "--data.root FOLDER\n"
        )


def test_a_certificate_says_what_was_done_where_only_the_last_block_does_less(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solver, "reducers", lambda has_cls: [])
    code, said, _ = call(capsys, "compress", model, "--macs", 0.95, *QUICK, "--out", tmp_path / "cheaper")
    assert code == 0
    assert "Change: no token is dropped, no width is cut; the last block computes only CLS." in " ".join(said.split())


@pytest.mark.parametrize("using", [(), ("--using", "tokens")], ids=["both", "tokens"])
def test_a_budget_out_of_reach_is_named_by_a_dry_run_and_ends_the_command_with_1(
    using: tuple[str, ...], model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("compress", model, "--macs", 0.001, *QUICK[:-4], *DRY[2:-1], *using)
    for more in (("--dry_run",), ("--out", tmp_path / "cheaper")):
        code, said, _ = call(capsys, *words, *more)
        assert "at most 0.001 of the MACs cannot be reached; the least is " in said
        assert code == (0 if more[0] == "--dry_run" else 1)
    assert not Certificate.read(tmp_path / "cheaper").met
    code, said, _ = call(capsys, *words, "--macs", 0.6, "--dry_run")
    assert (code, "cannot be reached" in said) == (0, False)


def test_nothing_is_read_before_options_are_checked_and_little_for_a_dry_run(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[int] = []
    plain = Stream.__getitem__
    monkeypatch.setattr(Stream, "__getitem__", lambda stream, key: keys.append(key) or plain(stream, key))
    words = ("compress", model, "--macs", 0.6, *QUICK, "--out", tmp_path / "new")
    code, _, err = call(capsys, *words, "--num_images", 10)
    assert (code, "10 images are too few" in err, keys) == (2, True, [])
    code, said, _ = call(capsys, *words, "--num_test_images", 33, "--dry_run")
    assert (code, len(keys)) == (0, 16)
    assert re.search(r"images for the certificate +33", said)


def test_a_certificate_of_another_image_size_is_verified_at_that_size(model: str, tmp_path: Path) -> None:
    network = open_model(model, 12)
    certificate = Certificate("macs 0.5", [], "another", hash_of(network), source={"model": model})
    assert _original(None, certificate, 12) is not None
    assert _original(None, certificate, None) is None


def test_images_must_be_named_where_a_model_comes_with_none(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, family = ("--out", tmp_path / "new"), tmp_path / "family"
    assert call(capsys, "stratify", model, "--data.name", "digits", "--num_images", 16, "--out", family)[0] == 0
    for words in (
        ("compress", model, "--macs", 0.6, *FEW, *out),
        ("stratify", model, *out),
        ("stratify", model, "--epochs", 1, *out),
        ("extract", family, "--macs", 0.9, "--refit", "true", *out),
        ("eval", model, "--data.workers", 0),
        ("sweep", model, "--method", "TopK() @ KeepRate({a})", "--vary", "{a: [0.5]}"),
    ):
        code, _, err = call(capsys, *words)
        line = (
            f"vitrim {words[0]}: no images are given; add --data.root FOLDER, or --data.name digits for the built-in "
        )
        assert (code, err) == (2, f"{line}digits\n"), words
        assert not (tmp_path / "new").exists()


def test_a_dry_run_lists_what_would_be_tried(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job.Job, "run", lambda *_, **__: pytest.fail("nothing is searched"))
    code, said, _ = call(capsys, "compress", model, *DRY)
    assert code == 0
    assert "candidates of the first round" in said
    assert "ToMe()" in said
    assert "About" in said


def test_random_weights_are_warned_about(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "compress", "vitrim_digits_vit", *DRY)
    assert code == 0
    assert "weights are random" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--macs 0.5", "give --out"),
        ("--out new", "exactly one budget"),
        ("--macs 0.5 --params 0.5 --out new", "exactly one budget"),
        ("--macs -1 --out new", "positive number"),
        ("--latency 12h --out new", "such as 0.5ms"),
        ("--macs 0.5 --using depth --out new", "'tokens', 'width'"),
        ("--macs 0.5 --out file", "there is a file of this name"),
        ("--macs 0.5 --data.root nowhere --out new", "nowhere is not a folder"),
        ("--macs 0.5 --data.root empty --out new", "holds no images"),
        ("--macs 0.5 --data.holdout 0.2 --out new", "no effect"),
        ("--macs 0.5 --num_images 20 --data.name digits --out new", "20 images are too few"),
        ("--macs 0.5 --num_images 1 --data.name digits --out new", "one image is too few"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    words: str,
    says: str,
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    Path("empty").mkdir()
    code, _, err = call(capsys, "compress", model, *words.split())
    assert code == 2
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


@pytest.mark.parametrize("words", ["compress --macs 0.5", "stratify"])
def test_a_reduced_model_is_refused_with_advice_for_the_command_line(
    words: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = load(model)
    attach(network, "TopK() @ KeepRate(0.5)")
    reduced = save(network, tmp_path / "reduced")
    verb, *options = words.split()
    code, _, err = call(capsys, verb, reduced, *options, "--data.name", "digits", "--out", tmp_path / "out")
    assert (code, err.strip().count("\n")) == (2, 0)
    assert f"{reduced} is reduced already, by TopK() @ KeepRate(rate=0.5); {verb} the model that it was made" in err
    made = re.search(r"in Python: (.*)", err)
    assert made is not None
    exec(made[1], {"vitrim": vitrim, "FOLDER": tmp_path / "dense"})
    assert attached(load(tmp_path / "dense")) is None


def test_verify_needs_a_certificate(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "verify", model)
    assert (code, "holds no certificate.json" in err) == (2, True)
    code, _, err = call(capsys, "verify", __file__)
    assert (code, "is a file that holds no model" in err, err.strip().count("\n")) == (2, True, 0)


def test_unreadable_images_are_named_where_there_are_too_few(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 3):
        folder = tmp_path / str(number)
        folder.mkdir()
        for index in range(number):
            (folder / f"{index}.png").write_bytes(b"no image")
        words = ("compress", model, "--macs", 0.5, "--data.root", folder, *FEW, "--out", tmp_path / "new")
        code, _, err = call(capsys, *words)
        assert (code, f"cannot read {folder / '0.png'}" in err, err.count("\n")) == (2, True, 1)
        code, _, err = call(capsys, *words, "--data.on_corrupt", "skip")
        assert (code, f"none of the {number} images can be read" in err, err.count("\n")) == (2, True, 1)
    code, _, err = call(capsys, "verify", tmp_path / "new")
    assert (code, f"there is no folder {tmp_path / 'new'}" in err) == (2, True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--macs 1", "macs is 1, all that the model needs; ask for less, such as macs=0.5"),
        ("--latency 1", "latency is 1, all that the model needs"),
        ("--params 1000000 --using width", "so it is within the budget of 1,000,000 parameters already; ask for less"),
        ("--macs 1e12", "already"),
    ],
)
def test_a_budget_that_the_model_meets_as_it_is_asks_for_nothing(
    words: str, says: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(capsys, "compress", model, *QUICK, *words.split(), "--dry_run")
    assert (code, says in err, err.count("\n")) == (2, True, 1), err
