"""Turns the lines of finished runs, in any order, into one summary, its tables and its plots."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from frontier.judge import (
    AT_LEAST,
    AT_MOST,
    BASELINE,
    Tuning,
    compare,
    final_loss,
    grouped,
    tune_budgets,
)
from frontier.plots import draw_task, label
from lib.files import plain
from lib.run_store import Line, RunStore, canonical
from lib.statistics import Estimate, estimate

HOW_IT_IS_COMPUTED = (
    "Speed-up = gradient evaluations that tuned AdamW needs for the contender's final loss (each "
    "budget with its own learning rate and complete schedule, interpolated per seed by monotone "
    "cubics in the logarithm of the budget, never extrapolated) ÷ the contender's budget.",
    "Geometric mean over paired seeds (same initial weights, same data order), 95% interval by "
    "Student's t on the logarithm. Loss difference = contender minus AdamW with the same number of "
    "gradient evaluations and its schedule compressed to them.",
    "*faster* or *slower* only where the interval excludes 1 and the loss difference's excludes 0; "
    "*faster* only where AdamW is tuned around the answer: at least 4 learning rates, the best not "
    "at the grid's edge. One equal contender in 20 still comes out as one of the two by chance.",
)
BOUND_SIGNS = {None: "", AT_LEAST: "≥ ", AT_MOST: "≤ ", "unknown": "? "}
STATISTICS = ("predicted_steps", "predicted_fraction", "acceptance_rate", "rollbacks")
# Columns of the printed tables; the report has more.
PRINTED = ("contender", "evaluations", "speed-up (95%)", "verdict", "loss (95%)", "seeds", "tuned")

# The tuned runs of optimizers, by name and options as text, and by budget.
Contenders = dict[tuple[str, str], dict[int, Tuning]]


def load_lines(paths: Iterable[Path]) -> list[Line]:
    """Reads runs from files; of runs with equal keys the first counts."""
    by_key: dict[str, Line] = {}
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path}: does not exist; must be a file of runs")
        for line in RunStore(path).lines:
            by_key.setdefault(line["key"], line)
    return list(by_key.values())


def judge_tasks(
    lines: Iterable[Line],
) -> Iterator[tuple[dict[str, Any], dict[int, Tuning], Contenders]]:
    """Compares the runs of each task, its options and its schedules, in the order of these.

    The baseline may be of another schedule, that of its most runs on the task, and has the
    options of its most runs. With other options it competes.

    Yields:
        An entry of the summary's ``tasks``, the baseline, and the others.
    """
    in_order = sorted(lines, key=lambda line: str(line["key"]))
    for (task, options), of_task in grouped(in_order, lambda x: _named(x, "task")).items():
        by_schedule = grouped(of_task, lambda line: str(line.get("schedule")))
        baselines = {schedule: _baseline_runs(runs) for schedule, runs in by_schedule.items()}
        richest = max(baselines, key=lambda schedule: len(baselines[schedule]))
        for schedule, runs in by_schedule.items():
            origin = schedule if baselines[schedule] else richest
            baseline = tune_budgets(baselines[origin])
            name = _optimizer(baselines[origin][0]) if baseline else (BASELINE, "{}")
            contenders = {key: tune_budgets(own) for key, own in grouped(runs, _optimizer).items()}
            if baseline:
                contenders.pop(name, None)
            rows = [
                _contender_row(key, tuning, baseline)
                for key, by_budget in contenders.items()
                for tuning in by_budget.values()
            ]
            if baseline and origin != schedule:
                for row in rows:
                    row["reasons"] += (f"AdamW with its {origin} schedule",)
            rows.sort(key=lambda row: (-(row["speedup"] or {"mean": 0.0})["mean"], row["label"]))
            entry = {
                "title": f"{label(task, json.loads(options))}, {schedule} schedule",
                "task": task,
                "task_options": json.loads(options),
                "schedule": schedule,
                "baseline_schedule": origin if baseline else None,
                "baseline_options": json.loads(name[1]),
                "metric": sorted({str(line.get("metric")) for line in runs}),
                "runs": len(runs),
                "frontier": [_row(tuning) for tuning in baseline.values()],
                "contenders": rows,
            }
            yield entry, baseline, contenders


def _named(line: Line, what: str) -> tuple[str, str]:
    """The name of a line's task or optimizer, and its options as text."""
    return str(line[what]), canonical(line.get(f"{what}_options") or {})


