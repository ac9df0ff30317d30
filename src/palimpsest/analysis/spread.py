"""Several training runs of one method: from each run's value and its interval over data to one mean with one interval.

The interval covers both what the runs share, the data, and what they do not, the training seed:

    low  = mean − √(below² + spread²)      spread = t(S − 1)·s/√S, s the standard deviation of the S runs' values
    high = mean + √(above² + spread²)      below, above = the arms of the mean's interval over data

This is the method of variance estimates recovery (Zou and Donner 2008): the arms of two independent parts add as
squares, and an asymmetric interval stays asymmetric. All runs are measured on the same data, so the arms over
data are not divided by √S. With two runs t is 12.7, with three 4.3, with five 2.8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95


def standard_deviation(values: Sequence[float]) -> float:
    """Of the runs' values, with n − 1; needs two or more."""
    return float(np.std(values, ddof=1))


def over_runs(values: Sequence[float], below: float = 0.0, above: float = 0.0) -> tuple[float, float, float]:
    """(mean, low, high) at 95 %. values: of each run, two or more; below, above: arms over data, none below 0.

    Without arms the interval is over seeds alone, on these data.
    """
    if len(values) < 2:
        raise ValueError("an interval over training runs needs two or more of them")
    mean = math.fsum(values) / len(values)
    t = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1))
    spread = t * standard_deviation(values) / math.sqrt(len(values))
    return mean, mean - math.hypot(below, spread), mean + math.hypot(above, spread)


def mean_arms(values: Sequence[float], lows: Sequence[float], highs: Sequence[float]) -> tuple[float, float]:
    """(below, above): the runs' mean distance from value to either end of their intervals over the same data.

    A percentile interval of a distance can lie wholly above its value (shift.py); its lower arm then counts as 0.
    """
    below = [value - low for value, low in zip(values, lows, strict=True)]
    above = [high - value for value, high in zip(values, highs, strict=True)]
    return max(0.0, math.fsum(below) / len(below)), max(0.0, math.fsum(above) / len(above))
