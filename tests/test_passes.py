"""What a forward pass shares with others (nothing), who else sees its calls, and which tokens it refuses."""

import copy
import functools
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from timm.layers import LayerScale
from timm.models.vision_transformer import Block, VisionTransformer
from timm.utils import AttentionExtract
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import vitrim
from hf_models import HF, MORE
from test_contract import in_threads
from vitrim.elastic.chain import start_chain
from vitrim.errors import UnsupportedModelError, VitrimError
from vitrim.measure.speed import bench
from vitrim.models import adapter_of, trace_of
from vitrim.models.families.hf.layout import layout_of
from vitrim.models.outputs import Logits, Patches, Wanted
from vitrim.models.reduction import reduced_block
from vitrim.models.reduction.contents import Contents
from zoo import SMALL, build, images

TOME, TOPK = "ToMe() @ KeepRate(0.6, at=(0, 1))", "TopK() @ KeepRate(0.6, at=(0, 1))"


# What a head may assume.


def test_a_head_on_cls_needs_no_trace() -> None:
    model, x = build("timm-vit", "vit"), images(2)
    with vitrim.attach(model, TOME):
        assert torch.equal(model.forward_head(model.forward_features(x).clone()), model(x))


def test_a_head_that_pools_takes_dense_features_from_anywhere() -> None:
    model, x = build("timm-vit", "gap"), images(2)
    features, dense = model.forward_features(x), model(x)
    with vitrim.attach(model, TOME):
        assert torch.equal(model.forward_head(features.clone()), dense)
    with vitrim.attach(model, "TopK(norm) @ KeepRate(0.6)"):  # Dropped tokens leave nothing to weigh.
        assert torch.equal(model.forward_head(model.forward_features(x).clone()), model(x))


def test_features_that_are_saved_hold_plain_tensors() -> None:
    model, file = build("timm-vit", "gap"), io.BytesIO()
    with vitrim.attach(model, TOME):
        features = model.forward_features(images(2))
        torch.save(features, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        assert torch.equal(loaded, features)
        assert trace_of(loaded) is None
        with torch.no_grad():
            features = model.forward_features(images(2))
            assert torch.equal(model.forward_head(copy.deepcopy(features)), model.forward_head(features))


def other_data(features: Tensor, others: Tensor) -> None:
    features.data = others.clone()


def other_marked_data(features: Tensor, others: Tensor) -> None:
    features.data = others  # They carry the trace of another pass.


WRITES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "copy": lambda features, others: features.copy_(others),
    "part": lambda features, others: features[1, -1].copy_(others[1, -1]),
    "rows change places": lambda features, others: features.copy_(features.flip(0)),
    "other data": other_data,
    "other marked data": other_marked_data,
    "through data": lambda features, others: features.data.copy_(others),
    "through numpy": lambda features, others: np.copyto(features.detach().numpy(), others.detach().numpy()),
    "through dlpack": lambda features, others: torch.from_dlpack(features.detach()).copy_(others),
}


@pytest.mark.parametrize("inference", [False, True], ids=["no grad", "inference"])
@pytest.mark.parametrize("write", WRITES)
def test_features_that_were_written_over_are_not_weighed_by_the_pass_before(write: str, inference: bool) -> None:
    if inference and write == "through dlpack":
        pytest.skip("PyTorch exports no tensors of inference mode")
    model, x = build("timm-vit", "gap_with_cls"), images(2)
    with vitrim.attach(model, TOME) as handle, torch.inference_mode(inference), torch.no_grad():
        features, others, expected = model.forward_features(x), model.forward_features(images(2, seed=1)), model(x)
        assert torch.equal(model.forward_head(features), expected)
        assert torch.equal(model.forward_head(features.detach()), expected)
        handle.state_of(features)
        WRITES[write](features, others)
        for read in (model.forward_head, handle.state_of, handle.restore):
            with pytest.raises(VitrimError, match="nothing written into it"):
                read(features)
        fresh = model.forward_features(x)
        fresh.copy_(fresh.clone())  # Writing the same changes nothing.
        assert torch.equal(model.forward_head(fresh), expected)


