"""Each fault that other implementations show on current libraries, and each way a handle can be misused."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import vitrim
from references import reduced_vit
from vitrim.errors import CheckpointError, ScoreError, UnsupportedModelError, VitrimError
from vitrim.models import attached_instead
from vitrim.tokens import Reduction
from zoo import SMALL, build, images

CUT = vitrim.KeepRate(0.6, at=(0, 2))


class OtherBlock(Block):
    """A block of somebody else's, which may do anything in its forward pass."""


class OtherAttention(Attention):
    """An attention of somebody else's."""


@pytest.mark.parametrize("name", ["deit3", "qk_norm", "gated"])
def test_layer_scale_and_qk_norm_are_not_lost(name: str) -> None:
    model, x = build("timm-vit", name).double(), images(1, dtype=torch.float64)
    with vitrim.attach(model, vitrim.ToMe(), vitrim.ConstantR(1)) as handle:
        expected, _ = reduced_vit(model, x[0], vitrim.ToMe(), handle.plan())
        assert (model(x)[0] - expected).abs().max() < 1e-10


@pytest.mark.parametrize("reducer", [vitrim.ToMe(), vitrim.TopK(fuse="sum")], ids=str)
def test_register_tokens_are_never_merged(reducer: vitrim.tokens.Reducer) -> None:
    model, x = build("timm-vit", "dinov2_registers"), images(2)
    with vitrim.attach(model, reducer, vitrim.PowerLaw(1.0, 0.5)) as handle:
        model(x)
        assert handle.states[-1].origin.shape == (2, 25)
        assert model.forward_features(x).shape[1] == model.num_prefix_tokens + handle.states[-1].size.shape[1]
        assert model.num_prefix_tokens == 5


def test_distillation_token_keeps_the_shape() -> None:
    model, x = build("timm-vit", "deit_distilled"), images(2)
    with vitrim.attach(model, vitrim.TopK(fuse="sum"), CUT) as handle:
        assert model(x).shape == (2, 5)
        assert handle.token_counts == (18, 18, 13)


def test_a_patched_model_is_never_left_dense() -> None:
    for name in ("mambaout_femto", "cait_xxs24_224", "swin_tiny_patch4_window7_224"):
        with torch.device("meta"):
            model = timm.create_model(name)
        with pytest.raises(UnsupportedModelError) as raised:
            vitrim.attach(model, vitrim.ToMe(), vitrim.ConstantR(4))
        assert type(model).__name__ in str(raised.value)
        assert ("timm-vit" in str(raised.value)) == name.startswith("mambaout")  # The others with a reason instead.


def test_foreign_blocks_and_heads_are_refused_by_name() -> None:
    other_blocks = timm.create_model("vit_tiny_patch16_224", **SMALL, block_fn=OtherBlock)
    other_attention = timm.create_model("vit_tiny_patch16_224", **SMALL, attn_layer=OtherAttention)
    for model, says in (
        (other_blocks, "OtherBlock"),
        (other_attention, "OtherAttention"),
        (nn.Linear(2, 2), "Linear"),
    ):
        with pytest.raises(UnsupportedModelError, match=says):
            vitrim.attach(model, vitrim.ToMe(), vitrim.ConstantR(1))
        assert vitrim.attached(model) is None
    compiled = torch.compile(build("timm-vit", "vit"), backend="eager")
    with pytest.raises(UnsupportedModelError, match="before wrapping or compiling"):
        vitrim.attach(compiled, vitrim.ToMe(), vitrim.ConstantR(1))


@pytest.mark.parametrize("reducer", [vitrim.ToMe(), vitrim.TopK(fuse="mean")], ids=str)
def test_recomputation_and_forward_features_work(reducer: vitrim.tokens.Reducer) -> None:
    model, x = build("timm-vit", "vit").train(), images(2)
    model.set_grad_checkpointing()
    with vitrim.attach(model, reducer, CUT) as handle:
        model.forward_features(x).sum().backward()
        assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
        assert [state.size.shape[1] for state in handle.states] == [n - 1 for n in handle.token_counts]