def _optimizer(line: Line) -> tuple[str, str]:
    return _named(line, "optimizer")


def _baseline_runs(lines: Iterable[Line]) -> list[Line]:
    found = grouped((line for line in lines if line["optimizer"] == BASELINE), _optimizer)
    return max(found.values(), key=len, default=[])


def summarize(lines: Sequence[Line]) -> dict[str, Any]:
    """Judges every contender; what comes back can be written as JSON.

    Returns:
        ``runs``, ``seeds``, ``hardware``, ``versions`` and ``tasks``: for each group of runs its
        ``frontier`` (a row a budget) and ``contenders`` (a row a contender and budget, sorted by
        speed-up). Losses are the task's own, times are in seconds.
    """
    return {
        "baseline": BASELINE,
        "how": list(HOW_IT_IS_COMPUTED),
        "runs": len(lines),
        "diverged_runs": sum(not math.isfinite(final_loss(line)) for line in lines),
        "seeds": sorted({int(line["seed"]) for line in lines}),
        "hardware": distinct(lines, "hardware"),
        "versions": distinct(lines, "versions"),
        "tasks": [entry for entry, _, _ in judge_tasks(lines)],
    }


def distinct(lines: Sequence[Line], field: str) -> list[Any]:
    """The values of a field, each once."""
    return [json.loads(text) for text in sorted({canonical(line.get(field)) for line in lines})]


def _row(tuning: Tuning) -> dict[str, Any]:
    """What rows of the frontier and of contenders have in common."""
    finals = list(tuning.finals.values())
    loss = estimate(finals) if math.isfinite(sum(finals)) else None
    return {
        "budget": tuning.budget,
        "lr": tuning.lr,
        "learning_rates": [{"lr": lr, "loss": plain(x)} for lr, x in tuning.means.items()],
        "tuning_seeds": list(tuning.tuning_seeds),
        "tuned": tuning.problem is None,
        "problem": tuning.problem,
        "loss": loss and loss.interval(),
        "loss_by_seed": plain(tuning.finals),
        "seconds": _median(line.get("seconds") for line in tuning.runs.values()),
    }


def _contender_row(
    key: tuple[str, str], tuning: Tuning, baseline: Mapping[int, Tuning]
) -> dict[str, Any]:
    optimizer, options = key[0], json.loads(key[1])
    compared: dict[str, Any] = {
        name: value.interval() if isinstance(value, Estimate) else value
        for name, value in vars(compare(tuning, baseline)).items()
    }
    compared["speedup_by_seed"] = {
        str(seed): {"speedup": value, "bound": bound}
        for seed, (value, bound) in compared["speedup_by_seed"].items()
    }
    same = baseline[tuning.budget].runs if tuning.budget in baseline else {}
    known = [line["stats"] for line in tuning.runs.values() if line.get("stats")]
    return {
        "label": label(optimizer, options),
        "optimizer": optimizer,
        "optimizer_options": options,
        **_row(tuning),
        **compared,
        "seconds_ratio": _median(
            _ratio(line, same[seed]) for seed, line in tuning.runs.items() if seed in same
        ),
        "stats": {
            name: statistics.fmean(stats[name] for stats in known)
            for name in STATISTICS
            if known and all(stats.get(name) is not None for stats in known)
        },
    }


def _ratio(ours: Line, theirs: Line) -> float | None:
    """The ratio of wall times, where the hardware was the same."""
    if ours.get("hardware") != theirs.get("hardware"):
        return None
    one, other = ours.get("seconds"), theirs.get("seconds")
    return one / other if one and other else None


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(statistics.median(known)) if known else None


def format_estimate(found: Mapping[str, Any] | None, form: str, sign: str = "") -> str:
    """A mean with its interval, as tables have it."""
    if found is None:
        return "-"
    text = f"{sign}{found['mean']:{form}}"
    if found["low"] in (None, found["high"]):  # no interval, or every seed at one bound
        return text
    return f"{text} ({found['low']:{form}} to {found['high']:{form}})"


