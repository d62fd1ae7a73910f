"""Models of Hugging Face transformers: what is theirs alone; the laws are in the contract suite."""

import ast
import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vitrim
from hf_models import HF, MORE
from test_contract import Case, agrees_with_reference
from vitrim.elastic import stratify
from vitrim.errors import CheckpointError, UnsupportedModelError, VitrimError
from vitrim.models import families, find_adapter, load
from vitrim.models.families.hf import reduced_classes
from zoo import images, predicted, redrawn

ALL = {**HF, **MORE}
CUT = "ToMe() @ KeepRate(0.6, at=(0, 1))"
REDUCERS = (vitrim.TopK("norm", fuse="mean"), vitrim.ToMe())


@pytest.mark.parametrize("name", MORE)
def test_every_model_equals_the_slow_reference_and_itself(name: str) -> None:
    model, x = redrawn(MORE[name]()), images(2)
    dense = predicted(model, x)
    classes = [type(module) for module in model.modules()]
    with vitrim.attach(model, "TopK('norm') @ KeepRate(1)"):
        assert torch.equal(predicted(model, x), dense)
    assert torch.equal(predicted(model, x), dense)
    assert [type(module) for module in model.modules()] == classes
    model = model.double()
    for reducer, place in zip(REDUCERS, ("inside", "before"), strict=True):
        agrees_with_reference(model, reducer, Case(reducer).cuts(0, 1, place=place))
    assert find_adapter(model).name == "transformers"


@pytest.mark.parametrize("name", ["hf_vit", "hf_siglip"])
def test_eager_and_fused_attention_agree(name: str) -> None:
    model, x = redrawn(ALL[name]()), images(2)
    for reducer in REDUCERS:
        with vitrim.attach(model, reducer, vitrim.KeepRate(0.6, at=(0, 1))) as handle, torch.no_grad():
            fused, kept = predicted(model, x), handle.states[-1].origin
            model.set_attn_implementation("eager")
            torch.testing.assert_close(predicted(model, x), fused)
            assert torch.equal(handle.states[-1].origin, kept)
            model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("name", ["hf_vit", "dinov3"])
def test_hooks_on_attention_see_its_calls(name: str) -> None:
    model, x, seen = redrawn(ALL[name]()), images(2), []
    reducer = vitrim.TopK("cls_attention", fuse="sum")
    with vitrim.attach(model, reducer, vitrim.KeepRate(0.6, at=(0, 1))) as handle, torch.no_grad():
        expected = predicted(model, x)
        for block in find_adapter(model).blocks(model):
            block.attention.register_forward_hook(lambda module, args, out: seen.append(out[0].shape[1]))
        torch.testing.assert_close(predicted(model, x), expected)
        prefix, counts = handle.geometry.num_prefix, handle.token_counts
        assert seen == [prefix + 25, *counts[:2]]


def test_transformers_is_imported_only_where_a_model_of_it_is_there() -> None:
    for path in Path(families.__file__).parent.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            module = getattr(node, "module", "") or ""
            assert not any(name.startswith("transformers") for name in (module, *names)), path


@pytest.mark.parametrize("name", [*HF, "deit_distilled", "vit_bare", "clip", "clip_projected", "dinov2", "dinov3"])
def test_cost_agrees_with_the_flop_counter(name: str) -> None:
    model = ALL[name]().eval()
    for reduction in (None, "TopK(norm, fuse=mean) @ KeepRate(0.6, at=(0, 1))", "ToMe() @ ConstantR(4)"):
        handle = None if reduction is None else vitrim.attach(model, reduction)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            predicted(model.to("meta"), torch.empty(1, 3, 40, 40, device="meta"))
        spare = 3 * 3 * 25 * 8  # Matching of ToMe and norms are counted in other ways.
        assert vitrim.cost(model).macs == pytest.approx(counter.get_total_flops() // 2, rel=1e-3, abs=spare)
        if handle is not None:
            handle.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*HF, "beit", "clip", "deit_distilled", "dinov2", "dinov3", "ijepa_bare"])
