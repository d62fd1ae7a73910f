"""Token counts against published figures, and schedules that cannot be carried out."""

import math

import pytest
import timm

import vitrim
from vitrim.errors import ScheduleError
from vitrim.tokens import Plan, Reducer, Schedule, make_plan


def plan(
    schedule: Schedule, num_patches: int = 196, depth: int = 12, num_prefix: int = 1, reducer: Reducer | None = None
) -> Plan:
    return make_plan(
        schedule, reducer or vitrim.TopK("norm"), depth=depth, num_patches=num_patches, num_prefix=num_prefix
    )


def kept(made: Plan) -> list[int]:
    return [cut.num_out for cut in made.cuts]


def test_power_law_published_counts() -> None:
    made = plan(vitrim.PowerLaw(r_max=0.6, alpha=2), num_patches=144, depth=8)
    assert made.token_counts == (143, 137, 125, 106, 81, 54, 29, 12)


@pytest.mark.parametrize(("r_max", "alpha", "depth", "num"), [(0.3, 1.0, 12, 196), (0.9, 2.7, 6, 64), (1.7, 0.4, 5, 9)])
def test_power_law_equals_its_formula_and_clamps(r_max: float, alpha: float, depth: int, num: int) -> None:
    made, now = plan(vitrim.PowerLaw(r_max, alpha), num, depth, num_prefix=3), num
    for block, leaving in enumerate(made.token_counts):
        now = max(1, math.floor(now * (1 - r_max * ((block + 1) / depth) ** alpha)))
        assert leaving == now + 3
    if r_max > 1:
        assert now == 1


def test_evit_published_counts() -> None:
    evit = vitrim.TopK(fuse="sum")
    assert kept(plan(vitrim.KeepRate(0.7, at=(3, 6, 9)), reducer=evit)) == [139, 99, 71]
    assert [cut.block for cut in plan(vitrim.KeepRate(0.7)).cuts] == [3, 6, 9]


def test_keep_rate_does_not_suffer_from_binary_fractions() -> None:
    for tenths in range(1, 10):
        assert kept(plan(vitrim.KeepRate(tenths / 10, at=(0,)), num_patches=100)) == [10 * tenths]
        assert kept(plan(vitrim.Stages({0: tenths / 10}), num_patches=100)) == [10 * tenths]


def test_stages_published_counts_and_place() -> None:
    made = plan(vitrim.Stages({4: 0.85, 8: 0.50}))
    assert [made.num_prefix + count for count in kept(made)] == [167, 99]
    assert {cut.place for cut in made.cuts} == {"before"}
    assert made.token_counts == (197,) * 4 + (167,) * 4 + (99,) * 4
    # A fused token does not count against fractions of the original tokens.
    assert [cut.keep for cut in plan(vitrim.Stages({4: 0.85, 8: 0.50}), reducer=vitrim.TopK(fuse="sum")).cuts] == [
        166,
        98,
    ]


def test_training_drop_keeps_the_floor() -> None:
    ptd = vitrim.Stages({0: 0.65}, place="inside")
    at_90 = vitrim.Polynomial(start=40, end=140, final=0.35).strength(90)
    assert kept(plan(ptd.scaled(at_90), num_patches=256, depth=6)) == [math.floor((1 - 0.0875) * 256)]


def test_tome_removes_r_until_half() -> None:
    made = plan(vitrim.ConstantR(13), reducer=vitrim.ToMe())
    assert made.token_counts == tuple(197 - 13 * (block + 1) for block in range(12))
    halved = plan(vitrim.ConstantR(100), reducer=vitrim.ToMe())
    assert halved.token_counts[:4] == (1 + 98, 1 + 49, 1 + 25, 1 + 13)


def test_constant_r_divides_by_the_blocks_before_the_return() -> None:
    made = plan(vitrim.ConstantR(30, reinstate=6))
    assert made.token_counts == tuple(197 - 30 * block for block in range(1, 7)) + (197,) * 6
    with pytest.raises(ScheduleError, match=r"removes 33 tokens in each of 6 blocks, .* use r of at most 32"):
        plan(vitrim.ConstantR(33, reinstate=6))
    assert plan(vitrim.ConstantR(32, reinstate=6)).token_counts[5] == 5


def test_constant_r_counts_fused_tokens_among_those_it_can_remove() -> None:
    fusing = vitrim.TopK(fuse="sum")
    made = plan(vitrim.ConstantR(17), reducer=fusing)
    assert made.cuts[-1].num_in - made.cuts[-1].keep == 17
    with pytest.raises(ScheduleError, match="use r of at most 17"):
        plan(vitrim.ConstantR(18), reducer=fusing)


@pytest.mark.parametrize("multiple", [8, 16, 5])
def test_round_to_makes_sequences_a_multiple(multiple: int) -> None:
    for reducer in (vitrim.TopK(), vitrim.TopK(fuse="mean"), vitrim.ToMe()):
        free = plan(vitrim.KeepRate(0.6, at=(1, 5)), reducer=reducer)
        made = plan(vitrim.KeepRate(0.6, at=(1, 5), round_to=multiple), reducer=reducer)
        for block in (1, 5):
            assert made.token_counts[block] % multiple == 0
            assert made.token_counts[block] >= free.token_counts[block]


def test_counts_with_a_fused_token_do_not_cut_again() -> None:
    made = plan(vitrim.Counts((16, 10, 10, 8)), num_patches=16, depth=4, reducer=vitrim.TopK(fuse="sum"))
    assert [(cut.block, cut.keep) for cut in made.cuts] == [(1, 10), (3, 8)]


