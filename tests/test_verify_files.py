"""`vitrim verify` of exported files: the certificate in the file, next to it, or made for it."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor.exc import InvalidCxxCompiler

from calling import call
from vitrim import Certificate, TopK, build_model, cost, load, save
from vitrim.compression import files, job, solver, verification
from vitrim.compression.candidates import stages
from vitrim.compression.certificate import Line
from vitrim.compression.files import SUFFIX, certificate_of, hash_file, outputs_of
from vitrim.compression.findings import Finding
from vitrim.errors import CheckpointError
from vitrim.exporting import FORMATS
from vitrim.measure.served import ServedFile, open_file

DIGITS = ("--data.name", "digits", "--data.workers", 0)
TIMES = [(0.5, 2.0, 1.0), (0.6, 2.0, 1.2)]


@pytest.fixture(scope="module", autouse=True)
def timed() -> Iterator[list[dict[str, Any]]]:
    """One reducer, and times that do not depend on the load; what was timed, with which options."""
    asked: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "sessions", lambda *models, **options: TIMES)
        patch.setattr(files, "sessions", lambda *models, **options: asked.append({"models": models} | options) or TIMES)
        patch.setattr(solver, "reducers", lambda has_cls: [TopK()])
        patch.setattr(solver, "first_shapes", lambda depth: stages(depth)[:1])
        yield asked


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and what vitrim compress made of it."""
    place = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    model = build_model("vitrim_digits_vit", depth=2, embed_dim=16, num_heads=2)
    nn.init.normal_(model.head.weight, std=0.5)
    given = save(model, place / "digits", classes=[str(number) for number in range(10)])
    from vitrim.cli import main

    words = ["compress", str(given), "--macs", "0.8", "--num_images", "40", "--trials", "0", "--batch_size", "2"]
    main([*words, "--using", "tokens", *map(str, DIGITS), "--out", str(place / "cheaper")])
    return given, place / "cheaper"


@pytest.fixture(scope="module")
def program(folders: tuple[Path, Path]) -> Path:
    """The cheaper model as a program of torch.export."""
    from vitrim.cli import main

    file = folders[1].parent / "cheaper.pt2"
    main(["export", str(folders[1]), "--format", "torch", *map(str, DIGITS), "--out", str(file)])
    return file