def test_a_saved_model_comes_back_whole(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = redrawn(ALL[name]()).to(dtype), images(2).to(dtype)
    vitrim.attach(model, CUT)
    vitrim.save(model, tmp_path / "model")
    back = load(tmp_path / "model")
    assert torch.equal(predicted(back, x), predicted(model, x))
    assert type(back) is type(model)


def test_pickles_of_reduced_models_are_read_where_nothing_was_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = redrawn(ALL["hf_siglip"]()), images(2)
    vitrim.attach(model, CUT)
    expected, text = predicted(model, x), pickle.dumps(model)
    made = dict(reduced_classes._made)
    monkeypatch.setattr(reduced_classes, "_made", {})
    fresh = reduced_classes.__getattr__("ReducedSiglipVisionModel")
    assert fresh not in made.values()
    assert fresh.__qualname__ == "ReducedSiglipVisionModel"
    monkeypatch.setattr(reduced_classes, "_made", made)
    assert torch.equal(predicted(pickle.loads(text), x), expected)


@pytest.mark.parametrize("name", ["hf_vit", "dinov2", "clip", "hf_siglip", "beit"])
def test_stratify_and_extract(name: str) -> None:
    model, x = redrawn(ALL[name]()), images(8)
    net = stratify(model, [x], num_images=8, width_multiple=4, max_saving=0.6, rounds=1, say=lambda _: None)
    for macs in (1.0, 0.7):
        small = net.extract(macs=macs)
        assert vitrim.cost(small).macs <= macs * vitrim.cost(model).macs
        if macs == 1:
            torch.testing.assert_close(predicted(small, x), predicted(model, x), rtol=1e-3, atol=1e-4)
    with vitrim.attach(small, CUT):
        assert predicted(small, x).isfinite().all()


@pytest.mark.parametrize("name", ["hf_dinov2", "siglip"])
def test_removed_halves_run_and_are_saved(name: str, tmp_path: Path) -> None:
    """Blocks of SigLIP give their attention its tokens by keyword."""
    model, x = redrawn(ALL[name]()), images(2)
    names = [name for name, _ in model.named_modules() if name.endswith((".attention", ".self_attn", ".mlp"))]
    vitrim.models.narrow(model, {names[0]: 0, names[3]: 0, names[4]: 4})
    dense = predicted(model, x)
    with vitrim.attach(model, "TopK('norm') @ KeepRate(0.6, at=(0, 1))"):
        assert predicted(model, x).shape == dense.shape
    agrees_with_reference(model.double(), vitrim.TopK("norm"), vitrim.KeepRate(0.6, at=(0, 1)))
    vitrim.save(model.float(), tmp_path)
    torch.testing.assert_close(predicted(load(tmp_path), x), dense)


@pytest.mark.parametrize("name", ["hf_dinov2", "dinov3"])
def test_gradients_survive_recomputation(name: str) -> None:
    model, x = redrawn(ALL[name]()).double().train(), images(2, dtype=torch.float64)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(0)  # DINOv3 scales its coordinates at random.
        predicted(model, x).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    calls: list[int] = []
    with vitrim.attach(model, CUT):
        plain = gradients()
        find_adapter(model).recompute(model)
        find_adapter(model).blocks(model)[1].norm2.register_forward_hook(lambda *_: calls.append(1))
        recomputed = gradients()
    assert len(calls) == 2
    assert len(plain) == len(recomputed) > 30
    for a, b in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["hf_vit", "clip", "dinov3"])
def test_hidden_states_are_what_each_layer_has_left(name: str) -> None:
    model, x = redrawn(ALL[name]()), images(2)
    with vitrim.attach(model, CUT) as handle, torch.no_grad():
        expected = predicted(model, x)
        for extra in ({}, {"return_dict": False}):
            out = model(pixel_values=x, output_hidden_states=True, **extra)
            states = out.hidden_states if not extra else out[-1]
            assert tuple(state.shape[1] for state in states[1:]) == handle.token_counts
            torch.testing.assert_close(out[0] if extra else out.to_tuple()[0], out[0])
        _, after = find_adapter(model).features(model, x, (1,))
        assert after[1][0].shape[1] == handle.geometry.num_prefix
        assert torch.equal(predicted(model, x), expected)
        with pytest.raises(VitrimError, match="output_attentions=True has no meaning where tokens are cut"):
            model(x, output_attentions=True)
        model.set_attn_implementation("eager")
    attentions = model(x, output_attentions=True).attentions
    assert len(attentions) == 3
    with vitrim.attach(model, "TopK(norm) @ KeepRate(1)"):
        assert len(model(x, output_attentions=True).attentions) == 3


