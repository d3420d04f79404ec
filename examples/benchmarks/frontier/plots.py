"""Three pictures a task: loss while training, the frontier, and loss against learning rate."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from frontier.judge import BASELINE, Tuning, seed_frontiers
from lib.files import save_figure

LABEL_LENGTH = 44
LOG_FROM = 10.0  # axes are logarithmic where the largest loss is so many times the smallest
PANEL_COLUMNS = 3
MARKERS = "osD^vP*X<>"

ByBudget = Mapping[int, Tuning]
# The tuned runs of an optimizer, and how they are drawn: the same in all pictures.
Series = tuple[ByBudget, dict[str, Any]]


def label(name: str, options: Mapping[str, Any] | None) -> str:
    """A name with its options behind it, nested ones by their innermost names."""
    parts = [name]
    for key, value in sorted((options or {}).items()):
        parts.append(label("", value) if isinstance(value, Mapping) else f"{key}={value}")
    return ", ".join(part for part in parts if part)


def draw_task(
    title: str,
    baseline: ByBudget,
    contenders: Mapping[tuple[str, str], ByBudget],
    directory: Path,
    stem: str,
) -> list[str]:
    """Draws the pictures of one task, and returns the names of their files.

    Args:
        title: Of every picture.
        baseline: The baseline's tuned runs, by budget.
        contenders: The same of every other optimizer, by its name and its options as text.
        directory: Where the files go.
        stem: What their names begin with.
    """
    others = _styled(contenders)
    names = []
    for draw in (_draw_frontier, _draw_curves, _draw_learning_rates):
        figure = draw(baseline, others)
        figure.suptitle(title, fontsize=11, x=0.02, horizontalalignment="left")
        names.append(f"{stem}-{draw.__name__.removeprefix('_draw_').replace('_', '-')}.png")
        save_figure(directory / names[-1], figure, 130, bbox_inches="tight")
    return names


def _styled(contenders: Mapping[tuple[str, str], ByBudget]) -> list[Series]:
    colors: Any = colormaps["tab10"].colors  # type: ignore[attr-defined]
    series = []
    for index, ((name, options), by_budget) in enumerate(contenders.items()):
        text = label(name, json.loads(options))
        style = {
            "color": colors[index % len(colors)],
            "marker": MARKERS[(index + index // len(colors)) % len(MARKERS)],
            "label": text if len(text) <= LABEL_LENGTH else text[: LABEL_LENGTH - 1] + "…",
        }
        series.append((by_budget, style))
    return series


def _draw_frontier(baseline: ByBudget, others: Sequence[Series]) -> Figure:
    """The baseline's final loss against its budget, and the contenders' points."""
    figure = Figure(figsize=(8.4, 4.8), layout="constrained")
    axes = figure.subplots()
    for number, frontier in enumerate(seed_frontiers(baseline).values()):
        if len(frontier.budgets) > 1:
            line = np.geomspace(frontier.budgets[0], frontier.budgets[-1], 200)
            curve = [frontier.scaled_loss_at(float(budget)) for budget in line]
            losses = [math.nan if y is None else frontier.unscaled(y) for y in curve]
            name = f"{BASELINE}, interpolated, each seed" if number == 0 else None
            axes.plot(line, losses, color="black", alpha=0.3, linewidth=1.0, label=name)
    style = {"color": "black", "marker": "o", "label": f"{BASELINE}, tuned"}
    everyone = [(baseline, style), *others]
    # Optimizers with the same budget would hide each other's bars: they stand side by side.
    shifts = [0.0, *(np.linspace(-0.03, 0.03, len(others)) if len(others) > 1 else [0.0])]
    shown: list[float] = []
    for (by_budget, style), shift in zip(everyone, shifts):
        finals = {b: [x for x in t.finals.values() if x < math.inf] for b, t in by_budget.items()}
        points = [(b * math.exp(shift), losses) for b, losses in finals.items() if losses]
        if points:
            at, seeds = zip(*points)
            means = np.array([np.mean(losses) for losses in seeds])
            bars = [means - list(map(min, seeds)), list(map(max, seeds)) - means]
            options: dict[str, Any] = {"linestyle": "none", "markersize": 5, "capsize": 3, **style}
            axes.errorbar(at, means, yerr=bars, **options)
            shown += [loss for losses in seeds for loss in losses]
    axes.set_xscale("log")
    budgets = sorted({budget for by_budget, _ in everyone for budget in by_budget})
    if len(budgets) <= 8:
        axes.set_xticks(budgets)
    else:
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    _loss_axis(axes, shown)
    axes.set_xlabel("gradient evaluations")
    axes.set_ylabel("final loss (bars: lowest to highest seed)")
    _legend(figure, [axes])
    return figure


def _draw_curves(baseline: ByBudget, others: Sequence[Series]) -> Figure:
    """Held-out loss against gradient evaluations and against wall time, at the main budget."""
    figure = Figure(figsize=(10.0, 4.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    counts = Counter(b for by_budget, _ in others for b in by_budget) or Counter(baseline)
    main = max(counts, key=lambda budget: (counts[budget], budget in baseline, -budget), default=0)
    shown: list[float] = []
    name: str | None = f"{BASELINE}, other budgets"
    for budget in baseline:
        if budget != main:
            style = {"color": "0.7", "label": name, "linewidth": 0.9}
            shown += _draw_mean_curve(panels, baseline[budget], style, band=False)
            name = None
    own = {"color": "black", "label": f"{BASELINE}, {main:,} evaluations"}
    for by_budget, style in [*others, (baseline, own)]:
        if main in by_budget:
            style = {key: style[key] for key in ("color", "label")}
            shown += _draw_mean_curve(panels, by_budget[main], style)
    panels[0].set_ylabel("held-out loss (band: one standard deviation)")
    for axes, text in zip(panels, ("gradient evaluations", "seconds")):
        axes.set_xlabel(text)
        axes.set_xscale("log")
        axes.grid(alpha=0.25)
    _loss_axis(panels[0], shown)
    _legend(figure, panels[:1])
    return figure


def _draw_mean_curve(
    panels: Sequence[Any], tuning: Tuning, style: Mapping[str, Any], band: bool = True
) -> list[float]:
    """Draws the mean of the seeds that did not diverge; returns the losses it drew."""
    curves = []
    for seed, line in tuning.runs.items():
        if math.isfinite(tuning.finals[seed]):
            # What a logarithmic axis can show.
            points = [p for p in line.get("curve") or [] if all(x is not None for x in p)]
            curves.append([p for p in points if p[0] > 0 and p[1] > 0 and math.isfinite(p[2])])
    length = min((len(curve) for curve in curves), default=0)
    if length == 0:
        return []
    stacked = np.array([curve[:length] for curve in curves])
    at, losses = stacked.mean(axis=0), stacked[:, :, 2]
    middle, deviation = losses.mean(axis=0), losses.std(axis=0)
    for axes, column in zip(panels, (0, 1)):
        axes.plot(at[:, column], middle, **{"linewidth": 1.4, **style})
        if band and len(curves) > 1:
            # A band that reaches 0 would take a logarithmic axis with it.
            low = np.maximum(middle - deviation, losses.min(axis=0))
            color = style["color"]
            axes.fill_between(at[:, column], low, middle + deviation, color=color, alpha=0.15, lw=0)
    return [float(loss) for loss in middle]


def _draw_learning_rates(baseline: ByBudget, others: Sequence[Series]) -> Figure:
    """Final loss against learning rate: a panel for each budget, the chosen rates marked."""
    everyone = [*others, (baseline, {"color": "black", "marker": "o", "label": BASELINE})]
    budgets = sorted({b for by_budget, _ in everyone for b in by_budget})
    columns = min(PANEL_COLUMNS, len(budgets))
    rows = math.ceil(len(budgets) / columns)
    figure = Figure(figsize=(3.4 * columns + 0.6, 2.9 * rows + 0.4), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[len(budgets) :]:
        axes.set_axis_off()
    for axes, budget in zip(grid, budgets):
        shown: list[float] = []
        for by_budget, style in everyone:
            if budget not in by_budget:
                continue
            tuning = by_budget[budget]
            means = {lr: mean for lr, mean in tuning.means.items() if math.isfinite(mean)}
            axes.plot(list(means), list(means.values()), markersize=4, linewidth=1.1, **style)
            if tuning.lr in means:
                ring = {"marker": "o", "markersize": 10, "fillstyle": "none", "linestyle": "none"}
                axes.plot([tuning.lr], [means[tuning.lr]], color=style["color"], **ring)
            shown += means.values()
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
    _legend(figure, grid)
    return figure


def _loss_axis(axes: Any, shown: Sequence[float]) -> None:
    """Makes the axis logarithmic where losses span orders of magnitude."""
    if shown and min(shown) > 0 and max(shown) > LOG_FROM * min(shown):
        axes.set_yscale("log")


def _legend(figure: Figure, panels: Sequence[Any]) -> None:
    """One legend for all panels, right of them, each name once."""
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, name in zip(*axes.get_legend_handles_labels()):
            handles.setdefault(name, handle)
    if handles:
        names = list(handles)
        figure.legend(handles.values(), names, loc="outside right upper", fontsize=7, frameon=False)
