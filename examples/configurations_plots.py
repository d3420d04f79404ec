"""The plot of ``three_configurations.py``: memory over time, and step time over steps."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from configurations_options import CONFIGURATIONS
from configurations_report import MEBIBYTE, TITLES
from configurations_runs import ConfigurationRun
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from run_files import PHASE_COLOURS

OTHER_COLOUR = "0.45"  # of steps that have no phase: AdamW's


def write_plot(path: Path, runs: Sequence[ConfigurationRun], title: str) -> None:
    """Draws a column for each configuration, with a line for each seed; whole or not at all.

    Args:
        path: The PNG file.
        runs: The finished runs.
        title: Heading of the whole figure.
    """
    figure = Figure(figsize=(4.2 * len(CONFIGURATIONS), 7), layout="constrained")
    grid = figure.subplots(2, len(CONFIGURATIONS), squeeze=False, sharey="row")
    for column, configuration in enumerate(CONFIGURATIONS):
        memory, times = grid[0][column], grid[1][column]
        for run in runs:
            if run.configuration == configuration:
                _draw_memory(memory, run)
                _draw_times(times, run)
        memory.set_title(TITLES[configuration])
        memory.set_xlabel("seconds of training")
        times.set_xlabel("step")
        # Steps slowed by other work on the machine are far above the rest.
        times.set_yscale("log")
        for axis in (memory, times):
            axis.grid(alpha=0.25)
    grid[0][0].set_ylabel("MiB")
    grid[1][0].set_ylabel("milliseconds a step")
    grid[0][-1].legend(
        handles=[
            Line2D([], [], color=OTHER_COLOUR, label="measured, above that before the model"),
            Line2D([], [], color="tab:purple", ls="--", label="parameters, gradients and state"),
        ],
        fontsize="small",
    )
    phases = {"AdamW": OTHER_COLOUR, **{x.capitalize(): c for x, c in PHASE_COLOURS.items()}}
    grid[1][-1].legend(
        handles=[
            Line2D([], [], color=colour, ls="", marker="o", ms=4, label=name)
            for name, colour in phases.items()
        ],
        fontsize="small",
    )
    figure.suptitle(title)
    temporary = path.with_name(path.name + ".part")
    figure.savefig(temporary, format="png", dpi=90)
    os.replace(temporary, path)


def _draw_memory(axis: Axes, run: ConfigurationRun) -> None:
    elapsed = list(itertools.accumulate(run.steps["seconds"]))
    above = [(used - run.memory_before) / MEBIBYTE for used in run.steps["memory_bytes"]]
    axis.plot(elapsed, above, color=OTHER_COLOUR, lw=1, alpha=0.8)
    axis.axhline(run.kept_bytes / MEBIBYTE, color="tab:purple", ls="--", lw=1)


def _draw_times(axis: Axes, run: ConfigurationRun) -> None:
    axis.scatter(
        range(1, len(run.steps["seconds"]) + 1),
        [1000 * seconds for seconds in run.steps["seconds"]],
        s=5,
        c=[PHASE_COLOURS.get(phase, OTHER_COLOUR) for phase in run.steps["phase"]],
    )