def contender_cells(row: Mapping[str, Any]) -> dict[str, str]:
    """A row of the contenders' table, by column."""
    difference = format_estimate(row["loss_difference"], "+.3g")
    if row["loss_ratio"] is not None:
        difference = format_estimate(row["loss_ratio"], ".3g") + " times"
    notes = list(row["reasons"])
    if row["unpaired_seeds"]:
        notes.append(f"seeds without baseline: {list(row['unpaired_seeds'])}")
    if row["control"] == "interpolated":
        notes.append("AdamW's loss at this budget interpolated")
    return {
        "contender": row["label"],
        "evaluations": f"{row['budget']:,}",
        "speed-up (95%)": format_estimate(row["speedup"], ".2f", BOUND_SIGNS[row["bound"]]),
        "verdict": row["verdict"],
        "loss": "-" if row["loss"] is None else f"{row['loss']['mean']:.4g}",
        "loss against AdamW's (95%)": difference,
        "learning rate": f"{row['lr']:g}",
        "seeds": str(len(row["seeds"])),
        "wall time": "-" if row["seconds_ratio"] is None else f"{row['seconds_ratio']:.2f}x",
        "notes": "; ".join(notes),
    }


def frontier_cells(row: Mapping[str, Any]) -> dict[str, str]:
    """A row of the frontier's table, by column."""
    return {
        "evaluations": f"{row['budget']:,}",
        "loss (95%)": format_estimate(row["loss"], ".4g"),
        "learning rate": f"{row['lr']:g}",
        "rates tried": str(len(row["learning_rates"])),
        "seeds": str(len(row["loss_by_seed"])),
        "tuned": row["problem"] or "yes",
    }


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table; a bar within a cell does not end it."""
    if not rows:
        return "None."
    parts = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in p)} |" for p in parts)


def markdown(summary: Mapping[str, Any]) -> str:
    """A summary as Markdown, with the plots that it names."""
    seeds = ", ".join(map(str, summary["seeds"]))
    parts = [
        "# Gradient evaluations against tuned AdamW",
        "\n".join(f"{i}. {text}" for i, text in enumerate(summary["how"], 1)),
        f"{summary['runs']:,} runs ({summary['diverged_runs']:,} diverged), seeds {seeds}.",
        *(f"Hardware: {label('', x)}." for x in summary["hardware"]),
        *(f"Versions: {label('', x)}." for x in summary["versions"]),
    ]
    for task in summary["tasks"]:
        parts.append(f"## {task['title']}\n\nLoss: {', '.join(task['metric'])}.")
        parts.append(markdown_table([contender_cells(row) for row in task["contenders"]]))
        name = label("AdamW", task["baseline_options"])
        parts.append(f"Frontier of {name} ({task['baseline_schedule']} schedule):")
        parts.append(markdown_table([frontier_cells(row) for row in task["frontier"]]))
        parts += [f"![{name}]({name})" for name in task.get("plots", ())]
    return "\n\n".join(parts) + "\n"


def print_tables(summary: Mapping[str, Any], console: Console) -> None:
    """Prints two short tables a task, narrow enough for a terminal."""
    for task in summary["tasks"]:
        contenders = [contender_cells(row) for row in task["contenders"]]
        frontier = [frontier_cells(row) for row in task["frontier"]]
        for title, rows in ((task["title"], contenders), ("AdamW's frontier", frontier)):
            if rows:
                table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD)
                columns = [name for name in PRINTED if name in rows[0]]
                for name in columns:
                    table.add_column(name, justify="right", no_wrap=True)
                if "contender" in columns:
                    first = table.columns[0]
                    first.justify, first.no_wrap, first.overflow = "left", False, "fold"
                for row in rows:
                    table.add_row(*(escape(row[name]) for name in columns))
                console.print(table)


def write_report(
    lines: Sequence[Line], directory: Path, console: Console | None = None
) -> dict[str, Any]:
    """Writes summary.json, report.md and the plots into a directory, and prints the tables.

    Files of an earlier report are replaced. Returns the summary.
    """
    if not lines:
        raise ValueError("lines: 0 runs; allowed is at least 1")
    directory.mkdir(parents=True, exist_ok=True)
    summary = summarize(lines)
    stems: list[str] = []
    for task, (_, baseline, contenders) in zip(summary["tasks"], judge_tasks(lines)):
        stem = re.sub(r"[^A-Za-z0-9]+", "-", f"{task['task']}-{task['schedule']}").strip("-")
        stems.append(stem)
        numbered = stem if stems.count(stem) == 1 else f"{stem}-{stems.count(stem)}"
        task["plots"] = draw_task(task["title"], baseline, contenders, directory, numbered)
    text = json.dumps(summary, indent=2, allow_nan=False)
    (directory / "summary.json").write_text(text + "\n", encoding="utf-8")
    (directory / "report.md").write_text(markdown(summary), encoding="utf-8")
    print_tables(summary, console or Console())
    return summary
