"""How much of a schedule acts: it follows training in every copy of a model, and is kept in checkpoints."""

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

import vitrim
from vitrim.errors import ScoreError, VitrimError
from vitrim.models import RemovedBranch
from zoo import build, images

CURRICULUM = "TopK() @ KeepRate(0.6, at=(0, 1)) @ Delayed(2)"
COPIES = [ModelEmaV2, ModelEmaV3, AveragedModel]


def reduced(text: str = CURRICULUM) -> tuple[nn.Module, vitrim.Handle]:
    model = build("timm-vit", "vit")
    return model, vitrim.attach(model, text)


@pytest.mark.parametrize("make", COPIES)
def test_set_epoch_moves_a_model_and_its_averages(make: Callable[[nn.Module], nn.Module]) -> None:
    model, handle = reduced()
    average, x = make(model), images(2)
    for epoch in (0, 1, 2):
        assert vitrim.set_epoch(nn.DataParallel(model), average, epoch=epoch) == (epoch >= 2)
        average.update(model) if hasattr(average, "update") else average.update_parameters(model)
    assert vitrim.attached(average) is vitrim.attached(average.module)
    assert vitrim.attached(average).token_counts == handle.token_counts == (16, 10, 10)
    torch.testing.assert_close(average(x), model(x))
    assert vitrim.set_epoch(handle, epoch=0) == 0


@pytest.mark.parametrize("make", COPIES)
def test_an_average_that_was_left_behind_says_so_once(make: Callable[[nn.Module], nn.Module]) -> None:
    model, handle = reduced()
    average, x = make(model), images(2)
    average(x)
    handle.set_epoch(2)
    model(x)
    with pytest.warns(UserWarning, match=r"still reduces at strength 0, while .* vitrim.set_epoch\(model, copy"):
        average(x)
    average(x)


def test_a_copy_that_was_left_behind_says_so_when_it_is_saved(tmp_path: Path) -> None:
    model = vitrim.build_model("vitrim_digits_vit", depth=2)
    handle = vitrim.attach(model, "TopK() @ KeepRate(0.6, at=(0, 1)) @ Delayed(2)")
    average = ModelEmaV3(model)
    handle.set_epoch(2)
    with pytest.warns(UserWarning, match="still reduces at strength 0"):
        vitrim.save(average.module, tmp_path / "average")
    vitrim.set_epoch(model, average, epoch=2)
    vitrim.save(average.module, tmp_path / "average", overwrite=True)
    assert vitrim.attached(vitrim.load(tmp_path / "average")).strength == 1


def test_a_copy_with_a_strength_of_its_own_keeps_it() -> None:
    model, handle = reduced()
    best = copy.deepcopy(model)
    vitrim.attached(best).set_strength(0.5)
    handle.set_epoch(2)
    best(images(2))
    assert (vitrim.attached(best).strength, handle.strength) == (0.5, 1)
    constant, handle = reduced("TopK() @ KeepRate(0.6)")
    twin = copy.deepcopy(constant)
    handle.set_strength(0.5)
    twin(images(2))  # Without a curriculum nobody expects it to follow.


def test_what_cannot_be_moved_is_named() -> None:
    with pytest.raises(VitrimError, match="no reduction is attached to this VisionTransformer"):
        vitrim.set_epoch(reduced()[0], build("timm-vit", "vit"), epoch=1)
    with pytest.raises(VitrimError, match="takes the models to move"):
        vitrim.set_epoch(epoch=1)
    with pytest.raises(VitrimError, match="2 models inside this ModuleList are reduced"):
        vitrim.attached(nn.ModuleList([reduced()[0], reduced()[0]]))
    with pytest.raises(VitrimError, match="between 0 and 1, not -1"):
        reduced()[1].set_strength(-1)


@pytest.mark.parametrize("by", ["hand", "a state dict", "the state of a handle"])
def test_a_strength_at_which_the_model_cannot_cut_is_refused_at_once(by: str) -> None:
    """At full strength one token is left after the first block, so that only a weaker schedule cuts at the second."""
    text = "TopK() @ KeepRate(0.01, at=(0, 1))"
    model = build("timm-vit", "vit")
    model.blocks[1].attn = RemovedBranch(model.embed_dim)  # It gives no scores.
    handle = vitrim.attach(model, text)
    other, whole = reduced(text)
    whole.set_strength(0.5)
    move = {
        "hand": lambda: handle.set_strength(0.5),
        "a state dict": lambda: model.load_state_dict(other.state_dict(), strict=False),
        "the state of a handle": lambda: handle.load_state_dict(whole.state_dict()),
    }
    with pytest.raises(ScoreError, match="the attention of block 1 was removed"):
        move[by]()
    assert (handle.strength, handle.token_counts) == (1, (2, 2, 2))
    model(images(2))


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel, lambda model: nn.Sequential(model)])
def test_load_state_dict_brings_the_strength(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model, handle = reduced()
    handle.set_strength(0.7)
    file = io.BytesIO()
    torch.save(wrap(model).state_dict(), file)
    file.seek(0)
    other, own = reduced()  # As Lightning's load_from_checkpoint: made again, then loaded.
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert own.strength == 0.7
    other, own = reduced()
    wrap(other).load_state_dict(torch.load(file, weights_only=True))
    assert own.strength == 0.7
    assert torch.equal(other(images(2)), model(images(2)))


def test_weights_that_do_not_say_their_strength_say_so_once() -> None:
    """A plain dict, as safetensors gives or as is left when prefixes are removed, has lost the metadata."""
    (model, handle), (other, own), x = reduced(), reduced(), images(2)
    handle.set_strength(0.7)
    other.load_state_dict(dict(model.state_dict()))
    with pytest.warns(UserWarning, match=r"do not say how far .* strength 0; call vitrim.set_epoch"):
        other(x)
    other(x)
    other.load_state_dict(dict(model.state_dict()))
    own.set_epoch(0)
    other(x)


def test_weights_go_both_ways_between_reduced_and_plain_models() -> None:
    (model, handle), plain = reduced(), build("timm-vit", "vit")
    handle.set_strength(0.7)
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())
    assert handle.strength == 0.7
    _, other = reduced("ToMe() @ ConstantR(2)")
    other.model.load_state_dict(model.state_dict())
    assert other.strength == 1, "the strength of another reduction is none of its own"


def test_a_checkpoint_of_a_handle_holds_strength_and_learnt_gradients() -> None:
    def learning() -> tuple[nn.Module, vitrim.Handle]:
        model = build("timm-vit", "vit").train()
        reducer, schedule = vitrim.TopK("gradient"), vitrim.KeepRate(0.6, at=(0, 1))
        return model, vitrim.attach(model, reducer, schedule, phase="train", curriculum=vitrim.Delayed(2))

    model, handle = learning()
    handle.set_epoch(2)
    model(images(2)).square().sum().backward()
    file = io.BytesIO()
    torch.save(handle.state_dict(), file)
    file.seek(0)
    again, other = learning()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.strength == 1
    for block, weights in handle.gradients.known().items():
        assert torch.equal(other.gradients.known()[block], weights)
    assert torch.equal(again(images(2, seed=3)), model(images(2, seed=3)))


@pytest.mark.parametrize("history", [3, "no", [3], {"val_loss": 1.0}, None])
def test_a_history_that_is_none_is_refused(history: object) -> None:
    with pytest.raises(VitrimError, match="history is a list of one mapping for each finished epoch, not"):
        reduced()[1].set_epoch(1, history)  # type: ignore[arg-type]
