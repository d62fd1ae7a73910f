"""The rotation and the regression of values alone, where queries and keys are rotated by place: against slow loops."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eva_models
import hf_models
import vitrim
from vitrim.elastic import ORDERINGS, stratify, wpac
from vitrim.elastic.piad import Piad, Stratifier
from vitrim.elastic.statistics import HeadSums, collect
from vitrim.models import adapter_of
from vitrim.models.widths.elastic_pairs import value_dim
from vitrim.models.widths.elastic_values import ElasticValues
from vitrim.models.widths.sublayers import elastic
from zoo import images, predicted, redrawn

# One layer for all streams with a bias of its own for values, and with one of the layer; three; groups of heads; HF's.
NAMES = ["eva02", "perception", "eva02_norms", "grouped", "hf_dinov3"]
MODELS = {**eva_models.EVA, **eva_models.MORE, "hf_dinov3": hf_models.MORE["dinov3"]}


def quiet(_: str) -> None:
    """Swallow what would be printed."""


def _model(name: str) -> Any:
    return redrawn(MODELS[name]()).double()


def _attention(model: Any, block: int = 1) -> tuple[str, Any, nn.Module]:
    """Name of the attention of a block, the layer, and its last projection."""
    name = next(name for name, module in model.named_modules() if module is adapter_of(model).blocks(model)[block])
    part = "attn" if hasattr(model.get_submodule(name), "attn") else "attention"
    attn: Any = model.get_submodule(f"{name}.{part}")
    return f"{name}.{part}", attn, getattr(attn, "proj", None) or attn.o_proj


def _value_rows(attn: Any) -> tuple[Tensor, Tensor | None]:
    """Weights (heads, dims, C) and biases (heads, dims) of the values."""
    heads, dims = getattr(attn, "num_kv_heads", attn.num_heads), value_dim(attn)
    linear = attn.v_proj if getattr(attn, "qkv", None) is None else attn.qkv
    bias = linear.bias if getattr(attn, "v_bias", None) is None else attn.v_bias
    weight = linear.weight.detach()[-heads * dims :].view(heads, dims, -1).clone()
    return weight, None if bias is None else bias.detach()[-heads * dims :].view(heads, dims).clone()


def _seen(model: Any, x: Tensor) -> dict[str, Tensor]:
    """What enters the attention of block 1 and its last projection, with the gradients of the objective of WPAC."""
    name, _, last = _attention(model)
    kept: dict[str, Tensor] = {}

    def keep(key: str, tensor: Tensor) -> None:
        tensor.retain_grad()
        kept[key] = tensor

    norm = model.get_submodule(f"{name.rpartition('.')[0]}.norm1")
    hooks = [
        norm.register_forward_hook(lambda _, __, out: keep("normed", out)),
        last.register_forward_pre_hook(lambda _, args: keep("mixed", args[0])),
    ]
    out = predicted(model, x)
    (out.max(1).values.sum() if adapter_of(model).classifier(model).classes else out.square().sum()).backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    return kept


@pytest.mark.parametrize("name", NAMES)
def test_covariance_of_values_equals_its_definition(name: str) -> None:
    """The gradient of values is that of the mixed ones through attention: by automatic differences of the values."""
    model, x = _model(name), images(4, dtype=torch.float64)
    layer, attn, _ = _attention(model)
    weight, bias = _value_rows(attn)
    heads, dims = weight.shape[:2]
    taken: dict[str, Tensor] = {}
    with elastic(model) as layers:
        inside: Any = layers[layer]

        def tap(name: str, tensor: Tensor, *_: Tensor) -> None:
            if name == "streams":
                tensor.retain_grad()
                taken["f"] = tensor

        inside.vitrim_tap = tap
        seen = _seen(model, x)
    values = seen["normed"].detach() @ weight.flatten(0, 1).mT + (0 if bias is None else bias.flatten())
    torch.testing.assert_close(taken["f"].detach(), values, rtol=0, atol=1e-12)
    f, g = (t.detach().flatten(0, 1).view(-1, heads, dims) for t in (values, taken["f"].grad))
    sums = collect(model, [x], num_images=4)[layer]
    assert isinstance(sums, HeadSums)
    assert sums.plain_SHh.shape == (1, heads, dims)
    for head in range(heads):
        rows, weights = f[:, head], (g * f)[:, head].abs().mean(1)
        centred = rows - rows.mean(0)
        expected = sum(w * torch.outer(c, c) for w, c in zip(weights, centred, strict=True))
        torch.testing.assert_close(sums.covariance(-1)[head], expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("ordering", ["wpac", "magnitude", "random", "taylor"])
@pytest.mark.parametrize("name", NAMES)
def test_values_rotate_alone_and_the_function_stays(name: str, ordering: str) -> None:
    assert ordering in ORDERINGS
    model, x = _model(name), images(4, dtype=torch.float64)
    before, old = predicted(model, x), copy.deepcopy(model)
    axes = collect(model, [x], num_images=4)[_attention(model)[0]].covariance(-1)
    done = wpac(model, [x], num_images=4, ordering=ordering, say=quiet)
    assert done.max_difference <= 1e-10
    assert (predicted(model, x) - before).abs().max() <= 1e-10
    (_, one, _), (_, other, _) = _attention(model), _attention(old)
    (weight, bias), (weight_before, bias_before) = _value_rows(one), _value_rows(other)
    for head in range(len(weight)):
        rotation = torch.linalg.lstsq(weight_before[head].mT, weight[head].mT).solution
        torch.testing.assert_close(rotation.mT @ rotation, torch.eye(len(rotation), dtype=torch.float64))
        if bias is not None:
            torch.testing.assert_close(bias[head], bias_before[head] @ rotation)
        if ordering == "wpac":
            turned = rotation.mT @ axes[head] @ rotation
            assert (turned - turned.diagonal().diag()).abs().max() <= 1e-9 * turned.abs().max()
            assert (turned.diagonal().diff() <= 1e-9 * turned.abs().max()).all()
    others = {name: value for name, value in one.state_dict().items() if not name.startswith(("v_", "proj", "o_proj"))}
    for name, value in others.items():  # Queries and keys with their norms.
        rows = len(value) - weight.shape[0] * weight.shape[1] if name.startswith("qkv") else len(value)
        assert torch.equal(value[:rows], other.state_dict()[name][:rows]), name


@pytest.mark.parametrize("name", ["perception", "grouped", "hf_dinov3"])
def test_kept_values_of_all_heads_predict_the_lost_ones(name: str) -> None:
    model, x = _model(name), images(16, dtype=torch.float64)
    net = stratify(model, [x], num_images=16, width_multiple=4, max_saving=0.3, rounds=1, even=True, say=quiet)
    layer, attn, last = _attention(net.model)
    assert net.compensations is not None
    heads, dims, width = attn.num_heads, attn.head_dim, 5
    kept = width if getattr(attn, "vitrim_rule", None) is None else attn.vitrim_rule.values[width]
    mixed = _seen(net.model, x)["mixed"]
    rows, gradient = mixed.detach(), mixed.grad
    assert gradient is not None
    size = gradient.square().sum(-1)
    weights = (1 + size / size.mean(1, keepdim=True)).flatten()
    rows = rows.flatten(0, 1)
    stay = [head * dims + dim for head in range(heads) for dim in range(kept)]
    lost = [column for column in range(heads * dims) if column not in stay]
    mean = (weights[:, None] * rows).sum(0) / weights.sum()
    spread = ((weights[:, None] * (rows - mean)).mT @ (rows - mean)) / weights.sum()
    order = torch.arange(heads * dims).view(heads, dims).mT.flatten()
    factor = net.compensations[layer].factor
    assert factor is not None
    ridge = (factor.double() @ factor.double().mT - spread[order][:, order]).diagonal().mean()
    spread = spread + ridge * torch.eye(heads * dims, dtype=torch.float64)
    weight = last.weight.detach()
    expected = weight[:, stay] + weight[:, lost] @ spread[lost][:, stay] @ torch.linalg.inv(spread[stay][:, stay])
    small = copy.deepcopy(net.model)
    vitrim.models.narrow(small, {layer: width}, net.compensations)
    _, cut, projection = _attention(small)
    assert value_dim(cut) == kept
    torch.testing.assert_close(projection.weight.detach(), expected, rtol=1e-4, atol=1e-4)  # Kept in float32.
    if last.bias is not None:
        moved = last.bias.detach() + weight @ mean - expected @ mean[stay]
        torch.testing.assert_close(projection.bias.detach(), moved, rtol=1e-4, atol=1e-4)


def test_all_networks_train_together_and_the_smallest_without_attention() -> None:
    model, x = _model("dinov3").float(), images(16)
    wpac(model, [x], num_images=16, say=quiet)
    config = Piad(grow_epochs=1, num_images=16, probe_images=8, max_saving=0.9, labels=False, width_multiple=4)
    with Stratifier(model, config) as stratifier:
        stratifier.start_epoch(0, [x])
        assert isinstance(_attention(model)[1], ElasticValues)
        for term in stratifier.losses(x[:2], torch.tensor([1, 2]), step=0):
            term.loss.backward()
    assert all(parameter.grad is not None for parameter in _attention(model)[1].parameters())
    net = stratifier.finish()
    assert 0 in net.chain.widths(-1).values()
    small = net.cut(-1)
    with net.at(-1) as running:
        torch.testing.assert_close(predicted(small, x), predicted(running.eval(), x), rtol=1e-4, atol=1e-4)
