"""SigLIP 2 of Hugging Face transformers: images of several sizes in one padded batch."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vitrim
from hf_models import HF, MORE
from vitrim.errors import VitrimError
from vitrim.measure.speed import bench
from vitrim.models import find_adapter
from vitrim.models.families.hf.layout import layout_of
from vitrim.tokens import Reducer
from zoo import images, predicted, redrawn

CUT = "TopK(norm, fuse=mean) @ KeepRate(0.6, at=(0, 1))"
REDUCERS = (vitrim.TopK("norm"), vitrim.TopK("mean_attention", fuse="sum"), vitrim.ToMe())
NAMES = ("hf_siglip2", "siglip2", "siglip2_headless")
SHAPES = ((5, 4), (3, 7), (4, 5), (5, 5))


def _model(name: str) -> nn.Module:
    return redrawn((HF | MORE)[name]()).double()


def _batch(shapes: Sequence[tuple[int, int]], longest: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """Random patches as the processor pads them."""
    longest = max(longest, *(rows * columns for rows, columns in shapes))
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(shapes), longest, dtype=torch.int32)
    for row, (rows, columns) in enumerate(shapes):
        mask[row, : rows * columns] = 1
    patches = torch.randn(len(shapes), longest, 192, generator=generator, dtype=torch.float64)
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor(shapes)}


def _alone(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    length = int(batch["pixel_attention_mask"][row].sum())
    part = {name: value[row : row + 1] for name, value in batch.items()}
    return {name: value if name == "spatial_shapes" else value[:, :length] for name, value in part.items()}


def _answer(out: object) -> Tensor:
    found = getattr(out, "logits", None)
    found = getattr(out, "pooler_output", None) if found is None else found
    return out.last_hidden_state[:, 0] if found is None else found


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reducer", REDUCERS, ids=str)
def test_a_padded_batch_gives_what_each_image_gives_alone(name: str, reducer: Reducer) -> None:
    model, batch = _model(name), _batch(SHAPES, longest=30)
    with vitrim.attach(model, reducer, vitrim.KeepRate(0.6, at=(0, 1))) as handle:
        together = _answer(model(**batch))
        state = handle.states[-1]
        for row, (rows, columns) in enumerate(SHAPES):
            alone, length = model(**_alone(batch, row)), rows * columns
            torch.testing.assert_close(_answer(alone)[0], together[row], rtol=1e-10, atol=1e-10)
            own = handle.states[-1]
            assert torch.equal(state.origin[row, :length], own.origin[0])
            assert (state.origin[row, length:] == -1).all()
            torch.testing.assert_close(state.positions[row, : own.size.shape[1]], own.positions[0])
            assert not state.size[row, own.size.shape[1] :].any()


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_drop_is_bit_equal_and_padding_holds_nothing_that_matters(name: str) -> None:
    model, batch = _model(name), _batch(SHAPES, longest=30)
    dense = _answer(model(**batch))
    with vitrim.attach(model, "TopK(norm, fuse=mean) @ KeepRate(1)"):
        assert torch.equal(_answer(model(**batch)), dense)
        torch.testing.assert_close(_answer(model(**_alone(batch, 1)))[0], dense[1], rtol=1e-6, atol=1e-6)
    with vitrim.attach(model, CUT):
        expected = _answer(model(**batch))
        batch["pixel_values"][batch["pixel_attention_mask"] == 0] = torch.nan
        assert torch.equal(_answer(model(**batch)), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["hf_siglip2", "siglip2"])
def test_features_of_two_batches_and_then_their_heads(name: str) -> None:
    model = _model(name)
    tower, batches = layout_of(model).tower_of(model), [_batch(SHAPES, seed=1), _batch(SHAPES[1:], seed=2)]
    with vitrim.attach(model, CUT, restorable=True) as handle:
        expected = [_answer(model(**batch)) for batch in batches]
        features = [tower(**batch, output_hidden_states=True) for batch in batches]
        for found, logits, batch in zip(features, expected, batches, strict=True):
            tokens = found.last_hidden_state
            torch.testing.assert_close(find_adapter(model).head(model, tokens), logits)
            assert handle.restore(tokens).shape == (*batch["pixel_values"].shape[:2], 24)
            assert handle.state_of(found.hidden_states[1]).positions.shape[1] == found.hidden_states[1].shape[1]
        with pytest.raises(VitrimError, match="from which forward pass"):
            find_adapter(model).head(model, features[0].last_hidden_state.clone())


@torch.no_grad()
def test_the_outputs_have_the_form_that_is_asked_for() -> None:
    model, batch, labels = _model("siglip2"), _batch(SHAPES), torch.tensor([0, 1, 2, 3])
    with vitrim.attach(model, CUT) as handle:
        out = model(**batch, labels=labels)
        torch.testing.assert_close(out.loss, nn.functional.cross_entropy(out.logits, labels))
        assert torch.equal(model(**batch, return_dict=False)[0], out.logits)
        assert torch.equal(model.vision_model(**batch, return_dict=False)[0], model.vision_model(**batch)[0])
        assert handle.model is model


@torch.no_grad()
def test_what_cannot_be_right_is_refused_in_one_line() -> None:
    model, batch = _model("hf_siglip2"), _batch(SHAPES)
    with vitrim.attach(model, CUT):
        empty = {**batch, "pixel_attention_mask": torch.zeros_like(batch["pixel_attention_mask"])}
        with pytest.raises(VitrimError, match="the mask leaves no patch of image 0 of the batch"):
            model(**empty)
        with pytest.raises(VitrimError, match=r"image 1 of the batch has 3 x 6 patches by spatial_shapes, but 21"):
            model(**{**batch, "spatial_shapes": torch.tensor([(5, 4), (3, 6), (4, 5), (5, 5)])})
        with pytest.raises(VitrimError, match="output_attentions=True has no meaning"):
            model(**batch, output_attentions=True)
        with pytest.raises(VitrimError, match="as its image processor makes them"):
            model(images(1))
    with pytest.raises(VitrimError, match="positions of SigLIP 2 make a square"):
        vitrim.build_model("Siglip2VisionModel", img_size=(64, 32))


@torch.no_grad()
@pytest.mark.parametrize("name", ["hf_siglip2", "siglip2"])
def test_images_of_another_size_and_a_saved_model(name: str, tmp_path: Path) -> None:
    model, x = _model(name).float(), images(2, 56)[:, :, :40]
    adapter = find_adapter(model)
    adapter.resize(model, (40, 56))
    with vitrim.attach(model, CUT) as handle:
        assert handle.plan().num_patches == 35
        expected = predicted(model, x)
        assert handle.positions.shape[1] == handle.token_counts[-1]
        vitrim.save(model, tmp_path)
        back = vitrim.load(tmp_path)
        assert torch.equal(predicted(back, x), expected)
    assert adapter.input_format(back).size == (3, 40, 56)
    assert back.state_dict().keys() == model.state_dict().keys()


def test_it_is_timed_like_any_other_model() -> None:
    model = HF["hf_siglip2"]().eval()
    table = bench({"dense": model}, batch_sizes=(1,), rounds=1, warmup=0)
    assert table.rows[0]["ms"] > 0


@torch.no_grad()
def test_a_compiled_padded_batch_gives_the_same_and_its_blocks_are_compiled() -> None:
    model, graphs = _model("hf_siglip2"), list[int]()
    batches = [_batch(SHAPES[:2], longest=30), _batch(SHAPES[1:3], longest=30, seed=1)]

    def note(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        graphs.append(sum("scaled_dot_product" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    with vitrim.attach(model, CUT):
        expected = [_answer(model(**batch)) for batch in batches]
        compiled = torch.compile(model, backend=note)
        for batch, one in zip(batches, expected, strict=True):
            torch.testing.assert_close(_answer(compiled(**batch)), one, rtol=1e-12, atol=1e-12)
        assert graphs.count(3) >= 2  # All blocks in one graph, for each length.
        torch._dynamo.reset()
        with pytest.raises(Exception, match="compile without fullgraph=True"):
            torch.compile(model, backend="eager", fullgraph=True)(**batches[0])