def test_labels_give_the_loss_of_the_model_itself() -> None:
    labels = torch.tensor([0, 3])
    for name in ("hf_vit", "hf_dinov2", "clip"):
        model, x = redrawn(ALL[name]()), images(2)
        with vitrim.attach(model, CUT):
            out = model(x, labels=labels)
            torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, labels))
            assert torch.equal(model(x, labels, return_dict=False)[0], out.loss)


def test_the_tower_inside_another_model_is_reduced_and_the_rest_stays() -> None:
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    vision = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 48}
    vision |= {"image_size": 40, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).eval()
    x, tokens = images(2), torch.tensor([[1, 2, 3]])
    dense = model(input_ids=tokens, pixel_values=x).logits_per_image
    with pytest.raises(UnsupportedModelError, match=r"give the model inside it: model\.vision_model "):
        vitrim.attach(model, CUT)
    with vitrim.attach(model.vision_model, CUT) as handle:
        out = model(input_ids=tokens, pixel_values=x)
        assert not torch.equal(out.logits_per_image, dense)
        assert out.vision_model_output.last_hidden_state.shape[1] == handle.token_counts[-1]
        assert vitrim.attached(model) is handle
    assert torch.equal(model(input_ids=tokens, pixel_values=x).logits_per_image, dense)


def test_images_of_other_sizes() -> None:
    for name in ("hf_vit", "clip", "hf_siglip"):
        model = redrawn(ALL[name]())
        with vitrim.attach(model, CUT) as handle:
            with pytest.raises(VitrimError, match=r"images of 48 x 40 px, but the model takes 40 x 40; resize them"):
                model(images(1, 48)[:, :, :, :40])
            out = model(images(1, 52)[:, :, :43], interpolate_pos_encoding=True)
            assert handle.states[0].origin.shape[1] == 5 * 6
            with pytest.raises(VitrimError, match="smaller than one patch"):
                model(images(1, 7), interpolate_pos_encoding=True)
            assert out[0].isfinite().all()
    for name in ("hf_dinov2", "dinov3"):
        model = redrawn(ALL[name]())
        with vitrim.attach(model, CUT) as handle:
            assert model(images(1, 56))[0].isfinite().all()
            assert handle.states[0].origin.shape[1] == 49


@pytest.mark.parametrize("name", ["hf_vit", "hf_siglip", "hf_dinov2", "dinov3"])
def test_a_model_takes_another_size_for_good(name: str, tmp_path: Path) -> None:
    model, x = redrawn(ALL[name]()), images(1, 56)
    adapter = find_adapter(model)
    with vitrim.attach(model, CUT) as handle:
        adapter.resize(model, 56)
        resized = predicted(model, x)
        assert handle.plan().num_patches == 49
        vitrim.save(model, tmp_path)
    assert adapter.input_format(model).size == (3, 56, 56)
    assert torch.equal(predicted(load(tmp_path), x), resized)
    other = ALL[name]()
    if name in ("hf_vit", "hf_siglip"):
        other = vitrim.build_model(type(model).__name__, **adapter.describe(model).args)
        assert adapter.trained_size(other, redrawn(ALL[name]()).state_dict(), None) == (40, 40)
        other.load_state_dict(adapter.fit_weights(other, redrawn(ALL[name]()).state_dict()))
        torch.testing.assert_close(predicted(other.eval(), x), predicted(model, x))


def test_classifiers_are_counted_and_replaced() -> None:
    for name, names in (("hf_vit", 1), ("deit_distilled", 2), ("clip", 1)):
        model = ALL[name]()
        adapter = find_adapter(model)
        assert (adapter.classifier(model).classes, len(adapter.classifier(model).names)) == (5, names)
        adapter.reset_classifier(model, 7)
        assert model(images(1)).logits.shape == (1, 7)
        assert (model.config.num_labels, adapter.classifier(model).classes) == (7, 7)
    with pytest.raises(UnsupportedModelError, match="classifier of this ViTModel cannot be replaced"):
        find_adapter(ALL["vit_bare"]()).reset_classifier(ALL["vit_bare"](), 3)


def test_copies_and_threads_keep_their_own_hidden_states() -> None:
    model, x = redrawn(ALL["hf_vit"]()), images(2)
    with vitrim.attach(model, CUT):
        twin = copy.deepcopy(model)
        model(x, output_hidden_states=True)
        assert torch.equal(predicted(twin, x), predicted(model, x))
        assert len(twin(x, output_hidden_states=True).hidden_states) == 4


