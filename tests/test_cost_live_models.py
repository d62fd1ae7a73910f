"""Counting never calls, changes or waits for the model that is counted, whatever its layers are."""

import copy
import threading
import warnings

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.flop_counter import FlopCounterMode

import vitrim
from vitrim.errors import VitrimError
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
    empty = copy.deepcopy(model).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        empty(torch.empty(1, 3, 64, 64, device="meta"))
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


def with_adapters(config: object) -> nn.Module:
    """The inner model of one that PEFT has put its layers into."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft

        return peft.get_peft_model(tiny(), config).eval().base_model.model


PEFT: dict[str, dict[str, object]] = {
    "Lora": {"r": 4},
    "Lora that is weight-decomposed (DoRA)": {"r": 4, "use_dora": True},
    "LoHa": {"r": 4},
    "LoKr": {"r": 4},
    "IA3": {"feedforward_modules": ["fc1"]},
    "OFT": {"oft_block_size": 8, "r": 0},
    "Vera": {"r": 8},
    "AdaLora": {"total_step": 10},
    "HRA": {"r": 4},
    "FourierFT": {"n_frequency": 10},
}
PER_BATCH = ("Lora that", "LoHa", "LoKr", "OFT", "HRA")
"""Work on weights once per batch."""


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*fan_in_fan_out")
@pytest.mark.parametrize("kind", PEFT)
def test_layers_of_peft_count_what_each_image_costs(kind: str) -> None:
    peft = pytest.importorskip("peft")
    model = with_adapters(getattr(peft, kind.partition(" ")[0] + "Config")(target_modules=["qkv", "fc1"], **PEFT[kind]))
    empty = copy.deepcopy(model).to("meta")
    flops = []
    for images_ in (1, 2):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            empty(torch.empty(images_, 3, 64, 64, device="meta"))
        flops.append(counter.get_total_flops() // 2)
    per_image = flops[1] - flops[0]
    assert (flops[0] > per_image) == kind.startswith(PER_BATCH)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert vitrim.cost(model).macs == per_image
    said = [str(one.message) for one in caught if "once per batch" in str(one.message)]
    assert bool(said) == kind.startswith(PER_BATCH)
    assert all("not counted per image" in line for line in said)


class Packed(nn.Module):
    """Weights in a form that only runs with values, as those of 4 bits do."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.packed = nn.Parameter(torch.zeros(base.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.zeros(self.in_features, self.out_features) * float(self.packed.max().item())


def test_adapters_over_packed_weights_count_as_over_plain_ones() -> None:
    plain, packed, alone = tiny(), tiny(), tiny()
    for block, other, third in zip(plain.blocks, packed.blocks, alone.blocks, strict=True):
        block.attn.qkv = LowRank(block.attn.qkv)
        other.attn.qkv = LowRank(other.attn.qkv)
        other.attn.qkv.base = Packed(other.attn.qkv.base)
        third.attn.qkv = Packed(third.attn.qkv)
    assert vitrim.cost(packed).macs == vitrim.cost(plain).macs
    assert vitrim.cost(alone).macs == vitrim.cost(tiny()).macs


def test_only_adapters_that_run_are_counted() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny(), peft.LoraConfig(r=4, target_modules=["qkv"])).eval()
    one = vitrim.cost(model.base_model.model).macs
    model.add_adapter("other", peft.LoraConfig(r=16, target_modules=["qkv"]))
    assert vitrim.cost(model.base_model.model).macs == one
    model.set_adapter("other")
    assert vitrim.cost(model.base_model.model).macs > one
    with model.disable_adapter():
        assert vitrim.cost(model.base_model.model).macs == vitrim.cost(tiny()).macs
    model.merge_adapter()
    assert vitrim.cost(model.base_model.model).macs == vitrim.cost(tiny()).macs


def test_layers_that_mix_rows_are_refused() -> None:
    model = tiny()
    model.blocks[0].mlp = type("Mixes", (Bilinear,), {"forward": lambda self, x: (x @ x.mT) @ x @ self.kernel})(
        192, 192
    )
    with pytest.raises(VitrimError, match="MACs of this Mixes do not grow evenly with its rows"):
        vitrim.cost(model)


