"""What ``gpt2_small.py`` shows: the runs of a seed, of all seeds, and the plot of the loss."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from lib.files import save_figure
from lib.gpt2_records import (
    ADAMW,
    ALONE,
    BASELINE,
    BASELINE_ONE,
    BASES,
    CONTROL,
    FINAL_LOSSES,
    HYBRID,
    HYBRID_ONE,
    ONE_PROCESS,
    RunRecord,
)
from lib.tables import UNKNOWN, cell, figures_table, mean_cell

GIBIBYTE = 2**30
NAMES = {BASELINE: "AdamW", HYBRID: "HybridOptimizer", CONTROL: "AdamW, as many gradients"}
NAMES |= {one: f"{NAMES[name]}, one process" for name, one in ONE_PROCESS.items()}
RUN_COLOURS = {BASELINE: "0.45", ALONE: "tab:cyan", HYBRID: "tab:purple", CONTROL: "black"}
RUN_COLOURS |= {BASELINE_ONE: "tab:olive", HYBRID_ONE: "tab:pink"}
PHASE_COLOURS = {"warmup": "tab:orange", "full": "tab:blue", "predict": "tab:green",
                 "correct": "tab:red"}  # fmt: skip
LOSS, PERCENT, FACTOR, SECONDS, SHARE = "{:.4f}", "{:+.2f} %", "{:.2f}x", "{:.2f} s", "{:.0%}"


@dataclass
class SeedRecord:
    """All runs from one seed.

    Attributes:
        seed: The seed.
        runs: By their names, in the order of the tables: "baseline" is AdamW for all steps,
            "base_alone" the base rule without prediction (only where it is not AdamW), "hybrid"
            HybridOptimizer, and "control" AdamW for as many gradients as that used. Under torchrun
            "baseline_one_process" and "hybrid_one_process" are those in one process.
        control_source: Where the control comes from: "own run", "baseline on its way" or "none".
    """

    seed: int
    runs: dict[str, RunRecord] = field(default_factory=dict)
    control_source: str = "none"

    def add(self, run: RunRecord) -> RunRecord:
        """Adds a run at its place."""
        runs = {**self.runs, run.name: run}
        self.runs = {name: runs[name] for name in RUN_COLOURS if name in runs}
        return run

    def above(self, name: str) -> float | None:
        """How much higher HybridOptimizer's final held-out loss is than a run's, in percent."""
        hybrid = self.runs.get(HYBRID)
        return hybrid.percent_above(self.runs.get(name)) if hybrid else None

    def of_one_process(self, run: RunRecord) -> RunRecord | None:
        """The same run in one process, where that was made, too."""
        return self.runs.get(ONE_PROCESS.get(run.name, ""))

    @property
    def above_alone_on_its_way(self) -> float | None:
        """The same against the base rule after as many gradients, where that was measured."""
        if (alone := self.runs.get(ALONE)) and (hybrid := self.runs.get(HYBRID)):
            return hybrid.percent_above(alone.stopped_after(hybrid.gradients))
        return None

    @property
    def goal(self) -> float | None:
        """AdamW's lowest held-out loss, where all were measured on their way.

        Not its last: on an H200 AdamW went up by 1 to 6 for one step in each of three runs, one of
        them the last.
        """
        hybrid, baseline = self.runs.get(HYBRID), self.runs.get(BASELINE)
        measured = baseline and baseline.held_out_end and hybrid and hybrid.held_out_after
        return min(baseline.held_out_after.values()) if baseline and measured else None

    def speed_up(self, name: str = HYBRID) -> float | None:
        """Wall-clock time of the baseline over that of a run, for all steps of both."""
        baseline, run = self.runs.get(BASELINE), self.runs.get(name)
        both = baseline and run and baseline.complete and run.complete
        return baseline.seconds / run.seconds if baseline and run and both else None

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "seed": self.seed,
            "speed_up_wall_clock": self.speed_up(),
            "held_out_percent_above_baseline": self.above(BASELINE),
            "held_out_percent_above_control": self.above(CONTROL),
            "control_source": self.control_source,
            "held_out_percent_above_base_alone": self.above(ALONE),
            "held_out_percent_above_base_alone_as_many_gradients": self.above_alone_on_its_way,
            "runs": {
                name: {
                    **_summary(run),
                    "gradients_to_baseline_loss": run.gradients_to(self.goal),
                    "seconds_to_baseline_loss": run.seconds_to(self.goal),
                }
                for name, run in self.runs.items()
            },
        }


def _summary(run: RunRecord) -> dict[str, Any]:
    steps = [{"step": n, **dataclasses.asdict(step)} for n, step in enumerate(run.steps, 1)]
    return {
        "optimizer": run.optimizer,
        "base": run.base,
        "complete": run.complete,
        "processes": run.processes,
        "planned_steps": run.planned_steps,
        "steps_taken": len(run.steps),
        "gradient_evaluations": run.gradients,
        "windows": run.windows,
        "noise_scales": run.noise_scales,
        "seconds": run.seconds,
        "mean_step_seconds_by_phase": {
            phase: sum(seconds) / len(seconds) for phase, seconds in run.seconds_by_phase().items()
        },
        "tokens_per_second": run.tokens_per_second,
        "memory_before_bytes": run.memory_before,
        "memory_peak_bytes": run.memory_peak,
        "training_loss_first": run.losses[0] if run.losses else None,
        "training_loss_final_mean": run.final_loss,
        "held_out_loss_start": run.held_out_start,
        "held_out_loss_end": run.held_out_end,
        "held_out_loss_after_gradients": run.held_out_after,
        "stats": run.stats,
        "steps": steps,
    }


def title_of(run: RunRecord) -> str:
    """Returns what a run is called in lines of progress and in the plot."""
    if run.name == ALONE:
        return f"{BASES[run.base]} alone"
    return NAMES[run.name] + ("" if run.base == ADAMW else f" on {BASES[run.base]}")


def result_table(record: SeedRecord, device: torch.device) -> Table:
    """Returns the table of all runs from one seed; the device decides what "memory" means."""
    runs = list(record.runs.values())
    baseline, alone, hybrid = (record.runs.get(name) for name in (BASELINE, ALONE, HYBRID))
    table = figures_table(f"Seed {record.seed}", ["", *map(_heading, runs)])

    def row(label: str, form: str, value: Callable[[RunRecord], float | None]) -> None:
        table.add_row(label, *(cell(value(run), form) for run in runs))

    def hybrid_only(label: str, value: float | None) -> None:
        row(label, PERCENT, lambda run: value if run is hybrid else None)

    def beside_one(label: str, form: str, value: Callable[[RunRecord, RunRecord], Any]) -> None:
        pairs = [(run, record.of_one_process(run)) for run in runs]
        if any(one for _, one in pairs):
            found = (cell(value(run, one) if one else None, form) for run, one in pairs)
            table.add_row(f"  {label} one process", *found)

    table.add_row("Steps", *map(_steps, runs))
    row("Gradient evaluations", "{}", lambda run: run.gradients)
    if any(sum(run.windows) > run.gradients for run in runs):
        row("  batches accumulated for them", "{}", lambda run: sum(run.windows))
        row("  noise scale at the end, batches", "{:.1f}", lambda run: run.statistic("noise_scale"))
    table.add_row("Predicted steps", *map(_predicted, runs))
    row("Total time", SECONDS, lambda run: run.seconds)
    table.add_row("Mean step time", *(_milliseconds([x.seconds for x in r.steps]) for r in runs))
    for phase, seconds in (hybrid.seconds_by_phase() if hybrid else {}).items():
        shown = f"{_milliseconds(seconds)} x {len(seconds)}"
        cells = (shown if run is hybrid else UNKNOWN for run in runs)
        table.add_row(f"  {phase.capitalize()}", *cells)
    row("Tokens per second", "{:,.0f}", lambda run: run.tokens_per_second)
    beside_one("times", FACTOR, lambda x, one: x.tokens_per_second / one.tokens_per_second)
    memory = "GPU" if device.type == "cuda" else "whole process"
    row(f"Peak memory ({memory})", "{:.2f} GiB", lambda run: run.memory_peak / GIBIBYTE)
    row("  above that before the model", "{:.2f} GiB", _above_before)
    row("Training loss, first batch", LOSS, lambda run: run.losses[0] if run.losses else None)
    row(f"Training loss, mean of last {FINAL_LOSSES}", LOSS, lambda run: run.final_loss)
    row("Held-out loss, start", LOSS, lambda run: run.held_out_start)
    row("Held-out loss, end", LOSS, lambda run: run.held_out_end)
    others = [run for run in runs if run is not baseline]
    row("  against AdamW", PERCENT, lambda x: x.percent_above(baseline) if x in others else None)
    beside_one("against", "{:+.4f} %", lambda run, one: run.percent_above(one))
    if alone is not None and hybrid is not None:
        # What tells the base rule's share from prediction's.
        rule, gradients = BASES[alone.base], hybrid.gradients
        hybrid_only(f"  against {rule} alone", record.above(ALONE))
        hybrid_only(f"  against AdamW after {gradients}", record.above(CONTROL))
        hybrid_only(f"  against {rule} after {gradients}", record.above_alone_on_its_way)
    else:
        hybrid_only("  against AdamW, as many gradients", record.above(CONTROL))
    if record.goal is not None:
        row("Gradients to AdamW's lowest", "{}", lambda run: run.gradients_to(record.goal))
        row("Seconds to it", SECONDS, lambda run: run.seconds_to(record.goal))
    row("Speed-up, wall clock", FACTOR, lambda run: record.speed_up(run.name))
    row("Predictions accepted", SHARE, lambda run: run.statistic("acceptance_rate"))
    row("Rollbacks", "{}", lambda run: run.statistic("rollbacks"))
    return table


def _heading(run: RunRecord) -> str:
    if run.name == CONTROL:
        return f"AdamW after\n{run.planned_steps} gradients"
    hybrid = "Hybrid" if run.base == ADAMW else f"Hybrid\non {BASES[run.base]}"
    names = {BASELINE: "AdamW", ALONE: f"{BASES[run.base]}\nalone", HYBRID: hybrid}
    if run.processes > 1:
        names = {name: f"{title}\nx {run.processes}" for name, title in names.items()}
    return {**names, BASELINE_ONE: "AdamW\nx 1", HYBRID_ONE: f"{hybrid}\nx 1"}[run.name]


def _above_before(run: RunRecord) -> float | None:
    return max(0, run.memory_peak - run.memory_before) / GIBIBYTE if run.steps else None


def _steps(run: RunRecord) -> str:
    done = len(run.steps)
    return str(done) if done == run.planned_steps else f"{done} of {run.planned_steps}"


def _predicted(run: RunRecord) -> str:
    share = cell(run.statistic("predicted_fraction"), SHARE)
    return UNKNOWN if run.stats is None else f"{run.statistic('predicted_steps')} ({share})"


def _milliseconds(seconds: Sequence[float]) -> str:
    return f"{1000 * sum(seconds) / len(seconds):.1f} ms" if seconds else UNKNOWN


Column = tuple[str, str, Callable[[SeedRecord], float | None]]
"""Heading, format and value."""


def seeds_table(records: Sequence[SeedRecord]) -> Table:
    """Returns the table of several seeds: a row for each and their mean.

    Where the base rule also ran alone, its loss takes the place of the seconds: more columns
    would not fit into a terminal of 80.
    """
    alone = next((record.runs[ALONE] for record in records if ALONE in record.runs), None)

    def of(name: str, field: str) -> Callable[[SeedRecord], float | None]:
        return lambda record: getattr(record.runs.get(name), field, None)

    rule = "" if alone is None else BASES[alone.base]
    columns = [
        ("AdamW\nseconds", "{:.2f}", of(BASELINE, "seconds")),
        ("Hybrid\nseconds", "{:.2f}", of(HYBRID, "seconds")),
        ("Speed\nup", FACTOR, SeedRecord.speed_up),
        ("Hybrid\ngrads", "{:g}", of(HYBRID, "gradients")),
        ("AdamW\nheld-out", LOSS, of(BASELINE, "held_out_end")),
        (f"{rule}\nheld-out", LOSS, of(ALONE, "held_out_end")),
        ("Hybrid\nheld-out", LOSS, of(HYBRID, "held_out_end")),
        ("As many\ngrads", LOSS, of(CONTROL, "held_out_end")),
        ("Against\nAdamW", PERCENT, lambda record: record.above(BASELINE)),
        ("Against\nas many", PERCENT, lambda record: record.above(CONTROL)),
        (f"Against\n{rule}", PERCENT, lambda record: record.above(ALONE)),
    ]
    left_out = ("AdamW\nseconds", "Hybrid\nseconds") if rule else ("\nheld-out", "Against\n")
    columns = [column for column in columns if column[0] not in left_out]
    return _of_seeds("All seeds", columns, records)


def _of_seeds(title: str, columns: Sequence[Column], records: Sequence[SeedRecord]) -> Table:
    table = figures_table(title, ["Seed", *(heading for heading, _, _ in columns)])
    for record in records:
        table.add_row(str(record.seed), *(cell(value(record), form) for _, form, value in columns))
    table.add_section()
    means = (mean_cell([value(record) for record in records], form) for _, form, value in columns)
    table.add_row("mean", *means)
    return table


def to_loss_table(records: Sequence[SeedRecord]) -> Table:
    """Returns the gradients and seconds that runs needed for AdamW's lowest held-out loss."""

    def of(name: str, measure: str) -> Callable[[SeedRecord], float | None]:
        return lambda record: getattr(record.runs.get(name), measure, lambda goal: None)(
            record.goal
        )

    columns: list[Column] = []
    for name in (BASELINE, ALONE, HYBRID):
        if (run := records[0].runs.get(name)) is not None:
            title = _heading(run).replace("\n", " ")
            columns.append((f"{title}\ngradients", "{:g}", of(name, "gradients_to")))
            columns.append(("seconds", "{:.2f}", of(name, "seconds_to")))
    return _of_seeds("To AdamW's lowest held-out loss", columns, records)


