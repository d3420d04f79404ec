"""What came out of the digits example, in numbers: means, intervals, and what is in the JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from digits_training import Contender, Recipe, Run
from scipy.stats import t as student_t

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95% interval; no interval from one seed.

    Attributes:
        mean: The mean.
        low: Lower end of the interval.
        high: Upper end.
        n: How many seeds.
    """

    mean: float
    low: float | None
    high: float | None
    n: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """Returns the mean and its interval by Student's t; None of nothing."""
    if not values:
        return None
    count, mean = len(values), float(np.mean(values))
    if count == 1:
        return Estimate(mean, None, None, 1)
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    half = float(student_t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    return Estimate(mean, mean - half, mean + half, count)


def estimate_ratio(values: Sequence[float]) -> Estimate | None:
    """The same for ratios: the geometric mean, so that a ratio and its inverse agree."""
    found = estimate([math.log(value) for value in values])
    if found is None:
        return None
    # Two seeds far apart give ends beyond any float.
    mean, low, high = (
        None if x is None else math.exp(min(x, 700)) for x in (found.mean, found.low, found.high)
    )
    assert mean is not None
    return Estimate(mean, low, high, found.n)


@dataclass(frozen=True)
class Tried:
    """How a learning rate did on the tuning seeds.

    Attributes:
        learning_rate: The rate.
        evaluations: Gradient evaluations to the target on each seed; None where not reached.
        final_accuracies: Validation accuracy at the end, on each seed.
        budget: Gradient evaluations of each run.
    """

    learning_rate: float
    evaluations: tuple[int | None, ...]
    final_accuracies: tuple[float, ...]
    budget: int

    @property
    def cost(self) -> tuple[float, float]:
        """What tuning makes least: the evaluations, then the final error.

        A run that did not reach the target counts as twice its budget.
        """
        needed = [2 * self.budget if n is None else n for n in self.evaluations]
        return float(np.mean(needed)), -float(np.mean(self.final_accuracies))


@dataclass
class Row:
    """Everything about one optimizer.

    Attributes:
        contender: The optimizer.
        tried: The learning rates tried, lowest first.
        runs: The reported runs, by seed.
    """

    contender: Contender
    tried: list[Tried] = field(default_factory=list)
    runs: dict[int, Run] = field(default_factory=dict)

    @property
    def best(self) -> Tried:
        """The learning rate that the reported runs take."""
        return min(self.tried, key=lambda tried: tried.cost)

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the lowest or the highest tried: one beyond may be better."""
        return self.best in (self.tried[0], self.tried[-1])

    def evaluations(self, target: float) -> list[int | None]:
        """Returns gradient evaluations to the target, for each run."""
        points = [run.reached(target) for run in self.runs.values()]
        return [None if point is None else point.gradients for point in points]

    def to_target(self, target: float, measure: str) -> Estimate | None:
        """Returns the mean of what the runs needed; None unless all got there.

        Args:
            target: The accuracy.
            measure: "gradients", "seconds" or "processor_seconds".
        """
        points = [run.reached(target) for run in self.runs.values()]
        values = [float(getattr(point, measure)) for point in points if point is not None]
        # The mean of those that got there would flatter an optimizer that often does not.
        return estimate(values) if len(values) == len(points) else None

    def ratio(self, baseline: Row, target: float, measure: str) -> Estimate | None:
        """Returns how many times as much the baseline needed, paired by seed.

        Args:
            baseline: AdamW.
            target: The accuracy.
            measure: As in `to_target`.
        """
        ratios = []
        for seed, run in self.runs.items():
            mine = run.reached(target)
            other = baseline.runs[seed].reached(target) if seed in baseline.runs else None
            if mine is None or other is None:
                return None
            ratios.append(float(getattr(other, measure)) / float(getattr(mine, measure)))
        return estimate_ratio(ratios)

    def final_accuracy(self) -> Estimate | None:
        """Returns the mean test accuracy at the end."""
        return estimate([run.final_accuracy for run in self.runs.values()])

    def predicted_steps(self) -> Estimate | None:
        """Returns the mean number of predicted steps; None where there can be none."""
        counts = [run.predicted_steps for run in self.runs.values()]
        return estimate([count for count in counts if count is not None])

    def to_dict(self, baseline: Row, recipe: Recipe) -> dict[str, Any]:
        """Returns all of it, for JSON.

        Args:
            baseline: AdamW.
            recipe: What the runs have in common.
        """
        target = recipe.target
        measures = ("gradients", "seconds", "processor_seconds")
        return {
            **self.contender.to_dict(),
            "learning_rate": self.best.learning_rate if self.tried else None,
            "learning_rate_at_edge": self.at_edge if self.tried else None,
            "evaluations_to_target": self.evaluations(target),
            "to_target": {name: _plain(self.to_target(target, name)) for name in measures},
            "baseline_over_this": {
                name: _plain(self.ratio(baseline, target, name)) for name in measures
            },
            "final_accuracy": _plain(self.final_accuracy()),
            "predicted_steps": _plain(self.predicted_steps()),
            "tuning": [dataclasses.asdict(tried) for tried in self.tried],
            "runs": [_run_to_dict(run, target) for run in self.runs.values()],
        }


def faster(rows: Sequence[Row], target: float) -> Row:
    """Returns the optimizer that got to the target most often, and of those the soonest."""

    def slowness(row: Row) -> tuple[int, float]:
        needed = row.evaluations(target)
        reached = [n for n in needed if n is not None]
        return needed.count(None), float(np.mean(reached)) if reached else math.inf

    return min(rows, key=slowness)


def results(
    content: Mapping[str, Any], rows: Sequence[Row], recipe: Recipe, complete: bool
) -> dict[str, Any]:
    """Returns the whole JSON.

    Args:
        content: What it says beside the runs.
        rows: The optimizers; AdamW comes first.
        recipe: What the runs have in common.
        complete: Whether nothing is missing.
    """
    return {
        **content,
        "complete": complete,
        "optimizers": {row.contender.name: row.to_dict(rows[0], recipe) for row in rows},
    }


def _plain(value: Estimate | None) -> dict[str, Any] | None:
    return None if value is None else dataclasses.asdict(value)


def _run_to_dict(run: Run, target: float) -> dict[str, Any]:
    reached = run.reached(target)
    last = run.curve[-1]
    return {
        "seed": run.seed,
        "learning_rate": run.learning_rate,
        "budget": run.budget,
        "reached": None if reached is None else dataclasses.asdict(reached),
        "final": dataclasses.asdict(last),
        "accuracy": [point.accuracy for point in run.curve],
        "stats": run.stats,
    }
