"""Methods that others set on an instance: no file or copy of a model has them, so they are refused and never lost."""

import copy
import functools
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.state import AcceleratorState

import vitrim
from hf_models import BACKBONES, HF, MORE
from vitrim.errors import CheckpointError, UnsupportedModelError, VitrimError
from vitrim.models.own_code import own_methods
from zoo import build, images

TOME = "ToMe() @ ConstantR(3)"


def half(z: Any, *args: Any, own: Any, **kwargs: Any) -> Any:
    return own(z, *args, **kwargs) * 0.5


def halve(module: Any, name: str = "forward") -> None:
    setattr(module, name, functools.partial(half, own=getattr(module, name)))


CHANGES: dict[str, Any] = {
    "blocks.0.mlp": lambda m: halve(m.blocks[0].mlp),
    "blocks.1": lambda m: setattr(m.blocks[1], "forward", types.MethodType(lambda self, z: z, m.blocks[1])),
    "norm": lambda m: setattr(m.norm, "forward", m.blocks[0].norm1.forward),
    "this VisionTransformer": lambda m: halve(m, "forward_head"),
}


@pytest.mark.parametrize("where", CHANGES)
def test_no_file_or_super_network_loses_a_method_of_an_instance(where: str, tmp_path: Any) -> None:
    model, x = build("timm-vit", "vit").eval(), torch.randn(64, 1, 20, 20)
    CHANGES[where](model)
    with pytest.raises(CheckpointError, match=f"^{where} has a forward.* of its own.*`del model"):
        vitrim.save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    with pytest.raises(UnsupportedModelError, match=rf"{where} (has a forward|was replaced)"):
        vitrim.stratify(model, x)
    with pytest.raises(UnsupportedModelError, match=f"^{where} has a forward"):
        vitrim.compress(model, x, macs=0.5)


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """accelerate keeps the number format of a process; other tests have one of their own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerator")
def test_what_libraries_set_on_models_is_no_method_of_others(tmp_path: Any) -> None:
    model, x = build("timm-vit", "vit").eval(), images(2)
    for number, change in enumerate((
        lambda: setattr(model, "forward", model.forward),
        lambda: setattr(model, "forward", torch.compile(model.forward, backend="eager")),
        lambda: model.compile(backend="eager"),
        lambda: add_hook_to_module(model.blocks[0].mlp, ModelHook()),
        lambda: remove_hook_from_module(model.blocks[0].mlp),
        lambda: Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model),
        lambda: setattr(model, "to", lambda *args: model),
    )):  # fmt: skip
        change()
        vitrim.save(model, tmp_path / str(number))
    twin: Any = copy.deepcopy(build("timm-vit", "vit").eval())
    twin.forward = twin.forward
    with vitrim.attach(twin, TOME):
        twin(x)
        vitrim.save(copy.deepcopy(twin), tmp_path / "reduced")
    assert vitrim.load(tmp_path / "reduced")(x).shape == (2, 5)


@pytest.mark.parametrize("name", [*HF, *MORE, *BACKBONES])
def test_no_model_of_transformers_comes_with_methods_of_its_own(name: str) -> None:
    model = {**HF, **MORE, **BACKBONES}[name]()
    assert not any(own_methods(module) for module in model.modules())


@pytest.mark.parametrize("name", ["pool", "forward_head"])
@pytest.mark.parametrize("on", ["instance", "class"])
def test_a_head_of_others_is_refused_where_it_would_count_merged_tokens_once(
    name: str, on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = build("timm-vit", "gap").eval(), images(2)
    own = getattr(type(model), name)

    def other(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    def patch() -> None:
        if on == "class":
            monkeypatch.setattr(type(model), name, other)
        else:
            monkeypatch.setattr(model, name, types.MethodType(other, model), raising=False)

    handle = vitrim.attach(model, TOME)
    expected = model(x)
    with monkeypatch.context() as inside:
        home = handle.model if on == "instance" else type(model).vitrim_foreign
        inside.setattr(home, name, types.MethodType(other, model) if on == "instance" else other, raising=False)
        with pytest.raises(VitrimError, match=rf"{name} of (its own|the class)"):
            model(x)
    vars(model).pop(name, None)
    assert torch.equal(model(x), expected)
    handle.remove()
    patch()
    with pytest.raises(UnsupportedModelError, match=rf"{name} of (its own|the class)"):
        vitrim.attach(model, TOME)
