"""How many gradient evaluations a tuned baseline needs for the loss that a contender reached.

The baseline's *frontier* is its final loss against its budget, each budget with its own complete
schedule and its own tuned learning rate. A contender's speed-up is the budget at which the
frontier has the contender's final loss, divided by the contender's budget. Frontier and contender
are compared seed by seed, since a seed fixes the initial weights and the order of the data for
both; so the spread of the speed-up over seeds contains the noise of the frontier as well as that
of the contender. What the pairing does not contain is the choice of learning rates: both sides
choose theirs by the same rule, on seeds that are then also used to compare them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.optimize import brentq
from scipy.stats import t as student_t

Line = dict[str, Any]
"""One finished run, as it was written: a line of JSON."""

BASELINE = "adamw"
CONFIDENCE = 0.95
MINIMUM_LEARNING_RATES = 4
LOG_SCALE_FROM = 10.0
"""Where the largest loss of a frontier is so many times its smallest, logarithms are compared."""
SMALLEST_LOSS = 1e-300
"""Stands in for a loss of 0 where logarithms are taken."""
INTERPOLATION_ERROR = 1.03
"""Of a budget between measured ones that double (at most 1.02 for losses from a power law to an
exponential): a speed-up at a budget the baseline was not run at must exceed it."""
BOOTSTRAP_FROM, BOOTSTRAP_RESAMPLES, BOOTSTRAP_SEED = 5, 10_000, 0
AT_LEAST, AT_MOST = "at least", "at most"


def final_loss(line: Line) -> float:
    """The loss a run is judged by; infinite where it diverged or has none."""
    final = line.get("final")
    if line.get("diverged") or final is None or not math.isfinite(final):
        return math.inf
    return float(final)


def canonical(options: Mapping[str, Any] | None) -> str:
    """Options as text that does not depend on the order of their names."""
    return json.dumps(options or {}, sort_keys=True, default=str)


@dataclass(frozen=True)
class Tuning:
    """The learning rates tried with one optimizer at one budget, and the best of them.

    Attributes:
        budget: Gradient evaluations a run.
        lr: The learning rate with the lowest mean final loss (see `tune`).
        means: That mean, for each learning rate tried, in increasing order; infinite where a
            run diverged.
        tuning_seeds: The seeds that every learning rate was run with.
        runs: The runs at ``lr``, by seed; there may be more seeds than those it was chosen with.
        problem: Why this does not count as tuned, or None if it does.
    """

    budget: int
    lr: float
    means: dict[float, float]
    tuning_seeds: tuple[int, ...]
    runs: dict[int, Line]
    problem: str | None

    @property
    def finals(self) -> dict[int, float]:
        """The final loss at ``lr``, by seed; infinite where the run diverged."""
        return {seed: final_loss(line) for seed, line in self.runs.items()}


def tune(lines: Sequence[Line]) -> Tuning:
    """Chooses the learning rate from runs that differ in nothing but learning rate and seed.

    The rates with the most seeds compete by their means over those. A rate with fewer seeds was
    given up on the way: where it is better than the winner on the seeds that it has, nobody
    knows which of the two is best, and the choice does not count as tuned.
    """
    budgets = {int(line["budget"]) for line in lines}
    if len(budgets) != 1:
        raise ValueError(f"lines: runs of budgets {sorted(budgets)}; allowed is exactly one budget")
    by_rate: dict[float, dict[int, Line]] = {}
    for line in sorted(lines, key=lambda line: str(line["key"])):
        by_rate.setdefault(float(line["lr"]), {})[int(line["seed"])] = line
    rates = sorted(by_rate)
    shared = set.intersection(*(set(by_rate[rate]) for rate in rates))

    def mean(rate: float, seeds: Iterable[int]) -> float:
        return float(np.mean([final_loss(by_rate[rate][seed]) for seed in sorted(seeds)]))

    means = {rate: mean(rate, by_rate[rate]) for rate in rates}
    most = max(
        (set(by_rate[rate]) for rate in rates), key=lambda seeds: (len(seeds), sorted(seeds))
    )
    complete = [rate for rate in rates if most <= set(by_rate[rate])]
    best = min(complete, key=lambda rate: (mean(rate, most), rate))
    given_up = [rate for rate in rates if rate not in complete and most & set(by_rate[rate])]
    better = [
        rate
        for rate in given_up
        if mean(rate, most & set(by_rate[rate])) < mean(best, most & set(by_rate[rate]))
    ]
    problem = None
    if not math.isfinite(means[best]):
        problem = "every learning rate diverged"
    elif len(rates) < MINIMUM_LEARNING_RATES:
        problem = f"fewer than {MINIMUM_LEARNING_RATES} learning rates"
    elif not shared:
        problem = "no seed was run with every learning rate"
    elif better:
        problem = f"learning rate {better[0]:g} is better on the seeds it was run with"
    elif best in (rates[0], rates[-1]):
        problem = "best learning rate at the edge of the grid"
    runs = dict(sorted(by_rate[best].items()))
    # Others may end early where they have converged: that is their loss, not their gain.
    finished = [x for x in runs.values() if x["optimizer"] == BASELINE and not x.get("diverged")]
    if problem is None and any(_evaluations(x) < 0.995 * int(x["budget"]) for x in finished):
        problem = "runs with fewer gradient evaluations than their budget"
    return Tuning(budgets.pop(), best, means, tuple(sorted(shared)), runs, problem)


def tune_budgets(lines: Iterable[Line]) -> dict[int, Tuning]:
    """The tuned learning rate at each budget of one optimizer, in increasing order of budget."""
    by_budget: dict[int, list[Line]] = {}
    for line in lines:
        by_budget.setdefault(int(line["budget"]), []).append(line)
    return {budget: tune(by_budget[budget]) for budget in sorted(by_budget)}


@dataclass(frozen=True)
class Need:
    """What a frontier needs for a loss.

    Attributes:
        budget: Gradient evaluations; at the end of what was measured where ``bound`` is set.
        bound: None, or whether the true number is "at least" or "at most" ``budget``.
        brackets: The measured budgets the answer was read from.
    """

    budget: float
    bound: str | None
    brackets: tuple[int, ...]


class Frontier:
    """The final loss of one seed's baseline against its budget, as a curve that can be inverted.

    A point counts where it is lower than all points of smaller budgets: the frontier is the best
    loss within a budget. (Isotonic regression would average a loss that rises again, where the
    baseline overfits, into a curve that the baseline itself beats.) Between the points it is
    interpolated by monotone cubics (PCHIP: Fritsch and Carlson 1980) in the logarithm of the
    budget. It is never extrapolated.

    Args:
        losses: The final loss at each budget; an infinite one is a run that diverged.
        logarithmic: Whether to interpolate the loss's logarithm.
    """

    def __init__(self, losses: Mapping[int, float], logarithmic: bool = False) -> None:
        self.logarithmic = logarithmic
        self.measured = tuple(sorted(losses))
        self.budgets: list[int] = []
        self.losses: list[float] = []
        for budget in self.measured:
            loss = self.scaled(losses[budget])
            if math.isfinite(loss) and (not self.losses or loss < self.losses[-1]):
                self.budgets.append(budget)
                self.losses.append(loss)
        self._curve = None
        if len(self.budgets) > 1:
            self._curve = PchipInterpolator(np.log(self.budgets), self.losses)

    def scaled(self, loss: float) -> float:
        """The loss on the scale of interpolation."""
        return math.log(max(loss, SMALLEST_LOSS)) if self.logarithmic else loss

    def needed(self, loss: float) -> Need:
        """How many gradient evaluations the frontier needs for this loss.

        Raises:
            ValueError: If the frontier has no point, since every run of it diverged.
        """
        if not self.budgets:
            raise ValueError("losses: all infinite; allowed is at least one finite loss")
        target = self.scaled(loss)
        if not target <= self.losses[0]:
            first = self.budgets[0]
            return Need(first, AT_MOST, tuple(b for b in self.measured if b <= first))
        if target < self.losses[-1]:
            last = self.budgets[-1]
            return Need(self.measured[-1], AT_LEAST, tuple(b for b in self.measured if b >= last))
        right = next(i for i, value in enumerate(self.losses) if value <= target)
        upper = self.budgets[right]
        if self.losses[right] == target or self._curve is None:
            return Need(upper, None, (upper,))
        lower, curve = self.budgets[right - 1], self._curve
        between = tuple(b for b in self.measured if lower <= b <= upper)
        ends = math.log(lower), math.log(upper)
        if float(curve(ends[1])) >= target:  # it meets its last point up to rounding only
            return Need(upper, None, between)
        return Need(math.exp(brentq(lambda x: float(curve(x)) - target, *ends)), None, between)

    def scaled_loss_at(self, budget: float) -> float | None:
        """The loss at a budget on the scale of interpolation, or None outside the measured."""
        if self._curve is None or not self.budgets[0] <= budget <= self.budgets[-1]:
            return None
        return float(self._curve(math.log(budget)))


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% confidence interval; the ends are None where there is none."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def exponential(self) -> Estimate:
        """The same for the geometric mean, when this one is of logarithms."""
        # Two seeds far apart give ends beyond any float.
        values = (self.mean, self.low, self.high)
        mean, low, high = (None if x is None else math.exp(min(x, 700.0)) for x in values)
        assert mean is not None
        return Estimate(mean, low, high, self.n)


def t_interval(values: Sequence[float]) -> Estimate | None:
    """The mean and its 95% interval by Student's t, the one verdicts use; one value has none."""
    count = len(values)
    if count == 0:
        return None
    mean = float(np.mean(values))
    if count == 1:
        return Estimate(mean, None, None, 1)
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    half = float(student_t.ppf((1.0 + CONFIDENCE) / 2.0, count - 1)) * error
    return Estimate(mean, mean - half, mean + half, count)


