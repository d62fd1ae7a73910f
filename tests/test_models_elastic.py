"""Layers of a variable width: what cannot be narrowed is refused, and sums in float64 stay where float64 exists."""

import re
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import vitrim
from vitrim.errors import CheckpointError, UnsupportedModelError
from vitrim.models import narrow
from vitrim.tokens.precision import exact, exact_device

PACKAGE = Path(vitrim.__file__).parent


class Lora(nn.Module):
    """A low-rank adapter around a linear layer, as PEFT makes it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


class Twice(nn.Module):
    """A parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Packed(torch.Tensor):
    """A tensor subclass, as quantised weights are."""


def wrap(layer: nn.Linear) -> nn.Module:
    return Lora(layer)


def subclass(layer: nn.Linear) -> nn.Module:
    return nn.modules.linear.NonDynamicallyQuantizableLinear(layer.in_features, layer.out_features)


def parametrised(layer: nn.Linear) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Twice())


def patched(layer: nn.Linear) -> nn.Module:
    layer.forward = lambda x: 0 * nn.functional.linear(x, layer.weight, layer.bias)
    return layer


def packed(layer: nn.Linear) -> nn.Module:
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Packed))
    return layer


def pruned(layer: nn.Linear) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", 0.5)


def spectral(layer: nn.Linear) -> nn.Module:
    return nn.utils.spectral_norm(layer)


def model_with(place: str, change: object) -> nn.Module:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=3, num_classes=4)
    model.set_submodule(f"blocks.1.{place}", change(model.get_submodule(f"blocks.1.{place}")))
    return model.eval()


@pytest.mark.parametrize("change", [wrap, subclass, parametrised, patched, packed, pruned, spectral])
@pytest.mark.parametrize("place", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_foreign_linear_layers_are_refused_before_anything_changes(place: str, change: object) -> None:
    model = model_with(place, change)
    x = torch.randn(2, 3, 32, 32)
    before, classes = model(x), [type(module) for module in model.modules()]
    for attempt in (lambda: vitrim.stratify(model, [x]), lambda: narrow(model, {"blocks.0.mlp": 8})):
        with pytest.raises(UnsupportedModelError, match=r"^blocks\.1\.\w+ holds a .*only plain linear layers"):
            attempt()
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(x), before)
    assert not [name for module in model.modules() for name in vars(module) if name.startswith("vitrim_")]


@pytest.mark.parametrize("place", ["attn", "mlp"])
def test_a_patched_branch_is_refused_since_its_patch_would_run_at_full_width(place: str) -> None:
    model = model_with(place, patched)
    with pytest.raises(UnsupportedModelError, match=rf"the forward of blocks\.1\.{place} was replaced"):
        vitrim.stratify(model, [torch.randn(2, 3, 32, 32)])


def test_sums_are_kept_on_the_cpu_where_a_device_has_no_float64() -> None:
    assert exact_device(torch.device("mps")) == torch.device("cpu")
    assert exact_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    moved: list[object] = []

    class OnMps:  # A tensor on a device that this machine lacks.
        device = torch.device("mps")

        def detach(self) -> "OnMps":
            return self

        def to(self, device: torch.device) -> Tensor:
            moved.append(device)
            return torch.ones(2)

        def double(self) -> Tensor:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    assert exact(OnMps()).dtype == torch.float64
    assert moved == [torch.device("cpu")]


def test_nothing_that_stratifies_or_shows_makes_float64_but_by_exact() -> None:
    files = [path for room in ("elastic", "models", "showing") for path in (PACKAGE / room).rglob("*.py")]
    for path in files:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not re.search(r"\.double\(\)|\.to\([^)]*float64", line), f"{path}:{number} {line.strip()}"


def test_a_model_whose_weights_are_results_of_a_computation_is_neither_copied_nor_saved(tmp_path: Path) -> None:
    model = model_with("mlp.fc1", pruned)
    for attempt in (lambda: vitrim.models.variant(model, "dense"), lambda: vitrim.bench(model, rounds=2)):
        with pytest.raises(UnsupportedModelError, match=r"cannot be copied: blocks\.1\.mlp\.fc1\.weight was computed"):
            attempt()
    with torch.no_grad():
        model(x := torch.randn(2, 3, 32, 32))
    with pytest.raises(CheckpointError, match=r"^blocks\.1\.mlp\.fc1\.weight is computed from other tensors"):
        vitrim.save(model, tmp_path / "pruned")
    assert torch.equal(vitrim.models.variant(model, "dense")(x), model(x))