def reentrant_gradients(model: nn.Module, x: torch.Tensor, *, reentrant: bool) -> list[torch.Tensor]:
    model.zero_grad()
    y = model._pos_embed(model.patch_embed(x.clone().requires_grad_()))
    for block in model.blocks:
        y = torch.utils.checkpoint.checkpoint(block, y, use_reentrant=True) if reentrant else block(y)
    y.square().sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(
    "reduction",
    [
        "TopK() @ KeepRate(0.6, at=(0, 2))",
        "TopK(fuse=sum) @ KeepRate(0.6, at=(0, 2))",
        "ToMe() @ KeepRate(0.6, at=(0, 2))",
        "ToMe() @ KeepRate(0.6, at=0, reinstate=2)",
        "TopK(norm, momentum=0.5) @ KeepRate(0.6, at=(0, 2))",
    ],
)
def test_reentrant_recomputation_gives_the_same_gradients(reduction: str) -> None:
    model, x = build("timm-vit", "vit").double(), images(2, dtype=torch.float64)
    with vitrim.attach(model, reduction):
        plain = reentrant_gradients(model, x, reentrant=False)
        again = reentrant_gradients(model, x, reentrant=True)
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "reduction",
    ["TopK() @ KeepRate(0.6, at=0, reinstate=2)", "TopK(fuse=mean, momentum=0.5) @ KeepRate(0.6, at=(0, 1))"],
)
def test_reentrant_recomputation_is_refused_where_it_would_be_wrong(reduction: str) -> None:
    model, x = build("timm-vit", "vit"), images(2)
    with vitrim.attach(model, reduction), pytest.raises(VitrimError, match="use_reentrant=False"):
        reentrant_gradients(model, x, reentrant=True)


@pytest.mark.parametrize("at", [(0, 1), (1,)])
@pytest.mark.parametrize("reducer", [vitrim.TopK(), vitrim.TopK(fuse="sum"), vitrim.ToMe()], ids=str)
def test_tokens_return_where_a_wrapper_replaces_tensors(reducer: vitrim.tokens.Reducer, at: tuple[int, ...]) -> None:
    model, x = build("timm-vit", "gap_with_cls"), images(2)
    with vitrim.attach(model, reducer, vitrim.KeepRate(0.6, at=at, reinstate=2)) as handle:
        expected = model(x)
        for block in model.blocks:
            block.register_forward_hook(lambda _, args, out: out.clone())
        assert torch.equal(model(x), expected)
        assert handle.last_trace().cuts() == []


def test_batch_of_two_neither_fails_nor_differs() -> None:
    model = build("timm-vit", "vit").double()
    with vitrim.attach(model, vitrim.TopK("mean_attention"), vitrim.PowerLaw(0.8, 1.0)):
        for seed in range(30):
            x = images(2, dtype=torch.float64, seed=seed)
            alone = torch.cat([model(x[:1]), model(x[1:])])
            assert (model(x) - alone).abs().max() < 1e-12


@pytest.mark.parametrize("score", ["cls_attention", "mean_attention"])
def test_attention_dropout_does_not_leak_into_scores(score: str) -> None:
    model, x = build("timm-vit", "vit"), images(2)
    for reducer in (vitrim.TopK(score), vitrim.TopK(score, fuse="sum")):
        with vitrim.attach(model, reducer, vitrim.KeepRate(0.6, at=(0,))) as handle:
            model.eval()(x)
            quiet = handle.states[0]
            for block in model.blocks:
                block.attn.attn_drop.p = 0.5
            model.train()(x)
            assert torch.equal(handle.states[0].origin, quiet.origin)
            assert torch.equal(handle.states[0].score, quiet.score)
            first = model(x)
            assert not torch.equal(first, model(x)), "the dropout itself must act"


@pytest.mark.parametrize("name", ["vit", "gap"])
def test_half_precision_counts_beyond_256(name: str) -> None:
    assignment = vitrim.tokens.Assignment.merge(
        3, torch.tensor([[1, 2]]), moved_BR=torch.tensor([[0]]), slot_BR=torch.tensor([[0]])
    )
    x, size = torch.tensor([[[4.0], [8.0], [5.0]]]), torch.tensor([[1.0, 301.0, 1.0]])
    exact = assignment.apply(x.double(), size)
    assert exact[0, 0, 0] == pytest.approx((4 + 8 * 301) / 302)
    for dtype in (torch.bfloat16, torch.float16):
        half = assignment.apply(x.to(dtype), size)
        assert half.dtype == dtype
        assert torch.equal(half, exact.to(dtype))
    assert assignment.size(size).tolist() == [[302.0, 1.0]]
    model = build("timm-vit", name).bfloat16()
    with vitrim.attach(model, vitrim.ToMe(), CUT) as handle:
        assert model(images(2).bfloat16()).dtype == torch.bfloat16
        assert handle.states[-1].size.sum() == 50


