"""Backbones of Hugging Face transformers: whole maps under reduction equal the slow reference, and the rest works."""

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vitrim
from hf_models import BACKBONES, _beit, _plain, in_timm_words
from references import VIEWS, reduced_vit
from vitrim.compression.fidelity import Fidelity
from vitrim.compression.images import Pictures
from vitrim.elastic import stratify
from vitrim.errors import UnsupportedModelError, VitrimError
from vitrim.models import find_adapter, load
from vitrim.models.families.hf.layout import layout_of
from vitrim.tokens import Reducer
from zoo import images, redrawn

CUT = "TopK('norm', fuse=mean) @ KeepRate(0.6, at=(0, 1))"
REDUCERS = (vitrim.TopK("norm"), vitrim.TopK("cls_attention", fuse="mean"), vitrim.ToMe())
each_backbone = pytest.mark.parametrize("name", BACKBONES)


def _model(name: str) -> Any:
    return redrawn(BACKBONES[name]()).double()


def _double(count: int = 2) -> Tensor:
    return images(count, dtype=torch.float64)


def _after(model: nn.Module, blocks: int) -> SimpleNamespace:
    """The first blocks of the network alone, as the slow reference reads it."""
    view = in_timm_words(model)
    view.blocks = view.blocks[:blocks]
    return view


