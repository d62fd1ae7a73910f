"""95 % intervals contain the truth in about 95 of 100 repetitions."""

import math

import numpy as np
import pytest

from vitrim.compression.measured_lines import time_lines
from vitrim.compression.remarks import time_notes
from vitrim.compression.timing import milliseconds, time_ratio
from vitrim.measure import intervals
from vitrim.measure.intervals import Interval, of_difference, of_drop, of_mean, of_share, of_times

DICE = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "RESAMPLES", 400)


@pytest.mark.parametrize(
    ("draw", "truth"),
    [
        (lambda: DICE.normal(1, 1, 96), 1.0),
        (lambda: DICE.gamma(0.3, 1, 96), 0.3),
        (lambda: DICE.lognormal(0, 1, 192), math.exp(0.5)),
    ],
    ids=["normal", "gamma", "lognormal"],
)
def test_intervals_of_means_of_skewed_values_cover(draw, truth: float) -> None:
    hits = sum(truth in of_mean(draw()) for _ in range(200))
    assert 0.89 <= hits / 200 <= 0.99


@pytest.mark.parametrize("share", [0.5, 0.97])
def test_intervals_of_shares_cover(share: float) -> None:
    found = [of_share(hits, 128) for hits in range(129)]
    covers = sum(share in found[int(DICE.binomial(128, share))] for _ in range(1000))
    assert covers / 1000 >= 0.92


@pytest.mark.parametrize(("lost", "gained"), [(0.02, 0.0), (0.05, 0.03), (0.2, 0.05)])
def test_intervals_of_paired_drops_cover(lost: float, gained: float) -> None:
    def covers() -> bool:
        u = DICE.random(160)
        before, after = (u < lost) | (u > lost + gained), u > lost
        return lost - gained in of_drop(before, after)

    assert sum(covers() for _ in range(400)) / 400 >= 0.92


def test_intervals_of_paired_differences_cover_where_several_seeds_share_the_images() -> None:
    def covers() -> bool:
        hard = DICE.random((1, 300))
        before, after = DICE.random((3, 300)) > 0.4 * hard, DICE.random((3, 300)) > 0.5 * hard
        return -0.05 in of_difference((after.astype(float) - before).mean(0))

    assert 0.92 <= sum(covers() for _ in range(400)) / 400 <= 0.99


def test_of_one_seed_the_interval_of_differences_is_that_of_bonett_and_price() -> None:
    lost, gained, number = 7, 3, 50
    down, up = (lost + 1) / (number + 2), (gained + 1) / (number + 2)
    error = math.sqrt((down + up - (down - up) ** 2) / (number + 2))
    found = of_drop([True] * 7 + [False] * 43, [False] * 7 + [True] * 3 + [False] * 40)
    assert (found.value, found.low, found.high) == pytest.approx(
        (0.08, down - up - 1.959964 * error, down - up + 1.959964 * error)
    )


@pytest.mark.parametrize("spread", [0.04, 0.3, 1.0], ids=["idle", "busy", "loaded"])
def test_intervals_of_times_contain_another_measurement(spread: float) -> None:
    def measured() -> Interval:
        return of_times(DICE.lognormal(math.log(0.5), spread, 5).tolist())

    assert 0.92 <= sum(measured().value in measured() for _ in range(1000)) / 1000 <= 0.98


def test_intervals_of_times_of_an_idle_machine_are_those_of_their_plain_values() -> None:
    def mean_of_another() -> bool:
        return float(DICE.normal(0.5, 0.02, 5).mean()) in of_times(DICE.normal(0.5, 0.02, 5).tolist())

    assert 0.92 <= sum(mean_of_another() for _ in range(400)) / 400 <= 0.98


def test_the_interval_of_times_that_vary_much_is_wide_and_above_zero() -> None:
    times = [(0.1, 2.0, 0.2), (3.0, 2.0, 6.0), (12.0, 2.0, 24.0)]
    for found in (time_ratio(times), milliseconds(times)[0]):
        assert 0 < found.low < found.value < found.high
    assert time_ratio(times).value == pytest.approx(3.6 ** (1 / 3))


def test_times_that_say_little_are_named() -> None:
    assert time_notes(time_lines([(0.5, 2.0, 1.0), (0.55, 2.0, 1.1), (0.52, 2.0, 1.04)])) == []
    busy, slower = time_notes(time_lines([(0.5, 2.0, 1.0), (3.0, 2.0, 6.0), (2.0, 2.0, 4.0)]))
    assert "was the machine busy?" in busy
    assert "slower than the given model: 1.44 times" in slower
    assert len(time_notes(time_lines([(0.5, 2.0, 1.0)]))) == 1


def test_an_interval_is_never_empty_where_all_images_agree() -> None:
    assert of_share(50, 50).low < 0.95
    same = of_drop([True] * 50, [True] * 50)
    assert same.value == 0
    assert same.low < 0 < same.high


def test_values_that_say_nothing_about_their_spread() -> None:
    assert of_mean([3.0]) == Interval(3.0, -math.inf, math.inf)
    assert of_mean([2.0, 2.0, 2.0]) == Interval(2.0, 2.0, 2.0)
    assert of_mean([1.0, math.inf]).high == math.inf
    assert of_times([0.5]) == Interval(pytest.approx(0.5), 0.0, math.inf)
    assert of_mean([1.0, 2.0, 3.0]) == of_mean([1.0, 2.0, 3.0]), "the same at every call"
    assert Interval(1, 0, 2).overlaps(Interval(3, 2, 4))
    assert not Interval(1, 0, 2).overlaps(Interval(3, 2.1, 4))
