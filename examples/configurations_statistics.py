"""Paired comparisons over seeds: means, 95% confidence intervals and t-tests."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

CONFIDENCE = 0.95
LARGEST_EXPONENT = 700.0  # e to a little more is beyond any float


@dataclass(frozen=True)
class Comparison:
    """A mean over seeds with its interval, and a t-test of whether there is any difference.

    Attributes:
        mean: The mean; of ratios the geometric one.
        low: Lower end of the 95% interval; None from a single seed.
        high: Upper end; None from a single seed.
        p_value: Two-sided, of the paired t-test; None from one seed or where all seeds agree
            exactly, which no test can judge.
        values: The value of each seed.
    """

    mean: float
    low: float | None
    high: float | None
    p_value: float | None
    values: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it, as plain Python values."""
        return dataclasses.asdict(self)


def compare_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Comparison:
    """Compares positive values as ratios, paired by seed.

    The test is on logarithms, so that a ratio and its inverse come to the same conclusion.

    Args:
        numerators: One value for each seed.
        denominators: The values to divide by, in the same order.

    Raises:
        ValueError: The two are not equally many, there are none, or one is not positive.
    """
    _check(numerators, denominators, positive=True)
    logarithms = [math.log(a / b) for a, b in zip(numerators, denominators, strict=True)]
    found = _one_sample(logarithms)
    mean, low, high = (
        None if x is None else math.exp(max(-LARGEST_EXPONENT, min(x, LARGEST_EXPONENT)))
        for x in (found.mean, found.low, found.high)
    )
    assert mean is not None
    return Comparison(mean, low, high, found.p_value, tuple(math.exp(x) for x in logarithms))


def compare_percent(values: Sequence[float], references: Sequence[float]) -> Comparison:
    """Says how many percent values are above others, paired by seed.

    Args:
        values: One value for each seed.
        references: What they are compared with, in the same order.

    Raises:
        ValueError: The two are not equally many, there are none, or a reference is not positive.
    """
    _check(values, references, positive=True)
    return _one_sample([100 * (a / b - 1) for a, b in zip(values, references, strict=True)])


def _check(values: Sequence[float], others: Sequence[float], positive: bool) -> None:
    if not values or len(values) != len(others):
        raise ValueError(
            f"values={list(values)!r}, references={list(others)!r}: must be equally many, at "
            "least one"
        )
    for name, numbers in (("values", values), ("references", others)):
        for number in numbers:
            if not math.isfinite(number) or (positive and number <= 0):
                raise ValueError(f"{name}={list(numbers)!r}: must be positive finite numbers")


def _one_sample(differences: Sequence[float]) -> Comparison:
    """The t-test of whether the mean of paired differences is zero."""
    values = tuple(float(x) for x in differences)
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Comparison(mean, None, None, None, values)
    if max(values) - min(values) <= 1e-12 * max(1.0, abs(mean)):
        return Comparison(mean, mean, mean, None, values)
    test = stats.ttest_1samp(values, 0.0)
    interval = test.confidence_interval(CONFIDENCE)
    return Comparison(mean, float(interval.low), float(interval.high), float(test.pvalue), values)
