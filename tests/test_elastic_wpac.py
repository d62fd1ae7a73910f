"""Ordering of widths: statistics against slow references, and a function that never changes."""

import copy
from dataclasses import fields

import pytest
import torch
from torch import nn

from elastic_models import VARIANTS, images, small, variants
from vitrim.elastic import ORDERINGS, stratify, wpac
from vitrim.elastic.probing import batches
from vitrim.elastic.statistics import HeadSums, collect, tensors_in
from vitrim.errors import DataError, UnknownNameError, UnsupportedModelError, VitrimError
from vitrim.models.widths.compensation import Moments


def quiet(_: str) -> None:
    """Swallow what would be printed."""


@variants
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_function_is_preserved(variant, dtype):
    model, x = small(dtype, **VARIANTS[variant]), images(dtype=dtype)
    before = model(x)
    lines = []
    done = wpac(model, [x], num_images=8, say=lines.append)
    limit = 1e-10 if dtype == torch.float64 else 1e-5 * max(1.0, before.abs().max().item())
    assert (model(x) - before).abs().max() <= limit
    assert done.max_difference <= limit
    assert "max |difference| = " in lines[0]


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_every_ordering_preserves_the_function_and_changes_the_weights(ordering):
    model, x = small(), images()
    before, weights = model(x), copy.deepcopy(model.state_dict())
    wpac(model, [x], ordering=ordering, say=quiet)
    assert (model(x) - before).abs().max() <= 1e-10
    for name in ("blocks.1.attn.qkv.weight", "blocks.1.attn.proj.weight", "blocks.1.mlp.fc1.weight"):
        assert not torch.equal(model.state_dict()[name], weights[name])
    assert torch.equal(model.state_dict()["blocks.1.attn.proj.bias"], weights["blocks.1.attn.proj.bias"])


def slow_moments(model: nn.Module, x: torch.Tensor, target: torch.Tensor | None):
    """F and G of block 1 from plain autograd, and the formulas of the definition in loops."""
    kept = {}
    block = model.blocks[1]
    hooks = [
        block.attn.qkv.register_forward_hook(lambda m, i, out: (out.retain_grad(), kept.update(f=out))[1]),
        block.mlp.act.register_forward_hook(lambda m, i, out: (out.retain_grad(), kept.update(a=out))[1]),
        block.attn.proj.register_forward_pre_hook(lambda m, i: (i[0].retain_grad(), kept.update(mixed=i[0]))[1]),
    ]
    out = model(x)
    total = out.max(1).values.sum() if target is None else out[torch.arange(len(x)), target].sum()
    total.backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    return kept["f"], kept["f"].grad, kept["a"], kept["a"].grad, kept["mixed"], kept["mixed"].grad


@pytest.mark.parametrize("labelled", [False, True])
def test_covariance_equals_its_definition(labelled):
    model, x = small(), images(6)
    target = torch.tensor([0, 4, 2, 1, 3, 3])
    f, g, a, ga, mixed, gm = slow_moments(model, x, target if labelled else None)
    sums = collect(model, [(x[:4], target[:4]), (x[4:], target[4:])], num_images=6, labels=labelled)
    attn, mlp = sums["blocks.1.attn"], sums["blocks.1.mlp"]
    f, g = (t.detach().flatten(0, 1).view(-1, 3, 3, 16) for t in (f, g))
    for head in range(3):
        expected = {}
        for stream in range(3):
            rows, weights = f[:, stream, head], (g * f)[:, stream, head].abs().mean(1)
            centred = rows - rows.mean(0)
            expected[stream] = sum(w * torch.outer(c, c) for w, c in zip(weights, centred, strict=True))
        assert torch.allclose(attn.covariance(2)[head], expected[2], rtol=1e-9, atol=1e-14)
        assert torch.allclose(attn.covariance(0, 1)[head], expected[0] + expected[1], rtol=1e-9, atol=1e-14)
    assert torch.allclose(mlp.fisher, (0.5 * ga**2 * a**2).flatten(0, 1).mean(0).detach(), rtol=1e-9, atol=1e-20)
    assert torch.allclose(mlp.taylor, (ga * a).abs().flatten(0, 1).mean(0).detach(), rtol=1e-9, atol=1e-20)
    for layer, value, gradient in ((mlp, a, ga), (attn, mixed, gm)):
        tokens = list(zip(value.detach().flatten(0, 1), gradient.flatten(0, 1), strict=True))
        sizes = torch.stack([(row * row).sum() for _, row in tokens]).view(len(x), -1)
        weights = (1 + sizes / sizes.mean(1, keepdim=True)).flatten()
        total = layer.moments[0] + layer.moments[1]
        mean = sum(w * row for w, (row, _) in zip(weights, tokens, strict=True)) / sum(weights)
        assert torch.allclose(total.mean, mean, rtol=1e-9)
        second = sum(w * torch.outer(row, row) for w, (row, _) in zip(weights, tokens, strict=True)) / sum(weights)
        assert torch.allclose(total.spread(False), second, rtol=1e-9)
    assert torch.allclose(attn.taylor, (g * f).abs().mean(0).sum((0, 1)), rtol=1e-9)


