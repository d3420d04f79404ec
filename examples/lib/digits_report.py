"""What came out of the digits example: an optimizer's numbers, the table, and the plot."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from lib.digits_training import Contender, Recipe, Run
from lib.files import save_figure
from lib.statistics import Estimate, estimate, paired_ratios
from lib.tables import UNKNOWN, figures_table

TICKS = (0.5, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995)
MEASURES = ("gradients", "seconds", "processor_seconds")


@dataclass(frozen=True)
class Tried:
    """How a learning rate did on the tuning seeds, with runs of some budget.

    Attributes:
        evaluations: Gradient evaluations to the target on each seed; None where not reached.
        final_accuracies: Validation accuracy at the end, on each seed.
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
    """Everything about one optimizer: the rates tried, lowest first, and its runs by seed."""

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

    def needed(self, target: float, measure: str) -> list[Any]:
        """Returns what each run needed to reach an accuracy, as of `MEASURES`; None: it did not."""
        return [getattr(run.reached(target), measure, None) for run in self.runs.values()]

    def to_target(self, target: float, measure: str) -> Estimate | None:
        """Returns the mean of what the runs needed; None unless all got there."""
        values = self.needed(target, measure)
        # The mean of those that got there would flatter an optimizer that often does not.
        return None if None in values else estimate(values)

    def ratio(self, baseline: Row, target: float, measure: str) -> Estimate | None:
        """Returns how many times as much the baseline needed, paired by seed.

        None where there is no run, or one of a pair did not get there.
        """
        mine, runs = self.needed(target, measure), map(baseline.runs.get, self.runs)
        others: list[Any] = [getattr(run and run.reached(target), measure, None) for run in runs]
        return paired_ratios(others, mine) if mine and None not in (*mine, *others) else None

    def final_accuracy(self) -> Estimate | None:
        """Returns the mean test accuracy at the end."""
        return estimate([run.final_accuracy for run in self.runs.values()])

    def predicted_steps(self) -> Estimate | None:
        """Returns the mean number of predicted steps; None where there can be none."""
        counts = [run.predicted_steps for run in self.runs.values()]
        return estimate([count for count in counts if count is not None])

    def to_dict(self, baseline: Row, target: float) -> dict[str, Any]:
        """Returns all of it, for JSON, compared with the baseline."""

        def interval(found: Estimate | None) -> dict[str, Any] | None:
            return found.interval() if found else None

        return {
            **self.contender.to_dict(),
            "learning_rate": self.best.learning_rate if self.tried else None,
            "learning_rate_at_edge": self.at_edge if self.tried else None,
            "evaluations_to_target": self.needed(target, "gradients"),
            "to_target": {x: interval(self.to_target(target, x)) for x in MEASURES},
            "baseline_over_this": {x: interval(self.ratio(baseline, target, x)) for x in MEASURES},
            "final_accuracy": interval(self.final_accuracy()),
            "predicted_steps": interval(self.predicted_steps()),
            "tuning": [dataclasses.asdict(tried) for tried in self.tried],
            "runs": [_run_to_dict(run, target) for run in self.runs.values()],
        }


def faster(rows: Sequence[Row], target: float) -> Row:
    """Returns the optimizer that got to the target most often, and of those the soonest."""

    def slowness(row: Row) -> tuple[int, float]:
        needed = row.needed(target, "gradients")
        reached = [n for n in needed if n is not None]
        return needed.count(None), float(np.mean(reached)) if reached else math.inf

    return min(rows, key=slowness)


def _run_to_dict(run: Run, target: float) -> dict[str, Any]:
    reached = run.reached(target)
    return {
        "seed": run.seed,
        "learning_rate": run.learning_rate,
        "budget": run.budget,
        "reached": reached and dataclasses.asdict(reached),
        "final": dataclasses.asdict(run.curve[-1]),
        "accuracy": [point.accuracy for point in run.curve],
        "stats": run.stats,
    }