@pytest.mark.parametrize("reducer", [vitrim.TopK("key_norm"), vitrim.TopK("norm", fuse="mean"), vitrim.ToMe()], ids=str)
@pytest.mark.parametrize("name", ["siglip", "clip", "gap"])
def test_autocast(name: str, reducer: vitrim.tokens.Reducer) -> None:
    model, x = build("timm-vit", name), images(2)
    with vitrim.attach(model, reducer, CUT):
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert (model(x) - exact).abs().mean() < 0.2 * exact.std()


@pytest.mark.parametrize(
    "reducer", [vitrim.TopK(), vitrim.TopK("attention_entropy"), vitrim.TopK(fuse="sum"), vitrim.ToMe()], ids=str
)
def test_accelerators_meet_no_host_tensor_and_no_wait(reducer: vitrim.tokens.Reducer) -> None:
    """Tensors that only claim to be on an accelerator raise when mixed with the host's, or when a value is read."""
    model, returning = build("timm-vit", "vit").train(), vitrim.KeepRate(0.6, at=(0, 1), reinstate=2)
    with FakeTensorMode():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape, device="cuda")))
        x = torch.empty(2, 3, 40, 40, device="cuda")
        for schedule in (CUT, returning):
            with vitrim.attach(model, reducer, schedule) as handle:
                model(x)
                assert {state.origin.device.type for state in handle.states[:1]} == {"cuda"}


def test_features_of_two_passes_keep_their_own_sizes() -> None:
    model = build("timm-vit", "gap").double()
    a, b = (images(2, dtype=torch.float64, seed=seed) for seed in (1, 2))
    with vitrim.attach(model, vitrim.ToMe(), CUT):
        apart = model(a), model(b)
        features = model.forward_features(a), model.forward_features(b)
        for logits, feature in zip(apart, features, strict=True):
            assert torch.equal(model.forward_head(feature), logits)


def test_intermediates_are_spread_by_block_even_where_counts_repeat() -> None:
    model, x = build("timm-vit", "vit"), images(2)
    reducer = vitrim.TopK(fuse="mean")
    with vitrim.attach(model, reducer, vitrim.ConstantR(1)) as handle:  # One token goes, one fused token comes.
        assert handle.token_counts == (26, 26, 26)
        flat = model.forward_intermediates(x, [0, 2], output_fmt="NLC", intermediates_only=True)
        maps = model.forward_intermediates(x, [2, 0], intermediates_only=True)
        for block, tokens, spread in zip((0, 2), flat, maps, strict=True):
            own = handle.states[block].origin
            for image in range(2):
                same = (tokens[image, own[image]] == spread[image].flatten(1).T).all(1)
                assert 25 - (block + 1) <= same.sum() < 25, "what was fused is there as it was before"


def test_dropped_places_of_a_map_are_filled_and_prefix_tokens_stay() -> None:
    model, x = build("timm-vit", "dinov2_registers"), images(2)
    with vitrim.attach(model, vitrim.TopK(), CUT) as handle:
        final, pairs = model.forward_intermediates(x, return_prefix_tokens=True)
        assert final.shape[1] == handle.token_counts[-1]
        for spread, prefix in pairs:
            assert not (spread == 0).all(1).any()
            assert prefix.shape == (2, 5, 24)
    with vitrim.attach(model, None, cls_only=True), pytest.raises(VitrimError, match="no map of patch tokens"):
        model.forward_intermediates(x)


