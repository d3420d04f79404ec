"""What ``three_configurations.py`` shows: comparisons, tables beside the source's figures, plot."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.console import Console
from rich.table import Table

from lib.files import plain, replacing, save_figure
from lib.gpt2_records import BASELINE, CONTROL, HYBRID, MEMORY_OPTIMISED, SIXTEEN_BIT, RunRecord
from lib.gpt2_report import FACTOR, LOSS, PERCENT, PHASE_COLOURS, SECONDS
from lib.statistics import Estimate, paired_percent, paired_ratios
from lib.tables import UNKNOWN, figures_table, mean_cell

WIDTH = 130  # of the tables, also where the output is no terminal
MEBIBYTE = 2**20
SIGNIFICANCE = 0.05
OTHER_COLOUR = "0.45"  # of steps that have no phase: AdamW's
# The control is last: it needs to know how many gradients HybridOptimizer used.
TITLES = {
    BASELINE: "AdamW",
    HYBRID: "Hybrid",
    MEMORY_OPTIMISED: "Memory-optimised",
    SIXTEEN_BIT: "AdamW, 16-bit",
    CONTROL: "AdamW, as many gradients",
}
CONFIGURATIONS = tuple(TITLES)
COMPARED = (
    # The controls first: what fewer gradients alone come to, and 16 bits alone.
    (CONTROL, BASELINE),
    (SIXTEEN_BIT, BASELINE),
    (HYBRID, BASELINE),
    (MEMORY_OPTIMISED, BASELINE),
    (HYBRID, CONTROL),
    (MEMORY_OPTIMISED, CONTROL),
    (MEMORY_OPTIMISED, SIXTEEN_BIT),
)

SOURCE_NOTE = """\
Source: its report of 2026-02-07; GPT-2 small, 50 steps of 4 x 64 random tokens (memory-optimised:
8 x 64), one run, RTX 5080. Its tokens per second count predicted steps too, which consume none:
ours do not. It had no control and measured no held-out loss."""
MEMORY_NOTE = """\
Memory is that of the whole process here, which keeps what earlier runs freed: compare parameters,
gradients and state instead. Offloaded state lies in the same memory here, and is counted."""
# The source's own figures. Its columns: baseline, HybridTrainer, memory-optimised.
SOURCE = {
    "Total time": ("31.3 s", "25.1 s", "18.0 s"),
    "Speed-up, wall clock": ("1.0x", "1.25x", "1.74x"),
    "Mean step time": ("624 ms", "498 ms", "345 ms"),
    "Tokens per second": ("409", "510", "1,419"),
    "Memory, first step": ("3.8 GB", "3.8 GB", "3.7 GB"),
    "Memory, last step": ("4.2 GB", "14.1 GB", "8.8 GB"),
    "Memory, peak": ("4.2 GB", "14.1 GB", "8.8 GB"),
    "Training loss, first": ("449.4", "449.0", "456.8"),
    "Training loss, last": ("64.1", "80.0", "80.4"),
    "  reduction": ("85.7 %", "82.2 %", "82.4 %"),
    "Warmup steps": (UNKNOWN, "5 (10 %)", UNKNOWN),
    "Full steps": (UNKNOWN, "10 (20 %)", UNKNOWN),
    "Predict steps": (UNKNOWN, "20 (40 %)", UNKNOWN),
    "Correct steps": (UNKNOWN, "15 (30 %)", UNKNOWN),
    "  Full step": (UNKNOWN, "700 ms", "500-600 ms"),
    "  Predict step": (UNKNOWN, "20-300 ms", "20-300 ms"),
    "  Correct step": (UNKNOWN, "70-300 ms", UNKNOWN),
}
# Our columns, and the source's beside those that it has too.
COLUMNS = {
    CONTROL: ("AdamW,\nas many\ngradients", None),
    SIXTEEN_BIT: ("AdamW,\n16-bit", None),
    BASELINE: ("AdamW", "source,\nBaseline"),
    HYBRID: ("Hybrid", "source,\nHybrid\nTrainer"),
    MEMORY_OPTIMISED: ("Memory-\noptimised", "source,\nMemory-\nOptimized"),
}

Runs = Mapping[str, Sequence[RunRecord]]
"""The runs of each configuration, in the order of the seeds."""


def complete_seeds(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Returns the runs of the seeds from which every configuration has finished."""
    by_seed: dict[int, dict[str, RunRecord]] = {}
    for run in runs:
        by_seed.setdefault(run.seed, {})[run.name] = run
    whole = [found for found in by_seed.values() if len(found) == len(CONFIGURATIONS)]
    return {name: [found[name] for found in whole] for name in CONFIGURATIONS}


def comparisons(runs: Runs) -> list[dict[str, Any]]:
    """Returns every comparison of complete seeds, paired by seed."""
    return [
        {
            "configuration": name,
            "reference": reference,
            "speed_up_wall_clock": _ratio(runs, reference, name, "seconds"),
            "speed_up_processor": _ratio(runs, reference, name, "processor_seconds"),
            "held_out_percent_above": _above(runs, name, reference),
            "kept_bytes_ratio": _ratio(runs, name, reference, "kept_bytes"),
            "memory_peak_ratio": _ratio(runs, name, reference, "memory_peak"),
        }
        for name, reference in COMPARED
    ]


