"""Mean and confidence interval of a few runs."""

import math
import statistics
from collections.abc import Sequence

# Student's t at 97.5 %, by degrees of freedom; beyond the table the last stands, which is a little wide
T975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def mean_and_ci(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half the width of its 95 % confidence interval, t·s/√n; of one value 0, which says nothing. Half is
    nan where a value is not finite, so that the table of several runs is not lost to one of them.

    Raises:
        ValueError: if there are no values.
    """
    n = len(values)
    if not n:
        raise ValueError("mean_and_ci of no values: it needs at least one")
    if n < 2:
        return values[0], 0.0
    if not all(map(math.isfinite, values)):
        return sum(values) / n, math.nan
    return statistics.fmean(values), T975[min(n - 1, len(T975)) - 1] * statistics.stdev(values) / math.sqrt(n)


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927): it has a width where all or none are right, too."""
    z, p = 1.96, right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))