def test_dynamic_image_sizes() -> None:
    model = build("timm-vit", "dynamic_size")
    with vitrim.attach(model, vitrim.TopK(), CUT) as handle:
        for size in (40, 64, 24, 40):
            model(images(1, size))
            num = (size // 8) ** 2
            assert handle.states[-1].origin.shape == (1, num)
            assert handle.states[-1].size.shape[1] + 1 == handle.plan(num).token_counts[-1]


@pytest.mark.parametrize("text", ["TopK() @ KeepRate(0.6, at=(0, 2))", "ToMe() @ Budget(macs=0.7)"])
def test_another_input_size_is_planned_for(text: str) -> None:
    model, same = build("timm-vit", "vit"), build("timm-vit", "vit")
    with vitrim.attach(model, text) as handle:
        handle.set_strength(0.5)
        model.set_input_size((64, 48))
        same.set_input_size((64, 48))
        with vitrim.attach(same, text) as fresh:
            fresh.set_strength(0.5)
            assert handle.token_counts == fresh.token_counts
            assert handle.schedule == fresh.schedule
            assert vitrim.cost(model) == vitrim.cost(same)
            x = torch.randn(1, 3, 64, 48)
            same.load_state_dict(model.state_dict())
            assert torch.equal(model(x), same(x))


HOOKED = ("TopK() @ KeepRate(0.6, at=(0, 2))", "TopK(fuse=sum) @ KeepRate(0.6, at=(0, 2))", "ToMe() @ ConstantR(3)",
          "TopK(norm) @ KeepRate(0.6, at=(1,), place=before)", None)  # fmt: skip


@pytest.mark.parametrize("text", HOOKED)
def test_hooks_on_projections_are_heard(text: str | None) -> None:
    model, halved, x = build("timm-vit", "vit"), build("timm-vit", "vit"), images(2)
    halved.load_state_dict(model.state_dict())
    for block in halved.blocks:
        for parameter in (*block.attn.qkv.parameters(), *block.attn.proj.parameters()):
            parameter.data *= 0.5
    for block in model.blocks:
        for layer in (block.attn.qkv, block.attn.proj):
            layer.register_forward_hook(lambda layer, args, out: out * 0.5)
    with vitrim.attach(model, text, cls_only=True), vitrim.attach(halved, text, cls_only=True):
        torch.testing.assert_close(model(x), halved(x))


@pytest.mark.parametrize("text", HOOKED)
def test_hooks_on_attention_as_a_whole_see_all_tokens_and_change_its_output(text: str | None) -> None:
    model, halved, x, seen = build("timm-vit", "vit"), build("timm-vit", "vit"), images(2), []
    halved.load_state_dict(model.state_dict())
    for block, other in zip(model.blocks, halved.blocks, strict=True):
        for parameter in other.attn.proj.parameters():
            parameter.data *= 0.5
        block.attn.register_forward_pre_hook(lambda attn, args: seen.append(args[0].shape[1]))
        block.attn.register_forward_hook(lambda attn, args, out: out * 0.5)
    dense = model(x)
    assert seen.pop(0) == 26
    seen.clear()
    with vitrim.attach(model, text, cls_only=True) as handle, vitrim.attach(halved, text, cls_only=True):
        torch.testing.assert_close(model(x), halved(x))
        plan = handle.plan()
        before = [plan.cut(index, "before") for index in range(3)]
        assert seen == [n if cut is None else 1 + cut.num_out for n, cut in zip(plan.entering, before, strict=True)]
    assert torch.equal(model(x), dense)


@pytest.mark.parametrize("text", HOOKED[:3])
def test_gradients_go_through_hooks_on_attention_as_a_whole(text: str) -> None:
    model, x, seen = build("timm-vit", "vit"), images(2), []
    with vitrim.attach(model, text):
        model(x).sum().backward()
        expected = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        for block in model.blocks:
            block.attn.register_full_backward_hook(lambda attn, inward, outward: seen.append(outward[0].shape[1]))
        model(x).sum().backward()
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], expected)
    assert len(seen) == len(model.blocks)


def test_nothing_of_a_pass_is_held_but_the_assignments() -> None:
    model, x = build("timm-vit", "vit"), images(2)
    seen: list[weakref.ref[torch.Tensor]] = []
    model.blocks[0].mlp.register_forward_hook(lambda _, args, out: seen.append(weakref.ref(out)))
    with vitrim.attach(model, vitrim.TopK(fuse="sum"), CUT) as handle:
        model(x)  # The graph is dropped with the result.
        gc.collect()
        assert seen[0]() is None
        assert not any(assignment.weight_BR.requires_grad for _, assignment in handle.last_trace().assignments)


def test_phase_and_epoch() -> None:
    model, x = build("timm-vit", "vit"), images(1)
    dense = model(x)
    with vitrim.attach(model, vitrim.TopK(), CUT, phase="train", curriculum=vitrim.Delayed(3)) as handle:
        assert torch.equal(model(x), dense)
        model.train()
        assert handle.token_counts == (26, 26, 26)
        assert handle.set_epoch(3) == 1
        assert handle.token_counts == (16, 16, 10)
        model.eval()
        assert torch.equal(model(x), dense)


