"""What a sweep shows: a table, a heat map, and the best settings as Python."""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table
from tune_options import AXES, Settings, Sweep
from tune_trials import Score

from triton_hybrid import HybridConfig

ROWS = 10
UNKNOWN = "-"


def best_table(sweep: Sweep, hybrid: Sequence[Score], adamw: Sequence[Score]) -> Table:
    """Returns the table of the best settings, and of AdamW.

    Args:
        sweep: The sweep.
        hybrid: HybridOptimizer's scores, the best first.
        adamw: AdamW's.
    """
    table = Table(
        title=f"Held-out loss after {sweep.gradients} gradients, mean of tuning seeds "
        f"{', '.join(map(str, sweep.seeds))}",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=0,
    )
    headings = ("learning\nrate", "confidence\nthreshold", "predict\nsteps", "correction\ninterval",
                "held-out\nmean", "deviation\nof seeds", "predicted\nsteps")  # fmt: skip
    table.add_column("", no_wrap=True, min_width=7)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for score in hybrid[:ROWS]:
        settings = score.settings
        assert settings is not None
        table.add_row(
            "Hybrid ", f"{score.learning_rate:g}", f"{settings.confidence_threshold:g}",
            str(settings.max_predict_steps), str(settings.correction_interval),
            *_losses(score), f"{score.statistics.get('predicted_steps', math.nan):.1f}",
        )  # fmt: skip
    table.add_section()
    for score in adamw:
        table.add_row(
            "AdamW", f"{score.learning_rate:g}", UNKNOWN, UNKNOWN, UNKNOWN, *_losses(score), UNKNOWN
        )
    if len(hybrid) > ROWS:
        table.caption = f"the best {ROWS} of {len(hybrid)} settings of HybridOptimizer"
    return table


def _losses(score: Score) -> tuple[str, str]:
    deviation = UNKNOWN if score.deviation is None else f"{score.deviation:.4f}"
    return f"{score.mean:.4f}", deviation


def python_line(config: HybridConfig) -> str:
    """Returns the Python that makes a configuration; what is default and not swept is left out.

    Args:
        config: The configuration.
    """
    defaults = HybridConfig()
    said = [
        f"{field.name}={getattr(config, field.name)!r}"
        for field in dataclasses.fields(HybridConfig)
        if field.name in AXES or getattr(config, field.name) != getattr(defaults, field.name)
    ]
    return f"HybridConfig({', '.join(said)})"


def reporting_command(sweep: Sweep, settings: Settings) -> str:
    """Returns a command that reports the chosen settings on seeds that did not choose them.

    Args:
        sweep: The sweep.
        settings: What it chose.
    """
    first = max(sweep.seeds) + 1
    flags = {
        "--model": sweep.base.model,
        "--drive": "inline",
        "--steps": sweep.gradients,
        "--lr": settings.learning_rate,
        "--confidence-threshold": settings.confidence_threshold,
        "--max-predict-steps": settings.max_predict_steps,
        "--correction-interval": settings.correction_interval,
    }
    parts = [str(part) for flag in flags.items() for part in flag]
    seeds = ["--seeds", str(first), str(first + 1), str(first + 2)]
    return shlex.join(
        ["python", "examples/gpt2_small.py", *parts, *sweep.handed_on, "--controls", *seeds]
    )


def heat_values(sweep: Sweep, hybrid: Sequence[Score]) -> list[list[float]]:
    """Returns the heat map's rows, from the lowest value of its vertical axis.

    Args:
        sweep: Says which axes, and what is shown of the settings that are none.
        hybrid: HybridOptimizer's scores.
    """
    horizontal, vertical = sweep.axes
    means = {score.settings: score.mean for score in hybrid}
    cells: dict[tuple[Any, Any], list[float]] = {}
    for settings in sweep.grid:
        mean = means.get(settings.canonical)
        if mean is not None:
            place = getattr(settings, horizontal), getattr(settings, vertical)
            cells.setdefault(place, []).append(mean)
    reduce = min if sweep.over == "min" else statistics.fmean
    return [
        [reduce(cells[x, y]) if (x, y) in cells else math.nan for x in sweep.values(horizontal)]
        for y in sweep.values(vertical)
    ]


def write_heat_map(
    path: Path, sweep: Sweep, hybrid: Sequence[Score], adamw: Sequence[Score]
) -> None:
    """Draws the held-out loss over two of the axes.

    Args:
        path: The PNG file.
        sweep: The sweep.
        hybrid: HybridOptimizer's scores.
        adamw: AdamW's.
    """
    rows = heat_values(sweep, hybrid)
    horizontal, vertical = sweep.axes
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axis = figure.subplots()
    finite = [value for row in rows for value in row if math.isfinite(value)] or [0.0]
    least, most = min(finite), max(finite)
    shown = [[value if math.isfinite(value) else math.nan for value in row] for row in rows]
    image = axis.imshow(
        shown, cmap="viridis_r", aspect="auto", origin="lower", vmin=least, vmax=most
    )
    figure.colorbar(image, ax=axis, label="held-out loss")
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            colour = "white" if value > (least + most) / 2 else "black"
            axis.text(x, y, f"{value:.4f}", ha="center", va="center", color=colour)
    axis.set_xticks(range(len(rows[0])), [f"{value:g}" for value in sweep.values(horizontal)])
    axis.set_yticks(range(len(rows)), [f"{value:g}" for value in sweep.values(vertical)])
    axis.set_xlabel(horizontal)
    axis.set_ylabel(vertical)
    others = " and ".join(name for name in AXES if name not in sweep.axes)
    which = "lowest" if sweep.over == "min" else "mean"
    title = (
        f"HybridOptimizer, GPT-2 {sweep.base.model}, {sweep.gradients} gradients\n"
        f"mean held-out loss of {len(sweep.seeds)} seeds, {which} over {others}"
    )
    if adamw:
        title += f"\nAdamW, best learning rate {adamw[0].learning_rate:g}: {adamw[0].mean:.4f}"
    axis.set_title(title, fontsize="medium")
    temporary = path.with_name(path.name + ".part")
    figure.savefig(temporary, format="png", dpi=110)
    os.replace(temporary, path)
