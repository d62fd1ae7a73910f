"""`vitrim export` and what it writes: files that compute what the model computes, or no files."""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.onnx.errors import OnnxExporterError

import vitrim
from calling import call
from relative_models import BEIT
from vitrim.errors import CheckpointError, DataError, OutputError, UnknownNameError, UnsupportedModelError, VitrimError
from vitrim.exporting import FORMATS, Format, compare, formats, run
from vitrim.exporting.formats import quantise
from vitrim.exporting.program import described, make_program, prepared
from vitrim.measure.served import ServedFile, open_file
from vitrim.measure.speed import bench
from zoo import ZOO, build, images, redrawn

CUT = "ToMe() @ KeepRate(0.6, at=(0,))"


def small(text: str | None = None, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    args = {"img_size": 24, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2, "num_classes": 3, **options}
    model = redrawn(vitrim.build_model("vit_tiny_patch16_224", **args))
    if text is not None:
        vitrim.attach(model, text)
    return model


def as_if_written(change: Callable[[Tensor], Tensor] = lambda x: x) -> Callable[[str], nn.Module]:
    """In place of `open_file`: what a model computes, changed."""
    model = small()
    return lambda path: ServedFile(path, "a stand-in", lambda x: change(model(x)), (None, 3, 24, 24), {})


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs take seconds to make, which most refusals do not depend on."""
    monkeypatch.setattr(run, "make_program", lambda model: None)
    plain = Format(
        ".pt2", lambda: None, lambda program, about, path: path.write_text("a file") and None, "torch.export"
    )
    monkeypatch.setitem(FORMATS, "torch", plain)


# Of other families: law 8 of the contract, and the tests of relative positions.
@pytest.mark.parametrize(
    ("adapter", "blocks"),
    [("timm-vit-blocks", "blocks"), ("timm-naflex", "blocks"), ("transformers", "vit.layers")],
)
def test_programs_of_families_agree_with_the_model(adapter: str, blocks: str) -> None:
    model = build(adapter, next(iter(ZOO[adapter])))
    holder = model.get_submodule(blocks.rpartition(".")[0])
    setattr(holder, blocks.rpartition(".")[2], model.get_submodule(blocks)[:1])
    ready = prepared(model, CUT)
    program = make_program(ready)
    found = compare(ready, program.module(), images(4))
    assert found.largest <= found.allowed
    assert found.batch_sizes == (1, 3)


def test_attention_under_a_learnt_bias_becomes_onnx(tmp_path: Path) -> None:
    model = redrawn(BEIT["beit"]())
    found = vitrim.export(model, images(3, 40, dtype=torch.float32), tmp_path / "beit.onnx", method=CUT)
    assert found.agreement.largest <= found.agreement.allowed


def test_what_onnx_cannot_hold_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_export: None) -> None:
    def fails(*args: object, **options: object) -> None:
        raise OnnxExporterError("step 2 of 3") from ValueError("no such operator\nand a stack")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(UnsupportedModelError, match=r"^this model cannot be written as ONNX: no such operator; use"):
        vitrim.export(small(), images(2, 24), tmp_path / "model.onnx")
    assert not [*tmp_path.iterdir()]


def test_transformers_make_no_mask_in_an_export() -> None:
    model = build("transformers", "hf_vit")
    model.vit.layers = model.vit.layers[:1]
    program = make_program(prepared(model))
    calls = [node for node in program.graph.nodes if "scaled_dot_product" in str(node.target)]
    assert len(calls) == 1
    assert [one for one in calls[0].args[3:] if isinstance(one, torch.fx.Node)] == []
    assert not isinstance(calls[0].kwargs.get("attn_mask"), torch.fx.Node)


def test_a_rotary_model_becomes_onnx_without_branches_and_with_its_tables_as_constants(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = build("timm-eva", "dinov3")
    model.blocks = model.blocks[:1]
    vitrim.models.set_widths(model, [vitrim.models.BlockWidths(12, 40, 5)])
    found = vitrim.export(model, images(4), tmp_path / "model.onnx", method="TopK(norm) @ KeepRate(0.6, at=(0,))")
    assert found.agreement.largest <= found.agreement.allowed
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    assert kinds["MatMul"] > 0
    assert {"If", "Loop", "Sin", "Cos", "Pad"}.isdisjoint(kinds)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reduced model with the names of its classes, as a folder."""
    folder = tmp_path_factory.mktemp("saved") / "digits"
    torch.manual_seed(0)
    model = vitrim.build_model("vitrim_digits_vit", depth=1, embed_dim=16, num_heads=2)
    nn.init.normal_(model.head.weight, std=0.5)
    vitrim.attach(model, "TopK(norm) @ KeepRate(0.6, at=0)", cls_only=True)
    return vitrim.save(model, folder, classes=[f"digit{number}" for number in range(10)])


def test_an_onnx_file_says_what_it_is_and_is_timed_next_to_the_model(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runtime = pytest.importorskip("onnxruntime")
    file, named = tmp_path / "new" / "m.onnx", ("--data.name", "digits", "--data.workers", 0)
    code, said, err = call(capsys, "export", saved, *named, "--out", file)
    assert code == 0, err
    assert "gives logits\ncompared with PyTorch on 16 images in batches of 1 and 15: largest difference " in said
    session = runtime.InferenceSession(str(file))
    assert session.get_inputs()[0].name == "images"
    assert session.get_inputs()[0].shape == ["batch", 1, 8, 8]
    assert session.get_outputs()[0].shape == ["batch", 10]
    about = json.loads(session.get_modelmeta().custom_metadata_map["vitrim"])
    model = vitrim.load(saved)
    assert about["classes"][:2] == ["digit0", "digit1"]
    assert about["macs"] == vitrim.cost(model).macs
    assert about["token_counts"] == [*vitrim.cost(model).token_counts]
    assert about["reduction"] == "TopK(score='norm') @ KeepRate(rate=0.6, at=(0,))"
    assert about["input"]["mean"] == pytest.approx([0.3053], abs=1e-3)
    assert {"vitrim", "torch", "timm"} <= set(about["versions"])
    again = call(capsys, "export", saved, *named, "--out", file)
    assert (again[0], "exists" in again[2]) == (2, True)
    files = [str(file), str(tmp_path / "8.onnx")]
    quantise(file, Path(files[1]))
    quantised = open_file(files[1])
    assert quantised.about == about
    digits = torch.rand(40, 1, 8, 8)
    found = compare(model, quantised, digits, exact=False)
    assert found.largest > found.allowed
    assert found.same_class > 0.8
    assert "on 40 images in batches of 1 and 32: same top class for" in found.text(quantised=True)
    with pytest.raises(VitrimError, match="differs from the model"):
        compare(model, quantised, digits)
    table = bench([*files, str(saved)], ["own"], batch_sizes=(1, 3), rounds=1, warmup=0)
    assert {row.reference for row in table.measured} == {files[0]}, "one reference where there are files"
    assert {row.macs for row in table.measured} == {about["macs"]}
    with pytest.raises(VitrimError, match="takes images of 1 x 8 x 8, not of 1 x 9 x 9"):
        bench({"file": open_file(str(file))}, input_size=9)
    with pytest.raises(VitrimError, match="float32 on the CPU"):
        bench({"file": open_file(str(file))}, dtype="bfloat16")
    code, _, err = call(capsys, "bench", file, "--method", "dense")
    assert (code, "would have no effect" in err) == (2, True)


def test_a_program_is_saved_with_its_description_for_a_batch_of_any_size(tmp_path: Path) -> None:
    model, file = small(), tmp_path / "m.pt2"
    found = vitrim.export(model, images(3, 24), file, format="torch", classes=["a", "b", "c"])
    assert found.text().startswith(f"written to {file}")
    opened = open_file(str(file))
    assert opened.about["classes"] == ["a", "b", "c"]
    assert opened.dims == (None, 3, 24, 24)
    torch.testing.assert_close(opened(images(9, 24)), model(images(9, 24)))
    assert vitrim.attached(model) is None
    table = bench({"eager": model, "file": opened}, batch_sizes=(2,), rounds=1, warmup=0, device="cpu")
    assert table.row("file", 2).macs == vitrim.cost(model).macs


def test_a_file_of_a_fixed_batch_size_is_timed_at_that_size_only(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    tensors = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 3, 8, 8]) for name in ("pixels", "out")
    ]
    node = onnx.helper.make_node("Relu", ["pixels"], ["out"])
    graph = onnx.helper.make_graph([node], "foreign", tensors[:1], tensors[1:])
    whole = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    file = str(tmp_path / "foreign.onnx")
    onnx.save(whole, file)
    table = bench(file, batch_sizes=(2,), rounds=1, warmup=0)
    assert table.row(file, 2).macs is None
    with pytest.raises(VitrimError, match=r"takes batches of 2 only, not of 3; use --batch_size 2"):
        bench(file, batch_sizes=(2, 3))
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    (tmp_path / "broken.pt2").write_bytes(b"no archive")
    for name in ("broken.onnx", "broken.pt2"):
        with pytest.raises(CheckpointError, match=r"cannot be opened"):
            open_file(str(tmp_path / name))
    with pytest.raises(CheckpointError, match="there is no file"):
        open_file(str(tmp_path / "none.onnx"))


