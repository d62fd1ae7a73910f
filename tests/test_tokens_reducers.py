"""Assignments, scores and reducers on their own, with shapes and element types checked while they run."""

# ruff: noqa: F722 (the linter takes shapes for names)

from collections.abc import Callable
from typing import Any

import pytest
import torch
from beartype import beartype
from jaxtyping import Bool, Float, Int64, jaxtyped
from torch import Tensor

import vitrim
from vitrim.errors import ScoreError
from vitrim.tokens import SCORES, Assignment, Evidence, TokenState, take
from vitrim.tokens.reducers import order_by


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    return jaxtyped(typechecker=beartype)(function)


@checked
def checked_take(x: Float[Tensor, "B N C"], index: Int64[Tensor, "B K"]) -> Float[Tensor, "B K C"]:
    return take(x, index)


@checked
def checked_order(score: Float[Tensor, "B N"], keep: int) -> tuple[Int64[Tensor, "B {keep}"], Int64[Tensor, "B R"]]:
    return order_by(score, keep)


@checked
def checked_apply(
    cut: Assignment, x: Float[Tensor, "B T C"], size: Float[Tensor, "B N"] | None, prefix: int, leaving: int
) -> Float[Tensor, "B {leaving} C"]:
    return cut.apply(x, size, prefix)


@checked
def checked_score(name: str, e: Evidence, num_patches: int) -> Float[Tensor, "_ {num_patches}"]:
    return SCORES[name].compute(e)


@checked
def checked_spread(s: TokenState, x: Float[Tensor, "B M C"], kept: Bool[Tensor, "B N"]) -> Float[Tensor, "B N C"]:
    return s.spread(x)


def evidence(
    num_images: int = 2,
    num_prefix: int = 2,
    num_patches: int = 9,
    dtype: torch.dtype = torch.float64,
    training: bool = False,
) -> Evidence:
    count = num_prefix + num_patches
    query, key = (torch.randn(num_images, 3, count, 4, dtype=dtype) for _ in range(2))
    return Evidence(
        num_prefix, 1, training, 0.5, torch.randn(num_images, count, 12, dtype=dtype), query[:, :, :1], query, key
    )


def test_take_equals_gather() -> None:
    x, index = torch.randn(3, 7, 5), torch.randint(7, (3, 4))
    assert torch.equal(checked_take(x, index), x.gather(1, index.unsqueeze(2).expand(-1, -1, 5)))
    assert checked_take(x[:, 1:], index[:, :0]).shape == (3, 0, 5)


def test_ties_go_to_the_lower_index() -> None:
    kept, rest = checked_order(torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0, 3.0]]), 3)
    assert kept.tolist() == [[0, 1, 3], [0, 1, 2]]
    assert rest.tolist() == [[2, 4], [3, 4]]
    same = evidence(1)
    key = torch.ones_like(same.key)
    merged = vitrim.ToMe().assign(Evidence(2, 0, False, 0.5, same.hidden_BTC, key_BHTD=key), keep=7)
    assert merged.target().tolist() == [[0, 0, 0, 1, 2, 3, 4, 5, 6]], "tokens 0 and 2 join the first odd token"


@pytest.mark.parametrize("num_prefix", [0, 1, 4])
@pytest.mark.parametrize(
    "reducer", [vitrim.TopK("norm"), vitrim.TopK("mean_attention", fuse="sum"), vitrim.ToMe()], ids=str
)
def test_apply_equals_a_matrix_of_weights(reducer: vitrim.tokens.Reducer, num_prefix: int) -> None:
    e = evidence(num_prefix=num_prefix)
    cut = reducer.assign(e, 6)
    x, size = e.hidden_BTC, torch.randint(1, 9, (2, 9)).double()
    out = checked_apply(cut, x, size, num_prefix, num_prefix + cut.num_out)
    assert torch.equal(out[:, :num_prefix], x[:, :num_prefix])
    for b in range(2):
        target, weight = cut.target()[b], torch.zeros(cut.num_out, 9, dtype=torch.float64)
        for n in range(9):
            if target[n] >= 0:
                weight[target[n], n] = size[b, n] if isinstance(reducer, vitrim.ToMe) else 1.0
        if cut.weight_BR is not None:
            weight[-1, cut.moved_BR[b]] = cut.weight_BR[b]
        if isinstance(reducer, vitrim.ToMe):
            weight /= weight.sum(1, keepdim=True)
        torch.testing.assert_close(out[b, num_prefix:], weight @ x[b, num_prefix:], rtol=1e-12, atol=1e-12)


def test_merging_leaves_lonely_tokens_bit_equal() -> None:
    e = evidence(dtype=torch.float32)
    cut, size = vitrim.ToMe().assign(e, 7), torch.rand(2, 9) * 100
    out = cut.apply(e.hidden_BTC, size, 2)
    for b in range(2):
        counts = torch.bincount(cut.target()[b], minlength=7)
        for slot in (counts == 1).nonzero().flatten():
            source = int((cut.target()[b] == slot).nonzero())
            assert torch.equal(out[b, 2 + slot], e.hidden_BTC[b, 2 + source])