def _ratio(runs: Runs, name: str, reference: str, field: str) -> Estimate:
    return paired_ratios(*([getattr(run, field) for run in runs[x]] for x in (name, reference)))


def _above(runs: Runs, name: str, reference: str) -> Estimate:
    return paired_percent(
        *([run.held_out_end or 0.0 for run in runs[x]] for x in (name, reference))
    )


def result_table(runs: Runs, title: str) -> Table:
    """Returns the table of all configurations of complete seeds, the source's columns beside."""
    headings = [heading for pair in COLUMNS.values() for heading in pair if heading]
    table = figures_table(title, ["", *headings], padding=(0, 1, 0, 0))

    def row(label: str, cell_of: Callable[[str], str]) -> None:
        source = iter(SOURCE.get(label, (UNKNOWN,) * 3))
        cells = []
        for name, (_, theirs) in COLUMNS.items():
            cells += [cell_of(name), next(source)] if theirs else [cell_of(name)]
        table.add_row(label, *cells)

    def mean(label: str, form: str, value: Callable[[RunRecord], float | None]) -> None:
        row(label, lambda name: mean_cell([value(run) for run in runs[name]], form))

    def mebibytes(label: str, value: Callable[[RunRecord], float]) -> None:
        mean(label, "{:,.1f} MiB", lambda run: value(run) / MEBIBYTE)

    def above(label: str, other: str) -> None:
        row(label, lambda x: UNKNOWN if x == other else PERCENT.format(_above(runs, x, other).mean))

    def speed_up(label: str, field: str) -> None:
        row(label, lambda name: FACTOR.format(_ratio(runs, BASELINE, name, field).mean))

    mean("Gradient evaluations", "{:.1f}", lambda run: run.gradients)
    mean("Held-out loss, start", LOSS, lambda run: run.held_out_start)
    mean("Held-out loss, end", LOSS, lambda run: run.held_out_end)
    above("  against as many gradients", CONTROL)
    above("  against AdamW", BASELINE)
    mean("Total time", SECONDS, lambda run: run.seconds)
    speed_up("Speed-up, wall clock", "seconds")
    speed_up("Speed-up, processor time", "processor_seconds")
    mean("Mean step time", "{:.1f} ms", lambda run: 1000 * run.seconds / len(run.steps))
    for phase in PHASE_COLOURS:
        row(f"  {phase.capitalize()} step", lambda name, p=phase: _step_time(runs[name], p))  # type: ignore[misc]
    for phase in PHASE_COLOURS:
        row(f"{phase.capitalize()} steps", lambda name, p=phase: _share(runs[name], p))  # type: ignore[misc]
    mean("Tokens per second", "{:,.0f}", lambda run: run.tokens_per_second)
    mebibytes("Memory, first step", lambda run: run.steps[0].memory_bytes)
    mebibytes("Memory, last step", lambda run: run.steps[-1].memory_bytes)
    mebibytes("Memory, peak", lambda run: run.memory_peak)
    mebibytes("Parameters, gradients, state", lambda run: run.kept_bytes)
    mebibytes("  state in host memory", lambda run: run.state_bytes_host)
    mean("Training loss, first", LOSS, lambda run: run.losses[0])
    mean("Training loss, last", LOSS, lambda run: run.final_loss)
    mean("  reduction", "{:.1f} %", lambda x: 100 * (1 - (x.final_loss or 0.0) / x.losses[0]))
    return table


def _step_time(runs: Sequence[RunRecord], phase: str) -> str:
    seconds = [x for run in runs for x in run.seconds_by_phase().get(phase, ())]
    return f"{1000 * statistics.fmean(seconds):.1f} ms" if seconds else UNKNOWN


def _share(runs: Sequence[RunRecord], phase: str) -> str:
    count = statistics.fmean(len(run.seconds_by_phase().get(phase, ())) for run in runs)
    return f"{count:.1f} ({100 * count / len(runs[0].steps):.0f} %)" if count else UNKNOWN


def comparison_table(found: Sequence[Mapping[str, Any]]) -> Table:
    """Returns the table of what `comparisons` found: means, 95% intervals and t-tests."""
    columns = (
        ("speed_up_wall_clock", "Speed-up,\nwall clock", FACTOR),
        ("speed_up_processor", "Speed-up,\nprocessor time", FACTOR),
        ("held_out_percent_above", "Held-out loss", PERCENT),
        ("kept_bytes_ratio", "Parameters,\ngradients, state", FACTOR),
    )
    title = "Paired by seed: mean, 95% interval, p of the t-test; * where p < 0.05"
    headings = ["", *(heading for _, heading, _ in columns)]
    table = figures_table(title, headings, padding=(0, 1, 0, 0))
    for entry in found:
        pair = f"{TITLES[entry['configuration']]}\n  against {TITLES[entry['reference']]}"
        table.add_row(pair, *(_interval(entry[name], form) for name, _, form in columns))
    return table