def test_attach_twice_and_attached_instead() -> None:
    model = build("timm-vit", "vit")
    with vitrim.attach(model, vitrim.TopK(), CUT) as handle:
        with pytest.raises(VitrimError, match="attached to this model already"):
            vitrim.attach(model, vitrim.ToMe(), CUT)
        with attached_instead(model, "ToMe() @ ConstantR(2)") as other:
            assert other.token_counts == (24, 22, 20)
        assert vitrim.attached(model) is handle
        with pytest.raises(VitrimError, match="attached to this model already"), attached_instead(model, None):
            vitrim.attach(model, vitrim.ToMe(), CUT)
        assert vitrim.attached(model) is handle


def test_a_refused_reduction_leaves_the_model_alone() -> None:
    model = build("timm-vit", "gap")
    classes = [type(module) for module in model.modules()]
    refused = [
        ((vitrim.TopK(), CUT), ScoreError, "no CLS token to score with"),
        ((vitrim.TopK("norm"), vitrim.KeepRate(0.5, at=(7,))), VitrimError, "cuts at block 7"),
        ((vitrim.TopK("norm"), vitrim.ConstantR(9)), VitrimError, "use r of at most 8"),
        ((vitrim.TopK("norm"),), VitrimError, "needs a schedule"),
        ((vitrim.TopK, CUT), VitrimError, r"takes a reducer such as .*; write TopK\(\) with brackets"),
        ((vitrim.TopK("norm"), vitrim.KeepRate), VitrimError, r"a schedule such as .*; write KeepRate\(...\)"),
        ((0.7, CUT), VitrimError, "takes a reducer such as .*; not 0.7"),
        ((None, CUT), VitrimError, "go with a reducer"),
    ]
    for args, error, says in refused:
        with pytest.raises(error, match=says):
            vitrim.attach(model, *args)
        assert [type(module) for module in model.modules()] == classes


def test_misuse_is_told_in_words() -> None:
    model, x = build("timm-vit", "vit"), images(1)
    with vitrim.attach(model, vitrim.TopK(), CUT) as handle:
        with pytest.raises(VitrimError, match="no forward pass has been made"):
            _ = handle.states
        with pytest.raises(VitrimError, match="run the model from its first block"):
            model.blocks[1](torch.zeros(1, 16, 24))
        with pytest.raises(VitrimError, match="attention mask cannot be combined"):
            model(x, attn_mask=torch.zeros(26, 26))


def test_a_phase_next_to_a_whole_reduction_is_refused() -> None:
    model, whole = build("timm-vit", "vit"), Reduction.parse("TopK() @ KeepRate(0.5, at=(1,))")
    with pytest.raises(VitrimError, match="a Reduction holds its own"):
        vitrim.attach(model, whole, phase="train")
    for given in (str(whole), whole.reducer):
        schedule = None if isinstance(given, str) else whole.schedule
        with vitrim.attach(model, given, schedule, phase="train") as handle:
            assert handle.reduction is not None
            assert handle.reduction.phase == "train"


@pytest.mark.parametrize(
    ("schedule", "curriculum", "words"),
    [
        (0.7, None, "schedule must be a schedule such as vitrim.KeepRate"),
        (vitrim.KeepRate, None, r"write KeepRate\(...\)"),
        (CUT, 3, "curriculum must be a curriculum such as vitrim.Delayed"),
    ],
)
def test_numbers_and_classes_in_place_of_methods_are_refused(schedule: Any, curriculum: Any, words: str) -> None:
    with pytest.raises(VitrimError, match=words):
        vitrim.attach(build("timm-vit", "vit"), vitrim.TopK(), schedule, curriculum=curriculum)


class WithOwnHead(VisionTransformer):
    """A class as people derive it."""

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return self.head(x[:, 1:].mean(1))


class Further(WithOwnHead):
    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0]


class OnlyNamed(VisionTransformer):
    """Nothing is done in another way."""


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (WithOwnHead, "WithOwnHead has forward_head of its own"),
        (Further, "Further has pooled, forward_head of its own"),
        (OnlyNamed, "OnlyNamed is a class of its own"),
    ],
)
def test_an_own_class_is_refused_with_its_methods_and_the_way_out(cls: type[VisionTransformer], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{words}, .*hold a plain VisionTransformer in your module"):
        vitrim.attach(cls(**SMALL), vitrim.ToMe(), CUT)


def test_a_model_that_cannot_be_rebuilt_is_named_by_its_own_class(tmp_path: Path) -> None:
    model = VisionTransformer(**SMALL)
    vitrim.attach(model, vitrim.ToMe(), CUT)
    with pytest.raises(CheckpointError, match=r"this VisionTransformer was not made by timm\.create_model"):
        vitrim.save(model, tmp_path / "m")
