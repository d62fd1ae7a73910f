"""Counting never calls, changes or waits for the model that is counted, whatever its layers are."""

import copy
import threading
import warnings

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vitrim
from vitrim.measure.speed import bench
from zoo import build, images

REDUCTIONS = ["TopK() @ KeepRate(0.5)", "TopK(mean_attention) @ KeepRate(0.5, place=before)", "ToMe() @ Budget(0.8)"]


class LowRank(nn.Module):
    """A linear layer with a trainable low-rank addition (LoRA)."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def tiny(**options: object) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, num_classes=7, **options).eval()


def executed(model: nn.Module) -> int:
    """MACs of one image by PyTorch's counter, on a copy without storage, where fused attention is spelled out."""
    hollow = copy.deepcopy(model).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hollow(torch.empty(1, 3, 64, 64, device="meta"))
    return counter.get_total_flops() // 2


def quantised(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.parametrize("name", ["vit", "hybrid", "siglip"])
def test_counting_calls_no_module_and_moves_no_tensor(name: str) -> None:
    model, called = build("timm-vit", name), []
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: called.append(module))
    before = {key: (value.data_ptr(), value.device) for key, value in model.state_dict().items()}
    for text in (None, "TopK(key_norm) @ KeepRate(0.5)", "ToMe() @ Budget(0.9)"):
        vitrim.cost(model)
        if text is not None:
            with vitrim.attach(model, text):
                vitrim.cost(model)
    assert called == []
    assert {key: (value.data_ptr(), value.device) for key, value in model.state_dict().items()} == before


@pytest.mark.parametrize("name", ["vit", "hybrid"])
def test_threads_may_count_while_the_model_runs(name: str) -> None:
    model, x = build("timm-vit", name), images()
    expected, dense, wrong = model(x), vitrim.cost(model), []

    def count() -> None:
        wrong.extend("cost" for _ in range(20) if vitrim.cost(model) != dense)

    threads = [threading.Thread(target=count) for _ in range(2)]
    for thread in threads:
        thread.start()
    outputs = [model(x) for _ in range(20)]
    for thread in threads:
        thread.join()
    assert wrong == []
    assert all(torch.equal(out, expected) for out in outputs)
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("text", REDUCTIONS)
def test_quantised_layers_count_as_their_sizes_say(text: str) -> None:
    plain = tiny()
    dense = vitrim.cost(plain).macs
    model = quantised(tiny())
    assert vitrim.cost(model).macs == dense
    with vitrim.attach(model, text):
        assert vitrim.cost(model).macs < dense
        with torch.no_grad():
            assert model(torch.randn(2, 3, 64, 64)).isfinite().all()


@pytest.mark.parametrize("text", REDUCTIONS)
@pytest.mark.parametrize("where", ["qkv", "proj", "fc1", "head"])
def test_foreign_linear_layers_count_as_they_are_executed(text: str, where: str) -> None:
    model = tiny()
    for name, module in list(model.named_modules()):
        if name.endswith(where) and isinstance(module, nn.Linear):
            model.set_submodule(name, LowRank(module))
    assert vitrim.cost(model).macs == executed(model)
    with vitrim.attach(model, text):
        assert vitrim.cost(model).macs == pytest.approx(executed(model), rel=1e-3)


def test_layers_with_hooks_count_as_they_are_executed() -> None:
    model = tiny()
    with vitrim.attach(model, "TopK() @ KeepRate(0.5)"):
        skipped = vitrim.cost(model).macs
        model.blocks[2].attn.qkv.register_forward_hook(lambda *_: None)
        whole = vitrim.cost(model).macs
        assert whole > skipped  # A call of the whole layer computes what the slices left out.
        assert whole == pytest.approx(executed(model), rel=1e-3)


def test_speed_and_macs_are_those_of_eval_mode() -> None:
    model = tiny().train()
    dense = vitrim.cost(model, training=False).macs
    vitrim.attach(model, "TopK() @ KeepRate(0.5)", phase="train")
    assert vitrim.cost(model).macs < dense
    table = bench({"trained": model}, batch_sizes=(1,), rounds=1, warmup=0, device="cpu")
    assert [row["macs"] for row in table.rows] == [dense]
