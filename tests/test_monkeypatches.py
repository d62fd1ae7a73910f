"""Forwards that others put on a class or an instance, before or after attach: they run, or are refused in one line."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vitrim
from hf_models import BACKBONES, MORE
from relative_models import BEIT
from toy_family import ToyViT
from vitrim.errors import VitrimError
from vitrim.models import adapter_of
from vitrim.models.own_code import replaced
from vitrim.models.widths.sublayers import elastic
from zoo import build, images

TOPK = "TopK(norm) @ KeepRate(0.6, at=(0, 1))"
MODELS: dict[str, Callable[[], Any]] = {
    "timm": lambda: build("timm-vit", "vit"),
    "transformers": MORE["clip"],
    "rotary": MORE["dinov3"],
}
CANNOT_CALL: dict[str, Callable[[], Any]] = {"beit": BEIT["beit"], "hf_beit": MORE["beit"]}
"""Whose blocks never call their attention as a whole."""


def _ready(make: Callable[[], Any]) -> tuple[Any, torch.Tensor]:
    model = make().eval()
    channels, *size = adapter_of(model).input_format(model).size
    return model, images(2) if channels == 1 else torch.randn(2, channels, *size)


def _attention(model: Any, index: int = 0) -> nn.Module:
    adapter = adapter_of(model)
    return adapter.blocks(model)[index].get_submodule(next(iter(adapter.branches_of(model))))


class _Patch:
    """A forward that adds nothing, and counts its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, on: Any) -> None:
        before, self.calls = on.forward, 0

        @functools.wraps(before)
        def zero(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            out = before(*args, **kwargs)
            return (0 * out[0], *out[1:]) if isinstance(out, tuple) else 0 * out

        monkeypatch.setattr(on, "forward", zero)


@pytest.fixture
def patch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], _Patch]:
    return lambda on: _Patch(monkeypatch, on)


