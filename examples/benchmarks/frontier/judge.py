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

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.optimize import brentq

from lib.run_store import Line
from lib.statistics import Estimate, bootstrap, estimate

BASELINE = "adamw"
MINIMUM_LEARNING_RATES = 4
# Where the largest loss of a frontier is so many times its smallest, logarithms are compared.
LOG_SCALE_FROM = 10.0
SMALLEST_LOSS = 1e-300  # stands in for a loss of 0 where logarithms are taken
# Of a budget between measured ones that double (at most 1.02 for losses from a power law to an
# exponential): a speed-up at a budget the baseline was not run at must exceed it.
INTERPOLATION_ERROR = 1.03
BUDGET_TOLERANCE = 0.005
AT_LEAST, AT_MOST = "at least", "at most"

K = TypeVar("K", bound=Any)


def final_loss(line: Line) -> float:
    """The loss a run is judged by; infinite where it diverged or has none."""
    final = line.get("final")
    if line.get("diverged") or final is None or not math.isfinite(final):
        return math.inf
    return float(final)


def grouped(lines: Iterable[Line], key: Callable[[Line], K]) -> dict[K, list[Line]]:
    """The lines of each key, in increasing order of the keys."""
    found: dict[K, list[Line]] = {}
    for line in lines:
        found.setdefault(key(line), []).append(line)
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Tuning:
    """The learning rates tried with one optimizer at one budget, and the best of them."""

    budget: int
    lr: float  # with the lowest mean final loss: see `tune`
    means: dict[float, float]  # of each rate tried, increasing; infinite where a run diverged
    tuning_seeds: tuple[int, ...]  # those that every rate was run with
    runs: dict[int, Line]  # at `lr`, by seed; maybe of more seeds than it was chosen with
    problem: str | None  # why this does not count as tuned; None if it does

    @cached_property
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
    in_order = sorted(lines, key=lambda line: str(line["key"]))
    by_rate = {
        rate: {int(line["seed"]): line for line in runs}
        for rate, runs in grouped(in_order, lambda line: float(line["lr"])).items()
    }
    rates, seeds_of = list(by_rate), {rate: set(runs) for rate, runs in by_rate.items()}

    def mean(rate: float, seeds: Iterable[int]) -> float:
        return float(np.mean([final_loss(by_rate[rate][seed]) for seed in sorted(seeds)]))

    means = {rate: mean(rate, by_rate[rate]) for rate in rates}
    shared = set.intersection(*seeds_of.values())
    most = max(seeds_of.values(), key=lambda seeds: (len(seeds), sorted(seeds)))
    complete = [rate for rate in rates if most <= seeds_of[rate]]
    best = min(complete, key=lambda rate: (mean(rate, most), rate))
    common = {rate: most & seeds_of[rate] for rate in rates if rate not in complete}
    better = [r for r, seeds in common.items() if seeds and mean(r, seeds) < mean(best, seeds)]
    runs = dict(sorted(by_rate[best].items()))
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
    # Others may end early where they have converged: that is their loss, not their gain.
    elif any(
        _share_of_budget(run) < 1 - BUDGET_TOLERANCE and not run.get("diverged")
        for run in runs.values()
        if run["optimizer"] == BASELINE
    ):
        problem = "runs with fewer gradient evaluations than their budget"
    return Tuning(budgets.pop(), best, means, tuple(sorted(shared)), runs, problem)


def _share_of_budget(line: Line) -> float:
    return int(line.get("gradient_evaluations") or line["budget"]) / int(line["budget"])


def tune_budgets(lines: Iterable[Line]) -> dict[int, Tuning]:
    """The tuned learning rate at each budget of one optimizer, in increasing order of budget."""
    by_budget = grouped(lines, lambda line: int(line["budget"]))
    return {budget: tune(runs) for budget, runs in by_budget.items()}