def test_tokens_inside_a_call_are_known_by_the_call_and_not_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading what tokens hold waits for an accelerator, which no usual use of a model does."""
    monkeypatch.setattr(Contents, "still_in", None)
    for model in (build("timm-vit", "gap"), MORE["ijepa"]().eval(), MORE["ijepa_bare"]().eval()):
        family = adapter_of(model)
        x = images(2, family.input_format(model).size[-1])
        with vitrim.attach(model, TOME), torch.inference_mode():
            found = family.outputs(model, x, Wanted.of(Logits(), Patches()))
            assert torch.equal(found["logits"], family.predict(model, x))


def test_forward_features_set_on_the_instance_reach_the_head_of_the_same_call() -> None:
    model, x = build("timm-vit", "gap"), images(2)
    with vitrim.attach(model, TOME):
        expected = model(x)
        ours = model.forward_features
        model.forward_features = lambda x, **masks: ours(x, **masks).clone()
        assert torch.equal(model(x), expected)
        model.forward_features = lambda x, **masks: (ours(x, **masks) + ours(x.flip(3), **masks)) / 2
        with pytest.raises(VitrimError, match="from which forward pass"):
            model(x)


# Copies.


def replica(model: nn.Module) -> nn.Module:
    """As `DataParallel` makes them for each device."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, twin in copies.items():
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else copies[child]
        for name, parameter in module._parameters.items():
            if parameter is not None:
                setattr(twin, name, parameter.detach().clone())
    return copies[model]


def test_replicas_of_data_parallel_share_no_pass() -> None:
    model, x = build("timm-vit", "gap_with_cls"), images(2)
    with vitrim.attach(model, TOME):
        alone = model(x)
        one, other = replica(model), replica(model)
        turns = [m.norm_pre(m._pos_embed(m.patch_embed(y))) for m, y in ((one, x), (other, x.flip(0)))]
        for pair in zip(one.blocks, other.blocks, strict=True):
            turns = [block(tokens) for block, tokens in zip(pair, turns, strict=True)]
        assert not torch.equal(*turns)
        for results in in_threads(one, [x]):
            assert torch.equal(results[0], alone)


def test_a_copied_block_brings_no_model_and_works() -> None:
    model, x = build("timm-vit", "vit"), images(2)
    with vitrim.attach(model, TOPK):
        tokens = model._pos_embed(model.patch_embed(x))
        expected = model.blocks[0](tokens.clone())
        for block in (copy.deepcopy(model.blocks[0]), pickle.loads(pickle.dumps(model.blocks[0]))):
            assert torch.equal(block(tokens.clone()), expected)
        assert len(pickle.dumps(model.blocks[0])) < len(pickle.dumps(model)) / 2


def test_what_changes_between_a_pass_and_its_recomputation_does_not_act_on_it() -> None:
    model, x = build("timm-vit", "vit").double(), images(2, dtype=torch.float64)
    with vitrim.attach(model, TOPK) as handle:
        model(x).square().sum().backward()
        plain = [parameter.grad.clone() for parameter in model.parameters()]
        model.set_grad_checkpointing()
        model.zero_grad()
        waiting = model(x).square().sum()
        handle.set_strength(0.3)
        model(x)
        waiting.backward()
        for parameter, expected in zip(model.parameters(), plain, strict=True):
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-12, atol=1e-12)


def test_backward_hooks_and_aliases_keep_the_trace() -> None:
    model, x = build("timm-vit", "gap_with_cls"), images(2)
    with vitrim.attach(model, TOME):
        expected = model(x)
        for block in model.blocks:
            block.register_full_backward_hook(lambda *_: None)
        out = model(x)
        assert torch.equal(out, expected)
        out.sum().backward()


def test_a_trace_moves_with_its_tokens_to_another_device() -> None:
    model, x = build("timm-vit", "gap_with_cls"), images(2)
    with vitrim.attach(model, "ToMe() @ KeepRate(0.6, at=0, reinstate=2)"):
        trace = trace_of(model.blocks[0](model._pos_embed(model.patch_embed(x)))).to(torch.device("meta"))
        assert trace.state().origin.is_meta
        assert trace.bias(torch.float32).is_meta


