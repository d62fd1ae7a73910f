"""Where tokens sit and what they are on the whole grid: positions, restoring, maps; against a slow reference."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitrim
from hf_models import MORE
from naflex_models import padded
from references import VIEWS, reduced_vit
from vitrim.errors import VitrimError
from vitrim.models import find_adapter
from vitrim.tokens import Reducer, TokenState
from zoo import build, images, redrawn

CUT = "TopK('norm', fuse=mean) @ KeepRate(0.6, at=(0, 1))"
REDUCERS = (vitrim.TopK("norm"), vitrim.TopK("norm", fuse="mean"), vitrim.ToMe())
MODELS = {
    "timm-vit": ("vit", "gap_with_cls"), "timm-eva": ("dinov3",), "timm-naflex": ("naflex",), "toy": ("toy",),
    "transformers": ("hf_dinov2", "clip_bare"),
}  # fmt: skip


def _model(family: str, name: str) -> nn.Module:
    return (redrawn(MORE[name]()) if family == "transformers" and name in MORE else build(family, name)).double()


def _own(state: TokenState) -> Tensor:
    """Which patches still have a token of their own, (B, N)."""
    return (state.origin >= 0) & (state.size.gather(1, state.origin.clamp(min=0)) == 1)


def _final(model: nn.Module, x: Tensor) -> Tensor:
    return find_adapter(model).features(model, x, ())[0]


@torch.no_grad()
@pytest.mark.parametrize("reducer", REDUCERS, ids=str)
@pytest.mark.parametrize(("family", "name"), [(f, n) for f, names in MODELS.items() for n in names])
def test_positions_and_restored_tokens_equal_the_slow_reference(family: str, name: str, reducer: Reducer) -> None:
    model, x = _model(family, name), images(2, dtype=torch.float64)
    schedule = vitrim.KeepRate(0.6, at=(0, 1))
    with vitrim.attach(model, reducer, schedule, restorable=True) as handle:
        final, plan = _final(model, x), handle.plan()
        state, restored = handle.state_of(final), handle.restore(final)
        assert torch.equal(handle.positions, state.positions)
        assert torch.equal(handle.origin, state.origin)
    norm = (VIEWS[family](model) if family in VIEWS else model).norm
    for image, positions, whole in zip(x, state.positions, restored, strict=True):
        _, tokens = reduced_vit(model, image, reducer, plan)
        for slot, members in enumerate(tokens.members):
            rows = [patch // 5 for patch in members]
            columns = [patch % 5 for patch in members]
            assert positions[slot].tolist() == pytest.approx([sum(rows) / len(rows), sum(columns) / len(columns)])
        back = {patch: row for row, members in zip(tokens.patches, tokens.members, strict=True) for patch in members}
        back |= tokens.parked
        expected = norm(torch.stack([*tokens.prefix, *(back[patch] for patch in range(25))])[None])[0]
        torch.testing.assert_close(whole, expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_nothing_to_drop_is_restored_bit_equal() -> None:
    model, x = build("timm-vit", "vit"), images(2)
    dense = model.forward_features(x)
    with vitrim.attach(model, "TopK() @ KeepRate(1)") as handle:
        final = model.forward_features(x)
        assert torch.equal(handle.restore(final), dense)
        rows, columns = torch.arange(25) // 5, torch.arange(25) % 5
        assert torch.equal(handle.positions, torch.stack([rows, columns], 1).expand(2, -1, -1).float())


@torch.no_grad()
@pytest.mark.parametrize("name", ["hf_vit", "clip_bare"])
def test_hidden_states_of_any_layer_say_where_their_tokens_sit(name: str) -> None:
    model, x = _model("transformers", name), images(2, dtype=torch.float64)
    with vitrim.attach(model, CUT, restorable=True) as handle:
        states = model(x, output_hidden_states=True).hidden_states
        for block, tokens in enumerate(states[1:]):
            state = handle.state_of(tokens)
            assert state.positions.shape == (2, handle.token_counts[block] - 1, 2)
            assert torch.equal(state.origin, handle.states[block].origin)
            whole = handle.restore(tokens)
            assert whole.shape == (2, 26, 24)
            left = _own(state)[0]
            assert torch.equal(whole[0, 1:][left], tokens[0, 1:][state.origin[0][left]])


@torch.no_grad()
@pytest.mark.parametrize("hooked", [False, True])
def test_what_is_dropped_without_its_attention_is_restored_as_it_entered_the_block(hooked: bool) -> None:
    model, x = _model("timm-vit", "vit"), images(2, dtype=torch.float64)
    if hooked:
        model.blocks[1].attn.register_forward_hook(lambda attn, args, out: out)
    (entered,) = model.forward_intermediates(x, [0], norm=True, output_fmt="NLC", intermediates_only=True)
    with vitrim.attach(model, "TopK() @ KeepRate(0.6, at=1)", restorable=True) as handle:
        whole = handle.restore(model.forward_features(x))[:, 1:]
        assert torch.equal((whole == entered).all(2), handle.origin < 0)


@torch.no_grad()
def test_grids_that_are_no_squares() -> None:
    model, x = _model("timm-vit", "dynamic_size"), images(1, 64, torch.float64)[:, :, :24]
    with vitrim.attach(model, "TopK() @ KeepRate(1)") as handle:
        model(x)
        assert handle.positions[0, [0, 8, -1]].tolist() == [[0, 0], [1, 0], [2, 7]]


@torch.no_grad()
def test_a_padded_batch_has_the_positions_and_the_tokens_of_each_image_alone() -> None:
    model = _model("timm-naflex", "naflex")
    pictures = [images(1, 56, torch.float64)[0, :, :rows, :columns] for rows, columns in ((40, 32), (24, 56), (32, 40))]
    batch = padded(pictures, longest=30)
    with vitrim.attach(model, CUT, restorable=True) as handle:
        together = model.forward_features(**batch)["patches"]
        state, whole = handle.state_of(together), handle.restore(together)
        assert torch.equal(handle.positions, state.positions)
        assert whole.shape == (3, 30 + model.num_prefix_tokens, 24)
        for row, picture in enumerate(pictures):
            alone = model.forward_features(picture[None])
            own, full = handle.state_of(alone), handle.restore(alone)
            count = own.positions.shape[1]
            torch.testing.assert_close(state.positions[row, :count], own.positions[0])
            assert (state.positions[row, count:] == -1).all()
            torch.testing.assert_close(whole[row, : full.shape[1]], full[0], rtol=1e-6, atol=1e-6)
            assert not whole[row, full.shape[1] :].any()


@torch.no_grad()
def test_threads_and_passes_in_turns_have_their_own_positions() -> None:
    model, batches = build("timm-vit", "vit"), [images(2, seed=seed) for seed in range(4)]
    with vitrim.attach(model, CUT, restorable=True) as handle:

        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            tokens = model.forward_features(x)
            return handle.state_of(tokens).positions, handle.restore(tokens)

        alone = [run(x) for x in batches]
        with ThreadPoolExecutor(4) as pool:
            for found, expected in zip(pool.map(run, batches), alone, strict=True):
                assert torch.equal(found[0], expected[0])
                torch.testing.assert_close(found[1], expected[1])
        features = [model.forward_features(x) for x in batches]
        for tokens, expected in zip(features, alone, strict=True):
            assert torch.equal(handle.state_of(tokens).positions, expected[0])
            assert torch.equal(handle.restore(tokens), expected[1])


def test_gradients_flow_into_restored_tokens() -> None:
    model, x = _model("timm-vit", "vit"), images(2, dtype=torch.float64)
    handle = vitrim.attach(model, "TopK('norm') @ KeepRate(0.6, at=(0, 1))", restorable=True)
    handle.restore(model.forward_features(x))[:, 1:].square().sum().backward()
    plain = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    find_adapter(model).recompute(model)
    handle.restore(model.forward_features(x))[:, 1:].square().sum().backward()
    again = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(plain) == len(again) > 30
    torch.testing.assert_close(again, plain, rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize(("family", "name"), [("timm-vit", "dinov2_registers"), ("timm-eva", "dinov3")])
@pytest.mark.parametrize("norm", [False, True])
def test_maps_of_every_block_are_what_restoring_gives(family: str, name: str, norm: bool) -> None:
    model, x = _model(family, name), images(2, dtype=torch.float64)
    with vitrim.attach(model, CUT, restorable=True) as handle:
        final, pairs = model.forward_intermediates(x, None, True, norm)
        handle.restorable = False
        same = model.forward_intermediates(x, None, True, norm)[1]
        expected = handle.adapter.features(model, x, (0, 1, 2))[1]
        for block, (spread, prefix) in enumerate(pairs):
            assert spread.shape == (2, prefix.shape[2], 5, 5)
            assert torch.equal(spread, same[block][0])
            state = handle.states[block]
            tokens = expected[block][1] if not norm else model.norm(torch.cat(expected[block], 1))[:, prefix.shape[1] :]
            left = _own(state)[1]
            torch.testing.assert_close(spread[1].flatten(1).T[left], tokens[1, state.origin[1][left]])
    with vitrim.attach(model, CUT, restorable=True) as handle:
        final, pairs = model.forward_intermediates(x, [2], True, True)
        prefix = handle.geometry.num_prefix
        restored = handle.restore(final)[:, prefix:].mT.unflatten(2, (5, 5))
        torch.testing.assert_close(pairs[0][0], restored)


@torch.no_grad()
def test_maps_before_tokens_return_are_filled_too() -> None:
    model, x = _model("timm-vit", "vit"), images(2, dtype=torch.float64)
    with vitrim.attach(model, "TopK() @ KeepRate(0.6, at=(0, 1), reinstate=2)", restorable=True) as handle:
        before, after = model.forward_intermediates(x, [1, 2], intermediates_only=True)
        assert not (before == 0).all(1).any()
        final = model.forward_features(x)
        assert torch.equal(handle.restore(final), final)
        torch.testing.assert_close(model.norm(after.flatten(2).mT), final[:, 1:])
        assert model.forward_intermediates(x, [0], False, False, True)[1][0].shape == (2, 24, 5, 5)


@torch.no_grad()
def test_what_cannot_be_restored_is_refused_in_one_line() -> None:
    model, x = build("timm-vit", "vit"), images(2)
    with vitrim.attach(model, "TopK() @ KeepRate(0.6, at=(0, 1))") as handle:
        tokens = model.forward_features(x)
        with pytest.raises(VitrimError, match="attach with restorable=True"):
            handle.restore(tokens)
        for changed in (tokens[:, 1:], tokens[:1], tokens.double(), tokens.clone()):
            for ask in (handle.restore, handle.state_of):
                with pytest.raises(VitrimError, match="give the tensor that the model returned"):
                    ask(changed)
    with (
        vitrim.attach(model, None, cls_only=True) as handle,
        pytest.raises(VitrimError, match="cls_only computes no patch"),
    ):
        handle.restore(model.forward_features(x))
    model = redrawn(_mae())
    with vitrim.attach(model, "TopK('norm') @ KeepRate(0.6, at=(0, 1))") as handle:
        state = handle.state_of(model(x).last_hidden_state)
    with pytest.raises(VitrimError, match="it is not known where these patches lie"):
        _ = state.positions


def _mae() -> Any:
    from transformers import ViTMAEConfig, ViTMAEModel

    sizes: dict[str, Any] = {
        "image_size": 40,
        "patch_size": 8,
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
    }
    return ViTMAEModel(ViTMAEConfig(**sizes, intermediate_size=48))
