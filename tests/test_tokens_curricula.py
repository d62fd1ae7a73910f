"""Curricula against their formulas and published figures."""

import math

import pytest

import vitrim
from vitrim.errors import ScheduleError, ScoreError
from vitrim.models import narrow
from vitrim.tokens import CURRICULA, Schedule
from vitrim.tokens.reduction import Phase
from zoo import build


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
    says = "make them agree or leave `final` out" if fits else "has no single one; leave `final` out"
    with pytest.raises(ScheduleError, match=says):
        vitrim.Reduction(vitrim.TopK(), contradicts, ptd)
    assert vitrim.Reduction(vitrim.TopK(), contradicts, vitrim.Polynomial(40, 140)).schedule == contradicts


@pytest.mark.parametrize(
    ("schedule", "drops"),
    [(vitrim.KeepRate(0.65), 0.35), (vitrim.Stages({0: 0.8, 2: 0.5}), 0.5), (vitrim.PowerLaw(0.6), 0.6)],
)
def test_initial_without_final_is_a_drop_ratio_too(schedule: Schedule, drops: float) -> None:
    made = vitrim.Reduction(vitrim.TopK(), schedule, vitrim.Polynomial(1, 10, initial=0.2))
    assert schedule.scaled(made.curriculum.strength(0)).drop_ratio == pytest.approx(0.2)
    assert schedule.scaled(made.curriculum.strength(10)).drop_ratio == pytest.approx(drops)
    again = vitrim.Reduction.parse(str(made))
    assert again == made


def test_token_counts_begin_at_initial() -> None:
    text = "TopK() @ Stages({0: 0.5}, place=inside) @ Polynomial(1, 4, initial=0.25)"
    model = vitrim.build_model("vitrim_digits_vit").train()
    with vitrim.attach(model, text) as handle:
        counts = []
        for epoch in (0, 1, 4, 9):
            handle.set_epoch(epoch)
            counts.append(handle.token_counts[0] - 1)
    assert counts == [48, 48, 32, 32]


def test_initial_that_cannot_be_reached_or_understood_is_refused() -> None:
    early = vitrim.Polynomial(1, 10, initial=0.4)
    with pytest.raises(ScheduleError, match=r"starts at drop ratio 0.4, but .* drops only 0.35; lower `initial`"):
        vitrim.Reduction(vitrim.TopK(), vitrim.KeepRate(0.65), early)
    for schedule in (vitrim.ConstantR(2), vitrim.Counts((9, 8, 7)), vitrim.Budget(0.5)):
        with pytest.raises(ScheduleError, match=r"initial is a drop ratio, but .* has no single one"):
            vitrim.Reduction(vitrim.TopK(), schedule, early)
    with pytest.raises(ScheduleError, match="give `final` too"):
        early.strength(0)


def test_curricula_name_the_figures_that_they_read() -> None:
    assert vitrim.Polynomial(1, 2).reads == vitrim.Delayed(1).reads == ()
    assert [figure.name for figure in vitrim.Adaptive().reads] == ["val_loss"]
    (entropy,) = vitrim.Adaptive("entropy").reads
    assert (entropy.name, entropy.needs) == ("attention_entropy", "cls_row")
    with pytest.raises(ScheduleError, match="val_loss in the history is a number, not 'low'"):
        vitrim.Adaptive().strength(2, [{"val_loss": "low"}])  # type: ignore[dict-item]


def test_attention_entropy_without_cls_is_refused_at_once() -> None:
    model = vitrim.build_model("vit_tiny_patch16_224", class_token=False, global_pool="avg", depth=2)
    with pytest.raises(ScoreError, match=r"no CLS token, which attention_entropy of Adaptive.* needs"):
        vitrim.attach(model, "ToMe() @ KeepRate(0.5) @ Adaptive(entropy)")
    with vitrim.attach(model, "ToMe() @ KeepRate(0.5) @ Adaptive(slope)") as handle:
        assert handle.strength == 0


@pytest.mark.parametrize("phase", ["both", "train"])
@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("TopK() @ ConstantR(100) @ Delayed(1)", "use r of at most"),
        ("TopK() @ ConstantR(100) @ Polynomial(40, 140)", "use r of at most"),
        ("TopK() @ ConstantR(100) @ Adaptive()", "use r of at most"),
        ("TopK() @ KeepRate(0.5, at=(1, 40)) @ CosineWarmup(9, 3)", "cuts at block 40"),
        ("TopK() @ Counts((60, 50, 40, 30)) @ Delayed(1)", "cannot follow a curriculum"),
    ],
)
def test_every_strength_is_checked_at_the_start(method: str, says: str, phase: Phase) -> None:
    model = vitrim.build_model("vitrim_digits_vit")
    with pytest.raises(ScheduleError, match=says):
        vitrim.attach(model, method, phase=phase)
    assert vitrim.models.attached(model) is None


def test_cuts_of_a_middling_strength_are_checked_too() -> None:
    """At full strength one token is left before block 2, so that only weaker ones cut in it."""
    model = build("timm-vit", "vit")
    narrow(model, {"blocks.2.attn": 0})
    with vitrim.attach(model, "TopK() @ PowerLaw(9.0, alpha=1.0)") as handle:
        assert [cut.block for cut in handle.plan().cuts] == [0]
    with pytest.raises(ScoreError, match="attention of block 2 was removed"):
        vitrim.attach(model, "TopK() @ PowerLaw(9.0, alpha=1.0) @ CosineWarmup(10)")


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
    examples = [
        vitrim.Polynomial(2, 5),
        vitrim.CosineWarmup(7, 1),
        vitrim.Delayed(3),
        vitrim.Adaptive(step=1.0),
        vitrim.Adaptive("entropy"),
    ]
    examples += [kind() for kind in CURRICULA.values() if kind not in set(map(type, examples))]
    for curriculum in examples:
        history = [{figure.name: figure.best[n > 0] for figure in curriculum.reads} for n in range(3)]
        strengths = [curriculum.strength(epoch / 3, history) for epoch in range(40)]
        assert 0 <= min(strengths) <= max(strengths) <= 1
        checked = curriculum.strengths
        assert all(min(abs(strength - known) for known in checked) < 0.05 for strength in strengths)
        assert strengths == sorted(strengths)


@pytest.mark.parametrize(
    ("curriculum", "first"),
    [
        (vitrim.Constant(), 1),
        (vitrim.Delayed(5), 6),
        (vitrim.Delayed(5.5), 7),
        (vitrim.Delayed(5.5, per_step=True), 6),
        (vitrim.Polynomial(4, 8), 6),
        (vitrim.Polynomial(4, 8, per_step=True), 5),
        (vitrim.Polynomial(4, 8, final=0.4, initial=0.1), 1),
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
        lambda: vitrim.Polynomial(0, 5, initial=1.5),
        lambda: vitrim.Polynomial(0, 5, initial=-0.1),
    ],
)
def test_impossible_curricula_are_refused(make: object) -> None:
    with pytest.raises(ScheduleError):
        make()  # type: ignore[operator]