def test_strength_scales_the_reduction() -> None:
    for schedule in (vitrim.PowerLaw(), vitrim.KeepRate(0.5), vitrim.Stages({1: 0.5}), vitrim.ConstantR(8)):
        assert plan(schedule.scaled(0.0)).cuts == ()
        assert plan(schedule.scaled(1.0)) == plan(schedule)
        assert plan(schedule).token_counts[-1] < plan(schedule.scaled(0.5)).token_counts[-1] < 197


def test_tokens_return_before_a_block() -> None:
    ptd = plan(vitrim.Stages({0: 0.65}, place="inside", reinstate=4), num_patches=256, depth=6)
    assert ptd.token_counts == (167,) * 4 + (257,) * 2
    assert ptd.entering == (257, 167, 167, 167, 257, 257)
    law = plan(vitrim.PowerLaw(0.6, reinstate=3), depth=6)
    assert [cut.block for cut in law.cuts] == [0, 1, 2]
    assert law.token_counts[:3] == plan(vitrim.PowerLaw(0.6), depth=6).token_counts[:3]
    assert law.token_counts[3:] == (197,) * 3
    assert [cut.block for cut in plan(vitrim.KeepRate(0.7, reinstate=8)).cuts] == [3, 6]
    assert plan(vitrim.ConstantR(8, reinstate=2).scaled(0.0)).reinstate is None
    assert plan(vitrim.Counts((100, 50), reinstate=2), depth=5).token_counts == (101, 51, 197, 197, 197)


@pytest.mark.parametrize("share", [0.9, 0.6, 0.4])
def test_budget_is_met_closely_from_below(share: float) -> None:
    model = timm.create_model("deit_small_patch16_224")
    dense = vitrim.cost(model).macs
    with vitrim.attach(model, vitrim.TopK(), vitrim.Budget(share)):
        assert 0.97 * share * dense < vitrim.cost(model).macs <= share * dense
    with vitrim.attach(model, vitrim.TopK(), vitrim.Budget(share * dense)):
        assert 0.97 * share * dense < vitrim.cost(model).macs <= share * dense


def test_budget_out_of_reach_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"cannot reach .* the least is .* \(0\.3.. of the model\)"):
        vitrim.attach(timm.create_model("vit_tiny_patch16_224"), vitrim.TopK(), vitrim.Budget(0.1))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: vitrim.KeepRate(0.0), "keep rate lies in (0, 1], not 0.0"),
        (lambda: vitrim.KeepRate(1.5), "keep rate lies in (0, 1], not 1.5"),
        (lambda: vitrim.KeepRate(0.5, at=(6, 3)), "ascending"),
        (lambda: vitrim.KeepRate(0.5, at=()), "ascending"),
        (lambda: vitrim.KeepRate(0.5, round_to=0), "round_to"),
        (lambda: vitrim.KeepRate(0.5, place="after"), "place is 'before' or 'inside'"),
        (lambda: vitrim.PowerLaw(r_max=-1), "r_max"),
        (lambda: vitrim.PowerLaw(alpha=0), "alpha"),
        (lambda: vitrim.Stages({}), "stages"),
        (lambda: vitrim.Stages({4: 0.5, 8: 0.7}), "cannot grow"),
        (lambda: vitrim.Stages({4: 1.2}), "stage fraction"),
        (lambda: vitrim.ConstantR(-1), "r is 0 or more"),
        (lambda: vitrim.Counts(()), "counts"),
        (lambda: vitrim.Counts((4, 5)), "cannot grow"),
        (lambda: vitrim.Budget(0), "positive number, not 0"),
        (lambda: vitrim.Budget(70), "a count that no model has; write a fraction of the model, such as 0.7"),
        (
            lambda: plan(vitrim.KeepRate(0.5, round_to=1000)),
            "would cut nothing: round_to is 1000, but the model has only 197",
        ),
        (lambda: vitrim.Budget(0.5, shape=vitrim.Budget(0.5)), "a schedule of another kind"),
        (lambda: plan(vitrim.KeepRate(0.5, at=(3, 12))), "cuts at block 12, but the model has blocks 0 to 11"),
        (lambda: plan(vitrim.KeepRate(0.5, at=(-1,))), "cuts at block -1"),
        (lambda: plan(vitrim.ConstantR(17)), "use r of at most 16"),
        (lambda: plan(vitrim.Counts((100, 50))), "Counts lists 2 blocks, but the model has 12"),
        (lambda: plan(vitrim.Counts((300,) * 12)), "only 196"),
        (lambda: vitrim.Counts((4, 3)).scaled(0.5), "cannot follow a curriculum"),
        (lambda: plan(vitrim.KeepRate(0.5, at=(3, 8), reinstate=8)), "block 8, but tokens return before block 8"),
        (
            lambda: plan(vitrim.KeepRate(0.5, reinstate=12)),
            "return before a block that comes after a cut, 11 at most, not before",
        ),
        (lambda: plan(vitrim.PowerLaw(0.5, reinstate=0)), "return before a block that comes after a cut"),
        (lambda: plan(vitrim.Counts((4, 3), reinstate=3)), "lists 2 blocks, but 3 come before the tokens return"),
        (lambda: vitrim.Budget(0.5, reinstate=3), "of a Budget are those of its shape"),
    ],
)
def test_impossible_schedules_say_what_is_wrong(make: object, says: str) -> None:
    with pytest.raises(ScheduleError) as raised:
        make()  # type: ignore[operator]
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