def test_the_encoder_of_a_masked_autoencoder() -> None:
    from transformers import ViTMAEConfig, ViTMAEModel

    small = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 48}
    for ratio, entering in ((0.0, 25), (0.6, 10)):
        config = ViTMAEConfig(image_size=40, patch_size=8, mask_ratio=ratio, **small)
        model, x, noise = redrawn(ViTMAEModel(config)), images(2), torch.arange(25.0).expand(2, -1)
        dense = model(x, noise=noise).last_hidden_state
        with vitrim.attach(model, "TopK() @ KeepRate(0.5, at=(1,))") as handle:
            assert handle.geometry.num_patches == entering
            out = model(x, noise=noise).last_hidden_state
            assert out.shape[1] == handle.token_counts[-1] == 1 + (entering + 1) // 2
        assert torch.equal(model(x, noise=noise).last_hidden_state, dense)
        with pytest.raises(UnsupportedModelError, match="patches in random order"):  # Pictures would show other places.
            find_adapter(model).grid(model, (40, 40))


@pytest.mark.parametrize("kind", ["ViTMAE", "ViT", "DeiT", "Beit"])
def test_an_encoder_whose_owner_reads_every_place_is_cut_only_as_a_copy(kind: str) -> None:
    import transformers

    small: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 40}
    small |= {"intermediate_size": 48, "patch_size": 8}
    if kind == "ViTMAE":
        small |= {f"decoder_{name}": small[name] for name in list(small)[:3]} | {"decoder_intermediate_size": 24}
    elif kind in ("ViT", "DeiT"):
        small |= {"encoder_stride": 8}
    name = f"{kind}For{'PreTraining' if kind == 'ViTMAE' else 'MaskedImageModeling'}"
    owner = getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**small))
    with pytest.raises(UnsupportedModelError, match=f"{name} needs the tokens of all patches") as caught:
        vitrim.attach(owner, CUT)
    assert "inside it: model" not in str(caught.value)
    encoder = getattr(owner, {"DeiT": "deit", "Beit": "beit"}.get(kind, "vit"))
    cut = "TopK(norm) @ KeepRate(0.5, at=(1,))"
    with pytest.raises(UnsupportedModelError, match=rf"{name} needs .*copy\.deepcopy\(model\)"):
        vitrim.attach(encoder, cut)
    assert vitrim.attached(owner) is None
    vitrim.attach(copy.deepcopy(encoder), cut).remove()


def test_masks_and_shared_bias_of_beit_are_refused_and_other_sizes_follow() -> None:
    from transformers import BeitConfig, BeitModel

    model = redrawn(ALL["beit"]())
    with vitrim.attach(model, CUT) as handle:
        assert model(images(1, 56)).logits.isfinite().all()
        assert handle.states[0].origin.shape[1] == 49
        with pytest.raises(VitrimError, match="attention mask cannot be combined"):
            model(images(1), attention_mask=torch.tensor([[1] * 20 + [0] * 6]))
    small = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 48}
    shared = BeitModel(BeitConfig(use_shared_relative_position_bias=True, image_size=40, patch_size=8, **small))
    with pytest.raises(UnsupportedModelError, match="whose blocks share one relative bias"):
        vitrim.attach(shared, CUT)


def test_an_own_class_is_refused_by_name() -> None:
    from transformers import ViTConfig, ViTModel

    class Own(ViTModel):
        pass

    with pytest.raises(UnsupportedModelError, match=r"Own .* hold a plain ViTModel in your module"):
        vitrim.attach(Own(ViTConfig(num_hidden_layers=1, hidden_size=24, num_attention_heads=3)), CUT)


def test_weights_in_the_names_of_timm_are_named() -> None:
    model = ALL["hf_vit"]()
    with pytest.raises(CheckpointError, match="these are weights in the names of timm"):
        find_adapter(model).fit_weights(model, {"cls_token": torch.zeros(1, 1, 24)})


def test_a_tower_whose_tokens_a_head_averages_is_reduced_through_the_whole_model() -> None:
    model = redrawn(ALL["dinov2"]())
    with pytest.raises(VitrimError, match="is the tower of a Dinov2ForImageClassification, whose head averages"):
        vitrim.attach(model.dinov2, CUT)
    with vitrim.attach(model.dinov2, "TopK(norm) @ KeepRate(0.6, at=(0, 1))"):
        assert predicted(model, images(1)).isfinite().all()
    with vitrim.attach(redrawn(ALL["dinov2_bare"]()), CUT), vitrim.attach(model, CUT):
        pass
