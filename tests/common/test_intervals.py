"""The mean of a few runs and its interval."""

import math

import pytest
from memtrain_common.measuring.intervals import mean_and_ci


def test_a_value_that_is_not_finite_leaves_a_mean_and_no_interval():
    mean, half = mean_and_ci([1.0, math.inf])
    assert mean == math.inf
    assert math.isnan(half)
    for values in ([1.0, math.nan], [math.inf, -math.inf]):
        assert all(map(math.isnan, mean_and_ci(values)))
    assert mean_and_ci([2.0]) == (2.0, 0.0)
    assert mean_and_ci([1.0, 3.0]) == pytest.approx((2.0, 12.706))


def test_no_values_have_no_mean():
    with pytest.raises(ValueError, match="no values"):
        mean_and_ci([])