@pytest.mark.usefixtures("no_export")
@pytest.mark.parametrize("change", [lambda x: x + 0.01, lambda x: x / 0, lambda x: x[:, :2]])
def test_a_file_that_computes_something_else_is_not_kept(
    change: Callable[[Tensor], Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "open_file", as_if_written(change))
    with pytest.raises(VitrimError, match=r"differs from the model by|gives \(4, 2\) where the model gives"):
        vitrim.export(small(), images(4, 24), tmp_path / "new" / "m.pt2", format="torch")
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("no_export")
def test_a_file_made_in_the_meantime_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, opened = tmp_path / "m.pt2", as_if_written()

    def meanwhile(path: str) -> nn.Module:
        file.write_text("of somebody else")
        return opened(path)

    monkeypatch.setattr(run, "open_file", meanwhile)
    with pytest.raises(OutputError, match="exists"):
        vitrim.export(small(), images(4, 24), file, format="torch")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["of somebody else"]


def test_images_on_which_rounding_chooses_the_tokens_are_left_out_and_counted() -> None:
    model = small(class_token=False, global_pool="avg")
    with torch.no_grad():
        for one in (model.pos_embed, model.patch_embed.proj.bias):
            one.zero_()
    vitrim.attach(model, "TopK(norm) @ KeepRate(0.2, at=(0,), place=before)")
    x = images(9, 24)
    x[4, :, 8:16, 8:16] = 9 * x[4, :, 8:16, 8:16]
    x[4, :, :8, :8] = -x[4, :, 8:16, 8:16]
    x[4, :, 16:, 16:] = 9 * x[4, :, 16:, 16:]
    assert compare(model, model, x).undecided == 0

    def other_choice(part: Tensor) -> Tensor:
        part = part.clone()
        for image in part:
            if image.abs().max() > 20:
                image[:, :8, :8] *= 1.001
        return model(part)

    found = compare(model, other_choice, x)  # type: ignore[arg-type]
    assert found.undecided == 1
    assert "1 left out, where rounding decides which tokens stay" in found.text()
    with pytest.raises(VitrimError, match="differs from the model"):
        compare(model, lambda part: other_choice(part) + 0.1, x)  # type: ignore[arg-type]


def test_models_that_no_file_can_hold_are_refused() -> None:
    model = small("TopK() @ KeepRate(0.5) @ CosineWarmup(4)")
    with pytest.raises(VitrimError, match=r"curriculum of this model has reached strength 0 .*or dense"):
        prepared(model)
    assert vitrim.attached(prepared(model, "dense")) is None
    vitrim.set_epoch(model, epoch=9)
    assert described(prepared(model), None)["reduction"].startswith("TopK()")
    vitrim.attached(model).remove()
    vitrim.attach(model, "TopK() @ KeepRate(0.5) @ CosineWarmup(4)", phase="train")
    assert described(prepared(model), None)["reduction"] is None, "it acts in training only"
    hook = model.blocks[0].register_forward_hook(lambda *_: None)
    with pytest.raises(VitrimError, match=r"blocks\.0 has a forward hook"):
        prepared(model)
    hook.remove()

    class Stubborn(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum() > 0 else x

    model.patch_drop = Stubborn()
    with pytest.raises(UnsupportedModelError, match=r"torch\.export cannot follow this VisionTransformer"):
        make_program(prepared(model, "dense"))


@pytest.mark.parametrize("int8", [False, True])
def test_weights_beyond_the_limit_of_a_file_lie_next_to_it(
    int8: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "ONE_FILE", 0)
    model, x = small(embed_dim=48), images(4, 24)
    found = vitrim.export(model, x, tmp_path / "m.onnx", int8=int8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert f"written to {tmp_path}/m.onnx and {tmp_path}/m.onnx.data (" in found.text()
    served = open_file(str(tmp_path / "m.onnx"))
    assert compare(model, served, x, exact=not int8).largest == pytest.approx(found.agreement.largest, abs=1e-5)
    (tmp_path / "m.onnx").unlink()
    with pytest.raises(OutputError, match=r"m\.onnx\.data exists"):  # Nothing is overwritten.
        vitrim.export(model, x, tmp_path / "m.onnx", int8=int8)


def test_bad_words_are_one_line_each(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small(), images(2, 24)
    with pytest.raises(UnknownNameError, match="did you mean onnx"):
        vitrim.export(model, x, tmp_path / "m.onnx", format="onxx")  # type: ignore[arg-type]
    with pytest.raises(OutputError, match=r"should end in \.pt2"):
        vitrim.export(model, x, tmp_path / "m.onnx", format="torch")
    with pytest.raises(VitrimError, match="int8 is for --format onnx"):
        vitrim.export(model, x, tmp_path / "m.pt2", format="torch", int8=True)
    (tmp_path / "m.onnx.data").touch()
    with pytest.raises(OutputError, match=r"m\.onnx\.data exists"):
        vitrim.export(model, x, tmp_path / "m.onnx")
    with pytest.raises(OutputError, match="cannot"):
        vitrim.export(model, x, tmp_path / "m.onnx.data" / "m.pt2", format="torch")
    with pytest.raises(DataError, match="two images are needed"):
        compare(model, model, x[:1])
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(VitrimError, match=r"pip install 'vitrim\[export\]'"):
        vitrim.export(model, x, tmp_path / "other.onnx")


def test_bad_images_are_one_line(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--format", "torch", "--out", tmp_path / "m.pt2")
    code, _, err = call(capsys, "export", saved, *out, "--data.root", tmp_path / "nowhere")
    assert (code, "nowhere is not a folder" in err) == (2, True)
    code, _, err = call(capsys, "export", saved, "--int8", "--out", tmp_path / "m.onnx")
    assert (code, "give --data.root" in err) == (2, True)
    code, _, err = call(capsys, "export", saved, *out, "--data.limit", 3)
    assert (code, "would have no effect" in err) == (2, True)
    assert not [*tmp_path.iterdir()]


def test_aotinductor_gets_the_program_and_the_description(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for its compiler, which takes a minute."""
    given: dict[str, Any] = {}

    def compiled(program: Any, *, package_path: str, inductor_configs: dict[str, Any]) -> None:
        given.update(program=program, about=inductor_configs["aot_inductor.metadata"]["vitrim"])
        Path(package_path).write_text("compiled")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compiled)
    monkeypatch.setattr(run, "make_program", lambda model: "the program")
    monkeypatch.setattr(run, "open_file", as_if_written())
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: "g++")
    vitrim.export(small(), images(3, 24), tmp_path / "m.pt2", format="aoti")
    assert given["program"] == "the program"
    assert json.loads(given["about"])["input"]["size"] == [3, 24, 24]
    assert (tmp_path / "m.pt2").read_text() == "compiled"


def test_a_missing_compiler_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.exc import InvalidCxxCompiler

    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", missing)
    with pytest.raises(VitrimError, match=r"no compiler here; install g\+\+"):
        vitrim.export(small(), images(2, 24), tmp_path / "m.pt2", format="aoti")


def test_weights_of_another_type_are_exported_in_float32_and_the_model_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_export: None
) -> None:
    model = small().bfloat16()
    exact = small().bfloat16().float()
    monkeypatch.setattr(run, "open_file", lambda path: ServedFile(path, "a stand-in", exact, (None, 3, 24, 24), {}))
    vitrim.export(model, images(3, 24), tmp_path / "m.pt2", format="torch")
    assert next(model.parameters()).dtype == torch.bfloat16


@pytest.fixture(autouse=True)
def _no_leftovers(tmp_path: Path) -> Iterator[None]:
    yield
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith((".vitrim", "vitrim-export"))]


def test_the_steps_for_torchao_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    page = (Path(__file__).parents[1] / "docs" / "export.md").read_text()
    (steps,) = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    vitrim.save(small("TopK() @ KeepRate(0.5)", embed_dim=64), tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    exec(compile(steps, "docs/export.md", "exec"), {"images": images(8, 24)})
    assert open_file("int8.pt2")(images(3, 24)).shape == (3, 3)


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda model, x: x[:1], "two images are needed"),
        (lambda model, x: x[:, :, :16], r"the images are 3 x 16 x 24, but the file will take 3 x 24 x 24"),
        (lambda model, x: (nn.init.constant_(model.head.bias, torch.nan), x)[1], "values that are not finite"),
    ],
)
def test_what_no_file_can_be_compared_on_is_refused_before_one_is_made(
    spoil: Callable[[Any, Tensor], Tensor], fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "make_program", lambda model: pytest.fail("the work had begun"))
    model = small()
    with pytest.raises(VitrimError, match=fault):
        vitrim.export(model, spoil(model, images(4, 24)), tmp_path / "m.pt2", format="torch")
    assert not [*tmp_path.iterdir()]
