"""timm's vision towers that return a grid: what projectors, heads and callers read when tokens were cut."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vitrim
from test_contract import Case, agrees_with_reference
from tower_models import DEEPSEEK, GEMMA4, MORE, QWEN3
from vitrim.errors import CheckpointError, UnsupportedModelError, VitrimError
from vitrim.models import BlockWidths, build_model, find_adapter, set_widths, widths_of
from vitrim.tokens import Reducer
from zoo import images, predicted, redrawn

MODELS = {**QWEN3, **DEEPSEEK, **GEMMA4, **MORE}
REDUCERS = [vitrim.TopK("norm"), vitrim.TopK("norm", fuse="mean"), vitrim.ToMe()]
CUT = "TopK(norm, fuse=mean) @ KeepRate(0.6, at=(0, 1))"
DROP = "TopK(norm) @ KeepRate(0.6, at=(0, 1))"
MERGE = "ToMe() @ KeepRate(0.6, at=(0, 1))"
CLASSIFIERS = ("qwen3", "qwen3_merge", "qwen3_every_patch", "deepseek", "deepseek_align", "gemma4", "gemma4_soft")


def _model(name: str) -> Any:
    return redrawn(MODELS[name]()).double()


def _x(count: int = 2, **options: Any) -> Tensor:
    return images(count, dtype=torch.float64, **options)


# Two reducers in every model, one at each place.
PLACED = [
    (name, REDUCERS[(at + second) % 3], ("inside", "before")[second])
    for at, name in enumerate(sorted(set(MORE) - {"deepseek_pads"}))
    for second in (0, 1)
]


@pytest.mark.parametrize(("name", "reducer", "place"), PLACED, ids=str)
def test_heads_and_projectors_read_what_the_slow_reference_gives_them(name: str, reducer: Reducer, place: str) -> None:
    agrees_with_reference(_model(name), reducer, Case(reducer).cuts(0, 1, place=place))


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(MODELS))
def test_nothing_to_drop_leaves_every_output_bit_equal(name: str) -> None:
    model = redrawn(MODELS[name]())
    size = find_adapter(model).geometry(model).input_size
    x = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))

    def outputs() -> list[Any]:
        as_dict = {} if name in ("gemma4", "gemma4_soft") else {"output_dict": True}
        asked = ({"norm": True}, {"output_fmt": "NLC", "indices": [0, 2]}, {"indices": 1, **as_dict},
                 {"indices": [1], "stop_early": True}, {"intermediates_only": True})  # fmt: skip
        return [model(x), model.forward_features(x), *(model.forward_intermediates(x, **each) for each in asked)]

    dense = outputs()
    with vitrim.attach(model, "ToMe() @ ConstantR(0)"):
        _equal(outputs(), dense)
    _equal(outputs(), dense)


def _equal(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
        return
    assert len(one) == len(other)
    for key in one if isinstance(one, dict) else range(len(one)):
        _equal(one[key], other[key])


@torch.no_grad()
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_features_have_the_shape_that_callers_expect_and_the_head_weighs_the_tokens_behind_them(name: str) -> None:
    model, x = _model(name), _x()
    shape = model.forward_features(x).shape
    for reduction in (CUT, DROP, MERGE):
        with vitrim.attach(model, reduction):
            features, logits = model.forward_features(x), model(x)
            assert features.shape == shape
            torch.testing.assert_close(model.forward_head(features), logits, rtol=1e-12, atol=1e-12)
            with torch.inference_mode():
                again = model.forward_head(model.forward_features(x))
            torch.testing.assert_close(again, logits, rtol=1e-12, atol=1e-12)
            copied = features.clone()
            if name == "gemma4" or (name in ("qwen3", "deepseek") and reduction != MERGE):
                with pytest.raises(VitrimError, match="it is not known from which forward pass these features come"):
                    model.forward_head(copied)
                if reduction != MERGE:
                    features.mul_(2)
                    with pytest.raises(VitrimError, match="it is not known from which forward pass these"):
                        model.forward_head(features)
            else:  # The mean of a grid whose merged tokens are copied is that of the tokens, weighed.
                torch.testing.assert_close(model.forward_head(copied), logits, rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3", "deepseek", "qwen3_merge", "gemma4"])
def test_an_encoder_inside_a_classifier_is_reduced_by_itself(name: str, tmp_path: Path) -> None:
    model, x = _model(name), _x()
    find_adapter(model).resize(model.encoder, 40)  # Gemma's does not say its own size.
    classes, dense = [type(module) for module in model.modules()], model(x)
    whole = copy.deepcopy(model)
    for reduction in (DROP, MERGE):
        with vitrim.attach(model.encoder, reduction) as handle, vitrim.attach(whole, reduction) as other:
            grid, logits = model.encoder(x), model(x)
            assert handle.token_counts == other.token_counts == (15, 9, 9)
            # The classifier, which knows of no reduction, averages the grid that it gets.
            pooled = grid.flatten(1, -2).mean(1)
            torch.testing.assert_close(logits, model.head(model.norm(pooled)))
            same = reduction == MERGE or name == "qwen3_merge"
            assert torch.allclose(logits, whole(x), rtol=1e-10, atol=1e-10) == same
            assert vitrim.cost(model).macs == vitrim.cost(whole).macs
            final, between = find_adapter(model).features(model, x, (0,))
            assert (final.shape[1], between[0][1].shape[1]) == (25, 15)
            torch.testing.assert_close(find_adapter(model).head(model, final), logits)
            with pytest.raises(CheckpointError, match=r"attached to the encoder inside this .*; attach it to the"):
                vitrim.save(model, tmp_path / "m")
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(x), dense)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3", "deepseek_enc", "gemma4_enc"])
@pytest.mark.parametrize("norm", [False, True])
def test_maps_and_grids_hold_every_patch_at_its_place(name: str, norm: bool) -> None:
    model, x = _model(name), _x()
    tower = getattr(model, "encoder", model)
    after = getattr(tower, "norm", nn.Identity())
    with vitrim.attach(model, CUT, restorable=True) as handle:
        left = handle.adapter.features(model, x, (0, 1, 2))
        maps = tower.forward_intermediates(x, norm=norm, intermediates_only=True)
        for block, whole in enumerate(maps):
            tokens = left[1][block][1]
            restored = handle.restore(tokens)
            restored = after(restored) if norm else restored
            torch.testing.assert_close(whole, restored.mT.unflatten(2, (5, 5)), rtol=1e-10, atol=1e-10)
        grid = tower.forward_features(x)
        state = handle.state_of(grid)
        assert torch.equal(state.positions, handle.state_of(left[0]).positions)
        assert torch.equal(handle.restore(grid), grid.flatten(1, -2))
        torch.testing.assert_close(handle.restore(left[0]), grid.flatten(1, -2), rtol=1e-10, atol=1e-10)
        short, lengths = tower.forward_intermediates(x, indices=[0, -1], output_fmt="NLC", norm=norm)
        assert [tokens.shape[1] for tokens in lengths] == [16, 11]
        assert torch.equal(short, grid)
        early = tower.forward_intermediates(x, indices=[1], stop_early=True, norm=norm, output_dict=True)
        assert torch.equal(early["image_intermediates"][0], maps[1])
        expected = after(handle.restore(left[1][1][1]))
        torch.testing.assert_close(early["image_features"], expected.reshape(early["image_features"].shape))


@torch.no_grad()
def test_real_projectors_take_their_own_blocks_of_patches() -> None:
    """2 x 2 patches of an image that is not a square, for Qwen3; each token of the projector reads four of the grid."""
    model = redrawn(MODELS["qwen3_enc"]()).double()
    model.merger = type(model.merger)(16, 2, 10).double()
    redrawn(model.merger)
    x = _x(size=64)[:, :, :32]
    with vitrim.attach(model, MERGE) as handle:
        out, grid = model(x), model.forward_features(x)
        assert (out.shape, grid.shape) == ((2, 8, 10), (2, 4, 8, 16))
        torch.testing.assert_close(out, model.merger(grid))
        state = handle.state_of(grid)
        together = (state.origin[0] == state.origin[0, 0]).view(4, 8).nonzero().tolist()
        assert all(torch.equal(grid[0, row, column], grid[0, 0, 0]) for row, column in together)
        torch.testing.assert_close(find_adapter(model).predict(model, x), out.mT)


@torch.no_grad()
def test_images_that_are_padded_to_whole_patches() -> None:
    model, x = redrawn(MODELS["deepseek_pads"]()), images(2)[:, :, :36, :38]
    adapter = find_adapter(model)
    assert adapter.geometry(model).num_patches == 25
    with vitrim.attach(model, CUT) as handle:
        assert model.forward_features(x).shape == (2, 5, 5, 16)
        model(x[:, :, :20])
        assert handle.states[-1].origin.shape[1] == 15
        adapter.resize(model, (30, 40))
        assert (handle.geometry.input_size, handle.geometry.num_patches) == ((3, 30, 40), 20)


def test_other_sizes_are_taken_for_good_or_refused() -> None:
    model = MODELS["qwen3_enc"]()
    adapter, handle = find_adapter(model), vitrim.attach(model, CUT)
    adapter.resize(model, (80, 40))
    assert handle.plan().num_patches == 50
    assert adapter.input_format(model).size == (3, 80, 40)
    for size, message in [
        ((44, 40), "images of 44 x 40 px cannot be divided into patches of 8 px"),
        (48, "images of 48 x 48 px have 6 x 6 patches, of which the projector takes 5 x 5 at a time"),
        (4, "images of 4 x 4 px are smaller than one patch of 8 px"),
    ]:
        with pytest.raises(UnsupportedModelError, match=message):
            adapter.resize(model, size)
    with pytest.raises(UnsupportedModelError, match="an encoder without a classifier; build qwen3_vit_88m for one"):
        adapter.reset_classifier(model, 5)
    with pytest.raises(VitrimError, match="4 x 4 px are smaller than one patch"):
        build_model("qwen3_vit_88m", img_size=4, depth=1)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3", "qwen3_enc", "deepseek_align", "deepseek_enc", "gemma4", "gemma4_enc"])
def test_a_saved_tower_comes_back_with_its_widths_and_its_reduction(name: str, tmp_path: Path) -> None:
    model, x = redrawn(MODELS[name]()), images(2)
    if name.startswith("deepseek"):
        for norm in [one for one in model.modules() if type(one).__name__ == "RmsNorm"]:
            _as_built(model, norm)
    if not name.startswith("gemma4"):
        set_widths(model, [BlockWidths(8, 17, 5, 4), BlockWidths(0, 64), BlockWidths(8, 0, 8, 6)])
    find_adapter(model).resize(model, (40, 80))
    vitrim.attach(model, CUT)
    wide = torch.cat([x, x.flip(3)], dim=3)
    vitrim.save(model, tmp_path / "m")
    other = vitrim.load(tmp_path / "m")
    assert torch.equal(other(wide), model(wide))
    assert find_adapter(other).geometry(other) == find_adapter(model).geometry(model)


def _as_built(model: Any, precise: nn.Module) -> None:
    from timm.layers import RmsNormFp32

    name = next(name for name, one in model.named_modules() if one is precise)
    norm = RmsNormFp32(precise.normalized_shape[0], precise.eps, precise.elementwise_affine)
    norm.load_state_dict(precise.state_dict())
    model.set_submodule(name, norm)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_cost_is_what_a_count_of_the_operations_finds(name: str) -> None:
    model = redrawn(MODELS[name]()).requires_grad_(False)
    x = torch.zeros(1, *find_adapter(model).geometry(model).input_size)
    for part in model.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False  # The counter does not see fused attention on CPUs.
    for reduction in (None, DROP):
        with vitrim.attach(model, reduction), FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x)
            assert vitrim.cost(model).macs == counter.get_total_flops() // 2


@pytest.mark.parametrize("name", ["qwen3_merge", "deepseek"])
def test_widths_of_values_pairs_and_gated_units_change(name: str) -> None:
    model = _model(name)
    (full, *_) = widths_of(model)
    assert full == BlockWidths(8, 64)
    set_widths(model, [BlockWidths(8, 11, 5, 4), BlockWidths(8, 64, 3), BlockWidths(0, 7)])
    if name == "deepseek":  # Each unit has a row of the gate and one of the value.
        assert model.encoder.blocks[0].mlp.fc1.out_features == 22
    agrees_with_reference(model, vitrim.ToMe(), vitrim.KeepRate(0.6, at=(0, 1)))


PAIR = ("gemma4_soft", "gemma4_enc")


@torch.no_grad()
def test_weights_of_an_encoder_are_those_of_the_encoder_in_a_classifier() -> None:
    for name, encoder in (
        ("qwen3_merge", "qwen3_enc"),
        ("deepseek_align", "deepseek_enc"),
        ("gemma4_soft", "gemma4_enc"),
    ):
        source, model = redrawn(MODELS[encoder]()), redrawn(MODELS[name]())
        state = find_adapter(model).fit_weights(model, source.state_dict())
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert (set(missing), unexpected) == ({"head.weight", "head.bias"}, [])
        x = images(2)
        torch.testing.assert_close(model.encoder(x), source(x))


def test_gradients_survive_recomputation_and_reach_the_projector() -> None:
    for name in ("qwen3_merge", "deepseek", "gemma4"):
        model, x = _model(name).train(), _x()

        def gradients(model: Any = model, x: Tensor = x) -> list[Tensor]:
            model.zero_grad()
            model(x).square().sum().backward()
            return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

        with vitrim.attach(model, CUT) as handle:
            plain = gradients()
            handle.adapter.recompute(model)
            again = gradients()
        assert len(plain) == len(list(model.parameters()))
        torch.testing.assert_close(again, plain, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_head_that_is_compiled_with_its_features_weighs_their_tokens() -> None:
    model, x = redrawn(MODELS["qwen3"]()), images(2)
    model.encoder.blocks = model.encoder.blocks[:1]
    torch._dynamo.reset()
    with vitrim.attach(model, "TopK(norm, fuse=mean) @ KeepRate(0.6, at=0)"):
        compiled = torch.compile(
            lambda y: model.forward_head(model.forward_features(y)), fullgraph=True, backend="eager"
        )
        torch.testing.assert_close(compiled(x), model(x))


@torch.no_grad()
def test_hooks_on_the_encoder_of_a_classifier_see_its_calls() -> None:
    model, x, seen = _model("qwen3"), _x(), []
    model.encoder.register_forward_hook(lambda _, args, out: seen.append(out.shape) or 2 * out)
    expected = model(x)
    with vitrim.attach(model, "ToMe() @ ConstantR(0)"):
        assert torch.equal(model(x), expected)
    with vitrim.attach(model, DROP):
        model(x)
    assert seen == [(2, 5, 5, 16), (2, 5, 5, 16), (2, 9, 16)]


@torch.no_grad()
def test_gemma_takes_images_alone_and_keeps_its_widths() -> None:
    model, x = _model("gemma4"), _x()
    coordinates = torch.cartesian_prod(torch.arange(5), torch.arange(5)).expand(2, -1, -1)
    with vitrim.attach(model, CUT):
        for given in ({"patches": x, "patch_coord": coordinates}, x.flatten(1)[:, :4800].view(2, 25, 192)):
            for method in (model, model.encoder, model.encoder.forward_features, model.encoder.forward_intermediates):
                with pytest.raises(VitrimError, match=r"takes images \(B, C, H, W\) of one size, no patches with"):
                    method(given)
    with pytest.raises(UnsupportedModelError, match="norms follow attention and MLP, and would act on what is left"):
        set_widths(model, [BlockWidths(12, 8)] * 3)


def test_towers_of_other_classes_are_refused_by_name() -> None:
    class Own(type(MODELS["qwen3_enc"]())):
        pass

    model = MODELS["qwen3"]()
    model.encoder.__class__ = Own
    with pytest.raises(UnsupportedModelError, match=r"its encoder is a .*Own, of which the timm-qwen3 adapter knows"):
        vitrim.attach(model, CUT)


def test_compress_judges_an_encoder_by_the_tokens_of_its_projector() -> None:
    model, x = redrawn(MODELS["deepseek_enc"]()), images(16)
    found = vitrim.compress(model, x, macs=0.8, using=("tokens",), trials=0, say=lambda line: None)
    assert vitrim.cost(found.model).macs <= 0.8 * vitrim.cost(model).macs
    assert 0 < found.certificate["divergence"].value < 1
    assert predicted(found.model, x).shape == (16, 10, 4)
