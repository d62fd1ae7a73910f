"""Curricula against their formulas and published figures."""

import math

import pytest

import vitrim
from vitrim.errors import ScheduleError
from vitrim.tokens import Schedule


def test_polynomial_published_drop_ratios() -> None:
    ptd = vitrim.Polynomial(start=40, end=140, final=0.35, gamma=2)
    ratios = [ptd.drop_ratio(epoch) for epoch in (0, 39, 40, 90, 140, 199)]
    assert ratios == pytest.approx([0, 0, 0, 0.0875, 0.35, 0.35], abs=1e-15)
    assert ptd.strength(90) == pytest.approx(0.25)


def test_polynomial_drives_the_keep_rate() -> None:
    schedule, ptd = vitrim.KeepRate(0.65), vitrim.Polynomial(40, 140, final=0.35, initial=0.1)
    for epoch in (0, 55.5, 90, 170):
        assert 1 - schedule.scaled(ptd.strength(epoch)).rate == pytest.approx(ptd.drop_ratio(epoch))


@pytest.mark.parametrize(
    ("fits", "contradicts"),
    [
        (vitrim.KeepRate(0.65), vitrim.KeepRate(0.5)),
        (vitrim.Stages({0: 0.65}), vitrim.Stages({0: 0.8})),
        (vitrim.Stages({0: 0.85, 2: 0.65}), vitrim.Stages({0: 0.65, 2: 0.5})),
        (vitrim.PowerLaw(0.35), vitrim.PowerLaw(0.6)),
        (None, vitrim.ConstantR(2)),
        (None, vitrim.Counts((9, 8, 7))),
        (None, vitrim.Budget(0.5)),
    ],
)
def test_polynomial_ends_where_the_schedule_does(fits: Schedule | None, contradicts: Schedule) -> None:
    ptd = vitrim.Polynomial(40, 140, final=0.35)
    if fits is not None:
        assert vitrim.Reduction(vitrim.TopK(), fits, ptd).schedule == fits
    says = "make them agree or leave `final` out" if fits else "has no one drop ratio; leave `final` out"
    with pytest.raises(ScheduleError, match=says):
        vitrim.Reduction(vitrim.TopK(), contradicts, ptd)
    assert vitrim.Reduction(vitrim.TopK(), contradicts, vitrim.Polynomial(40, 140)).schedule == contradicts


def test_delayed_constant_and_cosine() -> None:
    assert [vitrim.Delayed(5).strength(epoch) for epoch in (0, 4.99, 5, 9)] == [0, 0, 1, 1]
    assert vitrim.Constant().strength(0) == 1
    cosine = vitrim.CosineWarmup(end=100, start=20)
    assert [cosine.strength(epoch) for epoch in (0, 20, 60, 100, 300)] == pytest.approx([0, 0, 0.5, 1, 1])
    assert cosine.strength(40) == pytest.approx((1 - math.cos(math.pi / 4)) / 2)


def test_adaptive_follows_the_validation_loss() -> None:
    curriculum = vitrim.Adaptive(step=0.25, threshold=0.05)
    losses = [2.0, 1.8, 1.5, 1.49, 1.6, 1.0]  # Falls, falls, stalls, rises, falls.
    history = [{"val_loss": loss} for loss in losses]
    assert [curriculum.strength(n, history[:n]) for n in range(7)] == [0, 0, 0.25, 0.5, 0.5, 0.25, 0.5]
    assert vitrim.Adaptive(start=3).strength(2, history) == 0


def test_adaptive_follows_the_attention_entropy() -> None:
    curriculum = vitrim.Adaptive(signal="entropy", threshold=0.4)
    assert curriculum.strength(0) == 0
    for entropy, strength in ((1.0, 0.0), (0.9, 0.25), (0.6, 1.0), (0.1, 1.0)):
        assert curriculum.strength(3, [{"attention_entropy": entropy}]) == pytest.approx(strength)


def test_strength_stays_within_bounds() -> None:
    for curriculum in (
        vitrim.Polynomial(2, 5),
        vitrim.CosineWarmup(7, 1),
        vitrim.Delayed(3),
        vitrim.Adaptive(step=1.0),
    ):
        history = [{"val_loss": 3.0 - n, "attention_entropy": 0.5} for n in range(3)]
        strengths = [curriculum.strength(epoch / 3, history) for epoch in range(40)]
        assert strengths == sorted(strengths)
        assert 0 <= min(strengths) <= max(strengths) <= 1


@pytest.mark.parametrize(
    ("curriculum", "first"),
    [
        (vitrim.Constant(), 1),
        (vitrim.Delayed(5), 6),
        (vitrim.Delayed(5.5), 7),
        (vitrim.Delayed(5.5, per_step=True), 6),
        (vitrim.Polynomial(4, 8), 6),
        (vitrim.Polynomial(4, 8, per_step=True), 5),
        (vitrim.Polynomial(4, 8, initial=0.1), 1),
        (vitrim.CosineWarmup(8, 4), 6),
        (vitrim.Adaptive(), 3),
        (vitrim.Adaptive(start=4), 5),
        (vitrim.Adaptive("entropy"), 2),
    ],
    ids=str,
)
def test_epochs_that_a_curriculum_needs_to_act_at_all(curriculum: vitrim.tokens.Curriculum, first: int) -> None:
    assert [curriculum.acts_within(epochs) for epochs in range(1, 10)] == [epochs >= first for epochs in range(1, 10)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: vitrim.Delayed(-1),
        lambda: vitrim.Polynomial(5, 5),
        lambda: vitrim.Polynomial(0, 5, final=1.2),
        lambda: vitrim.Polynomial(0, 5, gamma=0),
        lambda: vitrim.Polynomial(0, 5, final=0.2, initial=0.3),
        lambda: vitrim.CosineWarmup(0),
        lambda: vitrim.Adaptive(signal="loss"),
        lambda: vitrim.Adaptive(step=0),
    ],
)
def test_impossible_curricula_are_refused(make: object) -> None:
    with pytest.raises(ScheduleError):
        make()  # type: ignore[operator]