def test_headless_model_is_weighed_by_its_squared_feature():
    model, x = small(num_classes=0), images(4)
    kept = {}
    hook = model.blocks[0].mlp.act.register_forward_hook(lambda m, i, out: (out.retain_grad(), kept.update(a=out))[1])
    model(x).square().sum().backward()
    hook.remove()
    expected = (kept["a"].grad * kept["a"]).abs().flatten(0, 1).mean(0).detach()
    assert torch.allclose(collect(model, [x], 4)["blocks.0.mlp"].taylor, expected, rtol=1e-9)
    with pytest.raises(VitrimError, match="no classifier"):
        collect(model, [(x, torch.zeros(4, dtype=torch.long))], 4, labels=True)


def test_axes_diagonalise_and_descend():
    model, x = small(), images(16)
    wpac(model, [x], num_images=16, say=quiet)
    again = collect(model, [x], 16)
    for head in again["blocks.1.attn"].covariance(2):
        values = head.diagonal()
        # The weights w change a little with the axes, so the second covariance is diagonal only nearly; order holds.
        assert values[:4].min() > values[-4:].max()
    fisher = again["blocks.2.mlp"].fisher
    assert torch.all(fisher[:-1] >= fisher[1:] * (1 - 1e-9))


def test_queries_and_keys_share_one_rotation_per_head():
    model, x = small(), images()
    before = model.blocks[0].attn.qkv.weight.detach().view(3, 3, 16, 48).clone()
    wpac(model, [x], say=quiet)
    after = model.blocks[0].attn.qkv.weight.detach().view(3, 3, 16, 48)
    for head in range(3):
        rotation = torch.linalg.lstsq(before[0, head].T, after[0, head].T).solution
        assert torch.allclose(rotation.T @ rotation, torch.eye(16, dtype=torch.float64), atol=1e-8)
        assert torch.allclose(before[1, head].T @ rotation, after[1, head].T, atol=1e-8)
        assert not torch.allclose(before[2, head].T @ rotation, after[2, head].T, atol=1e-2)


def test_under_a_query_norm_all_heads_share_one_order():
    model, x = small(qk_norm=True), images()
    before = copy.deepcopy(model.blocks[0].attn)
    wpac(model, [x], say=quiet)
    attn = model.blocks[0].attn
    order = [(before.q_norm.weight == w).nonzero().item() for w in attn.q_norm.weight]
    assert sorted(order) == list(range(16))
    assert torch.equal(attn.k_norm.bias, before.k_norm.bias[order])
    rows = before.qkv.weight.view(3, 3, 16, 48)[:2][:, :, order]
    assert torch.equal(attn.qkv.weight.view(3, 3, 16, 48)[:2], rows)


@pytest.mark.parametrize("split", [(1, 7), (3, 5), (8,)])
def test_sums_do_not_depend_on_batches_and_no_image_is_kept(split):
    model, x = small(), images(8)
    whole = collect(model, [x], 8)["blocks.1.attn"]
    parts = collect(model, list(x.split(split)), 8)["blocks.1.attn"]
    assert torch.allclose(whole.covariance(0, 1), parts.covariance(0, 1), rtol=1e-9)
    more = collect(model, [x] * 4, 32)["blocks.1.attn"]
    assert [t.shape for t in tensors_in(more)] == [t.shape for t in tensors_in(whole)]
    together = [sum(one.moments, start=Moments.zeros(48, torch.device("cpu"))).second for one in (whole, parts)]
    assert torch.allclose(*together, rtol=1e-9)


def test_half_precision_importance_does_not_underflow():
    model, x = small(), images(4)
    with torch.no_grad():
        model.head.weight.mul_(1e-3)
    precise = collect(model, [x], 4)["blocks.1.mlp"].fisher
    coarse = collect(model.to(torch.bfloat16), [x], 4)["blocks.1.mlp"].fisher
    assert (coarse > 0).sum() >= (precise > 0).sum() * 0.99