@dataclass(frozen=True)
class Need:
    """What a frontier needs for a loss."""

    budget: float  # gradient evaluations; the end of what was measured where `bound` is set
    bound: str | None  # whether the true number is "at least" or "at most" `budget`
    brackets: tuple[int, ...]  # the measured budgets the answer was read from


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

    def unscaled(self, loss: float) -> float:
        """The loss of which `scaled` is given."""
        return math.exp(loss) if self.logarithmic else loss

    def needed(self, loss: float) -> Need:
        """How many gradient evaluations the frontier needs for this loss.

        Raises:
            ValueError: The frontier has no point, since every run of it diverged.
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


@dataclass(frozen=True)
class Comparison:
    """A contender at one budget against the baseline, over the seeds of both."""

    # Geometric mean of the frontier's budget for the contender's final loss, divided by the
    # contender's budget: ends from Student's t on its logarithm, or (from 5 seeds on) by bootstrap.
    speedup: Estimate | None
    speedup_bootstrap: Estimate | None
    speedup_by_seed: dict[int, tuple[float, str | None]]  # with its bound
    # How the true speed-up lies to `speedup`: "at least" or "at most" where some seed's answer
    # lies outside the measured budgets, "unknown" where both occur.
    bound: str | None
    # Contender minus the baseline with the same number of gradient evaluations and its schedule
    # compressed to them, and (where losses span orders of magnitude) the geometric mean of their
    # ratio. None where a run diverged.
    loss_difference: Estimate | None
    loss_ratio: Estimate | None
    # "measured" where the baseline was run at this budget, "interpolated" where its frontier was
    # read there instead, None where neither is possible.
    control: str | None
    seeds: tuple[int, ...]  # those compared
    unpaired_seeds: tuple[int, ...]  # left out: the baseline lacks them
    diverged: int  # how many of the compared runs did
    verdict: str  # "faster", "slower", "none", "undecided" or "planted"
    reasons: tuple[str, ...]  # why it is not a better one, and what else is worth knowing


def compare(contender: Tuning, baseline: Mapping[int, Tuning]) -> Comparison:
    """Judges a contender at one budget; runs may be marked as planted, to check the harness.

    "faster" and "slower" need two things: an interval of the speed-up without 1, and an interval
    of the loss difference at equal budget without 0. Where the frontier is flat a small
    difference in loss is a large one in budget, and the first alone is then little evidence.
    """
    frontiers = seed_frontiers(baseline)
    finals, budget = contender.finals, contender.budget
    seeds = [seed for seed in finals if seed in frontiers]
    needs = {seed: frontiers[seed].needed(finals[seed]) for seed in seeds}
    logs = [math.log(need.budget / budget) for need in needs.values()]
    log_speedup, log_bootstrap = estimate(logs), bootstrap(logs)
    bounds = {need.bound for need in needs.values()} - {None}
    bound = None if not bounds else bounds.pop() if len(bounds) == 1 else "unknown"
    diverged = sum(not math.isfinite(finals[seed]) for seed in seeds)
    control, raw, scaled = _differences(contender, baseline, {s: frontiers[s] for s in seeds})
    margin = 0.0 if budget in baseline else math.log(INTERPOLATION_ERROR)
    verdict, reasons = _verdict(log_speedup, scaled, bound, diverged, margin)
    required = {b for need in needs.values() for b in need.brackets} | ({budget} & set(baseline))
    unfair = [
        f"baseline not tuned: {baseline[b].problem} at {b:,}"
        for b in sorted(required)
        if baseline[b].problem
    ]
    over = [s for s in seeds if _share_of_budget(contender.runs[s]) > 1 + BUDGET_TOLERANCE]
    if over:
        unfair.append(f"seeds {over} used more gradient evaluations than their budget")
    if verdict == "faster" and unfair:
        verdict = "none"
    reasons += unfair
    if contender.problem is not None:
        reasons.append(f"contender not tuned, it may be better than this: {contender.problem}")
    planted = sorted({str(x["planted"]) for x in contender.runs.values() if x.get("planted")})
    reasons += [f"planted: {what}" for what in planted]
    return Comparison(
        speedup=log_speedup and log_speedup.exponential(),
        speedup_bootstrap=log_bootstrap and log_bootstrap.exponential(),
        speedup_by_seed={s: (need.budget / budget, need.bound) for s, need in needs.items()},
        bound=bound,
        loss_difference=raw,
        loss_ratio=scaled.exponential() if scaled and spans_orders_of_magnitude(baseline) else None,
        control=control,
        seeds=tuple(seeds),
        unpaired_seeds=tuple(seed for seed in finals if seed not in frontiers),
        diverged=diverged,
        verdict="planted" if planted else verdict,
        reasons=tuple(reasons),
    )


def _differences(
    contender: Tuning, baseline: Mapping[int, Tuning], frontiers: Mapping[int, Frontier]
) -> tuple[str | None, Estimate | None, Estimate | None]:
    """Contender minus baseline, in loss and on the frontier's scale, after the kind of control."""
    budget, finals = contender.budget, contender.finals
    same = baseline[budget].finals if budget in baseline else {}
    theirs = {seed: frontiers[seed].scaled(same[seed]) for seed in frontiers if seed in same}
    control = "measured" if theirs else None
    if not theirs:
        read = {seed: frontier.scaled_loss_at(budget) for seed, frontier in frontiers.items()}
        theirs = {seed: loss for seed, loss in read.items() if loss is not None}
        control = "interpolated" if theirs else None
    if not all(math.isfinite(finals[seed]) and math.isfinite(theirs[seed]) for seed in theirs):
        return control, None, None
    raw = [finals[seed] - frontiers[seed].unscaled(loss) for seed, loss in theirs.items()]
    scaled = [frontiers[seed].scaled(finals[seed]) - loss for seed, loss in theirs.items()]
    return control, estimate(raw), estimate(scaled)


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
