"""95 % intervals of what is measured on some images, or in some sessions, for all images and sessions like them.

Means of skewed values: studentised bootstrap (Efron & Tibshirani 1993, 12.5). The percentile bootstrap is too narrow
for a divergence, which is near 0 for most images and large for a few. Shares: Wilson's interval, which is not empty
where all images agree. Differences of paired shares: Bonett & Price (2012), and its form for shares that are means over
several seeds. Times and ratios of times: Student's t over the logarithms of sessions, for another measurement of as
many sessions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 2_000


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def overlaps(self, other: "Interval") -> bool:
        """Whether some value lies in both."""
        return self.low <= other.high and other.low <= self.high


def of_mean(values: Sequence[float] | np.ndarray, seed: int = 0) -> Interval:
    """Of the mean, of any distribution: studentised bootstrap.

    The t statistic of each resample is computed with its own standard error, so that the skew is accounted for.
    """
    x = np.asarray(values, dtype=np.float64)
    mean = float(x.mean())
    if len(x) < 2 or not np.isfinite(x).all():
        return Interval(mean, -math.inf, math.inf)
    error = x.std(ddof=1) / math.sqrt(len(x))
    if error == 0:
        return Interval(mean, mean, mean)
    # One after another: all at once take 16 kB for each image.
    dice = np.random.default_rng(seed)
    drawn = (x[dice.integers(len(x), size=len(x))] for _ in range(RESAMPLES))
    means, deviations = np.array([(each.mean(), each.std(ddof=1)) for each in drawn]).T
    errors = deviations / math.sqrt(len(x))
    # A resample of equal values has no error of its own; the whole sample's stands in for it.
    t = (means - mean) / np.where(errors > 0, errors, error)
    low, high = np.quantile(t, [(1 + LEVEL) / 2, (1 - LEVEL) / 2])
    return Interval(mean, float(mean - low * error), float(mean - high * error))


def of_share(hits: int, number: int) -> Interval:
    """Of a share of images: Wilson's score interval."""
    found = stats.binomtest(hits, number).proportion_ci(LEVEL, method="wilson")
    return Interval(hits / number, float(found.low), float(found.high))


def of_drop(before: Sequence[bool] | np.ndarray, after: Sequence[bool] | np.ndarray) -> Interval:
    """By how much the share of right answers falls, paired by image: Bonett & Price's interval."""
    return of_difference(np.asarray(before, dtype=np.float64) - np.asarray(after, dtype=np.float64))


def of_difference(differences: np.ndarray) -> Interval:
    """Of the mean of differences in [-1, 1], one for each image, such as that of two shares of seeds that are right.

    With two images more, one that gains and one that loses everything, so that it is not empty where all agree. For
    differences of -1, 0 and 1 this is Bonett & Price's interval.
    """
    x = np.concatenate([differences, [1.0, -1.0]])
    mean, reach = float(x.mean()), float(stats.norm.ppf((1 + LEVEL) / 2)) * float(x.std()) / math.sqrt(len(x))
    return Interval(float(differences.mean()), max(-1.0, mean - reach), min(1.0, mean + reach))


def of_times(sessions: Sequence[float]) -> Interval:
    """Where another measurement of as many sessions will find their geometric mean: Student's t on logarithms.

    With the error of both means. Times are skewed: whatever else runs on the machine only adds to them.
    """
    number, logs = len(sessions), np.log(sessions)
    mean = float(logs.mean())
    if number < 2:
        return Interval(math.exp(mean), 0.0, math.inf)
    reach = float(stats.t.ppf((1 + LEVEL) / 2, number - 1)) * float(logs.std(ddof=1)) * math.sqrt(2 / number)
    # No float is as large as what two sessions may leave possible.
    return Interval(math.exp(mean), math.exp(mean - reach), math.exp(min(mean + reach, 700.0)))
