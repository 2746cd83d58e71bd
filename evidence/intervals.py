"""Intervals of means and of differences of means, for results that are compared over several runs."""

import math
import statistics
from dataclasses import dataclass

from scipy.special import stdtrit  # the quantile of Student's t distribution

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval of level `LEVEL`; low and high are None where there is none."""

    value: float
    low: float | None
    high: float | None


def mean_interval(values):
    """The mean of independent values with Student's t interval; a single value has none, and equal values neither.

    mean +- t sd / sqrt(n), where sd has n - 1 in the denominator and t is the quantile for n - 1 degrees of freedom.
    """
    n = len(values)
    if len(set(values)) < 2:
        return Interval(statistics.fmean(values), None, None)
    return _interval(statistics.fmean(values), statistics.variance(values) / n, n - 1)


def difference_interval(values, others):
    """The mean of `values` less that of `others` with Welch's interval, for unequal variances.

    There is none if n < 2 in either, or all values of one are equal: chance in few numbers, and no certainty.

    With v = sd^2 / n of each, the standard error is sqrt(v_1 + v_2), and Satterthwaite's degrees of freedom are
    (v_1 + v_2)^2 / (v_1^2 / (n_1 - 1) + v_2^2 / (n_2 - 1)).
    """
    difference = statistics.fmean(values) - statistics.fmean(others)
    if len(values) < 2 or len(others) < 2:
        return Interval(difference, None, None)
    v = [statistics.variance(sample) / len(sample) for sample in (values, others)]
    if 0 in v:
        return Interval(difference, None, None)
    freedom = sum(v) ** 2 / sum(part**2 / (len(sample) - 1) for part, sample in zip(v, (values, others)))
    return _interval(difference, sum(v), freedom)


def _interval(value, variance, freedom):
    half = float(stdtrit(freedom, (1 + LEVEL) / 2)) * math.sqrt(variance)
    return Interval(value, value - half, value + half)
