"""Three pictures a task: loss while training, the frontier, and loss against learning rate."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from frontier_statistics import BASELINE, Line, Tuning, seed_frontiers
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

Contenders = Mapping[tuple[str, str], Mapping[int, Tuning]]
LABEL_LENGTH = 44
LOG_FROM = 10.0
"""Axes are logarithmic where the largest loss shown is so many times the smallest."""
PANEL_COLUMNS = 3
DOTS_PER_INCH = 130


def label(name: str, options: Mapping[str, Any] | None) -> str:
    """A name with its options behind it, nested ones by their innermost names."""

    def flat(mapping: Mapping[str, Any]) -> list[str]:
        parts: list[str] = []
        for key, value in sorted(mapping.items()):
            parts += flat(value) if isinstance(value, Mapping) else [f"{key}={value}"]
        return parts

    return ", ".join([name, *flat(options or {})])


def draw_task(
    title: str,
    baseline: Mapping[int, Tuning],
    contenders: Contenders,
    directory: Path,
    stem: str,
) -> list[str]:
    """Draws the pictures of one task.

    Args:
        title: Of every picture.
        baseline: The baseline's tuned runs, by budget.
        contenders: The same of every other optimizer, by its name and its options as text.
        directory: Where the files go.
        stem: What their names begin with.

    Returns:
        The names of the files, in the order of a report.
    """
    styles = _styles(contenders)
    drawn = {
        "frontier": _draw_frontier(baseline, contenders, styles),
        "curves": _draw_curves(baseline, contenders, styles),
        "learning-rates": _draw_learning_rates(baseline, contenders, styles),
    }
    names = []
    for what, figure in drawn.items():
        figure.suptitle(title, fontsize=11, x=0.02, horizontalalignment="left")
        name = f"{stem}-{what}.png"
        figure.savefig(directory / name, dpi=DOTS_PER_INCH, bbox_inches="tight")
        pyplot.close(figure)
        names.append(name)
    return names


def _styles(contenders: Contenders) -> dict[tuple[str, str], dict[str, Any]]:
    """A colour and a marker for every contender, the same in all pictures."""
    colors = pyplot.get_cmap("tab10").colors
    markers = "osD^vP*X<>"
    styles = {}
    for index, (name, options) in enumerate(contenders):
        text = label(name, json.loads(options))
        if len(text) > LABEL_LENGTH:
            text = text[: LABEL_LENGTH - 1] + "…"
        styles[name, options] = {
            "color": colors[index % len(colors)],
            "marker": markers[(index + index // len(colors)) % len(markers)],
            "label": text,
        }
    return styles


def _finite(tuning: Tuning) -> list[float]:
    return [loss for loss in tuning.finals.values() if math.isfinite(loss)]


def _draw_frontier(
    baseline: Mapping[int, Tuning],
    contenders: Contenders,
    styles: Mapping[tuple[str, str], Mapping[str, Any]],
) -> Any:
    """The baseline's final loss against its budget, and the contenders' points."""
    figure, axes = pyplot.subplots(figsize=(8.4, 4.8), layout="constrained")
    for number, frontier in enumerate(seed_frontiers(baseline).values()):
        if len(frontier.budgets) < 2:
            continue
        budgets = np.geomspace(frontier.budgets[0], frontier.budgets[-1], 200)
        curve = [frontier.scaled_loss_at(float(budget)) for budget in budgets]
        losses = [
            math.nan if y is None else math.exp(y) if frontier.logarithmic else y for y in curve
        ]
        name = f"{BASELINE}, interpolated, each seed" if number == 0 else None
        axes.plot(budgets, losses, color="black", alpha=0.3, linewidth=1.0, label=name)
    everyone: list[tuple[Mapping[int, Tuning], dict[str, Any]]] = [
        (baseline, {"color": "black", "marker": "o", "label": f"{BASELINE}, tuned"})
    ]
    everyone += [(contenders[key], dict(styles[key])) for key in contenders]
    shown: list[float] = []
    # Optimizers with the same budget would hide each other's bars: they stand side by side.
    spread = np.linspace(-0.03, 0.03, len(contenders)) if len(contenders) > 1 else [0.0]
    for (by_budget, style), shift in zip(everyone, [0.0, *spread]):
        points = [(b, losses) for b, t in by_budget.items() if (losses := _finite(t))]
        if not points:
            continue
        means = np.array([np.mean(losses) for _, losses in points])
        lows = means - [min(losses) for _, losses in points]
        highs = [max(losses) for _, losses in points] - means
        at = [b * math.exp(shift) for b, _ in points]
        axes.errorbar(
            at, means, yerr=[lows, highs], linestyle="none", markersize=5, capsize=3, **style
        )
        shown += [loss for _, losses in points for loss in losses]
    _budget_axis(axes, sorted({b for by_budget, _ in everyone for b in by_budget}))
    _loss_axis(axes, shown)
    axes.set_xlabel("gradient evaluations")
    axes.set_ylabel("final loss (bars: lowest to highest seed)")
    _legend(figure, axes)
    return figure


def _draw_curves(
    baseline: Mapping[int, Tuning],
    contenders: Contenders,
    styles: Mapping[tuple[str, str], Mapping[str, Any]],
) -> Any:
    """Held-out loss against gradient evaluations and against wall time, at the main budget."""
    figure, panels = pyplot.subplots(1, 2, figsize=(10.0, 4.4), sharey=True, layout="constrained")
    counts = Counter(b for by_budget in contenders.values() for b in by_budget)
    counts = counts or Counter(baseline)
    main = max(counts, key=lambda budget: (counts[budget], budget in baseline, -budget), default=0)
    shown: list[float] = []
    others = [budget for budget in baseline if budget != main]
    for budget in others:
        name = f"{BASELINE}, other budgets" if budget == others[0] else None
        style = {"color": "0.7", "label": name, "linewidth": 0.9}
        shown += _draw_mean_curve(panels, baseline[budget], style, band=False)
    for key, by_budget in contenders.items():
        if main in by_budget:
            style = {name: styles[key][name] for name in ("color", "label")}
            shown += _draw_mean_curve(panels, by_budget[main], style)
    if main in baseline:
        style = {"color": "black", "label": f"{BASELINE}, {main:,} evaluations"}
        shown += _draw_mean_curve(panels, baseline[main], style)
    panels[0].set_xlabel("gradient evaluations")
    panels[1].set_xlabel("seconds")
    panels[0].set_ylabel("held-out loss (band: one standard deviation)")
    for axes in panels:
        axes.set_xscale("log")
        axes.grid(alpha=0.25)
    _loss_axis(panels[0], shown)
    _legend(figure, panels[0])
    return figure


def _draw_mean_curve(
    panels: Sequence[Any], tuning: Tuning, style: Mapping[str, Any], band: bool = True
) -> list[float]:
    """Draws the mean of the seeds that did not diverge; returns the losses it drew."""
    curves = [_curve(line) for seed, line in tuning.runs.items() if _kept(tuning, seed)]
    length = min((len(curve) for curve in curves), default=0)
    if length == 0:
        return []
    stacked = np.array([curve[:length] for curve in curves])
    at, losses = stacked.mean(axis=0), stacked[:, :, 2]
    middle, deviation = losses.mean(axis=0), losses.std(axis=0)
    for axes, column in zip(panels, (0, 1)):
        axes.plot(at[:, column], middle, **{"linewidth": 1.4, **style})
        if band and len(curves) > 1:
            low, high = middle - deviation, middle + deviation
            # A band that reaches 0 would take a logarithmic axis with it.
            low = np.maximum(low, losses.min(axis=0))
            axes.fill_between(at[:, column], low, high, color=style["color"], alpha=0.15, lw=0)
    return [float(loss) for loss in middle]


def _kept(tuning: Tuning, seed: int) -> bool:
    return math.isfinite(tuning.finals[seed])


def _curve(line: Line) -> list[tuple[float, float, float]]:
    """The points of a run that a logarithmic axis can show."""
    points = [p for p in line.get("curve") or [] if all(x is not None for x in p)]
    return [(x, t, y) for x, t, y in points if x > 0 and t > 0 and math.isfinite(y)]


def _draw_learning_rates(
    baseline: Mapping[int, Tuning],
    contenders: Contenders,
    styles: Mapping[tuple[str, str], Mapping[str, Any]],
) -> Any:
    """Final loss against learning rate: a panel for each budget, the chosen rates marked."""
    budgets = sorted({*baseline, *(b for by_budget in contenders.values() for b in by_budget)})
    columns = min(PANEL_COLUMNS, len(budgets))
    rows = math.ceil(len(budgets) / columns)
    size = (3.4 * columns + 0.6, 2.9 * rows + 0.4)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    everyone: list[tuple[Mapping[int, Tuning], dict[str, Any]]] = [
        (contenders[key], dict(styles[key])) for key in contenders
    ]
    everyone.append((baseline, {"color": "black", "marker": "o", "label": BASELINE}))
    for axes in grid.flat[len(budgets) :]:
        axes.set_axis_off()
    for axes, budget in zip(grid.flat, budgets):
        shown: list[float] = []
        for by_budget, style in everyone:
            if budget not in by_budget:
                continue
            tuning = by_budget[budget]
            rates = [rate for rate, mean in tuning.means.items() if math.isfinite(mean)]
            means = [tuning.means[rate] for rate in rates]
            axes.plot(rates, means, markersize=4, linewidth=1.1, **style)
            if tuning.lr in rates:
                best = tuning.means[tuning.lr]
                ring = {"marker": "o", "markersize": 10, "fillstyle": "none"}
                axes.plot([tuning.lr], [best], color=style["color"], linestyle="none", **ring)
            shown += means
        axes.set_title(f"{budget:,} gradient evaluations", fontsize=9)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", labelrotation=45)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        _loss_axis(axes, shown)
    figure.supxlabel("learning rate (ring: chosen; diverged ones are left out)", fontsize=9)
    figure.supylabel("final loss, mean of the seeds", fontsize=9)
    _legend(figure, *grid.flat)
    return figure


def _loss_axis(axes: Any, shown: Sequence[float]) -> None:
    """Makes the axis logarithmic where losses span orders of magnitude."""
    positive = [loss for loss in shown if loss > 0]
    if positive and len(positive) == len(shown) and max(shown) > LOG_FROM * min(shown):
        axes.set_yscale("log")


def _budget_axis(axes: Any, budgets: Sequence[int]) -> None:
    """A logarithmic axis with the budgets themselves as its ticks."""
    axes.set_xscale("log")
    if budgets and len(budgets) <= 8:
        axes.set_xticks(budgets)
    else:
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    axes.grid(alpha=0.25)


def _legend(figure: Any, *panels: Any) -> None:
    """One legend for all panels, right of them, each name once."""
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, name in zip(*axes.get_legend_handles_labels()):
            handles.setdefault(name, handle)
    if handles:
        figure.legend(
            handles.values(), handles.keys(), loc="outside right upper", fontsize=7, frameon=False
        )