def write_plot(path: Path, records: Sequence[SeedRecord], title: str) -> None:
    """Draws training loss against gradient evaluations and against time, a row for each seed."""
    figure = Figure(figsize=(13, 1 + 4 * len(records)), layout="constrained")
    grid = figure.subplots(len(records), 2, squeeze=False, sharey="row")
    for axes, record in zip(grid, records, strict=True):
        for axis, by_time in zip(axes, (False, True), strict=True):
            for run in record.runs.values():
                _draw_run(axis, run, by_time)
            axis.set_xlabel("seconds of training" if by_time else "gradient evaluations")
            axis.grid(alpha=0.25)
        _draw_noise(axes[0], record.runs.get(HYBRID))
        axes[0].set_ylabel(f"loss, seed {record.seed}")
        axes[1].legend(fontsize="small")
    figure.suptitle(title)
    save_figure(path, figure)


def _draw_run(axis: Axes, run: RunRecord, by_time: bool) -> None:
    ends = list(itertools.accumulate(step.seconds for step in run.steps))
    positions = ends if by_time else [step.gradients for step in run.steps]
    measured = [(x, s) for x, s in zip(positions, run.steps, strict=True) if s.loss is not None]
    x, y = [x for x, _ in measured], run.losses
    name, colour = title_of(run), RUN_COLOURS[run.name]
    if run.name == HYBRID:
        _draw_phases(axis, run, ends, by_time)
        axis.plot(x, y, color="0.2", lw=0.8, alpha=0.7)
        colours = [PHASE_COLOURS[step.phase] for _, step in measured]
        axis.scatter(x, y, s=14, c=colours, zorder=3, label=name)
    elif run.name in (BASELINE, ALONE):
        axis.plot(x, y, color=colour, lw=1.2, label=name)
    if run.held_out_end is not None and positions:
        label = f"{name}: held-out {run.held_out_end:.3f}"
        star: dict[str, Any] = {"marker": "*", "ms": 11, "ls": "", "mec": "white"}
        axis.plot(positions[-1], run.held_out_end, color=colour, label=label, **star)