def test_maps_where_nothing_is_cut_are_on_the_device_of_the_tokens() -> None:
    model = build("timm-vit", "vit").to("meta")
    with vitrim.attach(model, TOPK, phase="train"):  # Cuts nothing in eval mode.
        maps = model.forward_intermediates(images(2).to("meta"), intermediates_only=True)
        assert [each.device.type for each in maps] == ["meta"] * 3


# Who else sees calls.


@pytest.mark.parametrize("place", ["mlp.fc1", "norm2", "mlp.act", "forward", "everywhere"])
def test_whoever_sees_calls_inside_a_block_sees_whole_batches(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduced_block, "_SLICE_BYTES", 1 << 14)
    model, seen = build("timm-vit", "vit"), []

    def see(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        seen.append(len(args[0]))

    handle, remove = vitrim.attach(model, TOPK), None
    if place == "everywhere":
        remove = register_module_forward_hook(see).remove
    elif place == "forward":
        mlp = model.blocks[1].mlp
        own = mlp.forward
        mlp.forward = lambda x: (seen.append(len(x)), own(x))[1]
    else:
        remove = model.blocks[1].get_submodule(place).register_forward_hook(see).remove
    with handle, torch.no_grad():
        model(images(8))
    if remove is not None:
        remove()
    assert set(seen) == {8}


def test_a_batch_is_computed_in_parts_only_in_eval_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduced_block, "_SLICE_BYTES", 1 << 14)
    model, x, seen = build("timm-vit", "vit"), images(8), []
    with vitrim.attach(model, TOPK), torch.no_grad():
        expected = torch.cat([model(x[:4]), model(x[4:])])
        ours = type(model.blocks[0]).feed_forward
        monkeypatch.setattr(
            type(model.blocks[0]), "feed_forward", lambda self, x: (seen.append(len(x)), ours(self, x))[1]
        )
        torch.testing.assert_close(model(x), expected)
        assert max(seen) < 8
        seen.clear()
        model.train()(x)
        assert set(seen) == {8}


@pytest.mark.parametrize("append", [False, True])
def test_hooks_of_accelerate_before_and_after_attach(append: bool) -> None:
    model, x = build("timm-vit", "vit"), images(2)
    dense = model(x)
    with vitrim.attach(model, TOPK):
        reduced = model(x)
    for block in model.blocks:
        add_hook_to_module(block, ModelHook(), append=append)
    forwards = [(block.forward, block._old_forward) for block in model.blocks]
    with vitrim.attach(model, TOPK) as handle:  # Hooks first.
        assert torch.equal(model(x), reduced)
        assert handle.states[-1].origin.min() == -1
    assert torch.equal(model(x), dense)
    assert [(block.forward, block._old_forward) for block in model.blocks] == forwards
    for block in model.blocks:
        remove_hook_from_module(block)
    handle = vitrim.attach(model, TOPK)  # accelerate has left `forward` on each block.
    assert torch.equal(model(x), reduced)
    for module in model.modules():
        if isinstance(module, Block | VisionTransformer):
            add_hook_to_module(module, ModelHook())
    assert torch.equal(model(x), reduced)
    handle.remove()  # Hooks last.
    assert torch.equal(model(x), dense)
    for module in model.modules():
        remove_hook_from_module(module)
    assert torch.equal(model(x), dense)


def test_a_forward_set_on_a_block_is_refused_before_attach_and_acts_after() -> None:
    model, x = build("timm-vit", "vit"), images(2)
    dense = model(x)

    def halve(block: nn.Module) -> None:
        own = block.forward
        block.forward = lambda x, **masks: own(x, **masks) * 0.5

    halve(model.blocks[1])
    with pytest.raises(UnsupportedModelError, match=r"block 1 has a forward of its own.*attach first"):
        vitrim.attach(model, TOPK)
    assert vitrim.attached(model) is None
    assert type(model.blocks[1]) is Block
    del model.blocks[1].forward
    handle = vitrim.attach(model, TOPK)
    reduced = model(x)
    halve(model.blocks[2])
    assert not torch.equal(model(x), reduced)
    assert [len(state.size[0]) for state in handle.states] == [15, 9, 9]
    handle.remove()
    changed = model(x)
    del model.blocks[2].forward
    assert torch.equal(model(x), dense)
    assert not torch.equal(changed, dense)