def test_model_is_left_as_it_was_after_the_pass():
    model, x = small().train(), images(4)
    model.head.weight.requires_grad_(False)
    model.blocks[0].eval()
    kinds, weights = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())
    collect(model, [x], 4)
    assert [type(m) for m in model.modules()] == kinds
    assert [model.training, model.blocks[0].training, model.blocks[1].training] == [True, False, True]
    assert [model.head.weight.requires_grad, model.norm.weight.requires_grad] == [False, True]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def gated(model: nn.Module) -> nn.Module:
    model.blocks[1].attn.gate = nn.Linear(48, 48).double()
    return model


@pytest.mark.parametrize(
    ("model", "word"),
    [(lambda: small(scale_attn_norm=True), "norm between"), (lambda: gated(small()), "gate between")],
)
def test_gate_or_norm_behind_attention_is_refused(model, word):
    model = model()
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(UnsupportedModelError, match=word):
        wpac(model, [images(2)], say=quiet)
    assert [type(m) for m in model.modules()] == kinds


def test_bad_input_is_told_in_one_line():
    model = small()
    with pytest.raises(UnknownNameError, match="wpac"):
        wpac(model, [images(2)], ordering="wpca", say=quiet)
    with pytest.raises(DataError, match="no images"):
        collect(model, [], 8)
    with pytest.raises(VitrimError, match="num_images is a positive integer, not 0"):
        wpac(model, [images(2)], num_images=0, say=quiet)
    for batch in (
        images(2),
        (images(2), torch.rand(2)),
        (images(2), torch.tensor([True, False])),
        (images(2), torch.ones(2, 5, dtype=torch.long)),
        [images(2), [1]],
    ):
        with pytest.raises(DataError, match="integer labels"):
            list(batches([batch], model, 2, labels=True))
    for number in (1, 3):
        for reads in (wpac, stratify):
            with pytest.raises(DataError, match=f"{number} labels for 2 images"):
                reads(model, [(images(2), torch.zeros(number, dtype=torch.long))], labels=True, say=quiet)
    for wrong in (77, -1):
        with pytest.raises(DataError, match=r"but the model has 5 classes"):
            collect(model, [(images(2), torch.tensor([0, wrong]))], 2, labels=True)
    for data in (3, "images", {"pixels": images(2)}):
        with pytest.raises(DataError, match="give a tensor, a data set, a DataLoader or batches, not a"):
            wpac(model, data, say=quiet)
    for batch in ({"pixels": images(2)}, images(2)[0], []):
        with pytest.raises(DataError, match="a batch is"):
            wpac(model, [batch], say=quiet)
    with torch.inference_mode(), pytest.raises(VitrimError, match="outside of it"):
        wpac(model, [images(2)], say=quiet)
    with pytest.raises(VitrimError, match="not finite"):
        wpac(model, [images(2) / 0], say=quiet)


def test_short_integers_are_labels_too():
    sums = [collect(small(), [(images(2), torch.tensor([1, 4]).to(kind))], 2, labels=True)["blocks.0.mlp"].fisher
            for kind in (torch.int32, torch.int64)]  # fmt: skip
    assert torch.equal(*sums)


def test_activation_checkpointing_changes_nothing():
    plain, saving = small(), small()
    saving.set_grad_checkpointing(True)
    found, expected = collect(saving, [images(4)], 4), collect(plain, [images(4)], 4)
    assert found.keys() == expected.keys()
    for name, sums in expected.items():
        for field in fields(sums):
            given, wanted = getattr(found[name], field.name), getattr(sums, field.name)
            torch.testing.assert_close(given, wanted, rtol=1e-9, atol=0)


def _share(rank: int, file: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model, x = small(), images(8)
    done = wpac(model, [x[rank * 4 : rank * 4 + 4]], num_images=8, say=quiet)
    torch.save((model.state_dict(), done.shares), f"{out}{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_sum_to_one_and_write_no_files(tmp_path):
    files = (str(tmp_path / "rendezvous"), str(tmp_path / "rank"))
    torch.multiprocessing.start_processes(_share, files, nprocs=2, start_method="forkserver")
    (one, shares), (two, _) = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    model = small()
    alone = wpac(model, [images(8)], num_images=8, say=quiet)
    for name, value in model.state_dict().items():
        assert torch.allclose(value, one[name], atol=1e-6), name
    for name, share in alone.shares.items():
        assert torch.allclose(share, shares[name], rtol=1e-8)


def test_sums_of_nothing_are_zero():
    sums = HeadSums.zeros((3, 2, 4), 8, torch.device("cpu"))
    assert sums.second_SHhh.shape == (3, 2, 4, 4)
    assert sums.second_SHhh.dtype == torch.float64
    assert not sums.second_SHhh.any()
