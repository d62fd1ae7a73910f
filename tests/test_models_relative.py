"""timm's `Beit` and `VisionTransformerRelPos`: the relative bias of attention follows the tokens that are left."""

from typing import Any

import pytest
import torch

import vitrim
from references import gradients_of_reference
from relative_models import BEIT, MORE, RELPOS
from test_contract import Case, agrees_with_reference
from vitrim.errors import CheckpointError, VitrimError, WidthError
from vitrim.models import find_adapter
from vitrim.models.widths.sublayers import sublayers
from vitrim.tokens import Reducer
from zoo import images, redrawn

REDUCERS = [vitrim.TopK(), vitrim.TopK(fuse="sum"), vitrim.ToMe()]
resampling = pytest.mark.filterwarnings(  # Inside timm, as it resamples a table.
    "ignore:Using a non-tuple sequence", "ignore:torch.searchsorted.*non-contiguous"
)
CUT = "ToMe() @ KeepRate(0.6, at=(0, 1))"


def _model(name: str) -> Any:
    return redrawn({**BEIT, **RELPOS, **MORE}[name]()).double()


PLACED = [
    (name, reducer, ("inside", "before")[(row + column) % 2])
    for row, name in enumerate(sorted(MORE))
    for column, reducer in enumerate(REDUCERS)
]


@pytest.mark.parametrize(("name", "reducer", "place"), PLACED, ids=str)
def test_reduced_tokens_keep_their_own_bias(name: str, reducer: Reducer, place: str) -> None:
    model, case = _model(name), Case(reducer)
    agrees_with_reference(model, case.suited(model), case.cuts(0, 1, place=place))


@pytest.mark.parametrize("place", ["inside", "before"])
def test_scores_of_attention_see_the_bias_of_every_query(place: str) -> None:
    schedule = vitrim.KeepRate(0.6, at=(0, 1), place=place)
    agrees_with_reference(_model("beit_both"), vitrim.TopK("mean_attention", fuse="mean", momentum=0.5), schedule)


@pytest.mark.parametrize("name", ["beit_shared", "relpos_cls"])
def test_tokens_that_return_have_their_own_bias_again_and_cls_alone_its_own_row(name: str) -> None:
    for reducer in REDUCERS:
        agrees_with_reference(_model(name), reducer, vitrim.KeepRate(0.6, at=(0, 1), reinstate=2))
        agrees_with_reference(_model(name), reducer, vitrim.KeepRate(0.6, at=(0, 2)), cls_only=True)


@pytest.mark.parametrize("name", ["beit_both", "relpos_shared"])
@pytest.mark.parametrize("reducer", [vitrim.TopK("norm"), vitrim.ToMe()], ids=str)
def test_gradients_equal_those_of_the_reference(name: str, reducer: Reducer) -> None:
    model, x = _model(name), images(2, dtype=torch.float64)
    with vitrim.attach(model, reducer, vitrim.KeepRate(0.6, at=(0, 1))) as handle:
        plan = handle.plan()
        model(x).square().sum().backward()
    fast = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, slow in gradients_of_reference(model, x, reducer, plan).items():
        torch.testing.assert_close(fast[name], slow, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["beit", "beit_shared", "relpos_table", "relpos_swin"])
def test_half_precision_plain_attention_and_recomputation(name: str) -> None:
    model, x = _model(name).float(), images(2)
    with vitrim.attach(model, CUT):
        full = model(x)
        find_adapter(model).recompute(model)
        torch.testing.assert_close(model(x), full)
        with torch.no_grad():
            for block in model.blocks:
                block.attn.fused_attn = False
            torch.testing.assert_close(model(x), full)
            with torch.autocast("cpu", torch.bfloat16):
                assert model(x).isfinite().all()
            assert model.bfloat16()(x.bfloat16()).isfinite().all()


@resampling
@pytest.mark.parametrize("name", ["beit", "beit_both", "relpos_table", "relpos_swin"])
@pytest.mark.parametrize("size", [(56, 56), (40, 72)])
def test_weights_of_another_size_are_fitted_as_the_model_itself_is_resized(name: str, size: tuple[int, int]) -> None:
    model, other = _model(name), _model(name)
    state, adapter = model.state_dict(), find_adapter(model)
    with vitrim.attach(model, CUT) as handle:
        model.set_input_size(size)
        assert handle.plan().num_patches == size[0] * size[1] // 64
        x = torch.randn(1, 3, *size, dtype=torch.float64)
        expected = model(x)
    other.set_input_size(size)
    assert adapter.trained_size(other, state, None) == (None if name == "relpos_swin" else (40, 40))
    other.load_state_dict(adapter.fit_weights(other, state))
    with vitrim.attach(other, CUT):
        torch.testing.assert_close(other(x), expected, rtol=1e-6, atol=1e-6)


@resampling
def test_a_table_that_two_grids_explain_asks_for_the_size() -> None:
    """A grid of 5 x 13 has as many offsets as one of 8 x 8."""
    model = redrawn(MORE["relpos_table"]())
    model.set_input_size((40, 104))
    adapter, state = find_adapter(model), model.state_dict()
    with pytest.raises(CheckpointError, match=r"may be those of 5 x 13 or 8 x 8 patches; say the size"):
        adapter.fit_weights(model, state)
    same = adapter.fit_weights(model, state, (40, 104))
    assert all(torch.equal(same[name], value) for name, value in state.items())
    resized = adapter.fit_weights(model, state, (64, 64))
    assert not torch.equal(*(one["blocks.0.attn.rel_pos.relative_position_bias_table"] for one in (resized, state)))
    with pytest.raises(CheckpointError, match="do not belong to images of 48 x 48 px"):
        adapter.fit_weights(model, state, (48, 48))


def test_it_is_saved_and_loaded(tmp_path: Any) -> None:
    model, x = redrawn(BEIT["beit"]()), images(2)
    with vitrim.attach(model, CUT):
        expected = model(x)
        vitrim.save(model, tmp_path / "model")
    assert torch.equal(vitrim.load(tmp_path / "model")(x), expected)


def test_export_with_another_batch_size() -> None:
    model = redrawn(RELPOS["relpos_cls"]())
    model.blocks = model.blocks[:1]
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    with vitrim.attach(model, "ToMe() @ KeepRate(0.6, at=0, place=before)"), torch.no_grad():
        program = torch.export.export(model, (images(2),), dynamic_shapes=(batch,))
        torch.testing.assert_close(program.module()(images(5)), model(images(5)))


def test_maps_pooling_and_masks() -> None:
    model, x = _model("beit"), images(2, dtype=torch.float64)
    with vitrim.attach(model, CUT) as handle, torch.no_grad():
        final, maps = model.forward_intermediates(x, indices=[0, 2], norm=True)
        expected = handle.states[2].spread(final[:, 1:]).mT.unflatten(2, (5, 5))
        torch.testing.assert_close(maps[1], expected)
        with pytest.raises(VitrimError, match="from which forward pass these features come"):
            model.forward_head(model.forward_features(x).clone())


@pytest.mark.parametrize("name", ["beit", "relpos_table", "relpos_post_norm"])
def test_widths_are_refused_by_the_part_that_cannot_be_cut_and_tokens_named_instead(name: str) -> None:
    with pytest.raises(WidthError) as caught:
        sublayers(_model(name))
    assert str(caught.value).startswith("the width of blocks.0.attn cannot be cut: no narrow form of timm.models.")
    assert str(caught.value).endswith("; reduce its tokens instead: vitrim compress --using tokens, or vitrim.attach")
    assert str(caught.value).startswith(caught.value.fact)