@torch.no_grad()
@each_backbone
@pytest.mark.parametrize("reducer", REDUCERS, ids=str)
def test_maps_of_every_block_equal_the_slow_reference(
    name: str, reducer: Reducer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = _model(name), _double()
    with vitrim.attach(model, reducer, vitrim.KeepRate(0.6, at=(0, 1))) as handle:
        maps, plan = model(x).feature_maps, handle.plan()
    layout = layout_of(model)
    norm = getattr(model, layout.final_norm) if layout.final_norm else nn.Identity()
    for blocks, spread in enumerate(maps):
        assert spread.shape == (2, model.config.hidden_size, 5, 5)
        view = _after(model, blocks)
        monkeypatch.setitem(VIEWS, "transformers", lambda model, view=view: view)
        for image, whole in zip(x, spread, strict=True):
            _, tokens = reduced_vit(model, image, reducer, plan)
            back = {
                patch: row for row, members in zip(tokens.patches, tokens.members, strict=True) for patch in members
            }
            back |= tokens.parked
            expected = norm(torch.stack([back[patch] for patch in range(25)]))
            torch.testing.assert_close(whole.flatten(1).T, expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
@each_backbone
def test_nothing_to_drop_gives_the_same_maps_and_removing_gives_the_same_model(name: str) -> None:
    model, x = redrawn(BACKBONES[name]()), images(2)
    dense, classes = model(x).feature_maps, [type(module) for module in model.modules()]
    with vitrim.attach(model, "TopK('norm') @ KeepRate(1)"):
        assert all(map(torch.equal, model(x).feature_maps, dense))
    assert [type(module) for module in model.modules()] == classes
    assert all(map(torch.equal, model(x).feature_maps, dense))


@torch.no_grad()
@each_backbone
def test_hidden_states_are_what_each_layer_has_left(name: str) -> None:
    model, x = _model(name), _double()
    with vitrim.attach(model, CUT) as handle:
        out = model(x, output_hidden_states=True)
        assert [state.shape[1] for state in out.hidden_states[1:]] == list(handle.token_counts)
        for block, tokens in enumerate(out.hidden_states[1:]):
            assert torch.equal(handle.state_of(tokens).origin, handle.states[block].origin)
        chosen = model(x, output_hidden_states=[1]).hidden_states
        assert [state is None for state in chosen] == [True, False, True, True]
        assert torch.equal(chosen[1], out.hidden_states[1])
        assert "hidden_states" not in model(x)
        maps = model(x, return_dict=False)[0]
        assert all(map(torch.equal, maps, out.feature_maps))


@torch.no_grad()
@pytest.mark.parametrize("name", ["dinov2_backbone", "registers_backbone", "dinov3_backbone"])
def test_maps_that_are_not_reshaped_are_whole_sequences(name: str) -> None:
    model, x = _model(name), _double()
    with vitrim.attach(model, CUT):
        maps = model(x).feature_maps
        model.config.reshape_hidden_states = False
        for spread, sequence in zip(maps, model(x).feature_maps, strict=True):
            first = sequence.shape[1] - 25
            assert first in (0, 1, 3)
            assert torch.equal(sequence[:, first:].mT.unflatten(2, (5, 5)), spread)


@torch.no_grad()
def test_a_feature_pyramid_works_on_whole_maps_and_is_counted() -> None:
    model: Any = redrawn(_beit("BeitBackbone", add_fpn=True, reshape_hidden_states=True, out_indices=[0, 1, 2, 3]))
    x = images(2)
    with vitrim.attach(model, CUT):
        maps = model(x).feature_maps
        assert [each.shape[2] for each in maps] == [20, 10, 5, 2]
        with FlopCounterMode(display=False) as counter:
            model.to("meta")(torch.empty(1, 3, 40, 40, device="meta"))
        assert vitrim.cost(model).macs == pytest.approx(counter.get_total_flops() // 2, rel=1e-3)


@torch.no_grad()
@each_backbone
def test_cost_agrees_with_the_flop_counter(name: str) -> None:
    model = BACKBONES[name]().eval().to("meta")
    with vitrim.attach(model, "TopK(norm) @ KeepRate(0.6, at=(0, 1))"), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 40, 40, device="meta"))
        assert vitrim.cost(model).macs == pytest.approx(counter.get_total_flops() // 2, rel=1e-3)


@torch.no_grad()
@each_backbone
def test_copies_and_folders_give_the_same_maps(name: str, tmp_path: Path) -> None:
    model, x = redrawn(BACKBONES[name]()), images(2)
    model.config.out_indices = [1, 3]
    vitrim.attach(model, CUT)
    expected = model(x).feature_maps
    assert len(expected) == 2
    vitrim.save(model, tmp_path / "model")
    for back in (copy.deepcopy(model), load(tmp_path / "model")):
        assert type(back) is type(model)
        assert all(map(torch.equal, back(x).feature_maps, expected))


@each_backbone
def test_gradients_survive_recomputation(name: str) -> None:
    model, x = _model(name).train(), _double()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(0)  # DINOv3 scales its coordinates at random, BEiT drops paths.
        sum(each.square().sum() for each in model(x).feature_maps).backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    with vitrim.attach(model, CUT):
        plain = gradients()
        find_adapter(model).recompute(model)
        torch.testing.assert_close(gradients(), plain, rtol=1e-12, atol=1e-12)
        assert len(plain) > 30


@torch.no_grad()
def test_threads_and_compiled_backbones_give_what_each_pass_gives_alone() -> None:
    model, batches = _model("dinov2_backbone"), [images(2, dtype=torch.float64, seed=seed) for seed in range(4)]
    with vitrim.attach(model, CUT):
        alone = [model(x).feature_maps for x in batches]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda x: model(x).feature_maps, batches))
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for found in (together, [compiled(x).feature_maps for x in batches]):
            for maps, expected in zip(found, alone, strict=True):
                torch.testing.assert_close(maps, expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_depth_model_reads_whole_maps_of_its_backbone() -> None:
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation

    backbone = _plain("Dinov2Backbone", "Dinov2Config", out_indices=[0, 1, 2, 3], reshape_hidden_states=False)
    config = DepthAnythingConfig(
        backbone_config=backbone.config, patch_size=8, reassemble_hidden_size=24, neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8, head_hidden_size=8,
    )  # fmt: skip
    model, x = redrawn(DepthAnythingForDepthEstimation(config)), images(2)
    dense = model(x).predicted_depth
    with pytest.raises(UnsupportedModelError, match=r"give the model inside it: model\.backbone"):
        vitrim.attach(model, CUT)
    with vitrim.attach(model.backbone, CUT) as handle:
        depth = model(x).predicted_depth
        assert depth.shape == dense.shape
        assert not torch.equal(depth, dense)
        assert handle.token_counts == (17, 12, 12)
    assert torch.equal(model(x).predicted_depth, dense)


@torch.no_grad()
def test_features_of_a_backbone_are_restored_and_named() -> None:
    model, x = _model("dinov3_backbone"), _double()
    adapter = find_adapter(model)
    with vitrim.attach(model, CUT, restorable=True) as handle:
        final, after = adapter.features(model, x, (1,))
        maps = model(x).feature_maps
        torch.testing.assert_close(handle.restore(final)[:, 3:].mT.unflatten(2, (5, 5)), maps[-1])
        assert torch.equal(adapter.predict(model, x), maps[-1])
        assert after[1][1].shape[1] == handle.token_counts[1] - 3


@torch.no_grad()
def test_what_a_backbone_cannot_do_is_refused_in_one_line() -> None:
    model, x = redrawn(BACKBONES["dinov2_backbone"]()), images(2)
    with pytest.raises(VitrimError, match="cls_only needs a head that reads only CLS"):
        vitrim.attach(model, None, cls_only=True)
    with vitrim.attach(model, CUT):
        with pytest.raises(VitrimError, match="output_attentions=True has no meaning"):
            model(x, output_attentions=True)
        with pytest.raises(VitrimError, match="smaller than one patch"):
            model(x[:, :, :4])
    beit: Any = redrawn(BACKBONES["beit_backbone"]())
    with pytest.raises(UnsupportedModelError, match="a BeitBackbone needs the tokens of all patches"):
        vitrim.attach(beit.beit, CUT)
    with pytest.raises(UnsupportedModelError, match="timm builds no network like this Dinov2Backbone"):
        vitrim.convert(model, "timm")


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("VitDetBackbone", "VitDetConfig", r"ViTDet .* cannot be reduced: attention in windows needs the whole grid"),
        ("VitPoseBackbone", "VitPoseBackboneConfig", r"ViTPose .* cannot be reduced: the blocks of this tower have no"),
        ("PixioBackbone", "PixioConfig", r"Pixio .* cannot be reduced: the blocks of this tower have no adapter yet"),
    ],
)
def test_backbones_that_cannot_be_reduced_are_refused_with_the_reason(name: str, config: str, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        vitrim.attach(_plain(name, config), CUT)


@torch.no_grad()
def test_a_backbone_of_timm_inside_transformers_gives_whole_maps() -> None:
    from transformers import AutoBackbone, TimmBackboneConfig

    config = TimmBackboneConfig(backbone="test_vit", out_indices=[0, 2], img_size=160)
    model, x = AutoBackbone.from_config(config).eval(), images(1, 160)
    with pytest.raises(UnsupportedModelError, match=r"give the model inside it: model\._backbone\.model"):
        vitrim.attach(model, CUT)
    dense = [each.shape for each in model(x).feature_maps]
    with vitrim.attach(model._backbone.model, CUT) as handle:
        assert [each.shape for each in model(x).feature_maps] == dense
        assert handle.token_counts[-1] < 40


@torch.no_grad()
def test_maps_are_compared_place_by_place_and_image_by_image() -> None:
    model, x = redrawn(BACKBONES["dinov2_backbone"]()), images(4)
    fidelity = Fidelity(model, Pictures(x), torch.device("cpu"))
    dense = model(x).feature_maps[-1]
    with vitrim.attach(model, CUT):
        found, cut = fidelity.compare(model).divergence, model(x).feature_maps[-1]
        model.config.reshape_hidden_states = False
        sequences = find_adapter(model).predict(model, x)
    assert found.shape == (4,)
    for one, other, divergence in zip(dense, cut, found, strict=True):
        places = zip(one.flatten(1).T, other.flatten(1).T, strict=True)
        cosines = [(a @ b / (a.norm() * b.norm())).item() for a, b in places]
        assert divergence.item() == pytest.approx(1 - sum(cosines) / 25, abs=1e-6)
    assert torch.equal(sequences[:, :, 1:].unflatten(2, (5, 5)), cut)


def test_widths_of_a_backbone_are_cut_by_its_maps() -> None:
    model, x = redrawn(BACKBONES["beit_backbone"]()), images(8)
    net = stratify(model, [x], num_images=8, width_multiple=4, max_saving=0.6, rounds=1, say=lambda line: None)
    small = net.extract(macs=0.8)
    assert vitrim.cost(small).macs <= 0.8 * vitrim.cost(model).macs
    with torch.no_grad(), vitrim.attach(small, CUT):
        assert [each.shape for each in small(x).feature_maps] == [(8, 24, 5, 5)] * 4


def test_a_reduced_backbone_is_exported(tmp_path: Path) -> None:
    model, x = redrawn(BACKBONES["dinov2_backbone"]()), images(3)
    with vitrim.attach(model, "TopK(norm) @ KeepRate(0.6, at=(0, 1))"), torch.no_grad():
        expected = model(x).feature_maps[-1]
        vitrim.export(model, images(8), tmp_path / "backbone.pt2", format="torch")
    program = torch.export.load(tmp_path / "backbone.pt2")
    torch.testing.assert_close(program.module()(x), expected)