def result_table(rows: Sequence[Row], recipe: Recipe) -> Table:
    """Returns the table of all optimizers; AdamW comes first."""
    target, baseline = recipe.target, rows[0]
    seeds = " ".join(str(seed) for seed in baseline.runs)
    table = figures_table(
        f"Test accuracy of {100 * target:g} %, seeds {seeds}: mean, and 95 % interval by t",
        ("", "Learning\nrate", "Gradients\nto target", "AdamW's\nover these", "Seconds,\nof CPU",
         "Final\naccuracy", "Predicted\nsteps"),
        caption=f"Reached: at the first of the measurements made every {recipe.interval} "
        f"gradients. Final: after {recipe.budget} gradients; the control after as many as it was "
        "given.",
        caption_justify="left",
    )  # fmt: skip
    for row in rows:
        edge = "\nat edge" if row.at_edge else ""
        ratio = None if row is baseline else row.ratio(baseline, target, "gradients")
        seconds = [row.to_target(target, name) for name in ("seconds", "processor_seconds")]
        steps = row.predicted_steps()
        table.add_row(
            row.contender.title.replace(", ", ",\n"),
            f"{row.best.learning_rate:g}{edge}",
            _evaluations(row, target),
            _interval(ratio),
            "\n".join(f"{found.mean:.3f}" for found in seconds if found) or UNKNOWN,
            _spread_of(row.final_accuracy(), 100, "{:.2f}", " %"),
            UNKNOWN if steps is None else f"{steps.mean:.0f}",
        )
    return table


def _interval(ratio: Estimate | None) -> str:
    ends = f"\n{ratio.low:.2f} to {ratio.high:.2f}" if ratio and ratio.low is not None else ""
    return UNKNOWN if ratio is None else f"{ratio.mean:.2f}x{ends}"


def _spread_of(found: Estimate | None, scale: float, form: str, unit: str = "") -> str:
    """Shows a mean, and how far its interval goes to either side."""
    if found is None:
        return UNKNOWN
    half = [] if found.low is None else ["± " + form.format(scale * (found.mean - found.low))]
    return "\n".join([form.format(scale * found.mean) + unit, *half])


def _evaluations(row: Row, target: float) -> str:
    found = row.to_target(target, "gradients")
    if found is not None:
        return _spread_of(found, 1, "{:.1f}")
    needed = row.needed(target, "gradients")
    reached = [n for n in needed if n is not None]
    mean = f"\nthose {np.mean(reached):.0f}" if reached else ""
    return f"{len(reached)} of {len(needed)}{mean}"


def write_plot(path: Path, rows: Sequence[Row], recipe: Recipe, title: str) -> None:
    """Draws test accuracy against gradient evaluations: every seed, and their mean."""
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    whole, start = figure.subplots(1, 2)
    needed = [n for row in rows for n in row.needed(recipe.target, "gradients") if n is not None]
    for axis in (whole, start):
        for row in rows:
            _draw(axis, row)
        axis.axhline(recipe.target, color="0.3", ls="--", lw=1)
        axis.set_yscale("logit", nonpositive="clip")
        axis.minorticks_off()
        axis.set_yticks(TICKS, [f"{100 * tick:g} %" for tick in TICKS])
        axis.set_ylim(0.3, 0.999)
        axis.set_xlabel("gradient evaluations")
        axis.grid(alpha=0.25)
    start.set_xlim(0, 1.25 * max(needed, default=recipe.budget))
    start.set_title("until the target")
    whole.set_title("whole runs")
    whole.set_ylabel("test accuracy, spread out towards 100 %")
    whole.legend(fontsize="small", loc="lower right")
    figure.suptitle(title)
    save_figure(path, figure)


def _draw(axis: Axes, row: Row) -> None:
    runs = [run.curve for run in row.runs.values()]
    curves = [([x.gradients for x in curve], [x.accuracy for x in curve]) for curve in runs]
    title, colour = row.contender.title, row.contender.colour
    for x, y in curves:
        axis.plot(x, y, color=colour, lw=0.6, alpha=0.45)
    if all(x == curves[0][0] for x, _ in curves):
        mean = np.mean([y for _, y in curves], axis=0)
        axis.plot(curves[0][0], mean, color=colour, lw=1.8, label=title)
    else:
        # Runs of different lengths have no mean curve; what counts is where they end.
        ends = [(x[-1], y[-1]) for x, y in curves]
        axis.plot(*zip(*ends), color=colour, marker="*", ms=10, ls="", label=title)