def _interval(found: Estimate, form: str) -> str:
    text = form.format(found.mean)
    if found.low is None or found.high is None:
        return text
    if found.p_value is None:
        return f"{text}\nsame for all seeds"
    mark = " *" if found.p_value < SIGNIFICANCE else ""
    ends = f"{form.format(found.low)} to {form.format(found.high)}"
    return f"{text}, p = {found.p_value:.2g}{mark}\n{ends}"


def print_tables(
    console: Console, runs: Sequence[RunRecord], title: tuple[str, str], on_cpu: bool
) -> None:
    """Prints everything about the complete seeds among some runs; nothing of none.

    Args:
        console: Where to.
        runs: The finished runs.
        title: Of the table of results, before and after the seeds.
        on_cpu: Whether memory is that of the whole process.
    """
    whole = complete_seeds(runs)
    seeds = [run.seed for run in whole[BASELINE]]
    if not seeds:
        return
    console.width = max(console.width, WIDTH)  # cut short, a table of figures is worth nothing
    table = result_table(whole, f"{title[0]}, means of seeds {seeds}. {title[1]}")
    for part in (table, SOURCE_NOTE, *((MEMORY_NOTE,) if on_cpu else ())):
        console.print(part, highlight=False)
    console.print(comparison_table(comparisons(whole)), highlight=False)
    if len(seeds) == 1:
        console.print("One seed has no spread: no interval and no test. Give several: --seeds")


def write_results(
    path: Path, content: Mapping[str, Any], runs: Sequence[RunRecord], complete: bool
) -> None:
    """Writes the JSON file of the finished runs; `complete`: no more are to come."""
    whole = complete_seeds(runs)
    found = comparisons(whole) if whole[BASELINE] else []
    tests = [{k: vars(v) if isinstance(v, Estimate) else v for k, v in x.items()} for x in found]
    head = plain({**content, "complete": complete, "comparisons": tests})
    # A line for each run: with one for each number the file would have tens of thousands.
    lines = ",\n".join("  " + json.dumps(_summary(run), allow_nan=False) for run in runs)
    text = json.dumps(head, indent=1, allow_nan=False).removesuffix("\n}")
    with replacing(path) as part:
        part.write_text(f'{text},\n "runs": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def _summary(run: RunRecord) -> dict[str, Any]:
    values = run.to_dict()
    steps, name = values.pop("steps"), values.pop("name")
    return {
        "configuration": name,
        **values,
        "gradient_evaluations": run.gradients,
        "seconds": run.seconds,
        "processor_seconds": run.processor_seconds,
        "kept_bytes": run.kept_bytes,
        "training_loss_last": run.final_loss,
        "steps": steps,
    }


def write_plot(path: Path, runs: Sequence[RunRecord], title: str) -> None:
    """Draws memory over time and step time over steps, a column for each configuration."""
    figure = Figure(figsize=(4.2 * len(CONFIGURATIONS), 7), layout="constrained")
    grid = figure.subplots(2, len(CONFIGURATIONS), squeeze=False, sharey="row")
    for column, configuration in enumerate(CONFIGURATIONS):
        memory, times = grid[0][column], grid[1][column]
        for run in runs:
            if run.name == configuration:
                _draw(memory, times, run)
        memory.set_title(TITLES[configuration])
        memory.set_xlabel("seconds of training")
        times.set_xlabel("step")
        # Steps slowed by other work on the machine are far above the rest.
        times.set_yscale("log")
        for axis in (memory, times):
            axis.grid(alpha=0.25)
    grid[0][0].set_ylabel("MiB")
    grid[1][0].set_ylabel("milliseconds a step")
    measured = Line2D([], [], color=OTHER_COLOUR, label="measured, above that before the model")
    kept = Line2D([], [], color="tab:purple", ls="--", label="parameters, gradients and state")
    grid[0][-1].legend(handles=[measured, kept], fontsize="small")
    dots: dict[str, Any] = {"ls": "", "marker": "o", "ms": 4}
    phases = [("AdamW", OTHER_COLOUR), *PHASE_COLOURS.items()]
    handles = [Line2D([], [], color=colour, label=name, **dots) for name, colour in phases]
    grid[1][-1].legend(handles=handles, fontsize="small")
    figure.suptitle(title)
    save_figure(path, figure, dots_per_inch=90)


def _draw(memory: Axes, times: Axes, run: RunRecord) -> None:
    elapsed = list(itertools.accumulate(step.seconds for step in run.steps))
    above = [(step.memory_bytes - run.memory_before) / MEBIBYTE for step in run.steps]
    memory.plot(elapsed, above, color=OTHER_COLOUR, lw=1, alpha=0.8)
    memory.axhline(run.kept_bytes / MEBIBYTE, color="tab:purple", ls="--", lw=1)
    colours = [PHASE_COLOURS.get(step.phase, OTHER_COLOUR) for step in run.steps]
    milliseconds = [1000 * step.seconds for step in run.steps]
    times.scatter(range(1, len(run.steps) + 1), milliseconds, s=5, c=colours)
