"""timm's `Eva`: the rotation of queries and keys follows the tokens that are left."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import vitrim
from eva_models import EVA, MORE, SMALL, in_timm_words, turned
from references import VIEWS, gradients_of_reference, reduced_vit
from test_contract import Case, agrees_with_reference
from vitrim.errors import CheckpointError, UnsupportedModelError, VitrimError
from vitrim.models import find_adapter
from vitrim.tokens import Assignment, Plan, Reducer
from zoo import images, redrawn

REDUCERS = [vitrim.TopK(), vitrim.TopK(fuse="sum"), vitrim.ToMe()]
CUT = "TopK(fuse=sum) @ KeepRate(0.6, at=(0, 1))"


def _model(name: str) -> Any:
    return redrawn({**EVA, **MORE}[name]()).double()


# Each reducer at one place in every model, and at the other place in the next one.
PLACED = [
    (name, reducer, ("inside", "before")[(row + column) % 2])
    for row, name in enumerate(sorted(MORE))
    for column, reducer in enumerate(REDUCERS)
]


@pytest.mark.parametrize(("name", "reducer", "place"), PLACED, ids=str)
def test_reduced_tokens_keep_their_own_rotation(name: str, reducer: Reducer, place: str) -> None:
    model, case = _model(name), Case(reducer)
    agrees_with_reference(model, case.suited(model), case.cuts(0, 1, place=place))


@pytest.mark.parametrize(("score", "place"), [("mean_attention", "before"), ("mean_attention", "inside")])
def test_scores_see_rotated_queries_and_keys(score: str, place: str) -> None:
    schedule = vitrim.KeepRate(0.6, at=(0, 1), place=place)
    agrees_with_reference(_model("mixed"), vitrim.TopK(score, fuse="mean", momentum=0.5), schedule)


def test_tokens_that_return_are_at_their_own_places_again() -> None:
    for reducer in REDUCERS:
        agrees_with_reference(_model("eva02"), reducer, vitrim.KeepRate(0.6, at=(0, 1), reinstate=2))


def test_a_merged_token_is_at_the_place_of_its_largest_member() -> None:
    place, size = torch.tensor([[10, 11, 12, 13, 14, 15]]), torch.tensor([[1.0, 2, 3, 1, 1, 1]])
    merged = Assignment.merge(6, torch.tensor([[1, 3, 5]]), torch.tensor([[2, 4, 0]]), torch.tensor([[0, 2, 2]]))
    assert merged.place(place, size).tolist() == [[12, 13, 10]]
    assert merged.place(place).tolist() == [[11, 13, 10]]


def test_a_fused_token_is_at_the_place_of_its_best_scored_member() -> None:
    place, kept, rest = torch.tensor([[10, 11, 12, 13, 14]]), torch.tensor([[0, 3]]), torch.tensor([[1, 2, 4]])
    score = torch.tensor([[0.9, 0.1, 0.3, 0.8, 0.3]])
    assert Assignment.fuse(5, kept, rest, score[:, 1:4], score).place(place).tolist() == [[10, 13, 12]]
    lost = score * torch.nan  # A run that diverges goes on to where it is stopped.
    assert Assignment.fuse(5, kept, rest, lost[:, 1:4], lost).place(place).tolist() == [[10, 13, 14]]


@pytest.mark.parametrize("name", ["eva02", "mixed"])
@pytest.mark.parametrize("reducer", [vitrim.TopK(), vitrim.ToMe()], ids=str)
def test_gradients_equal_those_of_the_reference(name: str, reducer: Reducer) -> None:
    model, x = _model(name), images(2, dtype=torch.float64)
    with vitrim.attach(model, reducer, vitrim.KeepRate(0.6, at=(0, 1))) as handle:
        plan = handle.plan()
        model(x).square().sum().backward()
    fast = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, slow in gradients_of_reference(model, x, reducer, plan).items():
        precision = 1e-4 if name == "rope.freqs" else 1e-9  # timm multiplies frequencies in float32.
        torch.testing.assert_close(fast[name], slow, rtol=precision, atol=precision)


@pytest.mark.parametrize("rope_type", ["cat", "dinov3", "mixed"])
@pytest.mark.parametrize("dropped", [0.0, 0.3])
def test_training_with_changed_coordinates_and_dropped_patches(
    rope_type: str, dropped: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference on the tokens and tables that timm has drawn in one training step."""
    options = {"rope_jitter_coords": 1.5, "rope_rescale_coords": 2.0, "patch_drop_rate": dropped}
    model = redrawn(_rotary(rope_type=rope_type, **options)).double().train()
    seen: list[tuple[Tensor, Tensor]] = []
    original = model._pos_embed
    monkeypatch.setattr(model, "_pos_embed", lambda x: seen.append(original(x)) or seen[-1])
    x = images(2, dtype=torch.float64)
    for reducer in (vitrim.TopK(fuse="sum"), vitrim.ToMe()):
        with vitrim.attach(model, reducer, vitrim.KeepRate(0.6, at=(0, 1))) as handle:
            logits, plan = model(x), handle.plan()
        (embedded, table), view = seen.pop(), in_timm_words(model)
        assert plan.num_patches == (17 if dropped else 25)
        for image in range(2):
            own = table
            if dropped:  # timm adds a dimension of images: (B, 1, N, E), or (depth, B, H, N, E).
                own = table[:, image] if rope_type == "mixed" else table[image, 0]
            _expect(view, embedded[image], own.double(), reducer, plan, logits[image], monkeypatch)
    fixed = model.eval()._pos_embed(model.patch_embed(x))[1]
    assert not dropped or fixed.shape[-2] == 25


