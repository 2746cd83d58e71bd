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


@pytest.mark.parametrize(
    ("interval", "value"),
    [
        (mean_interval([3.0]), 3.0),
        (mean_interval([2.0, 2.0]), 2.0),
        (difference_interval([3.0], [1.0, 2.0]), 1.5),
        (difference_interval([1.0, 2.0], [3.0]), -1.5),
        (difference_interval([2.0, 2.0], [1.0, 1.5, 0.5]), 1.0),
    ],
)
def test_single_values_and_equal_values_have_no_interval(interval, value):
    assert (interval.value, interval.low, interval.high) == (value, None, None)
