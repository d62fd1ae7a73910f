"""What can only go wrong on CUDA: tensors on two devices, lower precision, graphs. Left out where there is no CUDA."""

import copy
from contextlib import AbstractContextManager, nullcontext

import pytest
import timm
import torch
from torch import nn

import vitrim
from vitrim import attach, stratify
from vitrim.elastic import SuperNet
from vitrim.errors import VitrimError
from vitrim.measure.speed import bench
from vitrim.models import load, save
from zoo import MODELS, build, images, predicted

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA here")
REDUCTIONS = (
    "TopK() @ KeepRate(0.6)", "TopK(fuse=sum) @ KeepRate(0.6, at=[0, 1])", "TopK(norm, fuse=mean) @ KeepRate(0.6)",
    "ToMe() @ ConstantR(3)", "TopK(mean_attention) @ PowerLaw(0.5, 1.5, reinstate=2)", "TopK() @ Budget(0.8)",
)  # fmt: skip


def small(**options: object) -> nn.Module:
    """A ViT of three blocks on CUDA."""
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **(sizes | options)).cuda().eval()


@pytest.fixture(autouse=True)
def _exact_matmuls() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize(("adapter", "name"), MODELS, ids=[name for _, name in MODELS])
def test_every_family_gives_on_cuda_what_it_gives_on_the_cpu(adapter, name):
    model, pixels = build(adapter, name).double(), images(dtype=torch.float64)
    for reduction in ("TopK(mean_attention, fuse=sum) @ KeepRate(0.7, at=[0, 1])", "ToMe() @ ConstantR(3)"):
        here = copy.deepcopy(model)
        try:
            attach(here, reduction)
        except VitrimError:
            continue  # Refused on the CPU too, which the contract tests.
        there = copy.deepcopy(here).cuda()
        with torch.no_grad():
            torch.testing.assert_close(predicted(there, pixels.cuda()).cpu(), predicted(here, pixels))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_half_precision_stays_close_and_finite(reduction):
    model, pixels = small(), torch.randn(8, 3, 64, 64, device="cuda")
    attach(model, reduction)
    with torch.no_grad():
        exact = model(pixels)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cuda", dtype):
                mixed = model(pixels)
            whole = copy.deepcopy(model).to(dtype)(pixels.to(dtype))
            for found in (mixed, whole):
                assert found.isfinite().all()
                # Other tokens may stay where scores are nearly equal, so that outputs are close on the average alone.
                assert (found.float() - exact).abs().mean() < 0.1 * exact.abs().mean() + 0.02


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_recorded_graph_repeats_the_pass_on_new_images(reduction):
    model, first, second = small(), *torch.randn(2, 4, 3, 64, 64, device="cuda")
    attach(model, reduction)
    with torch.inference_mode():
        expected = model(second)
        pixels = first.clone()
        for _ in range(3):
            model(pixels)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = model(pixels)
        pixels.copy_(second)
        graph.replay()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_head_called_by_itself_is_recorded_too_but_not_where_nothing_counts_what_is_written():
    model, first, second = small(global_pool="avg"), *torch.randn(2, 4, 3, 64, 64, device="cuda")
    attach(model, "ToMe() @ ConstantR(3)")

    def record(guard: AbstractContextManager[object]) -> None:
        with guard:
            expected, pixels = model(second), first.clone()
            for _ in range(3):
                model.forward_head(model.forward_features(pixels))
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = model.forward_head(model.forward_features(pixels))
            pixels.copy_(second)
            graph.replay()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    record(torch.no_grad())
    with pytest.raises(VitrimError, match="no_grad"):
        record(torch.inference_mode())
    torch.cuda.synchronize()


def test_features_that_were_written_over_are_refused_on_cuda_in_whatever_way():
    model, pixels = small(global_pool="avg"), torch.randn(4, 3, 64, 64, device="cuda")
    attach(model, "ToMe() @ ConstantR(3)")
    for guard in (torch.no_grad(), torch.inference_mode()):
        with guard:
            kept, written = model.forward_features(pixels), model.forward_features(pixels)
            torch.testing.assert_close(model.forward_head(kept), model(pixels), rtol=1e-4, atol=1e-5)
            written.data.mul_(1.01)
            with pytest.raises(VitrimError):
                model.forward_head(written)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_under_reduction_has_finite_gradients(precision):
    model, pixels = small().train(), torch.randn(8, 3, 64, 64, device="cuda")
    attach(model, "TopK(fuse=sum) @ KeepRate(0.6)")
    mixed = torch.autocast("cuda", torch.bfloat16) if precision == "bfloat16" else nullcontext()
    with mixed:
        loss = model(pixels).square().mean()
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.patch_embed.proj.weight.grad.abs().sum() > 0


def test_intermediates_stay_on_the_device_with_and_without_a_cut():
    model, pixels = small(), torch.randn(2, 3, 64, 64, device="cuda")
    for reduction in ("TopK() @ KeepRate(1.0)", "TopK() @ KeepRate(0.6)"):
        with attach(model, reduction), torch.no_grad():
            _, maps = model.forward_intermediates(pixels, output_fmt="NCHW")
        assert {(each.shape, each.device.type) for each in maps} == {((2, 48, 8, 8), "cuda")}


def test_a_super_network_made_on_cuda_is_cut_saved_and_read(tmp_path):
    model = small()
    data = [torch.randn(32, 3, 64, 64) for _ in range(4)]
    net = stratify(model, data, num_images=128, say=lambda line: None)
    cut = net.extract(macs=0.6, data=data)
    assert {p.device.type for p in cut.parameters()} == {"cuda"}
    again = SuperNet.load(net.save(tmp_path / "net"))
    pixels = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            again.cut(5)(pixels), net.cut(5).cpu()(pixels), rtol=1e-4, atol=1e-4
        )  # fmt: skip
        read = load(save(cut, tmp_path / "cut"))
        torch.testing.assert_close(read(pixels), cut.cpu()(pixels), rtol=1e-4, atol=1e-4)


def test_compress_searches_and_times_on_cuda():
    model, pixels = small(), torch.randn(128, 3, 64, 64)
    for budget in ({"macs": 0.6}, {"latency": 0.9}):
        found = vitrim.compress(model, pixels, **budget, batch_size=8, trials=2, say=lambda line: None)
        assert found.certificate.settings["device"] == "cuda"
        assert {p.device.type for p in found.model.parameters()} == {"cuda"}
        assert found.certificate["macs"].value < found.certificate["macs"].of


def test_bench_replays_graphs():
    model = small()
    reduced = copy.deepcopy(model)
    attach(reduced, "TopK(fuse=sum) @ KeepRate(0.6)")
    table = bench({"dense": model, "reduced": reduced}, batch_sizes=(1, 4), rounds=2, graphs=True)
    assert "graphs True" in table.markdown()
    assert all(row.peak_mib is not None and row.seconds[0] > 0 for row in table.measured)


def test_compiled_models_agree_with_eager_ones(two_forms):
    model, pixels = small(), torch.randn(4, 3, 64, 64, device="cuda")
    attach(model, "TopK(fuse=sum) @ KeepRate(0.6)")
    with torch.no_grad():
        expected = model(pixels)
        torch.testing.assert_close(torch.compile(model)(pixels), expected, rtol=1e-4, atol=1e-4)
