"""What the digits example shows: progress, the table, and the plot."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from digits_results import Estimate, Row
from digits_training import Recipe
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

SECONDS_BETWEEN_LINES = 30.0
UNKNOWN = "-"
LEAST_ERROR = 5e-4  # a logarithmic axis has no zero


@contextmanager
def progress(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """Shows how the runs get on: a bar in a terminal, now and then a line elsewhere.

    Args:
        console: Where to show it.
        total: How many runs there are.

    Yields:
        What to call after every run, with what it was.
    """
    if not console.is_terminal:
        yield _line_writer(console, total)
        return
    # Drawn only between runs: a thread of its own would slow what is timed.
    bar = Progress(
        TextColumn("{task.description:32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("time left"),
        TimeRemainingColumn(),
        console=console,
        auto_refresh=False,
    )
    with bar:
        task = bar.add_task("", total=total)
        bar.refresh()

        def report(title: str) -> None:
            bar.update(task, advance=1, description=title)
            bar.refresh()

        yield report


def _line_writer(console: Console, total: int) -> Callable[[str], None]:
    started = last = time.monotonic()
    done = 0

    def report(title: str) -> None:
        nonlocal last, done
        done += 1
        now = time.monotonic()
        if done < total and now - last < SECONDS_BETWEEN_LINES:
            return
        last = now
        left = (now - started) / done * (total - done)
        console.print(f"{title}: run {done}/{total}, {left:.0f} s left", highlight=False)

    return report


def result_table(rows: Sequence[Row], recipe: Recipe) -> Table:
    """Returns the table of all optimizers.

    Args:
        rows: The optimizers; AdamW comes first.
        recipe: What the runs have in common.
    """
    target, baseline = recipe.target, rows[0]
    seeds = " ".join(str(seed) for seed in baseline.runs)
    table = Table(
        title=f"Test accuracy of {100 * target:g} %, seeds {seeds}: mean, and 95 % interval by t",
        title_justify="left",
        caption=(
            f"Reached: at the first of the measurements made every {recipe.interval} gradients. "
            f"Final: after {recipe.budget} gradients; the control after as many as it was given."
        ),
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=0,  # narrow enough for 80 columns
    )
    table.add_column("", no_wrap=True)
    headings = (
        "Learning\nrate",
        "Gradients\nto target",
        "AdamW's\nover these",
        "Seconds,\nof CPU",
    )
    for heading in (*headings, "Final\naccuracy", "Predicted\nsteps"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        edge = "\nat edge" if row.at_edge else ""
        table.add_row(
            row.contender.title.replace(", ", ",\n"),
            f"{row.best.learning_rate:g}{edge}",
            _evaluations(row, target),
            UNKNOWN if row is baseline else _ratio(row.ratio(baseline, target, "gradients")),
            _seconds(row, target),
            _accuracy(row.final_accuracy()),
            _predicted(row),
        )
    return table


def _evaluations(row: Row, target: float) -> str:
    found = row.to_target(target, "gradients")
    if found is None:
        needed = row.evaluations(target)
        reached = [n for n in needed if n is not None]
        mean = f"\nthose {np.mean(reached):.0f}" if reached else ""
        return f"{len(reached)} of {len(needed)}{mean}"
    if found.low is None:
        return f"{found.mean:.1f}"
    return f"{found.mean:.1f}\n± {found.mean - found.low:.1f}"


def _ratio(found: Estimate | None) -> str:
    if found is None:
        return UNKNOWN
    if found.low is None or found.high is None:
        return f"{found.mean:.2f}x"
    return f"{found.mean:.2f}x\n{found.low:.2f} to {found.high:.2f}"


def _seconds(row: Row, target: float) -> str:
    wall = row.to_target(target, "seconds")
    processor = row.to_target(target, "processor_seconds")
    if wall is None or processor is None:
        return UNKNOWN
    return f"{wall.mean:.3f}\n{processor.mean:.3f}"


def _accuracy(found: Estimate | None) -> str:
    if found is None:
        return UNKNOWN
    spread = "" if found.low is None else f"\n± {100 * (found.mean - found.low):.2f}"
    return f"{100 * found.mean:.2f} %{spread}"


def _predicted(row: Row) -> str:
    found = row.predicted_steps()
    return UNKNOWN if found is None else f"{found.mean:.0f}"


def write_plot(path: Path, rows: Sequence[Row], recipe: Recipe, title: str) -> None:
    """Draws test error against gradient evaluations: every seed, and their mean.

    Args:
        path: The PNG file.
        rows: The optimizers.
        recipe: What the runs have in common.
        title: Heading of the figure.
    """
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    whole, start = figure.subplots(1, 2)
    for row in rows:
        for axis in (whole, start):
            _draw(axis, row)
    needed = [n for row in rows for n in row.evaluations(recipe.target) if n is not None]
    for axis in (whole, start):
        axis.axhline(recipe.target, color="0.3", ls="--", lw=1)
        axis.set_yscale("function", functions=(_spread, _gather))
        ticks = [0.5, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995]
        axis.set_yticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
        axis.set_ylim(0.3, 0.999)
        axis.set_xlabel("gradient evaluations")
        axis.grid(alpha=0.25)
    start.set_xlim(0, 1.25 * max(needed, default=recipe.budget))
    start.set_title("until the target")
    whole.set_title("whole runs")
    whole.set_ylabel("test accuracy, spread out towards 100 %")
    whole.legend(fontsize="small", loc="lower right")
    figure.suptitle(title)
    temporary = path.with_name(path.name + ".part")
    figure.savefig(temporary, format="png", dpi=110)
    os.replace(temporary, path)


def _draw(axis: Axes, row: Row) -> None:
    curves = [
        ([point.gradients for point in run.curve], [point.accuracy for point in run.curve])
        for run in row.runs.values()
    ]
    if not curves:
        return
    colour = row.contender.colour
    for x, y in curves:
        axis.plot(x, y, color=colour, lw=0.6, alpha=0.45)
    positions = curves[0][0]
    if all(x == positions for x, _ in curves):
        mean = np.mean([y for _, y in curves], axis=0)
        axis.plot(positions, mean, color=colour, lw=1.8, label=row.contender.title)
    else:
        # Runs of different lengths have no mean curve; what counts is where they end.
        ends = [(x[-1], y[-1]) for x, y in curves]
        axis.plot(*zip(*ends), color=colour, marker="*", ms=10, ls="", label=row.contender.title)


def _spread(accuracy: np.ndarray) -> np.ndarray:
    return np.asarray(-np.log(np.maximum(1 - np.asarray(accuracy), LEAST_ERROR)))


def _gather(height: np.ndarray) -> np.ndarray:
    return np.asarray(1 - np.exp(-np.asarray(height)))