def bootstrap_interval(values: Sequence[float]) -> Estimate | None:
    """The mean and its 95% percentile bootstrap interval, over seeds; none below 5, too few."""
    count = len(values)
    if count < BOOTSTRAP_FROM:
        return None
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    drawn = generator.integers(count, size=(BOOTSTRAP_RESAMPLES, count))
    means = np.asarray(values, dtype=float)[drawn].mean(axis=1)
    low, high = np.quantile(means, [0.5 - CONFIDENCE / 2.0, 0.5 + CONFIDENCE / 2.0])
    return Estimate(float(np.mean(values)), float(low), float(high), count)


@dataclass(frozen=True)
class Comparison:
    """A contender at one budget against the baseline.

    Attributes:
        speedup: Geometric mean over seeds of the frontier's budget for the contender's final
            loss, divided by the contender's budget; ends from Student's t on its logarithm.
        speedup_bootstrap: The same by paired bootstrap, from 5 seeds on.
        speedup_by_seed: Each seed's, with its bound.
        bound: None, or how the true speed-up lies to ``speedup``: "at least" or "at most" where
            some seed's answer lies outside the measured budgets, "unknown" where both occur.
        loss_difference: Contender minus the baseline with the same number of gradient evaluations
            and its schedule compressed to them. None where a run diverged.
        loss_ratio: The geometric mean of their ratio, where losses span orders of magnitude.
        control: "measured" where the baseline was run at this budget, "interpolated" where its
            frontier was read there instead, None where neither is possible.
        seeds: The seeds compared.
        unpaired_seeds: Seeds the baseline lacks; they are left out.
        diverged: How many of the compared runs diverged.
        verdict: "faster", "slower", "none", "undecided" or "planted".
        reasons: Why the verdict is not a better one, and what else is worth knowing.
    """

    speedup: Estimate | None
    speedup_bootstrap: Estimate | None
    speedup_by_seed: dict[int, tuple[float, str | None]]
    bound: str | None
    loss_difference: Estimate | None
    loss_ratio: Estimate | None
    control: str | None
    seeds: tuple[int, ...]
    unpaired_seeds: tuple[int, ...]
    diverged: int
    verdict: str
    reasons: tuple[str, ...]