@pytest.mark.parametrize("name", sorted(SCORES))
def test_scores_have_the_right_shape_and_sign(name: str) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        e = evidence(dtype=dtype, training=SCORES[name].training_only)
        score = checked_score(name, e, 9)
        assert score.min() >= 0
        assert score.isfinite().all()
        assert SCORES[name].summary.endswith((".", ")."))
        if SCORES[name].is_probability:
            assert score.sum(1).max() <= 1.0 + 1e-6 if name == "cls_attention" else score.max() <= 1


@pytest.mark.parametrize(
    ("name", "lacks"), [("cls_attention", "cls_row"), ("mean_attention", "queries"), ("key_norm", "key")]
)
def test_a_score_without_its_evidence_says_what_to_declare(name: str, lacks: str) -> None:
    bare = Evidence(
        1, 0, False, 1.0, torch.randn(1, 5, 8), key_BHTD=None if lacks == "key" else torch.randn(1, 2, 5, 4)
    )
    with pytest.raises(ScoreError, match=lacks):
        SCORES[name].compute(bare)


def test_random_is_fresh_in_training_and_fixed_in_evaluation() -> None:
    hidden = torch.randn(3, 50, 8)
    draw = SCORES["random"].compute
    still = draw(Evidence(1, 0, False, 1.0, hidden))
    assert torch.equal(still, draw(Evidence(1, 0, False, 1.0, hidden)))
    assert torch.equal(still[0], still[2])
    assert len(still[0].unique()) == 49
    assert not torch.equal(still, draw(Evidence(1, 1, False, 1.0, hidden)))
    fresh = draw(Evidence(1, 0, True, 1.0, hidden))
    assert not torch.equal(fresh, draw(Evidence(1, 0, True, 1.0, hidden)))
    assert not torch.equal(fresh[0], fresh[1])


def test_fused_weights() -> None:
    e = evidence()
    for mode in ("sum", "mean"):
        cut = vitrim.TopK(fuse=mode).assign(e, 4)
        raw = SCORES["cls_attention"].compute(e)
        expected = raw.gather(1, cut.moved_BR)
        if mode == "mean":
            expected = expected / expected.sum(1, keepdim=True)
        torch.testing.assert_close(cut.weight_BR, expected)
        assert raw.gather(1, cut.kept_BK).min(1).values.ge(raw.gather(1, cut.moved_BR).max(1).values).all()


@pytest.mark.parametrize("reducer", [vitrim.TopK("norm"), vitrim.TopK(fuse="sum"), vitrim.ToMe()], ids=str)
def test_undo_brings_every_token_back_to_its_place(reducer: vitrim.tokens.Reducer) -> None:
    e = evidence()
    cut = reducer.assign(e, 6)
    now, before = torch.randn(2, 2 + cut.num_out, 12).double(), e.hidden_BTC
    back = cut.undo(now, None if cut.merges else before, 2)
    assert back.shape == before.shape
    assert torch.equal(back[:, :2], now[:, :2])
    for b in range(2):
        kept, target = cut.kept_BK[b].tolist(), cut.target()[b].tolist()
        for n in range(9):
            stays = n in kept or cut.merges
            assert torch.equal(back[b, 2 + n], now[b, 2 + target[n]] if stays else before[b, 2 + n])


def test_state_after_several_cuts() -> None:
    first = Assignment.drop(4, torch.tensor([[0, 2, 3]]), torch.tensor([[4.0, 1.0, 3.0, 2.0]]))
    second = Assignment.merge(3, torch.tensor([[0, 2]]), torch.tensor([[1]]), torch.tensor([[1]]))
    third = Assignment.fuse(2, torch.tensor([[1]]), torch.tensor([[0]]), torch.ones(1, 1))
    state = TokenState.start(1, 4, torch.device("cpu")).after([first, second, third])
    assert state.origin.tolist() == [[1, -1, 0, 0]]
    assert state.size.tolist() == [[2.0, 1.0]]
    spread = checked_spread(state, torch.tensor([[[5.0], [7.0]]]), state.origin >= 0)
    assert spread.flatten().tolist() == [7.0, 0.0, 5.0, 5.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_tokens_that_are_alike_a_cluster_keeps_the_most_important_one(dtype: torch.dtype) -> None:
    directions = torch.eye(12)[:4]
    kind = torch.tensor([0, 1, 0, 2, 1, 0, 3, 2])
    length = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    hidden = torch.cat([torch.ones(1, 12), directions[kind] * length[:, None]])[None].to(dtype)
    found = vitrim.Cluster("norm").assign(Evidence(1, 0, False, 1.0, hidden), keep=4)
    assert found.kept_BK.tolist() == [[4, 5, 6, 7]], "the longest of every direction"
    assert found.target().tolist() == [[1, 0, 1, 3, 0, 1, 2, 3]]
    assert found.size(torch.ones(1, 8)).tolist() == [[2, 3, 1, 2]]


def test_tokens_that_are_all_the_same_are_clustered_by_index() -> None:
    same = torch.ones(2, 6, 12)
    found = vitrim.Cluster("norm").assign(Evidence(1, 0, False, 1.0, same), keep=3)
    assert found.kept_BK.tolist() == [[0, 1, 2]] * 2
    assert found.target().tolist() == [[0, 1, 2, 0, 0]] * 2
