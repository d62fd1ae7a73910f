"""What `str` prints of a reduction, `Reduction.parse` reads; anything else is refused in one clear line."""

from collections.abc import Callable

import numpy as np
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
    vitrim.Stages({0: 0.65}, place="inside", reinstate=4),
]
CURRICULA_SHOWN = [
    vitrim.Constant(),
    vitrim.Delayed(5),
    vitrim.Polynomial(40, 140, gamma=3.0, per_step=True),
    vitrim.CosineWarmup(30, 5),
    vitrim.Adaptive(),
    vitrim.Adaptive("entropy", threshold=0.3),
]


# Parts without an example take part with their default options.
for shown, table in ((REDUCERS_SHOWN, REDUCERS), (SCHEDULES_SHOWN, SCHEDULES), (CURRICULA_SHOWN, CURRICULA)):
    shown += [part() for part in table.values() if part not in set(map(type, shown))]


@pytest.mark.parametrize("phase", ["both", "train", "eval"])
def test_round_trip(phase: str) -> None:
    for reducer in REDUCERS_SHOWN:
        if reducer.training_only and phase != "train":
            continue
        for schedule in SCHEDULES_SHOWN:
            for curriculum in CURRICULA_SHOWN:
                made = Reduction(reducer, schedule, curriculum, phase)
                assert Reduction.parse(str(made), phase) == made
                assert hash(made) == hash(Reduction.parse(str(made), phase))


def test_shortest_forms() -> None:
    short = Reduction.parse("TopK @ KeepRate(0.7, at=[3, 6])")
    assert short == Reduction(vitrim.TopK(), vitrim.KeepRate(0.7, at=(3, 6)))
    assert str(short) == "TopK() @ KeepRate(rate=0.7, at=(3, 6))"
    assert Reduction.parse("ToMe(prop_attn=false) @ ConstantR(2)").reducer == vitrim.ToMe(prop_attn=False)
    assert Reduction.parse("TopK(norm, fuse=mean) @ ConstantR(2) @ Delayed(5)").curriculum == vitrim.Delayed(5)


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("TopQ() @ KeepRate()", UnknownNameError, "did you mean TopK"),
        ("TopK(cls_atention) @ KeepRate()", UnknownNameError, "did you mean cls_attention"),
        ("TopK() @ KeepRat(0.7)", UnknownNameError, "did you mean KeepRate"),
        (" ", ScheduleError, "no reduction given; for example TopK(cls_attention) @ KeepRate(0.7"),
        ("TopK()", ScheduleError, "is not `reducer @ schedule`"),
        ("KeepRate() @ TopK()", ScheduleError, "is not `reducer @ schedule`"),
        ("TopK() @ KeepRate() @ Constant() @ Constant()", ScheduleError, "is not `reducer @ schedule`"),
        ("TopK( @ KeepRate()", ScheduleError, "cannot read"),
        ("TopK() @ KeepRate(rat=0.7)", ScheduleError, "options are"),
        ("TopK() @ KeepRate(0.7 + x)", ScheduleError, "cannot read"),
        ("TopK() @ (lambda: 1)()", ScheduleError, "cannot read"),
        ("TopK() @ KeepRate('high')", ScheduleError, "KeepRate: rate is a number, not 'high'"),
        ("TopK() @ KeepRate(1.5)", ScheduleError, "keep rate lies in (0, 1]"),
        ("TopK(norm, fuse=sum) @ KeepRate()", ScoreError, "use fuse='mean'"),
        ("TopK(fuse=max) @ KeepRate()", ScoreError, "TopK: fuse is 'sum' or 'mean' or None, not 'max'"),
        ("TopK(momentum=1) @ KeepRate()", ScoreError, "momentum is in [0, 1)"),
        ("TopK(shallow=-1) @ KeepRate()", ScoreError, "shallow"),
        ("TopK(shallow=1, normalise=True, fuse=mean) @ KeepRate()", ScoreError, "carries negative scores"),
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


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: vitrim.ConstantR("3"), "ConstantR: r is a whole number, not '3'"),
        (lambda: vitrim.ConstantR(1.5), "ConstantR: r is a whole number, not 1.5"),
        (lambda: vitrim.KeepRate(0.7, at=(1.5,)), "KeepRate: at is a tuple, each entry a whole number or None, not"),
        (lambda: vitrim.PowerLaw(float("nan")), "PowerLaw: r_max is a number, not nan"),
        (lambda: vitrim.Budget(float("inf")), "Budget: macs is a number, not inf"),
        (lambda: vitrim.KeepRate(True), "KeepRate: rate is a number, not True"),
        (lambda: vitrim.Stages([1]), "Stages: fractions is a mapping, each key a whole number and each value a number"),
        (lambda: vitrim.Stages({4: "a"}), "Stages: fractions is a mapping"),
        (lambda: vitrim.Counts(5), "Counts: counts is a tuple, each entry a whole number, not 5"),
        (lambda: vitrim.Counts("987"), "Counts: counts is a tuple"),
        (lambda: vitrim.Budget("a"), "Budget: macs is a number, not 'a'"),
        (lambda: vitrim.Budget(0.5, shape=0.3), "Budget: shape is a Schedule, not 0.3"),
        (lambda: vitrim.PowerLaw(place="after"), "PowerLaw: place is 'before' or 'inside', not 'after'"),
        (lambda: vitrim.TopK(score=None), "TopK: score is text, not None"),
        (lambda: vitrim.ToMe("no"), "ToMe: prop_attn is True or False, not 'no'"),
        (lambda: vitrim.Delayed("3"), "Delayed: epoch is a number, not '3'"),
        (lambda: vitrim.Adaptive("slop"), "Adaptive: signal is 'slope' or 'entropy', not 'slop'"),
        (lambda: Reduction(vitrim.TopK(), vitrim.KeepRate(), "Delayed(3)"), "curriculum is a Curriculum, not 'Del"),
        (lambda: Reduction(vitrim.TopK(), 0.7), "schedule is a Schedule, not 0.7"),
    ],
)
def test_options_of_another_kind(make: Callable[[], object], says: str) -> None:
    with pytest.raises(VitrimError) as raised:
        make()
    assert says in str(raised.value)


