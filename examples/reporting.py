"""What the example prints: progress while it runs, and tables of what came out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from run_records import ADAMW, BASES, FINAL_LOSSES, RunRecord, SeedRecord, percent_above

SECONDS_BETWEEN_LINES = 30.0
UNKNOWN = "-"
GIBIBYTE = 2**30


@contextmanager
def progress(console: Console, title: str, steps: int) -> Iterator[Callable[[RunRecord], None]]:
    """Shows how a run gets on: a bar in a terminal, now and then a line elsewhere.

    Args:
        console: Where to show it.
        title: What the run is called.
        steps: How many steps it has.

    Yields:
        What to call after every step.
    """
    if not console.is_terminal:
        yield _line_writer(console, title, steps)
        return
    # Drawn only between steps, never beside one: a thread of its own would slow what is timed.
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[phase]:>8} loss {task.fields[loss]}"),
        TextColumn("time left"),
        TimeRemainingColumn(),
        console=console,
        auto_refresh=False,
    )
    with bar:
        task = bar.add_task(title, total=steps, phase="", loss=UNKNOWN)
        bar.refresh()

        def report(record: RunRecord) -> None:
            losses = record.losses
            bar.update(
                task,
                completed=len(record.steps),
                phase=record.steps[-1].phase,
                loss=f"{losses[-1]:.3f}" if losses else UNKNOWN,
            )
            bar.refresh()

        yield report


def _line_writer(console: Console, title: str, steps: int) -> Callable[[RunRecord], None]:
    last = time.monotonic()

    def report(record: RunRecord) -> None:
        nonlocal last
        done = len(record.steps)
        if done < steps and time.monotonic() - last < SECONDS_BETWEEN_LINES:
            return
        last = time.monotonic()
        losses = record.losses
        left = record.seconds / done * (steps - done)
        console.print(
            f"{title}: step {done}/{steps}, {record.steps[-1].phase}, "
            f"loss {losses[-1] if losses else float('nan'):.3f}, {left:.0f} s left",
            highlight=False,
        )

    return report


def result_table(seed_record: SeedRecord, device: torch.device) -> Table:
    """Returns the table of all runs from one seed.

    Args:
        seed_record: The runs.
        device: Where they ran, which decides what "memory" means.
    """
    runs = seed_record.runs
    alone = seed_record.alone
    # In the wide box a fourth run would not fit into 80 columns.
    narrow: dict[str, Any] = {} if alone is None else {"box": SIMPLE_HEAD, "padding": 0}
    table = Table(title=f"Seed {seed_record.seed}", title_justify="left", **narrow)
    table.add_column("")
    for run in runs:
        table.add_column(_heading(run, seed_record), justify="right")

    def row(label: str, cell: Callable[[RunRecord], str]) -> None:
        table.add_row(label, *(cell(run) for run in runs))

    row("Steps", _steps)
    row("Gradient evaluations", lambda run: str(run.gradients))
    row("Predicted steps", _predicted)
    row("Total time", lambda run: f"{run.seconds:.2f} s")
    row(
        "Mean step time",
        lambda run: _milliseconds([step.seconds for step in run.steps]),
    )
    by_phase = {} if seed_record.hybrid is None else seed_record.hybrid.seconds_by_phase()
    for phase, seconds in by_phase.items():
        cell = _milliseconds(seconds, counted=True)
        row(
            f"  {phase.capitalize()}",
            lambda run, cell=cell: cell if run is seed_record.hybrid else UNKNOWN,  # type: ignore[misc]
        )
    row("Tokens per second", lambda run: f"{run.tokens_per_second:,.0f}")
    memory = "Peak memory (GPU)" if device.type == "cuda" else "Peak memory (whole process)"
    row(memory, lambda run: f"{run.memory_peak / GIBIBYTE:.2f} GiB")
    row("  above that before the model", _above)
    row("Training loss, first batch", lambda run: _number(run.losses[0] if run.losses else None))
    row(f"Training loss, mean of last {FINAL_LOSSES}", lambda run: _number(run.final_loss))
    row("Held-out loss, start", lambda run: _number(run.held_out_start))
    row("Held-out loss, end", lambda run: _number(run.held_out_end))
    row("  against AdamW", lambda run: _against_baseline(run, seed_record))
    if alone is not None and seed_record.hybrid is not None:
        _add_base_rows(row, seed_record, alone, seed_record.hybrid)
    else:
        row("  against AdamW, as many gradients", lambda run: _against_control(run, seed_record))
    row("Speed-up, wall clock", lambda run: _speed_up(run, seed_record.baseline))
    row("Predictions accepted", lambda run: _share(run.statistic("acceptance_rate")))
    row("Rollbacks", lambda run: str(run.statistic("rollbacks") if run.stats else UNKNOWN))
    return table


def _add_base_rows(
    row: Callable[[str, Callable[[RunRecord], str]], None],
    seed_record: SeedRecord,
    alone: RunRecord,
    hybrid: RunRecord,
) -> None:
    """Adds what tells the base rule's share from prediction's.

    Args:
        row: Adds a row to the table.
        seed_record: The runs.
        alone: The base rule alone.
        hybrid: HybridOptimizer.
    """
    rule, gradients = BASES[alone.base], hybrid.gradients

    def hybrid_only(value: float | None) -> Callable[[RunRecord], str]:
        return lambda run: _percent(value) if run is hybrid else UNKNOWN

    row(f"  against {rule} alone", hybrid_only(seed_record.against_alone))
    row(f"  against AdamW after {gradients}", hybrid_only(seed_record.against_control))
    row(f"  against {rule} after {gradients}", hybrid_only(seed_record.against_alone_on_its_way))


def seeds_table(seed_records: Sequence[SeedRecord]) -> Table:
    """Returns the table of several seeds: a row for each and their mean.

    Args:
        seed_records: The runs. Where the base rule also ran alone, its loss takes the place of
            the seconds.
    """
    rule = next((BASES[record.alone.base] for record in seed_records if record.alone), None)
    # Narrow enough for 80 columns.
    table = Table(title="All seeds", title_justify="left", box=SIMPLE_HEAD, padding=0)
    columns: list[tuple[str, Callable[[SeedRecord], float | None], Callable[[float | None], str]]]
    columns = [
        ("AdamW\nseconds", lambda s: s.baseline.seconds if s.baseline else None, _seconds),
        ("Hybrid\nseconds", lambda s: s.hybrid.seconds if s.hybrid else None, _seconds),
        ("Speed\nup", lambda s: s.speed_up, _factor),
        ("Hybrid\ngrads", lambda s: s.hybrid.gradients if s.hybrid else None, _count),
        ("AdamW\nheld-out", lambda s: s.baseline.held_out_end if s.baseline else None, _number),
        ("Hybrid\nheld-out", lambda s: s.hybrid.held_out_end if s.hybrid else None, _number),
        ("As many\ngrads", lambda s: s.control.held_out_end if s.control else None, _number),
        ("Against\nAdamW", lambda s: s.against_baseline, _percent),
        ("Against\nas many", lambda s: s.against_control, _percent),
    ]
    if rule is not None:
        columns = [column for column in columns if not column[0].endswith("seconds")]
        columns.insert(
            3, (f"{rule}\nheld-out", lambda s: s.alone.held_out_end if s.alone else None, _number)
        )
        columns.append((f"Against\n{rule}", lambda s: s.against_alone, _percent))
    table.add_column("Seed", no_wrap=True)
    for heading, _, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for record in seed_records:
        table.add_row(str(record.seed), *(show(value_of(record)) for _, value_of, show in columns))
    table.add_section()
    means = []
    for _, value_of, show in columns:
        values = [value_of(record) for record in seed_records]
        known = [value for value in values if value is not None]
        means.append(show(sum(known) / len(known) if len(known) == len(values) else None))
    table.add_row("mean", *means)
    return table


def _heading(run: RunRecord, seed_record: SeedRecord) -> str:
    if run is seed_record.hybrid:
        return "Hybrid" if run.base == ADAMW else f"Hybrid\non {BASES[run.base]}"
    if run is seed_record.alone:
        return f"{BASES[run.base]}\nalone"
    if run is seed_record.control:
        return f"AdamW after\n{run.planned_steps} gradients"
    return "AdamW"


def _steps(run: RunRecord) -> str:
    done = len(run.steps)
    return str(done) if done == run.planned_steps else f"{done} of {run.planned_steps}"


def _predicted(run: RunRecord) -> str:
    if run.stats is None:
        return UNKNOWN
    share = _share(run.statistic("predicted_fraction"))
    return f"{run.statistic('predicted_steps')} ({share})"


def _milliseconds(seconds: Sequence[float], counted: bool = False) -> str:
    if not seconds:
        return UNKNOWN
    count = f" x {len(seconds)}" if counted else ""
    return f"{1000 * sum(seconds) / len(seconds):.1f} ms{count}"


def _above(run: RunRecord) -> str:
    above = max(0, run.memory_peak - run.memory_before)
    return f"{above / GIBIBYTE:.2f} GiB" if run.steps else UNKNOWN


def _against_baseline(run: RunRecord, seed_record: SeedRecord) -> str:
    if run is seed_record.baseline:
        return UNKNOWN
    return _percent(percent_above(run, seed_record.baseline))


def _against_control(run: RunRecord, seed_record: SeedRecord) -> str:
    if run is not seed_record.hybrid:
        return UNKNOWN
    return _percent(seed_record.against_control)


def _speed_up(run: RunRecord, baseline: RunRecord | None) -> str:
    if baseline is None or not run.complete or not baseline.complete:
        return UNKNOWN
    return _factor(baseline.seconds / run.seconds)


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.4f}"


def _count(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:g}"


def _seconds(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.2f}"


def _factor(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.2f}x"


def _percent(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:+.2f} %"


def _share(value: float | None) -> str:
    # Not a number: the share of nothing, such as of no predictions.
    return UNKNOWN if value is None or math.isnan(value) else f"{100 * value:.0f} %"