@pytest.mark.parametrize("name", ["pool", "forward_intermediates"])
def test_methods_that_a_reduction_needs_are_not_hidden_by_those_of_the_instance(name: str) -> None:
    model, x = build("timm-vit", "gap"), images(2)
    own = getattr(model, name)
    setattr(model, name, lambda *args, **options: own(*args, **options))
    with pytest.raises(UnsupportedModelError, match=f"the model has a {name} of its own"):
        vitrim.attach(model, TOME)
    setattr(model, name, own)  # Only bound to the instance, which changes nothing.
    dense = model(x)
    with vitrim.attach(model, TOME):
        assert not torch.equal(model(x), dense)
    assert vars(model)[name] is own
    model.forward = functools.partial(VisionTransformer.forward, model)  # As accelerate prepares models.
    with vitrim.attach(model, TOME) as handle:
        reduced = model(x)
        assert handle.states[-1].size.max() > 1
        del model.forward
        assert torch.equal(model(x), reduced)


def test_what_is_put_on_attention_acts_or_is_refused() -> None:
    model, halved, x = build("timm-vit", "vit"), build("timm-vit", "vit"), images(2)
    for block in halved.blocks:
        for parameter in block.attn.qkv.parameters():
            parameter.data *= 0.5
    for block in model.blocks:
        own = block.attn.qkv.forward
        block.attn.qkv.forward = lambda x, own=own: own(x) * 0.5
    with vitrim.attach(model, TOPK), vitrim.attach(halved, TOPK):
        torch.testing.assert_close(model(x), halved(x))
    own = model.blocks[1].attn.forward
    model.blocks[1].attn.forward = lambda x, **masks: own(x, **masks) * 0.5
    halved.blocks[1].attn.proj.weight.data *= 0.5
    halved.blocks[1].attn.proj.bias.data *= 0.5
    for text in (TOPK, "ToMe(prop_attn=False) @ ConstantR(3)"):
        with vitrim.attach(model, text), vitrim.attach(halved, text):
            torch.testing.assert_close(model(x), halved(x))
    with vitrim.attach(model, TOME), pytest.raises(VitrimError, match=r"the attn of block 1 has a forward of its own"):
        model(x)  # Nobody knows whether that function adds the sizes of merged tokens to its logits.


def test_attention_maps_come_from_every_block_where_attention_is_not_fused() -> None:
    model, x = build("timm-vit", "vit"), images(2)
    for block in model.blocks:
        block.attn.fused_attn = False
    with vitrim.attach(model, "TopK(fuse=sum) @ KeepRate(0.6, at=(0, 1))"):
        maps = AttentionExtract(model, method="hook")(x)
        assert [tuple(each.shape) for each in maps.values()] == [(2, 3, n, n) for n in (26, 17, 12)]
        assert all(torch.allclose(each.sum(-1), torch.ones(())) for each in maps.values())