def _draw_noise(axis: Axes, run: RunRecord | None) -> None:
    """Draws the noise scale and the lengths of windows, where these follow from it."""
    if run is None or not run.noise_scales:
        return
    other = axis.twinx()
    gradients = [step.gradients for step in run.steps]
    noise = [math.nan if x is None else x for x in run.noise_scales]
    other.plot(gradients, noise, color="tab:olive", lw=1.0, label="noise scale")
    look: dict[str, Any] = {"color": "tab:brown", "lw": 1.0, "alpha": 0.7, "where": "mid"}
    other.step(range(1, len(run.windows) + 1), run.windows, label="batches a window", **look)
    other.set_yscale("log")
    other.set_ylabel("batches")
    other.legend(fontsize="small", loc="upper center")


def _draw_phases(axis: Axes, run: RunRecord, ends: Sequence[float], by_time: bool) -> None:
    """Draws what HybridOptimizer did: its phases over time, or where it predicted."""
    bottom = axis.get_xaxis_transform()
    if not by_time:
        # Predicted steps take no gradient, so here they have no width.
        predicted = [step.gradients for step in run.steps if step.loss is None]
        mark: dict[str, Any] = {"marker": "|", "ls": "", "color": PHASE_COLOURS["predict"]}
        axis.plot(predicted, [0.01] * len(predicted), transform=bottom, label="Predict", **mark)
        return
    for phase, colour in PHASE_COLOURS.items():
        pairs = zip(ends, run.steps, strict=True)
        spans = [(end - s.seconds, s.seconds) for end, s in pairs if s.phase == phase]
        look: dict[str, Any] = {"facecolors": colour, "alpha": 0.18, "label": phase.capitalize()}
        axis.broken_barh(spans, (0, 1), transform=bottom, **look)
