"""Eval mode lasts as long as its context, also where it ends by an exception or modules differ in mode."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import vitrim
from vitrim.data.specs import DataSpec
from vitrim.data.splits import plain_stream
from vitrim.distill import Distiller
from vitrim.elastic.latency import milliseconds
from vitrim.elastic.probing import frozen
from vitrim.measure.accelerator import make_accelerator
from vitrim.measure.accuracy import attention_entropy, evaluate, mean_loss
from vitrim.models.evaluating import evaluating


class Failing(Exception):
    """Raised by a model in the middle of its work."""


def mixed() -> nn.Module:
    """In train mode, but for a frozen block in it."""
    model = timm.create_model("vitrim_digits_vit", depth=3, embed_dim=24, num_heads=2).train()
    model.blocks[1].eval()
    return model


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def fail(module: nn.Module, given: Any) -> None:
    assert not module.training
    raise Failing


def digits(model: nn.Module) -> Any:
    return plain_stream(model, DataSpec(name="digits", workers=0))


def mean(model: nn.Module, _: Path) -> object:
    options = {"batch_size": 400, "workers": 0, "accelerator": make_accelerator(cpu=True)}
    return mean_loss(Distiller(model, None, "Labels()"), digits(model), **options)


def draw(model: nn.Module, folder: Path) -> object:
    Image.new("L", (8, 8)).save(folder / "a.png")
    with vitrim.attach(model, "TopK() @ KeepRate(0.5, at=(1,))"):
        return vitrim.show(model, folder / "a.png", folder / "out")


def freeze(model: nn.Module, _: Path) -> object:
    with frozen(model):
        return model(torch.rand(1, 1, 8, 8))


USERS: dict[str, Callable[[nn.Module, Path], object]] = {
    "evaluate": lambda model, _: evaluate(model, digits(model), batch_size=400, accelerator=make_accelerator(cpu=True)),
    "mean_loss": mean,
    "attention_entropy": lambda model, _: attention_entropy(model, torch.rand(2, 1, 8, 8)),
    "milliseconds": lambda model, _: milliseconds(model),
    "frozen": freeze,
    "show": draw,
}


@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
@pytest.mark.parametrize("name", USERS)
def test_every_module_is_in_its_own_mode_again(name: str, fails: bool, tmp_path: Path):
    model = mixed()
    before = modes(model)
    assert True in before
    assert False in before
    if fails:
        model.blocks[2].mlp.register_forward_pre_hook(fail)
        with pytest.raises(Failing):
            USERS[name](model, tmp_path)
    else:
        USERS[name](model, tmp_path)
    assert modes(model) == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_several_models_and_shared_modules():
    shared = nn.Linear(2, 2).train()
    one, other = nn.Sequential(shared).train(), nn.Sequential(shared, nn.Dropout()).eval()
    shared.train()
    before = [modes(model) for model in (one, other)]
    with evaluating(one, other):
        assert not any(modes(one) + modes(other))
    assert [modes(model) for model in (one, other)] == before


def test_modules_that_act_on_a_change_of_mode_can_undo_it():
    class Merging(nn.Module):
        merged = False

        def train(self, mode: bool = True) -> "Merging":
            self.merged = not mode
            return super().train(mode)

    module = Merging().train()
    with evaluating(module):
        assert module.merged
    assert module.training
    assert not module.merged