def spans_orders_of_magnitude(baseline: Mapping[int, Tuning]) -> bool:
    """Whether losses of this frontier are to be compared by their logarithms."""
    losses = [x for t in baseline.values() for x in t.finals.values() if math.isfinite(x)]
    said = any(x.get("loss_scale") == "log" for t in baseline.values() for x in t.runs.values())
    if not losses or min(losses) < 0:
        return False
    return said or max(losses) > LOG_SCALE_FROM * min(losses)


def seed_frontiers(baseline: Mapping[int, Tuning]) -> dict[int, Frontier]:
    """The frontier of each seed that has at least one finite loss."""
    logarithmic = spans_orders_of_magnitude(baseline)
    frontiers = {}
    for seed in sorted({seed for tuning in baseline.values() for seed in tuning.runs}):
        losses = {b: t.finals[seed] for b, t in baseline.items() if seed in t.runs}
        frontiers[seed] = Frontier(losses, logarithmic)
    return {seed: frontier for seed, frontier in frontiers.items() if frontier.budgets}


def compare(contender: Tuning, baseline: Mapping[int, Tuning], planted: bool = False) -> Comparison:
    """Judges a contender at one budget; ``planted`` marks a check of the harness itself.

    "faster" and "slower" need two things: an interval of the speed-up without 1, and an interval
    of the loss difference at equal budget without 0. Where the frontier is flat a small
    difference in loss is a large one in budget, and the first alone is then little evidence.
    """
    frontiers = seed_frontiers(baseline)
    finals = contender.finals
    seeds = [seed for seed in finals if seed in frontiers]
    needs = {seed: frontiers[seed].needed(finals[seed]) for seed in seeds}
    logs = [math.log(needs[seed].budget / contender.budget) for seed in seeds]
    bounds = {need.bound for need in needs.values()} - {None}
    same = baseline[contender.budget].runs if contender.budget in baseline else {}
    measured = [seed for seed in seeds if seed in same]
    pairs = {seed: frontiers[seed].scaled(final_loss(same[seed])) for seed in measured}
    if not measured:
        read = {seed: frontiers[seed].scaled_loss_at(contender.budget) for seed in seeds}
        pairs = {seed: loss for seed, loss in read.items() if loss is not None}
    raw, scaled = _differences(finals, pairs, frontiers)
    log_speedup, bootstrap = t_interval(logs), bootstrap_interval(logs)
    bound = None if not bounds else bounds.pop() if len(bounds) == 1 else "unknown"
    diverged = sum(not math.isfinite(finals[seed]) for seed in seeds)
    required = {budget for need in needs.values() for budget in need.brackets}
    required |= {contender.budget} & set(baseline)
    margin = 0.0 if contender.budget in baseline else math.log(INTERPOLATION_ERROR)
    verdict, reasons = _verdict(log_speedup, scaled, bound, diverged, margin)
    untuned = {b: baseline[b].problem for b in sorted(required) if baseline[b].problem}
    unfair = [f"baseline not tuned: {problem} at {b:,}" for b, problem in untuned.items()]
    over = [s for s in seeds if _evaluations(contender.runs[s]) > 1.005 * contender.budget]
    if over:
        unfair.append(f"seeds {over} used more gradient evaluations than their budget")
    if verdict == "faster" and unfair:
        verdict = "none"
    reasons += unfair
    if contender.problem is not None:
        reasons.append(f"contender not tuned, it may be better than this: {contender.problem}")
    if planted:
        verdict = "planted"
    return Comparison(
        speedup=log_speedup and log_speedup.exponential(),
        speedup_bootstrap=bootstrap and bootstrap.exponential(),
        speedup_by_seed={s: (needs[s].budget / contender.budget, needs[s].bound) for s in seeds},
        bound=bound,
        loss_difference=raw,
        loss_ratio=scaled.exponential() if scaled and spans_orders_of_magnitude(baseline) else None,
        control=None if not pairs else "measured" if measured else "interpolated",
        seeds=tuple(seeds),
        unpaired_seeds=tuple(seed for seed in finals if seed not in frontiers),
        diverged=diverged,
        verdict=verdict,
        reasons=tuple(reasons),
    )