@pytest.mark.parametrize("text", [TOME, TOPK, "TopK(fuse=sum) @ KeepRate(0.6, at=(0, 1))"])
def test_attention_that_is_not_fused_gives_the_same_and_can_be_differentiated_twice(text: str) -> None:
    model, x = build("timm-vit", "vit").double(), images(2, dtype=torch.float64).requires_grad_()
    with vitrim.attach(model, text):
        fused = model(x)
        for block in model.blocks:
            block.attn.fused_attn = False
        assert (model(x) - fused).abs().max() < 1e-12
        (first,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        assert first.square().sum().requires_grad
        first.square().sum().backward()


# Tokens and blocks that are not what the reduction was planned for.


def with_prompts(x: Tensor) -> Tensor:
    return torch.cat([x, torch.zeros(len(x), 4, x.shape[2])], 1)


def test_tokens_added_before_the_blocks_are_refused() -> None:
    for name in ("vit", "dynamic_size"):
        model, x = build("timm-vit", name), images(2)
        hook = model.patch_drop.register_forward_hook(lambda _, args, out: with_prompts(out))
        with vitrim.attach(model, TOPK), pytest.raises(VitrimError, match=r"30 tokens reach .* images give 26"):
            model(x)
        hook.remove()
    model = build("timm-vit", "vit")
    with vitrim.attach(model, TOPK, curriculum=None), pytest.raises(VitrimError, match="prompt tuning"):
        model.blocks(with_prompts(model._pos_embed(model.patch_embed(x))))


@pytest.mark.parametrize("name", ["dynamic_size", "hf_vit", "hf_dinov2"])
def test_blocks_called_one_by_one_take_patches_of_a_known_number_only(name: str) -> None:
    """Models for images of all sizes: 30 tokens may be 25 patches and 4 prompts, or 29 patches."""
    model = build("timm-vit", name) if name == "dynamic_size" else HF[name]().eval()
    side = adapter_of(model).input_format(model).size[-1]
    embed = model._pos_embed if name == "dynamic_size" else layout_of(model).tower_of(model).embeddings

    def run(x: Tensor, prompts: bool = False) -> Tensor:
        tokens = embed(model.patch_embed(x)) if name == "dynamic_size" else embed(x)
        tokens = with_prompts(tokens) if prompts else tokens
        for block in adapter_of(model).blocks(model):
            tokens = block(tokens)
        return tokens

    with vitrim.attach(model, TOPK) as handle, torch.no_grad():
        left = run(images(2, side)).shape[1]
        assert left == handle.token_counts[-1]
        with pytest.raises(VitrimError, match=r"not known which of them are patches; .*open_call"):
            run(images(2, side), prompts=True)
        with model.open_call(images(2, side)):
            assert run(images(2, side)).shape[1] == left
            with pytest.raises(VitrimError, match="prompt tuning"):
                run(images(2, side), prompts=True)
        if name == "hf_vit":  # Its embeddings take one size, unless they are asked.
            return
        larger = images(2, 2 * side)
        with pytest.raises(VitrimError, match="not known which of them are patches"):
            run(larger)
        with model.open_call(larger):
            assert run(larger).shape[1] > left
        model(larger)
    assert run(images(2, side), prompts=True).isfinite().all()


def test_tokens_added_between_blocks_are_refused() -> None:
    model, x = build("timm-vit", "vit"), images(2)
    model.blocks[0].register_forward_hook(lambda _, args, out: with_prompts(out))
    with vitrim.attach(model, TOPK), pytest.raises(VitrimError, match="2 x 20 reach block 1"):
        model(x)


def test_patches_dropped_in_training_are_counted() -> None:
    model, x = VisionTransformer(**SMALL, patch_drop_rate=0.4), images(2)
    whole = vitrim.cost(model.eval())
    assert vitrim.cost(model.train()).token_counts == (16, 16, 16)
    assert vitrim.cost(model).macs < whole.macs
    lengths: list[int] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, out: lengths.append(out.shape[1]))
    with vitrim.attach(model, "TopK(fuse=sum) @ KeepRate(0.6, at=(0, 1))") as handle:
        for mode in (True, False):
            lengths.clear()
            model.train(mode)(x)
            assert handle.token_counts == vitrim.cost(model).token_counts == tuple(lengths)
        model.train()
        tokens = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
        assert [each.shape[1] + 1 for each in tokens] == list(handle.token_counts)
        with pytest.raises(VitrimError, match="patch_drop_rate drops patches in training"):
            model.forward_intermediates(x)


@pytest.mark.parametrize("change", ["removed", "replaced", "moved"])
def test_blocks_that_change_after_attach_are_named(change: str) -> None:
    model, x = build("timm-vit", "gap_with_cls"), images(2)
    handle = vitrim.attach(model, TOME)
    blocks = list(model.blocks)
    if change == "replaced":
        model.blocks[1] = Block(24, 3)
    else:
        model.blocks = nn.Sequential(*(blocks[:2] if change == "removed" else (blocks[0], blocks[2], blocks[1])))
    for use in (lambda: handle.token_counts, lambda: vitrim.cost(model), lambda: model(x)):
        with pytest.raises(VitrimError, match=r"call handle.remove\(\), then attach again"):
            use()
    handle.remove()
    assert {type(block) for block in (*blocks, *model.blocks)} == {Block}
    with vitrim.attach(model, TOME) as handle:
        model(x)
        assert len(handle.token_counts) == len(model.blocks)


