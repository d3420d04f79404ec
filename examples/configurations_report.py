"""What ``three_configurations.py`` reports: comparisons, and tables beside the source's figures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from configurations_options import CONFIGURATIONS, MEMORY_OPTIMISED, SIXTEEN_BIT, Plan
from configurations_runs import ConfigurationRun
from configurations_statistics import Comparison, compare_percent, compare_ratios
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from run_records import BASELINE, CONTROL, FINAL_LOSSES, HYBRID
from text_data import write_atomically

WIDTH = 130  # of the tables, also where the output is no terminal
UNKNOWN = "-"
MEBIBYTE = 2**20
SIGNIFICANCE = 0.05
TITLES = {
    BASELINE: "AdamW",
    HYBRID: "Hybrid",
    MEMORY_OPTIMISED: "Memory-optimised",
    SIXTEEN_BIT: "AdamW, 16-bit",
    CONTROL: "AdamW, as many gradients",
}
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
SOURCE_COLUMNS = (BASELINE, HYBRID, MEMORY_OPTIMISED)

Runs = Mapping[str, Sequence[ConfigurationRun]]
"""The runs of each configuration, in the order of the seeds."""


def final_loss(run: ConfigurationRun) -> float:
    """Returns the mean training loss of the last few gradient evaluations."""
    return statistics.fmean(run.losses[-FINAL_LOSSES:])


def complete_seeds(runs: Sequence[ConfigurationRun]) -> dict[str, list[ConfigurationRun]]:
    """Returns the runs of the seeds from which every configuration has finished.

    Args:
        runs: Finished runs, in any order.
    """
    by_seed: dict[int, dict[str, ConfigurationRun]] = {}
    for run in runs:
        by_seed.setdefault(run.seed, {})[run.configuration] = run
    whole = [found for found in by_seed.values() if len(found) == len(CONFIGURATIONS)]
    return {name: [found[name] for found in whole] for name in CONFIGURATIONS}


def comparisons(runs: Runs) -> list[dict[str, Any]]:
    """Returns every comparison, paired by seed.

    Args:
        runs: Complete seeds.
    """
    found = []
    for name, reference in COMPARED:
        mine, others = runs[name], runs[reference]

        def ratio(
            value: Callable[[ConfigurationRun], float],
            inverse: bool = False,
            mine: Sequence[ConfigurationRun] = mine,
            others: Sequence[ConfigurationRun] = others,
        ) -> Comparison:
            ours, theirs = [value(run) for run in mine], [value(run) for run in others]
            return compare_ratios(theirs, ours) if inverse else compare_ratios(ours, theirs)

        found.append(
            {
                "configuration": name,
                "reference": reference,
                "speed_up_wall_clock": ratio(lambda run: run.seconds, inverse=True),
                "speed_up_processor": ratio(lambda run: run.processor_seconds, inverse=True),
                "held_out_percent_above": compare_percent(
                    [run.held_out_end for run in mine], [run.held_out_end for run in others]
                ),
                "kept_bytes_ratio": ratio(lambda run: run.kept_bytes),
                "memory_peak_ratio": ratio(lambda run: run.memory_peak),
            }
        )
    return found


def result_table(runs: Runs, plan: Plan) -> Table:
    """Returns the table of all configurations with the source's columns beside ours.

    Args:
        runs: Complete seeds.
        plan: The settings, for the title.
    """
    seeds = [run.seed for run in runs[BASELINE]]
    base = plan.base
    table = Table(
        title=f"GPT-2 {base.model}, {base.steps} steps of {base.batch} x {base.length} tokens, "
        f"means of seeds {seeds}. 16-bit: {plan.precision.upper()} parameters, FP32 masters, "
        f"{plan.accumulation} micro-batches; memory-optimised: offload {plan.offload} too",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("")
    headings = {
        CONTROL: "AdamW,\nas many\ngradients",
        SIXTEEN_BIT: "\nAdamW,\n16-bit",
        BASELINE: "\n\nAdamW",
        "source 1": "source,\n\nBaseline",
        HYBRID: "\n\nHybrid",
        "source 2": "source,\nHybrid\nTrainer",
        MEMORY_OPTIMISED: "\nMemory-\noptimised",
        "source 3": "source,\nMemory-\nOptimized",
    }
    for heading in headings.values():
        table.add_column(heading, justify="right", no_wrap=True)

    def row(label: str, cell: Callable[[str], str]) -> None:
        source = dict(zip(SOURCE_COLUMNS, SOURCE.get(label, (UNKNOWN,) * 3), strict=True))
        cells = [cell(CONTROL), cell(SIXTEEN_BIT)]
        for name in SOURCE_COLUMNS:
            cells += [cell(name), source[name]]
        table.add_row(label, *cells)

    def mean(name: str, value: Callable[[ConfigurationRun], float]) -> float:
        return statistics.fmean(value(run) for run in runs[name])

    def speed_up(name: str, value: Callable[[ConfigurationRun], float]) -> str:
        ratio = compare_ratios([value(r) for r in runs[BASELINE]], [value(r) for r in runs[name]])
        return f"{ratio.mean:.2f}x"

    def above(name: str, reference: str) -> str:
        if name == reference:
            return UNKNOWN
        held_out = [[run.held_out_end for run in runs[key]] for key in (name, reference)]
        return f"{compare_percent(held_out[0], held_out[1]).mean:+.2f} %"

    def mebibytes(value: Callable[[ConfigurationRun], float]) -> Callable[[str], str]:
        return lambda name: f"{mean(name, value) / MEBIBYTE:,.1f} MiB"

    row("Gradient evaluations", lambda name: f"{mean(name, lambda r: r.gradients):.1f}")
    row("Held-out loss, start", lambda name: f"{mean(name, lambda r: r.held_out_start):.4f}")
    row("Held-out loss, end", lambda name: f"{mean(name, lambda r: r.held_out_end):.4f}")
    row("  against as many gradients", lambda name: above(name, CONTROL))
    row("  against AdamW", lambda name: above(name, BASELINE))
    row("Total time", lambda name: f"{mean(name, lambda r: r.seconds):.2f} s")
    row("Speed-up, wall clock", lambda name: speed_up(name, lambda r: r.seconds))
    row("Speed-up, processor time", lambda name: speed_up(name, lambda r: r.processor_seconds))
    row(
        "Mean step time",
        lambda name: f"{1000 * mean(name, lambda r: r.seconds / len(r.steps['seconds'])):.1f} ms",
    )
    for phase in ("Warmup", "Full", "Predict", "Correct"):
        row(f"  {phase} step", lambda name, phase=phase: _step_time(runs[name], phase.lower()))  # type: ignore[misc]
    for phase in ("Warmup", "Full", "Predict", "Correct"):
        row(f"{phase} steps", lambda name, phase=phase: _share(runs[name], phase.lower()))  # type: ignore[misc]
    row("Tokens per second", lambda name: f"{mean(name, lambda r: r.tokens_per_second):,.0f}")
    row("Memory, first step", mebibytes(lambda run: run.steps["memory_bytes"][0]))
    row("Memory, last step", mebibytes(lambda run: run.steps["memory_bytes"][-1]))
    row("Memory, peak", mebibytes(lambda run: run.memory_peak))
    row("Parameters, gradients, state", mebibytes(lambda run: run.kept_bytes))
    row("  state in host memory", mebibytes(lambda run: run.state_bytes_host))
    row("Training loss, first", lambda name: f"{mean(name, lambda r: r.losses[0]):.4f}")
    row("Training loss, last", lambda name: f"{mean(name, final_loss):.4f}")
    row(
        "  reduction",
        lambda name: f"{100 * mean(name, lambda r: 1 - final_loss(r) / r.losses[0]):.1f} %",
    )
    return table


def comparison_table(found: Sequence[Mapping[str, Any]]) -> Table:
    """Returns the table of comparisons: means, 95% intervals and t-tests.

    Args:
        found: What `comparisons` returns.
    """
    table = Table(
        title="Paired by seed: mean, 95% interval, p of the t-test; * where p < 0.05",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("")
    for heading in ("Speed-up,\nwall clock", "Speed-up,\nprocessor time", "Held-out loss",
                    "Parameters,\ngradients, state"):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in found:
        table.add_row(
            f"{TITLES[entry['configuration']]}\n  against {TITLES[entry['reference']]}",
            _cell(entry["speed_up_wall_clock"], "{:.2f}x"),
            _cell(entry["speed_up_processor"], "{:.2f}x"),
            _cell(entry["held_out_percent_above"], "{:+.2f} %"),
            _cell(entry["kept_bytes_ratio"], "{:.2f}x"),
        )
    return table


def print_tables(console: Console, runs: Runs, plan: Plan) -> None:
    """Prints everything.

    Args:
        console: Where to.
        runs: Complete seeds; nothing is printed of none.
        plan: The settings.
    """
    if not runs[BASELINE]:
        return
    console.width = max(console.width, WIDTH)  # cut short, a table of figures is worth nothing
    console.print(result_table(runs, plan), highlight=False)
    console.print(SOURCE_NOTE, highlight=False)
    if plan.base.device.type == "cpu":
        console.print(
            "Memory is that of the whole process here, which keeps what earlier runs freed: "
            "compare parameters,\ngradients and state instead. Offloaded state lies in the same "
            "memory here, and is counted.",
            highlight=False,
        )
    console.print(comparison_table(comparisons(runs)), highlight=False)
    if len(runs[BASELINE]) == 1:
        console.print("One seed has no spread: no interval and no test. Give several: --seeds")


def write_results(
    path: Path, content: Mapping[str, Any], runs: Sequence[ConfigurationRun], complete: bool
) -> None:
    """Writes the JSON file, whole or not at all.

    Args:
        path: The file.
        content: What it says beside the runs.
        runs: The finished runs.
        complete: Whether there are no more to come.
    """
    whole = complete_seeds(runs)
    found = comparisons(whole) if whole[BASELINE] else []
    head = {
        **content,
        "complete": complete,
        "comparisons": [
            {k: v.to_dict() if isinstance(v, Comparison) else v for k, v in entry.items()}
            for entry in found
        ],
    }
    # A line for each run: with one for each number the file would have tens of thousands.
    lines = ",\n".join("  " + json.dumps(_summary(run), allow_nan=False) for run in runs)
    text = json.dumps(head, indent=1, allow_nan=False).removesuffix("\n}")
    write_atomically(path, f'{text},\n "runs": [\n{lines}\n ]\n}}\n')


def _summary(run: ConfigurationRun) -> dict[str, Any]:
    values = run.to_dict()
    steps = values.pop("steps")
    return {
        **values,
        "gradient_evaluations": run.gradients,
        "seconds": run.seconds,
        "processor_seconds": run.processor_seconds,
        "kept_bytes": run.kept_bytes,
        "training_loss_last": final_loss(run),
        "steps": steps,
    }


def _cell(found: Comparison, form: str) -> str:
    text = form.format(found.mean)
    if found.low is None or found.high is None:
        return text
    if found.p_value is None:
        return f"{text}\nsame for all seeds"
    mark = " *" if found.p_value < SIGNIFICANCE else ""
    interval = f"{form.format(found.low)} to {form.format(found.high)}"
    return f"{text}, p = {found.p_value:.2g}{mark}\n{interval}"


def _step_time(runs: Sequence[ConfigurationRun], phase: str) -> str:
    seconds = [x for run in runs for x in run.of_phase(phase)]
    return f"{1000 * statistics.fmean(seconds):.1f} ms" if seconds else UNKNOWN


def _share(runs: Sequence[ConfigurationRun], phase: str) -> str:
    count = statistics.fmean(len(run.of_phase(phase)) for run in runs)
    if not count:
        return UNKNOWN
    return f"{count:.1f} ({100 * count / len(runs[0].steps['phase']):.0f} %)"
