"""What `str` prints of a reduction, `Reduction.parse` reads; anything else is refused in one clear line."""

import pytest

import vitrim
from vitrim.errors import ScheduleError, ScoreError, UnknownNameError, VitrimError
from vitrim.tokens import CURRICULA, REDUCERS, SCHEDULES, SCORES, Reduction

REDUCERS_SHOWN = [
    *(vitrim.TopK(score) for score in SCORES),
    vitrim.TopK(fuse="sum"),
    vitrim.TopK("norm", fuse="mean", normalise=True, momentum=0.5),
    vitrim.TopK(shallow=4),
    vitrim.ToMe(),
    vitrim.ToMe(prop_attn=False),
]
SCHEDULES_SHOWN = [
    vitrim.PowerLaw(0.5, 1.2, place="before"),
    vitrim.KeepRate(0.7, at=(3, 6, 9), round_to=8),
    vitrim.Stages({4: 0.85, 8: 0.5}),
    vitrim.ConstantR(13),
    vitrim.Counts((9, 8, 7)),
    vitrim.Budget(0.5),
    vitrim.Budget(0.5, shape=vitrim.KeepRate(0.3, at=(1,))),
]
CURRICULA_SHOWN = [
    vitrim.Constant(),
    vitrim.Delayed(5),
    vitrim.Polynomial(40, 140, gamma=3.0, per_step=True),
    vitrim.CosineWarmup(30, 5),
    vitrim.Adaptive(),
    vitrim.Adaptive("entropy", threshold=0.3),
]


def test_every_part_is_shown() -> None:
    assert {type(part).__name__ for part in REDUCERS_SHOWN} == set(REDUCERS)
    assert {type(part).__name__ for part in SCHEDULES_SHOWN} == set(SCHEDULES)
    assert {type(part).__name__ for part in CURRICULA_SHOWN} == set(CURRICULA)


@pytest.mark.parametrize("phase", ["both", "train", "eval"])
def test_round_trip(phase: str) -> None:
    for reducer in REDUCERS_SHOWN:
        for schedule in SCHEDULES_SHOWN:
            for curriculum in CURRICULA_SHOWN:
                made = Reduction(reducer, schedule, curriculum, phase)
                assert Reduction.parse(str(made), phase) == made
                assert hash(made) == hash(Reduction.parse(str(made), phase))


def test_shortest_forms() -> None:
    short = Reduction.parse("TopK @ KeepRate(0.7, at=[3, 6])")
    assert short == Reduction(vitrim.TopK(), vitrim.KeepRate(0.7, at=(3, 6)))
    assert str(short) == "TopK() @ KeepRate(rate=0.7, at=(3, 6))"
    assert Reduction.parse("TopK(norm, fuse=mean) @ ConstantR(2) @ Delayed(5)").curriculum == vitrim.Delayed(5)


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("TopQ() @ KeepRate()", UnknownNameError, "did you mean TopK"),
        ("TopK(cls_atention) @ KeepRate()", UnknownNameError, "did you mean cls_attention"),
        ("TopK() @ KeepRat(0.7)", UnknownNameError, "did you mean KeepRate"),
        ("TopK()", ScheduleError, "is not `reducer @ schedule`"),
        ("KeepRate() @ TopK()", ScheduleError, "is not `reducer @ schedule`"),
        ("TopK() @ KeepRate() @ Constant() @ Constant()", ScheduleError, "is not `reducer @ schedule`"),
        ("TopK( @ KeepRate()", ScheduleError, "cannot read"),
        ("TopK() @ KeepRate(rat=0.7)", ScheduleError, "options are"),
        ("TopK() @ KeepRate(0.7 + x)", ScheduleError, "cannot read"),
        ("TopK() @ (lambda: 1)()", ScheduleError, "cannot read"),
        ("TopK() @ KeepRate('high')", ScheduleError, "KeepRate('high')"),
        ("TopK() @ KeepRate(1.5)", ScheduleError, "keep rate lies in (0, 1]"),
        ("TopK(norm, fuse=sum) @ KeepRate()", ScoreError, "use fuse='mean'"),
        ("TopK(fuse=max) @ KeepRate()", ScoreError, "fuse is None, 'sum' or 'mean'"),
        ("TopK(momentum=1) @ KeepRate()", ScoreError, "momentum lies in [0, 1)"),
        ("TopK(shallow=-1) @ KeepRate()", ScoreError, "shallow"),
        ("TopK(shallow=1, normalise=True, fuse=mean) @ KeepRate()", ScoreError, "can be negative"),
    ],
)
def test_bad_text_is_refused(text: str, error: type[VitrimError], says: str) -> None:
    with pytest.raises(error) as raised:
        Reduction.parse(text)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_phase_is_checked() -> None:
    with pytest.raises(ScheduleError, match="phase is"):
        Reduction(vitrim.TopK(), vitrim.KeepRate(), phase="test")
