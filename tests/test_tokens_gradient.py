"""The gradient score against autograd and plain loops, and where it does not work."""

import pytest
import torch
from torch import Tensor, nn

import vitrim
from references import reduced_vit
from vitrim.errors import ScoreError, VitrimError
from vitrim.tokens import Reduction
from vitrim.tokens.gradients import MOMENTUM, GradientMemory
from zoo import build, images


def learning() -> nn.Module:
    return build("timm-vit", "dinov2_registers").double().train()


def reduction(place: str = "inside", **options: int) -> Reduction:
    return Reduction(vitrim.TopK("gradient"), vitrim.KeepRate(0.6, at=(0, 1), place=place, **options), phase="train")


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum() / len(x)


@pytest.mark.parametrize(("place", "options"), [("inside", {}), ("before", {}), ("inside", {"reinstate": 2})])
def test_equals_slow_reference_over_several_steps(place: str, options: dict[str, int]) -> None:
    model, chosen = learning(), reduction(place, **options)
    left: dict[int, Tensor] = {}

    def keep(block: int, tokens: Tensor) -> None:
        tokens.retain_grad()
        left[block] = tokens

    for block in (0, 1):  # What a cut leaves is what the next norm reads.
        norm = model.blocks[block].norm2 if place == "inside" else model.blocks[block].norm1
        norm.register_forward_pre_hook(lambda _, args, block=block: keep(block, args[0]) if handle_on else None)
    listened: dict[int, list[float]] = {}
    with vitrim.attach(model, chosen) as handle:
        plan, first = handle.plan(), model.num_prefix_tokens
        for step in range(3):
            x, handle_on = images(2, dtype=torch.float64, seed=step), True
            model.zero_grad()
            logits = model(x)
            handle_on = False
            for image, found, origin in zip(x, logits, handle.states[1].origin, strict=True):
                with torch.no_grad():
                    expected, _ = reduced_vit(model, image, chosen.reducer, plan, listened)
                    _, cut = reduced_vit(model, image, chosen.reducer, plan_of_cuts(plan), listened)
                assert (found - expected).abs().max() < 1e-10
                assert set((origin == -1).nonzero().flatten().tolist()) == cut.lost
            (logits.square().sum() / len(x)).backward()
            for block, tokens in left.items():
                square = [0.0] * tokens.shape[2]
                for image in range(len(x)):
                    for row in range(first, tokens.shape[1]):
                        for channel, value in enumerate(tokens.grad[image, row].tolist()):
                            square[channel] += value * value
                shape = [value * len(square) / sum(square) for value in square]
                if block in listened:
                    before = listened[block]
                    shape = [MOMENTUM * old + (1 - MOMENTUM) * new for old, new in zip(before, shape, strict=True)]
                listened[block] = shape
        for block, weights in handle.gradients.known().items():
            assert weights.tolist() == pytest.approx(listened[block], rel=1e-9)


def plan_of_cuts(plan: vitrim.tokens.Plan) -> vitrim.tokens.Plan:
    return vitrim.tokens.Plan(plan.num_patches, plan.num_prefix, plan.depth, plan.cuts)


def test_recomputation_chooses_the_same_tokens_whatever_was_learnt_in_between() -> None:
    model, (a, b) = learning(), (images(dtype=torch.float64, seed=seed) for seed in (1, 2))

    def gradients() -> list[Tensor]:
        model.zero_grad()
        with vitrim.attach(model, reduction()) as handle:
            loss_of(model, a).backward()
            waiting = loss_of(model, b)
            loss_of(model, b.flip(0)).backward()
            loss_of(model, a)  # Takes up what the step before has noted, while `waiting` still waits.
            waiting.backward()
            known = list(handle.gradients.known().values())
        return [*known, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    plain = gradients()
    model.set_grad_checkpointing()
    for one, other in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own looking.
def test_compiled_training_learns_the_same() -> None:
    model = learning()
    model.blocks = model.blocks[:2]
    with vitrim.attach(model, reduction()) as handle:
        for step in range(3):
            loss_of(model, images(dtype=torch.float64, seed=step)).backward()
        plain = handle.gradients.known()
    torch._dynamo.reset()
    model.zero_grad()
    with vitrim.attach(model, reduction()) as handle:
        compiled = torch.compile(model, backend="eager")
        for step in range(3):
            loss_of(compiled, images(dtype=torch.float64, seed=step)).backward()
        for block, weights in handle.gradients.known().items():
            torch.testing.assert_close(weights, plain[block])


def test_an_overflow_says_nothing_and_scale_does_not_count() -> None:
    memory, x = GradientMemory(), torch.randn(2, 4, 3, requires_grad=True)
    for factor in (1.0, float("inf"), 0.0, 100.0):
        tokens = x * 1.0
        memory.watch(0, tokens, 1, 4)
        (tokens * torch.tensor([1.0, 2.0, 3.0]) * factor).sum().backward()
        expected = torch.tensor([1.0, 4.0, 9.0])
        torch.testing.assert_close(memory.known()[0], expected / expected.mean())
    other = GradientMemory()
    other.load_state_dict(memory.state_dict())
    assert torch.equal(other.known()[0], memory.known()[0])


def test_where_there_are_no_gradients() -> None:
    model, x = learning().float(), images(1)
    for phase in ("both", "eval"):
        with pytest.raises(ScoreError, match=r"TopK\(score='gradient'\) uses gradients.* not in phase '" + phase):
            vitrim.attach(model, vitrim.TopK("gradient"), vitrim.KeepRate(0.5), phase=phase)
    with vitrim.attach(model, reduction()) as handle:
        with torch.no_grad(), pytest.raises(ScoreError, match="works only in training steps") as raised:
            model(x)
        assert "\n" not in str(raised.value)
        model.requires_grad_(False)
        model.head.requires_grad_(True)
        with pytest.raises(VitrimError, match="no gradient reaches the cut at block 0"):
            model(x)
        dense = model.eval()(x)
        assert handle.token_counts == (30, 30, 30)
    assert torch.equal(model(x), dense)
