"""What leaves eager PyTorch: traced, scripted, exported by the older ONNX exporter, summarised, compiled."""

import io
import warnings

import pytest
import timm
import torch
from torch import Tensor, nn

import vitrim
from hf_models import HF
from vitrim.errors import VitrimError
from vitrim.tokens.scores import SCORES, Evidence
from zoo import build, images

REDUCTIONS = [
    "TopK() @ PowerLaw(0.6, 1.5)",
    "TopK(fuse=sum) @ KeepRate(0.63)",
    "TopK(norm, fuse=mean) @ Stages({1: 0.5})",
    "TopK(random) @ KeepRate(0.5)",
    "ToMe() @ ConstantR(4)",
]


def tiny(text: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=80, depth=3, embed_dim=24, num_heads=3).eval()
    vitrim.attach(model, text)
    return model


def pictures(count: int) -> Tensor:
    return torch.randn(count, 3, 80, 80, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("text", REDUCTIONS)
def test_a_traced_model_keeps_the_same_tokens_at_any_batch_size(text: str) -> None:
    model = tiny(text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, pictures(32))
    for count in (32, 8, 1):
        assert torch.equal(traced(pictures(count)), model(pictures(count)))


@pytest.mark.parametrize("text", REDUCTIONS)
def test_the_older_onnx_exporter_agrees_with_eager(text: str) -> None:
    runtime, model, file = pytest.importorskip("onnxruntime"), tiny(text), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (pictures(4),), file, dynamo=False, opset_version=18, input_names=["x"],
            dynamic_axes={"x": {0: "batch"}},
        )  # fmt: skip
    session = runtime.InferenceSession(file.getvalue())
    for count in (4, 1, 9):
        (out,) = session.run(None, {"x": pictures(count).numpy()})
        torch.testing.assert_close(torch.from_numpy(out), model(pictures(count)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["uneven", "removed"])
def test_extracted_networks_can_be_scripted(name: str) -> None:
    model, x = build("timm-vit", name), images()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(x), model(x))


@pytest.mark.parametrize("wrap", [lambda model: model, nn.Sequential], ids=["bare", "wrapped"])
@pytest.mark.parametrize("make", [lambda: tiny(REDUCTIONS[0]), lambda: _reduced("hf_vit")], ids=["timm", "hf"])
def test_scripting_a_reduced_model_is_refused_in_one_line(make, wrap) -> None:
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(
            VitrimError, match=r"torch\.jit\.script cannot compile a model with a reduction; use torch\.j"
        ):
            torch.jit.script(wrap(model))


def _reduced(name: str) -> nn.Module:
    model = HF[name]().eval()
    vitrim.attach(model, "TopK() @ KeepRate(0.5)")
    return model


def test_summaries_that_hook_every_module_get_through_a_reduced_model() -> None:
    model, seen = tiny(REDUCTIONS[0]), []
    expected = model(pictures(2))
    hooks = [
        module.register_forward_hook(lambda module, args, out: seen.append((type(module).__name__, out.shape)))
        for module in model.modules()
        if not list(module.children())
    ]
    torch.testing.assert_close(model(pictures(2)), expected)
    assert {"Linear", "LayerNorm", "Conv2d"} <= {name for name, _ in seen}
    for hook in hooks:
        hook.remove()


def test_layers_of_torchao_are_reduced_and_exported() -> None:
    quantization, model = pytest.importorskip("torchao.quantization"), build("timm-vit", "vit")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    vitrim.attach(model, REDUCTIONS[0])
    expected = model(images(4))
    assert expected.isfinite().all()
    assert vitrim.cost(model).macs > 0
    exported = torch.export.export(model, (images(4),)).module()
    torch.testing.assert_close(exported(images(4)), expected)


def test_a_compiled_model_is_compiled_again_for_each_number_of_tokens(two_forms: None) -> None:
    model = tiny("TopK() @ KeepRate(0.5) @ CosineWarmup(3)")
    frames: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        frames.append(1)
        return graph

    assert vitrim.compile(model, backend=backend, fullgraph=True) is model
    counts = set()
    for epoch in range(1, 4):
        vitrim.set_epoch(model, epoch=epoch)
        with torch.no_grad():
            model(pictures(2))
        counts.add(vitrim.attached(model).token_counts)
    assert len(frames) >= len(counts) == 3  # torch by itself stops at 2.


@pytest.mark.parametrize("name", [name for name, score in SCORES.items() if score.needs in ("cls_row", "attention")])
def test_scores_stay_finite_where_logits_leave_the_range_of_half_precision(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, 9, 16, generator=generator).mul(200) for _ in range(2))

    def score(dtype: torch.dtype) -> Tensor:
        evidence = Evidence(
            num_prefix=1, block=0, training=False, scale=1.0, hidden_BTC=torch.zeros(2, 9, 48, dtype=dtype),
            cls_query_BH1D=query[:, :, :1].to(dtype), query_BHTD=query.to(dtype), key_BHTD=key.to(dtype),
        )  # fmt: skip
        return SCORES[name].compute(evidence)

    assert (query @ key.transpose(-2, -1)).abs().max() > torch.finfo(torch.float16).max
    for dtype in (torch.float16, torch.bfloat16):
        assert score(dtype).isfinite().all()
        assert score(dtype).dtype == torch.float32


@pytest.mark.parametrize("name", ["norm", "key_norm"])
def test_norms_stay_finite_where_their_squares_leave_the_range_of_half_precision(name: str) -> None:
    large = torch.full((2, 3, 9, 16), 300.0, dtype=torch.float16)
    evidence = Evidence(
        num_prefix=1, block=0, training=False, scale=1.0, hidden_BTC=large.flatten(1, 2)[:, :9], key_BHTD=large
    )
    assert SCORES[name].compute(evidence).isfinite().all()