def _differences(
    finals: Mapping[int, float], pairs: Mapping[int, float], frontiers: Mapping[int, Frontier]
) -> tuple[Estimate | None, Estimate | None]:
    """Contender minus baseline: in loss, and on the scale of the frontier."""
    if not all(math.isfinite(finals[seed]) and math.isfinite(pairs[seed]) for seed in pairs):
        return None, None
    scaled = [frontiers[seed].scaled(finals[seed]) - loss for seed, loss in pairs.items()]
    logarithmic = any(frontier.logarithmic for frontier in frontiers.values())
    raw = [finals[s] - (math.exp(loss) if logarithmic else loss) for s, loss in pairs.items()]
    return t_interval(raw), t_interval(scaled)


def _verdict(
    speedup: Estimate | None,
    difference: Estimate | None,
    bound: str | None,
    diverged: int,
    margin: float,
) -> tuple[str, list[str]]:
    """The verdict if baseline and contender are tuned, with what stands in its way."""
    if speedup is None:
        return "undecided", ["no seed in common with a baseline that did not diverge"]
    if speedup.low is None or speedup.high is None:
        return "undecided", ["one seed: no interval"]
    if diverged:
        worse = diverged == speedup.n and speedup.mean < 0
        return "slower" if worse else "none", [f"{diverged} of {speedup.n} runs diverged"]
    if speedup.low <= margin and speedup.high >= -margin:
        return "none", []
    claim, allowed = ("faster", AT_LEAST) if speedup.low > margin else ("slower", AT_MOST)
    if bound not in (None, allowed):
        return "none", [f"the frontier was not measured far enough to say {claim}"]
    if difference is None or difference.low is None or difference.high is None:
        return "none", ["no interval of the loss difference at this budget"]
    agrees = difference.high < 0 if claim == "faster" else difference.low > 0
    return (claim, []) if agrees else ("none", ["the loss at equal budget does not differ"])


def _evaluations(line: Line) -> int:
    return int(line.get("gradient_evaluations") or line["budget"])