def test_attention_of_another_class_or_layer_after_attach_is_not_bypassed() -> None:
    model, x = build("timm-vit", "vit"), images(2)
    stock, calls = type(model.blocks[1].attn), []

    class Counted(stock):
        def forward(self, x: torch.Tensor, **kwargs: object) -> torch.Tensor:
            calls.append(x.shape[1])
            return super().forward(x, **kwargs)

    handle = vitrim.attach(model, TOPK)
    reduced = model(x)
    model.blocks[0].attn.__class__ = Counted
    torch.testing.assert_close(model(x), reduced)
    assert calls == [26]
    with pytest.raises(UnsupportedModelError, match="Counted"):
        vitrim.cost(model)
    model.blocks[0].attn.__class__ = stock
    assert torch.equal(model(x), reduced)
    before, model.blocks[0].attn = model.blocks[0].attn, stock(24, 3)
    with pytest.raises(VitrimError, match=r"attn of block 0 was replaced; call handle.remove\(\), then attach again"):
        model(x)
    model.blocks[0].attn = before
    handle.remove()
    assert not [name for block in model.blocks for name in vars(block.attn) if name.startswith("vitrim")]


def test_blocks_inside_wrappers_are_still_those_of_the_reduction() -> None:
    model, x = build("timm-vit", "gap_with_cls"), images(2)
    with vitrim.attach(model, TOME) as handle:
        expected = model(x)
        model.blocks = nn.Sequential(*(nn.Sequential(block) for block in model.blocks))
        assert torch.equal(model(x), expected)
        assert handle.token_counts == (17, 11, 11)


def test_one_block_in_two_places_is_refused() -> None:
    model = build("timm-vit", "vit")
    model.blocks[2] = model.blocks[0]
    with pytest.raises(UnsupportedModelError, match="two blocks of this model are the same module"):
        vitrim.attach(model, TOPK)
    assert {type(block) for block in model.blocks} == {Block}


def test_a_class_changed_after_attach_is_not_overwritten() -> None:
    model = build("timm-vit", "vit")
    handle = vitrim.attach(model, TOPK)
    nn.utils.parametrize.register_parametrization(model, "cls_token", LayerScale(24), unsafe=True)
    with pytest.raises(VitrimError, match=r"was changed to Parametrized.* after attach"):
        handle.remove()
    nn.utils.parametrize.remove_parametrizations(model, "cls_token")
    handle.remove()
    assert type(model) is VisionTransformer


# What users hold.


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity(), build("timm-vit", "vit")])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](x)


@pytest.mark.parametrize(
    ("wrap", "inner"),
    [
        (lambda: Net(), r": model\.layers\[1\] "),
        (lambda: nn.DataParallel(build("timm-vit", "vit")), r": model\.module "),
        (lambda: torch.optim.swa_utils.AveragedModel(build("timm-vit", "vit")), r": model\.module "),
        (lambda: torch.compile(build("timm-vit", "vit"), backend="eager"), r": model\._orig_mod "),
        (lambda: nn.DataParallel(Net()), r": model\.module\.layers\[1\] "),
    ],
)
def test_the_model_inside_a_wrapper_is_named(wrap, inner: str) -> None:
    with pytest.raises(UnsupportedModelError, match=inner):
        vitrim.attach(wrap(), TOPK)


def test_parts_of_a_model_are_not_parts_of_its_handle() -> None:
    with vitrim.attach(build("timm-vit", "vit"), TOPK) as handle:
        with pytest.raises(AttributeError, match=r"handle\.blocks: attach returns a handle"):
            handle.blocks  # noqa: B018
        with pytest.raises(AttributeError, match="'Handle' object has no attribute 'bloks'"):
            handle.bloks  # noqa: B018


def test_a_handle_is_not_a_model_and_says_so() -> None:
    model, x = build("timm-vit", "vit"), images(2)
    handle = vitrim.attach(model, TOPK)
    for use in (lambda: handle(x), lambda: handle.parameters(), lambda: handle.train(), lambda: handle.to("cpu"),
                lambda: vitrim.attach(handle, TOPK)):  # fmt: skip
        with pytest.raises(VitrimError, match=r"attach returns a handle .* go on using the model"):
            use()
    assert not hasattr(handle, "parameters")
    assert not hasattr(handle, "nonsense")


