import numpy as np
import pytest
from scipy import stats

from evidence.intervals import difference_interval, mean_interval

# Rounding alone: the formulas are the same as scipy's.
NEAR = {"rel": 1e-9, "abs": 1e-12}


def made_up(n, seed, mean=90.0, sd=2.0):
    return np.random.default_rng(seed).normal(mean, sd, n).tolist()


@pytest.mark.parametrize("n", [2, 3, 5, 40])
def test_the_interval_of_a_mean_is_students(n):
    values = made_up(n, seed=n)
    interval = mean_interval(values)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (interval.low, interval.high) == (pytest.approx(low, **NEAR), pytest.approx(high, **NEAR))
    assert interval.value == pytest.approx((low + high) / 2)


@pytest.mark.parametrize(("n", "others"), [(2, 2), (5, 5), (5, 3), (4, 30)])
def test_the_interval_of_a_difference_is_welchs(n, others):
    a, b = made_up(n, seed=n, sd=5.0), made_up(others, seed=99, mean=88.0, sd=0.5)
    interval = difference_interval(a, b)
    low, high = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert (interval.low, interval.high) == (pytest.approx(low, **NEAR), pytest.approx(high, **NEAR))
    assert interval.value == pytest.approx(np.mean(a) - np.mean(b))


def test_by_hand():
    """Of 1, 2, 3: mean 2, sd 1, t of two degrees of freedom 4.302653 (any table of Student's t)."""
    interval = mean_interval([1.0, 2.0, 3.0])
    assert interval.high - interval.value == pytest.approx(4.302653 / 3**0.5, abs=1e-6)


def test_a_single_value_has_no_interval():
    assert (mean_interval([3.0]).value, mean_interval([3.0]).low, mean_interval([3.0]).high) == (3.0, None, None)
    assert difference_interval([3.0], [1.0, 2.0]).low is None
    assert difference_interval([1.0, 2.0], [3.0]).value == -1.5


def test_equal_values_are_no_certainty():
    assert (mean_interval([2.0, 2.0]).value, mean_interval([2.0, 2.0]).low) == (2.0, None)
    difference = difference_interval([2.0, 2.0], [1.0, 1.0, 1.0])
    assert (difference.value, difference.low, difference.high) == (1.0, None, None)
    assert difference_interval([2.0, 2.0], [1.0, 1.5, 1.0]).low is None


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_intervals_hold_the_truth_nineteen_times_in_twenty(seed):
    """Of 2,000 made-up comparisons; the share's standard error is 0.5 %, so 2 % is four of them."""
    generator = np.random.default_rng(seed)
    means, differences = 0, 0
    for _ in range(2000):
        a, b = generator.normal(1.0, 3.0, 5).tolist(), generator.normal(0.0, 1.0, 8).tolist()
        means += mean_interval(a).low <= 1.0 <= mean_interval(a).high
        differences += difference_interval(a, b).low <= 1.0 <= difference_interval(a, b).high
    assert means / 2000 == pytest.approx(0.95, abs=0.02)
    assert differences / 2000 == pytest.approx(0.95, abs=0.02)