def _rotary(**options: object) -> nn.Module:
    return timm.models.eva.Eva(**{**SMALL, "embed_dim": 36, "use_rot_pos_emb": True, **options})


def _expect(
    view: Any, tokens: Tensor, table: Tensor, reducer: Reducer, plan: Plan, logits: Tensor, patch: pytest.MonkeyPatch
) -> None:
    for index, block in enumerate(view.blocks):
        block.attn.turned = lambda head, place, row, index=index: turned(
            table[index, head] if table.ndim == 4 else table, False, place, row
        )
    view.patch_embed, view._pos_embed, view.norm_pre = (lambda x: x), (lambda x: tokens[None]), nn.Identity()
    patch.setitem(VIEWS, "timm-eva", lambda _: view)
    expected, _ = reduced_vit(_rotary(), tokens, reducer, plan)
    assert (logits - expected).abs().max() < 1e-10


@pytest.mark.parametrize("name", ["dinov3", "mixed_ape"])
def test_other_sizes_of_images(name: str) -> None:
    model, x = _model(name), images(1, size=56, dtype=torch.float64)
    with vitrim.attach(model, CUT) as handle:
        dynamic = model(x) if model.dynamic_img_size else None
        model.set_input_size((56, 56))
        resized = model(x)
        assert handle.plan().num_patches == 49
    if dynamic is not None:
        torch.testing.assert_close(dynamic, resized)
    reducer = vitrim.TopK(fuse="sum")
    for image, logits in zip(x, resized, strict=True):
        assert (reduced_vit(model, image, reducer, handle.plan())[0] - logits).abs().max() < 1e-10


@pytest.mark.parametrize("name", ["dinov3", "eva02", "mixed_ape"])
def test_weights_of_another_size_are_fitted_as_the_model_itself_is_resized(name: str) -> None:
    model, state = _model(name), _model(name).state_dict()
    model.set_input_size((56, 56))
    other, adapter = _model(name), find_adapter(model)
    other.set_input_size((56, 56))
    assert adapter.trained_size(other, state, None) == (None if name == "dinov3" else (40, 40))
    other.load_state_dict(adapter.fit_weights(other, state))
    x = images(1, size=56, dtype=torch.float64)
    torch.testing.assert_close(other(x), model(x), rtol=1e-6, atol=1e-6)  # timm resamples in float32.
    state["reg_token"] = torch.zeros(1, 7, 36)
    with pytest.raises(
        CheckpointError, match=r"the weights have 7 register tokens, the model \d; ask for num_reg_tokens=7"
    ):
        adapter.fit_weights(other, state)


@pytest.mark.parametrize("name", ["dinov3", "perception", "qk_norm", "mixed"])
def test_half_precision_and_plain_attention(name: str) -> None:
    model, x = _model(name).float(), images(2)
    with vitrim.attach(model, CUT), torch.no_grad():
        full = model(x)
        for block in model.blocks:
            block.attn.fused_attn = False
        torch.testing.assert_close(model(x), full)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).isfinite().all()
        assert model.bfloat16()(x.bfloat16()).isfinite().all()


def test_hooks_on_projections_and_on_attention_are_called() -> None:
    model, x, calls = _model("eva02_norms"), images(2, dtype=torch.float64), []
    with vitrim.attach(model, CUT), torch.no_grad():
        expected = model(x)
        for name in ("q_proj", "k_proj", "v_proj", "proj"):
            model.blocks[0].attn.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
        assert torch.equal(model(x), expected)
        assert set(calls) == {"q_proj", "k_proj", "v_proj", "proj"}
        for block in model.blocks:
            block.attn.register_forward_hook(lambda *_: calls.append("attn"))
        torch.testing.assert_close(model(x), expected)
        assert calls.count("attn") == len(model.blocks)


def test_masks_are_refused_and_a_rotary_table_given_by_place_is_not() -> None:
    model, x = _model("eva02"), images(2, dtype=torch.float64)
    with vitrim.attach(model, CUT), torch.no_grad():
        expected = model(x)
        with pytest.raises(VitrimError, match="an attention mask cannot be combined with token reduction"):
            model(x, attn_mask=torch.zeros(26, 26, dtype=torch.float64))
        tokens, table = model._pos_embed(model.patch_embed(x))
        for block in model.blocks:
            tokens = block(tokens, table)
        final = model.norm(tokens)
        vitrim.models.reduction.trace.mark(final, vitrim.models.trace_of(tokens))
        assert torch.equal(model.forward_head(final), expected)


def test_other_kinds_of_eva_are_refused_by_name() -> None:
    class Own(timm.models.eva.EvaAttention):
        pass

    model = _model("eva02")
    model.blocks[1].attn.__class__ = Own
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1 holds a Own, which the timm-eva adapter cannot cut"):
        vitrim.attach(model, CUT)


@pytest.mark.parametrize("name", ["dinov3", "perception"])
def test_maps_are_spread_over_the_whole_grid(name: str) -> None:
    model, x = _model(name), images(2, dtype=torch.float64)
    with vitrim.attach(model, "ToMe() @ ConstantR(4)") as handle, torch.no_grad():
        final, maps = model.forward_intermediates(x, indices=[0, 2], return_prefix_tokens=True, norm=True)
        state = handle.states[2]
        expected = state.spread(final[:, model.num_prefix_tokens :]).mT.unflatten(2, (5, 5))
        torch.testing.assert_close(maps[1][0], expected)
        assert maps[0][1].shape == (2, model.num_prefix_tokens, 36)
        early = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True, norm=True)
        torch.testing.assert_close(early[0], maps[0][0])
