"""timm's `NaFlexVit`: images of any size, and padded batches in which padding is never scored, kept or merged."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import vitrim
from naflex_models import MORE, NAFLEX, padded
from test_contract import Case, agrees_with_reference
from vitrim.errors import UnsupportedModelError, VitrimError
from vitrim.models import adapter_of, build_model
from vitrim.tokens import Reducer
from zoo import redrawn

CUT = "TopK(norm, fuse=mean) @ KeepRate(0.6, at=(0, 1))"
SIZES = [(40, 40), (24, 56), (16, 16), (56, 24)]


def _model(name: str) -> Any:
    return redrawn({**NAFLEX, **MORE}[name]()).double()


def _images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(3, *size, generator=generator, dtype=torch.float64) for size in SIZES]


# Each reducer in one model of each of the three, at both places; the others meet one each.
REDUCERS = [vitrim.TopK("random", fuse="mean"), vitrim.TopK("mean_attention"), vitrim.ToMe()]
PLACED = [
    *((name, reducer, "before") for name in NAFLEX for reducer in REDUCERS),
    *((name, REDUCERS[at % 3], "inside") for at, name in enumerate([*NAFLEX, *MORE])),
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "reducer", "place"), PLACED, ids=str)
def test_a_padded_batch_gives_what_each_image_gives_alone(name: str, reducer: Reducer, place: str) -> None:
    model, images = _model(name), _images()
    with vitrim.attach(model, reducer, vitrim.KeepRate(0.6, at=(0, 1), place=place)) as handle:
        together = model(padded(images, longest=30))
        states, prefix = handle.states[-1], handle.geometry.num_prefix
        for row, image in enumerate(images):
            torch.testing.assert_close(model(padded([image]))[0], together[row], rtol=1e-10, atol=1e-10)
            if "sampled" not in name:  # timm samples positions of padded batches by another method.
                torch.testing.assert_close(model(image[None])[0], together[row], rtol=1e-6, atol=1e-6)
            own, length = handle.states[-1], image[0].numel() // 64
            assert torch.equal(states.origin[row, :length], own.origin[0])
            assert (states.origin[row, length:] == -1).all()
            kept = handle.plan(length).token_counts[-1] - prefix
            assert torch.equal(states.size[row, :kept], own.size[0])
            assert not states.size[row, kept:].any()


@pytest.mark.parametrize("name", sorted(set(MORE) - {"naflex_max"}))  # The reference knows no maximum over tokens.
def test_images_of_one_size_equal_the_slow_reference(name: str) -> None:
    agrees_with_reference(_model(name), vitrim.ToMe(), vitrim.KeepRate(0.6, at=(0, 1)))


@torch.no_grad()
def test_padding_holds_nothing_that_matters() -> None:
    model, batch = _model("naflex"), padded(_images(), longest=40)
    with vitrim.attach(model, CUT):
        expected = model(batch)
        batch["patches"][~batch["patch_valid"]] = torch.nan
        assert torch.equal(model(batch), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(NAFLEX))
def test_nothing_to_drop_is_bit_equal_in_a_padded_batch(name: str) -> None:
    model, batch = _model(name), padded(_images(), longest=30)
    dense = model(batch)
    for reduction in ("TopK(norm, fuse=mean) @ KeepRate(1.0)", "ToMe() @ ConstantR(0)"):
        with vitrim.attach(model, reduction):
            assert torch.equal(model(batch), dense)
            assert torch.equal(model.forward_head(**model.forward_features(**batch)), dense)
    assert torch.equal(model(batch), dense)


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(NAFLEX))
def test_features_of_two_batches_and_then_their_heads(name: str) -> None:
    model, images = _model(name), _images()
    batches = [padded(images), padded(images[1:])]
    with vitrim.attach(model, CUT):
        expected = [model(batch) for batch in batches]
        features = [model.forward_features(**batch) for batch in batches]
        for found, logits in zip(features, expected, strict=True):
            assert found["patches"].shape[1] - model.num_prefix_tokens == found["patch_valid"].shape[1]
            assert torch.equal(model.forward_head(**found), logits)
        copies = {**features[0], "patches": features[0]["patches"].clone()}
        if name == "naflex_rotary":  # Its head reads CLS alone.
            torch.testing.assert_close(model.forward_head(**copies), expected[0])
        else:
            features[0]["patches"].data.mul_(2)
            features[1]["patches"].copy_(features[1]["patches"].flip(0))
            for changed in (copies, *features):
                with pytest.raises(VitrimError, match="it is not known from which forward pass these features come"):
                    model.forward_head(**changed)
    with vitrim.attach(model, "TopK(norm) @ KeepRate(0.6, at=(0, 1))"):  # Nothing stands for several patches.
        found = model.forward_features(**batches[0])
        found["patches"] = found["patches"].clone()
        torch.testing.assert_close(model.forward_head(**found), model(batches[0]))


@torch.no_grad()
def test_without_pooling_the_tokens_of_a_padded_batch_are_returned() -> None:
    model = _model("naflex")
    model.reset_classifier(0, "")
    with vitrim.attach(model, CUT) as handle:
        out = model(padded(_images()))
        assert out.shape[1] == handle.plan(25).token_counts[-1]
        cut = [handle.plan(length).token_counts[-1] for length in (25, 21, 4, 21)]
        for tokens, count, image in zip(out, cut, _images(), strict=True):
            torch.testing.assert_close(tokens[:count], model(padded([image]))[0])
            assert not tokens[count:].any()


@torch.no_grad()
def test_cls_only_in_a_padded_batch() -> None:
    model, batch = _model("naflex_rotary"), padded(_images())
    dense = model(batch)
    with vitrim.attach(model, None, cls_only=True):
        torch.testing.assert_close(model(batch), dense)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_a_padded_batch_are_those_of_its_images(recompute: bool) -> None:
    model, images = _model("naflex_rotary"), _images()
    model.set_grad_checkpointing(recompute)
    with vitrim.attach(model.train(), "TopK(norm, fuse=mean) @ KeepRate(0.6, at=(0, 1))"):
        model(padded(images)).square().sum().backward()
        together = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()
        for image in images:
            model(padded([image])).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, together[name])


def test_patches_dropped_in_training_are_dropped_from_those_that_are_there() -> None:
    model = redrawn(timm.create_model("naflexvit_base_patch16_gap", patch_drop_rate=0.4, depth=2, embed_dim=24,
                                      num_heads=3, patch_size=8, num_classes=5)).train()  # fmt: skip
    with vitrim.attach(model, CUT) as handle:
        batch = {
            name: value.float() if value.is_floating_point() else value for name, value in padded(_images()).items()
        }
        batch["patches"][~batch["patch_valid"]] = torch.nan
        assert model(batch).isfinite().all()
        assert handle.states[-1].size.shape[1] == handle.plan(15).token_counts[-1] - handle.geometry.num_prefix


@torch.no_grad()
def test_what_no_reduction_can_be_right_for_is_refused() -> None:
    model, batch = _model("naflex"), padded(_images())
    empty, holes = batch["patch_valid"].clone(), batch["patch_valid"].clone()
    empty[2], holes[0, 3] = False, False
    with vitrim.attach(model, CUT):
        with pytest.raises(VitrimError, match="the mask leaves no patch of image 2 of the batch; leave that image out"):
            model({**batch, "patch_valid": empty})
        with pytest.raises(VitrimError, match="padding lies between the patches of an image"):
            model({**batch, "patch_valid": holes})
        with pytest.raises(VitrimError, match="an attention mask cannot be combined with token reduction"):
            model({**batch, "attn_mask": torch.zeros(4, 1, 29, 29, dtype=torch.float64)})
        with pytest.raises(VitrimError, match="is of another length for every image; call forward_features"):
            model.forward_intermediates(batch, output_fmt="NLC")
    with vitrim.attach(model, "ToMe() @ ConstantR(0)"):
        final, _ = model.forward_intermediates(batch, output_fmt="NLC")
        assert torch.equal(final, model.forward_features(**batch)["patches"])


@torch.no_grad()
def test_maps_are_spread_over_the_grid_of_an_image_of_any_size() -> None:
    model, image = _model("naflex"), _images()[1][None]
    with vitrim.attach(model, "ToMe() @ ConstantR(4)") as handle:
        final, maps = model.forward_intermediates(image, indices=[0, 2], norm=True)
        expected = handle.states[2].spread(final[:, model.num_prefix_tokens :]).mT.unflatten(2, (3, 7))
        torch.testing.assert_close(maps[1], expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["naflex", "naflex_rotary"])
def test_a_saved_model_comes_back_with_its_size_and_its_positions(name: str, tmp_path: Path) -> None:
    model, batch = _model(name).float(), {k: v.float() if v.ndim == 3 and k == "patches" else v
                                          for k, v in padded(_images()).items()}  # fmt: skip
    adapter = adapter_of(model)
    assert adapter.geometry(model).num_patches == 25
    handle = vitrim.attach(model, CUT)
    adapter.resize(model, (32, 48))
    assert (handle.geometry.input_size, handle.geometry.num_patches) == ((3, 32, 48), 24)
    vitrim.save(model, tmp_path / "saved")
    other = vitrim.load(tmp_path / "saved")
    assert torch.equal(other(batch), model(batch))
    assert vitrim.attached(other).geometry == handle.geometry
    assert adapter.input_format(other).size == (3, 32, 48)
    with pytest.raises(UnsupportedModelError, match="images of 20 x 40 px cannot be divided into patches of 8 px"):
        adapter.resize(other, (20, 40))
    with pytest.raises(UnsupportedModelError, match="images of 4 x 4 px are smaller than one patch of 8 px"):
        adapter.resize(other, 4)


def test_cost_is_what_a_count_of_the_operations_finds() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for name in NAFLEX:
        model = _model(name).requires_grad_(False)
        for reduction in (None, CUT):
            with vitrim.attach(model, reduction), FlopCounterMode(display=False) as counter, torch.no_grad():
                for part in model.modules():
                    part.fused_attn = False  # The counter does not see fused attention on CPUs.
                model(torch.zeros(1, 3, 40, 40, dtype=torch.float64))
                assert vitrim.cost(model).macs == counter.get_total_flops() // 2


def test_the_size_of_images_means_the_same_as_in_other_families() -> None:
    with torch.device("meta"):
        model = build_model("naflexvit_base_patch16_gap", img_size=224)
        plain = build_model("naflexvit_base_patch16_gap")
    assert adapter_of(model).geometry(model).num_patches == 196
    assert adapter_of(plain).geometry(plain).input_size == (3, 384, 384)


def test_blocks_that_cannot_be_cut_are_refused_by_name() -> None:
    model = timm.create_model("naflexvit_base_patch16_gap", depth=1, embed_dim=24, num_heads=2, attn_layer="diff")
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0 holds a DiffAttention, which the timm-naflex adapter"):
        vitrim.attach(model, CUT)


def test_widths_change_where_blocks_are_standard_ones() -> None:
    model = _model("naflex")
    expected = Case(vitrim.ToMe()).cuts(0, 1)
    vitrim.models.set_widths(model, [vitrim.models.BlockWidths(5, 40)] * 3)
    agrees_with_reference(model, vitrim.ToMe(), expected)
    rotary = _model("naflex_rotary")
    dims = vitrim.models.widths_of(rotary)[0].head_dim
    with pytest.raises(UnsupportedModelError, match=f"its heads are scaled by their {dims} dims"):
        vitrim.models.set_widths(rotary, [vitrim.models.BlockWidths(5, 40)] * 3)
    vitrim.models.set_widths(rotary, [vitrim.models.BlockWidths(dims, 40, 5)] * 3)
    agrees_with_reference(rotary, vitrim.ToMe(), expected)
    pictures = _images()
    together = rotary(padded(pictures, longest=30))
    for image, logits in zip(pictures, together, strict=True):
        torch.testing.assert_close(rotary(padded([image]))[0], logits, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_compiled_batches_give_the_same() -> None:
    model, batch = _model("naflex"), padded(_images()[1:3], longest=30)
    x = torch.stack([image[:, :16, :16] for image in _images()])
    with vitrim.attach(model, CUT):
        expected = model(batch), model(x)
        torch.testing.assert_close(torch.compile(model, backend="eager")(batch), expected[0], rtol=1e-12, atol=1e-12)
        torch._dynamo.reset()
        whole = torch.compile(model, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match="compile without fullgraph=True"):
            whole(batch)
        torch.testing.assert_close(whole(x), expected[1], rtol=1e-12, atol=1e-12)