@pytest.mark.parametrize("place", ["class", "instance"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", MODELS)
def test_a_patched_attention_is_called_where_a_block_cuts(name: str, when: str, place: str, patch: Any) -> None:
    model, x = _ready(MODELS[name])
    handle = vitrim.attach(model, TOPK) if when == "after" else None
    first = _attention(model)
    with torch.inference_mode():
        plain = model(x)
        found = patch(type(first) if place == "class" else first)
        handle = handle or vitrim.attach(model, TOPK)
        changed = model(x)
    blocks = len(adapter_of(model).blocks(model))
    assert found.calls == (blocks if place == "class" else 1)
    pair = [out if isinstance(out, torch.Tensor) else out[0] for out in (plain, changed)]
    assert pair[0].shape != pair[1].shape or not torch.allclose(*pair)
    handle.remove()
    assert not [key for module in model.modules() for key in vars(module) if key.startswith("vitrim_")]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", CANNOT_CALL)
def test_a_patched_attention_that_cannot_run_is_refused(name: str, when: str, patch: Any) -> None:
    model, x = _ready(CANNOT_CALL[name])
    if when == "after":
        vitrim.attach(model, TOPK)
    patch(type(_attention(model)))
    if when == "before":
        vitrim.attach(model, TOPK)
    with pytest.raises(VitrimError, match=r"of block 0 has a forward of its own, which cannot run"):
        model(x)


def test_sizes_of_merged_tokens_need_an_attention_that_reads_them(patch: Any) -> None:
    model, x = _ready(MODELS["timm"])
    patch(type(_attention(model)))
    with (
        vitrim.attach(model, "ToMe() @ KeepRate(0.6, at=(0, 1))"),
        pytest.raises(VitrimError, match=r"may ignore the mask .* undo the patch of its class"),
    ):
        model(x)


@pytest.mark.parametrize("name", [*MODELS, *CANNOT_CALL])
def test_a_patched_class_of_blocks_is_refused(name: str, patch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _ready({**MODELS, **CANNOT_CALL}[name])
    kind = type(adapter_of(model).blocks(model)[0])
    with monkeypatch.context() as only_here:
        _Patch(only_here, kind)
        with pytest.raises(VitrimError, match=rf"forward of the class {kind.__name__} was replaced.* before attach"):
            vitrim.attach(model, TOPK)
        assert vitrim.attached(model) is None
    with vitrim.attach(model, TOPK):
        model(x)
        patch(kind)
        with pytest.raises(VitrimError, match=r"the forward of the class of block 0 was replaced"):
            model(x)


def test_a_patched_pooling_of_a_class_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _ready(lambda: build("timm-vit", "gap"))
    own = VisionTransformer.pool
    with monkeypatch.context() as only_here:
        only_here.setattr(VisionTransformer, "pool", lambda self, x, pool_type=None: 2 * own(self, x, pool_type))
        with pytest.raises(VitrimError, match="the pool of the class VisionTransformer was replaced"):
            vitrim.attach(model, "ToMe() @ KeepRate(0.6)")
    with vitrim.attach(model, "ToMe() @ KeepRate(0.6)"):
        assert model(x).isfinite().all()
        monkeypatch.setattr(VisionTransformer, "pool", lambda self, x, pool_type=None: 2 * own(self, x, pool_type))
        with pytest.raises(VitrimError, match="the pool of the class of this VisionTransformer was replaced"):
            model(x)


@pytest.mark.parametrize("name", ["siglip", "beit", "dinov2_backbone"])
def test_a_patched_class_of_a_part_is_refused(name: str, patch: Any) -> None:
    model, x = _ready({**MORE, **BACKBONES}[name])
    adapter = adapter_of(model)
    parts = (part for part in adapter.parts(model) if "forward" not in adapter.reduced_class(part).vitrim_free)
    own = type(next(parts))
    with vitrim.attach(model, "ToMe() @ KeepRate(0.6, at=(0,))"):
        model(x)
        patch(own)
        with pytest.raises(VitrimError, match=rf"the forward of the class of this {own.__name__} was replaced"):
            model(x)


@pytest.mark.parametrize("name", ["sdpa", "of_ours"])
def test_a_registered_attention_function_runs_or_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _ready(MODELS["transformers"])
    calls: list[str] = []

    def ours(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return sdpa_attention_forward(*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, ours)
    with vitrim.attach(model, TOPK) as handle:
        plain = model(x)[0]
        model.set_attn_implementation(name)
        calls.clear()
        torch.testing.assert_close(model(x)[0], plain)
        assert len(calls) == len(handle.token_counts)
    with vitrim.attach(model, "ToMe() @ KeepRate(0.6, at=(0,))"):
        with pytest.raises(VitrimError, match=f"registered as '{name}' may ignore the mask .* call model.set_attn"):
            model(x)
        model.set_attn_implementation("eager")
        assert model(x)[0].isfinite().all()


def test_a_patch_of_all_linear_layers_sees_their_calls(patch: Any) -> None:
    model, x = _ready(MODELS["timm"])
    with vitrim.attach(model, TOPK):
        reduced = model(x)
        found = patch(nn.Linear)
        changed = model(x)
    assert found.calls >= 4 * len(model.blocks)
    assert not torch.allclose(changed, reduced)


@pytest.mark.parametrize("name", MODELS)
def test_a_patched_attention_cannot_change_its_width(name: str, patch: Any) -> None:
    model, _ = _ready(MODELS[name])
    patch(type(_attention(model)))
    with pytest.raises(VitrimError, match=r"the forward of .* was replaced; undo that patch"), elastic(model):
        raise AssertionError("elastic() let it pass")


def test_classes_of_all_families_are_their_libraries_own() -> None:
    for make in (*MODELS.values(), *CANNOT_CALL.values(), lambda: ToyViT(5, 8, 1, 24, 2, 2)):
        assert not [type(module) for module in make().modules() if replaced(type(module))]