DIGITS = vitrim.build_model("vitrim_digits_vit", depth=1, embed_dim=8, num_heads=2)
NOT_MODELS = {
    "name": ("vit_tiny", r"'vit_tiny' is a name, not a model; .*vitrim.build_model\('vit_tiny'\)"),
    "nothing": (None, r"None is not a model; give a torch\.nn\.Module"),
    "number": (123, r"the type int is not a model; give a torch\.nn\.Module"),
    "weights": ({"cls_token": torch.zeros(2)}, r"a dict of weights is not a model; .*load_state_dict"),
    "class": (VisionTransformer, "VisionTransformer is a class, not a model"),
    "holder": (
        vitrim.SuperNet(DIGITS, start_chain(DIGITS)),
        "a SuperNet is not a model; give the model in it, its .model",
    ),
}


@pytest.mark.parametrize("kind", NOT_MODELS)
def test_what_is_no_model_is_refused_in_one_line_by_every_call(kind: str, tmp_path) -> None:
    given, message = NOT_MODELS[kind]
    calls = (
        lambda: vitrim.attach(given, TOPK),
        lambda: vitrim.attached(given),
        lambda: vitrim.cost(given),
        lambda: vitrim.save(given, tmp_path / "saved"),
        lambda: vitrim.stratify(given, [images(2)]),
        lambda: vitrim.compress(given, images(2), macs=0.5),
        lambda: vitrim.convert(given, "timm"),
        lambda: vitrim.compile(given),
        lambda: vitrim.set_epoch(given, epoch=0),
        *([] if kind == "name" else [lambda: bench({"mine": given})]),  # Which opens names.
    )
    for call in calls:
        with pytest.raises(VitrimError, match=message):
            call()


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_saving_and_converting_a_wrapper_name_the_model_inside(wrap, tmp_path) -> None:
    model = wrap(build("timm-vit", "vit"))
    inner = r"the model inside it: model\.(module|_orig_mod)"
    for call in (lambda: vitrim.save(model, tmp_path), lambda: vitrim.convert(model, "transformers"),
                 lambda: vitrim.cost(model)):  # fmt: skip
        with pytest.raises(VitrimError, match=inner) as caught:
            call()
        assert "vitrim.attach" not in str(caught.value)


@pytest.mark.parametrize("epoch", ["1", None, -1, math.nan, math.inf])
def test_an_epoch_that_is_no_number_moves_nothing(epoch) -> None:
    model = build("timm-vit", "vit")
    with vitrim.attach(model, vitrim.TopK(), vitrim.KeepRate(0.5), curriculum=vitrim.Delayed(2)) as handle:
        vitrim.set_epoch(model, epoch=2)
        with pytest.raises(VitrimError, match="epoch is a number, 0 or more, not"):
            vitrim.set_epoch(model, epoch=epoch)
        with pytest.raises(VitrimError, match="strength is between 0 and 1, not '1'"):
            handle.set_strength("1")  # pyright: ignore[reportArgumentType]
        assert handle.strength == 1


@pytest.mark.parametrize("name", ["timm", "transformers"])
@pytest.mark.parametrize("phase", ["train", "eval"])
def test_the_mode_of_the_model_decides_and_not_that_of_a_frozen_block(name: str, phase: str) -> None:
    whole: Any = build("timm-vit", "vit") if name == "timm" else MORE["dinov2"]()
    x = images(2) if name == "timm" else torch.randn(2, 3, 40, 40)
    handle = vitrim.attach(whole, "TopK(norm) @ KeepRate(0.5, at=(0, 1))", phase=phase)
    whole.train()
    if name == "timm":
        whole.blocks[0].eval()
    else:
        whole.dinov2.eval()
    whole(x)
    assert [int((state.origin >= 0).sum(1)[0]) for state in handle.states] == [
        count - handle.geometry.num_prefix for count in handle.token_counts
    ]
    assert (handle.token_counts[0] < handle.geometry.num_patches) == (phase == "train")
