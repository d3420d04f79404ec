"""Means over seeds with their 95% confidence intervals, and paired comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
LARGEST_EXPONENT = 700.0  # e to a little more is beyond any float
EQUAL = 1e-12  # of the largest: values no further apart differ by rounding alone
BOOTSTRAP_FROM, BOOTSTRAP_RESAMPLES, BOOTSTRAP_SEED = 5, 10_000, 0


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, its 95% interval, and a test of whether the true mean is zero.

    Attributes:
        mean: The mean; of ratios the geometric one.
        low: Lower end of the interval; None from a single seed.
        high: Upper end; None from a single seed.
        p_value: Of the two-sided t-test that the mean is 0, of ratios 1. None from a single seed,
            or where all seeds agree, which no test can judge.
        values: The value of each seed.
    """

    mean: float
    low: float | None
    high: float | None
    p_value: float | None
    values: tuple[float, ...]

    @property
    def n(self) -> int:
        """How many seeds."""
        return len(self.values)

    def interval(self) -> dict[str, Any]:
        """Mean, ends and number of seeds, for JSON; `dataclasses.asdict` gives all of it."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "n": self.n}

    def exponential(self) -> Estimate:
        """The geometric mean and its interval, where this one is of logarithms."""
        low, high = (None if x is None else _exp(x) for x in (self.low, self.high))
        return Estimate(_exp(self.mean), low, high, self.p_value, tuple(map(_exp, self.values)))


def estimate(values: Sequence[float], scale: float = 0.0) -> Estimate | None:
    """Returns the mean and its interval by Student's t; None of nothing.

    Args:
        values: One for each seed.
        scale: Of the numbers that values near zero are differences of, whose rounding they have.
    """
    if len(values) == 0:
        return None
    found = tuple(map(float, values))
    mean = math.fsum(found) / len(found)
    if len(found) == 1:
        return Estimate(mean, None, None, None, found)
    if max(found) - min(found) <= EQUAL * max(scale, *map(abs, found)):
        return Estimate(mean, mean, mean, None, found)
    test = stats.ttest_1samp(found, 0.0)
    interval = test.confidence_interval(CONFIDENCE)
    return Estimate(mean, float(interval.low), float(interval.high), float(test.pvalue), found)


def estimate_ratio(ratios: Sequence[float]) -> Estimate | None:
    """The same by logarithms, so that ratios and their inverses come to the same conclusion."""
    found = estimate([math.log(ratio) for ratio in ratios], scale=1.0)
    return found and found.exponential()


def paired_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Compares positive values as ratios, paired by seed.

    Raises:
        ValueError: They are not equally many, there are none, or one is not positive and finite.
    """
    _check_pairs(numerators, denominators)
    found = estimate_ratio([a / b for a, b in zip(numerators, denominators, strict=True)])
    assert found is not None
    return found


def paired_percent(values: Sequence[float], references: Sequence[float]) -> Estimate:
    """Says how many percent positive values are above others, paired by seed.

    Raises:
        ValueError: They are not equally many, there are none, or one is not positive and finite.
    """
    _check_pairs(values, references)
    found = estimate(
        [100 * (a / b - 1) for a, b in zip(values, references, strict=True)], scale=1.0
    )
    assert found is not None
    return found


def bootstrap(values: Sequence[float]) -> Estimate | None:
    """Returns the mean and its percentile bootstrap interval; None below 5 values, too few."""
    if len(values) < BOOTSTRAP_FROM:
        return None
    interval = stats.bootstrap(
        (np.asarray(values, dtype=float),),
        np.mean,
        n_resamples=BOOTSTRAP_RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(BOOTSTRAP_SEED),
    ).confidence_interval
    ends = float(interval.low), float(interval.high)
    return Estimate(float(np.mean(values)), *ends, None, tuple(map(float, values)))


def _exp(value: float) -> float:
    return math.exp(min(value, LARGEST_EXPONENT))


def _check_pairs(values: Sequence[float], references: Sequence[float]) -> None:
    both = f"values={list(values)!r}, references={list(references)!r}"
    if not values or len(values) != len(references):
        raise ValueError(f"{both}: must be equally many, at least one")
    if not all(0 < number < math.inf for number in (*values, *references)):
        raise ValueError(f"{both}: must be positive finite numbers")