class Bilinear(nn.Module):
    """A token-wise layer of weights that says no sizes."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(out, width))
        self.seen: list[torch.Size] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.shape)
        return x @ self.kernel.T


@pytest.mark.parametrize("where", ["attn.qkv", "mlp"])
def test_layers_without_sizes_are_counted_on_an_empty_copy(where: str) -> None:
    model, width = tiny(), 192
    for block in model.blocks:
        block.set_submodule(where, Bilinear(width, 3 * width if where == "attn.qkv" else width))
    for text in (None, *REDUCTIONS):
        if text is not None:
            vitrim.attach(model, text)
        assert vitrim.cost(model).macs == pytest.approx(executed(model), rel=1e-3)
        if text is not None:
            vitrim.attached(model).remove()
    assert all(block.get_submodule(where).seen == [] for block in model.blocks)


def test_a_layer_that_reads_values_is_refused_in_one_line() -> None:
    model = tiny()
    model.head = type("Reads", (Bilinear,), {"forward": lambda self, x: x if x.sum().item() > 0 else -x})(192, 7)
    with pytest.raises(
        VitrimError, match="MACs of this Reads cannot be counted, since it does not run on tensors"
    ) as e:
        vitrim.cost(model)
    assert "\n" not in str(e.value)
    vitrim.attach(model, "TopK() @ KeepRate(0.5)")  # Only a budget needs the count.


def test_counting_hooks_no_call_of_other_models() -> None:
    seen: list[bool] = []

    class Spy(Bilinear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(bool(torch_module._has_any_global_hook()))
            return super().forward(x)

    model = tiny()
    model.head = Spy(192, 7)
    vitrim.cost(model)
    assert seen
    assert not any(seen)


def test_packed_weights_of_quantised_layers_are_parameters() -> None:
    assert vitrim.cost(quantised(tiny())).params == vitrim.cost(tiny()).params


def test_cost_can_be_asked_for_either_mode() -> None:
    model = tiny(patch_drop_rate=0.5)
    assert (
        vitrim.cost(model, training=True).macs
        < vitrim.cost(model).macs
        == vitrim.cost(model.train(), training=False).macs
    )


class Int8Weight(Tensor):
    """A weight-only quantised tensor, as torchao has them, which cannot be sliced."""

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor) -> "Int8Weight":
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self.values, self.step = values, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values", "step"], None

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, Tensor], *_: object) -> "Int8Weight":
        return cls(parts["values"], parts["step"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        packet = func.overloadpacket if hasattr(func, "overloadpacket") else func
        if packet in (torch.ops.aten.detach, torch.ops.aten.alias):
            return cls(func(args[0].values), args[0].step)
        if packet in (torch.ops.aten.t, torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.linear):
            plain = [a.values * a.step if isinstance(a, Int8Weight) else a for a in args]
            return func(*plain, **(kwargs or {}))
        raise NotImplementedError(f"{func} of a quantised weight")


@pytest.mark.parametrize("text", REDUCTIONS)
def test_weights_that_are_tensor_subclasses_are_counted_and_not_sliced(text: str) -> None:
    plain, model = tiny(), tiny()
    model.load_state_dict(plain.state_dict())
    for block, other in zip(model.blocks, plain.blocks, strict=True):
        for layer, own in ((block.attn.qkv, other.attn.qkv), (block.mlp.fc1, other.mlp.fc1)):
            step = own.weight.detach().abs().max() / 127
            values = (own.weight.detach() / step).round()
            layer.weight = nn.Parameter(Int8Weight(values.to(torch.int8), step), requires_grad=False)
            own.weight.data = values * step
    dense = vitrim.cost(plain)
    assert (vitrim.cost(model).macs, vitrim.cost(model).params) == (dense.macs, dense.params)
    with vitrim.attach(model, text), vitrim.attach(plain, text), torch.no_grad():
        assert vitrim.cost(plain).macs <= vitrim.cost(model).macs < dense.macs
        x = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", ["attn.qkv", "attn"])
@pytest.mark.parametrize("text", ["TopK() @ KeepRate(0.5)", "TopK(random) @ KeepRate(0.5)"])
def test_layers_with_hooks_count_as_they_are_executed(layer: str, text: str) -> None:
    model = tiny()
    with vitrim.attach(model, text):
        skipped = vitrim.cost(model).macs
        model.blocks[2].get_submodule(layer).register_forward_hook(lambda *_: None)
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