def test_the_certificate_of_a_folder_goes_into_its_file_and_is_measured_there(
    folders: tuple[Path, Path], program: Path, timed: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    written, inside = Certificate.read(folders[1]), certificate_of(open_file(str(program)))
    assert inside is not None
    assert (inside.lines, inside.weights, inside.original) == (written.lines, written.weights, written.original)
    assert list(inside.tried) == []
    code, said, err = call(capsys, "verify", program, "--num_images", 100)
    assert code == 0, (said, err)
    assert "holds here" in said
    assert "same top class" in said
    assert "counted when the file was exported" in " ".join(said.split())
    last = timed[-1]
    assert (last["batch_size"], last["device"], last["dtype"]) == (2, "cpu", "float32")
    assert [model.runtime for model in last["models"]] == ["torch.export", "torch.export"]
    assert last["models"][0].macs == cost(load(folders[0])).macs, "the given model, in the same format"


def test_a_file_without_images_or_model_is_timed_all_the_same(folders: tuple[Path, Path], program: Path) -> None:
    served = open_file(str(program))
    certificate = certificate_of(served)
    assert certificate is not None
    found = files.verify_file(served, certificate, say=lambda line: None)
    measured = {finding.line.key for finding in found.findings if finding.here is not None}
    assert measured == {"time", "ms"}
    assert {finding.why for finding in found.findings if finding.line.key == "drop"} == {"no images were given"}


def test_compiled_times_are_left_out_where_nothing_can_be_compiled(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", missing)
    written = Certificate.read(folders[1])
    compiled = replace(written, settings={**written.settings, "compile": True})
    monkeypatch.setattr(verification, "open_certified", lambda folder: (load(folder), compiled))
    found = verification.verify(folders[1], say=lambda line: None)
    why = {finding.line.key: finding.why for finding in found.findings if finding.here is None}
    assert "no compiler here" in why["time"]
    assert found.holds
    assert {finding.line.key for finding in found.findings if finding.here is not None} == {"macs", "params"}


def test_a_method_of_its_own_has_no_certificate(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "dense.pt2"
    words = ("export", folders[1], "--format", "torch", *DIGITS, "--method", "dense", "--out", file)
    assert call(capsys, *words)[0] == 0
    assert certificate_of(open_file(str(file))) is None
    code, _, err = call(capsys, "verify", file)
    assert (code, "holds no certificate; name the model" in err, err.count("\n")) == (2, True, 1)


def test_a_file_without_a_certificate_gets_one_that_holds_for_it_alone(
    folders: tuple[Path, Path], program: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As for weights that torchao stores as int8: a program that torch itself saved."""
    file = tmp_path / "plain.pt2"
    torch.export.save(torch.export.load(program), file)
    beside = Path(f"{file}{SUFFIX}")
    words = ("verify", file, "--original", folders[0], *DIGITS, "--num_images", 60)
    code, said, err = call(capsys, *words)
    assert code == 0, err
    assert f"to keep it, add --out {beside}" in said
    assert "Certificate: no budget" in said
    assert not beside.exists()
    assert call(capsys, *words, "--out", beside)[0] == 0
    made = Certificate.from_json(beside.read_text())
    assert made.weights == hash_file(file)
    assert made["divergence"].number == 60
    assert {"agreement", "accuracy", "drop", "time"} <= {line.key for line in made.lines}
    assert call(capsys, *words, "--out", beside)[0] == 2, "nothing is overwritten"
    code, said, err = call(capsys, "verify", file, "--num_images", 60)
    assert (code, "Verified: no budget, holds here" in said) == (0, True), (said, err)
    code, _, err = call(capsys, "verify", file, "--original", folders[1], "--num_images", 60)
    assert (code, "another model" in err) == (2, True)
    file.write_bytes(program.read_bytes())
    code, _, err = call(capsys, "verify", file)
    assert (code, "belongs to another file" in err, err.count("\n")) == (2, True, 1)


def test_a_worse_file_does_not_hold(
    program: Path, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "outputs_of", lambda served, images: outputs_of(served, images).roll(1, dims=1))
    code, said, _ = call(capsys, "verify", program, "--num_images", 60)
    assert code == 1
    assert "DOES NOT HOLD" in said
    monkeypatch.setattr(files, "outputs_of", lambda served, images: outputs_of(served, images)[:, :3])
    code, _, err = call(capsys, "verify", program, "--num_images", 60)
    assert (code, "gives outputs of (3,) where the given model has (10,)" in err) == (2, True)


def test_int8_keeps_the_certificate(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    file = tmp_path / "int8.onnx"
    words = ("export", folders[1], "--int8", "--num_images", 20, *DIGITS, "--out", file)
    code, said, err = call(capsys, *words)
    assert code == 0, err
    assert f"to measure it again: vitrim verify {file}" in said
    served = open_file(str(file))
    assert certificate_of(served) == certificate_of(served)
    code, said, err = call(capsys, "verify", file, "--num_images", 60)
    assert code in (0, 1), err
    assert "ONNX Runtime" in said


def test_the_certificate_of_other_weights_is_not_exported(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = load(folders[1])
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    save(other, tmp_path / "other")
    (tmp_path / "other" / "certificate.json").write_text((folders[1] / "certificate.json").read_text())
    code, _, err = call(capsys, "export", tmp_path / "other", "--format", "torch", "--out", tmp_path / "new.pt2")
    assert (code, "belongs to other weights" in err, err.count("\n")) == (2, True, 1)
    assert not (tmp_path / "new.pt2").exists()


def test_a_divergence_of_rounding_holds() -> None:
    there, here, worse = (Line("divergence", value, value, value) for value in (1e-13, 4e-9, 2e-3))
    assert Finding(there, here).holds
    assert not Finding(there, worse).holds


def test_a_damaged_certificate_in_a_file_is_one_line() -> None:
    served = ServedFile("a.onnx", "ONNX Runtime", lambda x: x, (None, 1, 8, 8), {"certificate": {"schema": 1}})
    with pytest.raises(CheckpointError, match=r"the certificate in a\.onnx is not a vitrim certificate"):
        certificate_of(served)


def test_the_last_batch_is_filled_for_a_file_of_one_batch_size() -> None:
    sizes: list[int] = []
    served = ServedFile("a.onnx", "ONNX Runtime", lambda x: sizes.append(len(x)) or x.flatten(1), (4, 1, 2, 2), {})
    x = torch.arange(40.0).view(10, 1, 2, 2)
    assert torch.equal(outputs_of(served, x), x.flatten(1))
    assert sizes == [4, 4, 4]


def test_every_format_names_what_runs_it() -> None:
    assert {name: form.runtime for name, form in FORMATS.items()} == {
        "onnx": "ONNX Runtime", "torch": "torch.export", "aoti": "AOTInductor",
    }  # fmt: skip
    assert json.loads(json.dumps(files.for_description(Certificate("a", [], "b", "c"))))["certificate"]["asked"] == "a"