def test_numbers_and_lists_from_elsewhere() -> None:
    assert vitrim.KeepRate(np.float32(0.5), at=[1, 2]) == vitrim.KeepRate(0.5, at=(1, 2))
    assert vitrim.KeepRate(1, at=2).at == (2,)
    assert vitrim.Counts(range(3, 0, -1)) == vitrim.Counts((3, 2, 1))
    assert vitrim.ConstantR(np.int64(3)) == vitrim.ConstantR(3)
    assert vitrim.Budget(1, shape=vitrim.KeepRate(0.3)).macs == 1
    made = Reduction(
        vitrim.TopK(np.str_("norm"), momentum=np.float32(0.5)),
        vitrim.Stages({np.int64(0): np.float64(0.7)}, reinstate=np.int32(4)),
        vitrim.Polynomial(np.int64(2), np.float64(5)),
    )
    assert str(made) == (
        "TopK(score='norm', momentum=0.5) @ Stages(fractions={0: 0.7}, reinstate=4) @ Polynomial(start=2, end=5.0)"
    )
    for schedule in (vitrim.KeepRate(np.float64(0.7), at=np.array([3, 6])), vitrim.KeepRate(0.7, at=np.int64(2))):
        assert Reduction.parse(str(Reduction(vitrim.TopK(), schedule))).schedule == schedule


def test_messages_show_what_was_written() -> None:
    assert str(vitrim.ConstantR(100)) == "ConstantR(r=100)"
    assert str(vitrim.KeepRate(0.7, place="before")) == "KeepRate(rate=0.7, place='before')"
    with pytest.raises(ScheduleError, match=r"^ConstantR\(r=100\) removes 100 tokens"):
        vitrim.ConstantR(100).check(12, 196, vitrim.TopK())
