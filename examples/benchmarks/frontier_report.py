"""Turns the lines of finished runs into one summary, its tables and its plots.

``load_lines`` reads them, ``summarize`` judges them by frontier_statistics.py, ``write_report``
writes summary.json, report.md and the plots, and prints the tables. The order of the lines makes
no difference.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from frontier_lines import read_lines
from frontier_plots import draw_task, label
from frontier_statistics import (
    AT_LEAST,
    AT_MOST,
    BASELINE,
    Line,
    Tuning,
    canonical,
    compare,
    final_loss,
    t_interval,
    tune_budgets,
)
from rich.box import SIMPLE_HEAD
from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.table import Table

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
PRINTED = ("contender", "evaluations", "speed-up (95%)", "verdict", "loss (95%)", "seeds", "tuned")
"""Columns of the printed tables; the report has more."""


@dataclass
class Group:
    """The runs that are compared with each other: one task, its options, one schedule.

    Attributes:
        task: Its name.
        task_options: Its options.
        schedule: Of the learning rate.
        baseline_schedule: The baseline's, if it was not run with ``schedule``: that of its most
            runs on the same task. None where the task has no baseline at all.
        baseline: Its tuned runs, by budget.
        baseline_options: Its options: of several, those with the most runs. The others compete.
        contenders: The tuned runs of the others, by (optimizer, options as text) and budget.
        lines: All runs of the group, without a baseline from elsewhere.
    """

    task: str
    task_options: dict[str, Any]
    schedule: str
    baseline_schedule: str | None
    baseline: dict[int, Tuning]
    baseline_options: dict[str, Any]
    contenders: dict[tuple[str, str], dict[int, Tuning]]
    lines: list[Line]

    @property
    def title(self) -> str:
        """What the group is called in tables and plots."""
        return f"{label(self.task, self.task_options)}, {self.schedule} schedule"


def load_lines(paths: Iterable[str | Path]) -> list[Line]:
    """Reads runs from files; of runs with equal keys the first counts.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If a line is JSON but not an object with a key.
    """
    by_key: dict[str, Line] = {}
    for path in map(Path, paths):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file of runs")
        for line in read_lines(path):
            by_key.setdefault(str(line["key"]), line)
    return list(by_key.values())


def group_lines(lines: Iterable[Line]) -> list[Group]:
    """Sorts runs into groups with a baseline each, ordered by task, options and schedule."""
    by_task: dict[tuple[str, str], dict[str, list[Line]]] = {}
    for line in sorted(lines, key=lambda line: str(line["key"])):
        name = (str(line["task"]), canonical(line.get("task_options")))
        by_task.setdefault(name, {}).setdefault(str(line.get("schedule")), []).append(line)
    groups = []
    for (task, options), by_schedule in sorted(by_task.items()):
        baselines = {s: _baseline_runs(by_schedule[s]) for s in sorted(by_schedule)}
        richest = max(baselines, key=lambda schedule: len(baselines[schedule]))
        for schedule in sorted(by_schedule):
            source = schedule if baselines[schedule] else richest
            baseline = baselines[source]
            chosen = dict(baseline[0].get("optimizer_options") or {}) if baseline else {}
            contenders: dict[tuple[str, str], list[Line]] = {}
            for line in by_schedule[schedule]:
                key = (str(line["optimizer"]), canonical(line.get("optimizer_options")))
                if not baseline or key != (BASELINE, canonical(chosen)):
                    contenders.setdefault(key, []).append(line)
            groups.append(
                Group(
                    task=task,
                    task_options=json.loads(options),
                    schedule=schedule,
                    baseline_schedule=source if baseline else None,
                    baseline=tune_budgets(baseline),
                    baseline_options=chosen,
                    contenders={key: tune_budgets(contenders[key]) for key in sorted(contenders)},
                    lines=by_schedule[schedule],
                )
            )
    return groups


def _baseline_runs(lines: Sequence[Line]) -> list[Line]:
    by_options: dict[str, list[Line]] = {}
    for line in lines:
        if line["optimizer"] == BASELINE:
            by_options.setdefault(canonical(line.get("optimizer_options")), []).append(line)
    return max((by_options[o] for o in sorted(by_options)), key=len, default=[])


def summarize(lines: Iterable[Line]) -> dict[str, Any]:
    """Judges every contender; what comes back can be written as JSON.

    Returns:
        ``runs``, ``seeds``, ``hardware``, ``versions`` and ``tasks``: for each group of runs its
        ``frontier`` (a row a budget) and ``contenders`` (a row a contender and budget, sorted by
        speed-up). Losses are the task's own, times are in seconds.
    """
    lines = list(lines)
    return {
        "baseline": BASELINE,
        "how": list(HOW_IT_IS_COMPUTED),
        "runs": len(lines),
        "diverged_runs": sum(not math.isfinite(final_loss(line)) for line in lines),
        "seeds": sorted({int(line["seed"]) for line in lines}),
        "hardware": _distinct(lines, "hardware"),
        "versions": _distinct(lines, "versions"),
        "tasks": [summarize_group(group) for group in group_lines(lines)],
    }


def _distinct(lines: Sequence[Line], field: str) -> list[Any]:
    return [json.loads(t)[field] for t in sorted({canonical({field: x.get(field)}) for x in lines})]


def summarize_group(group: Group) -> dict[str, Any]:
    """One entry of the summary's ``tasks``."""
    contenders = []
    for (optimizer, options), by_budget in group.contenders.items():
        for tuning in by_budget.values():
            contenders.append(_contender_row(group, optimizer, json.loads(options), tuning))
    contenders.sort(key=lambda row: (-(row["speedup"] or {"mean": 0.0})["mean"], row["label"]))
    return {
        "title": group.title,
        "task": group.task,
        "task_options": group.task_options,
        "schedule": group.schedule,
        "baseline_schedule": group.baseline_schedule,
        "baseline_options": group.baseline_options,
        "metric": sorted({str(line.get("metric")) for line in group.lines}),
        "runs": len(group.lines),
        "frontier": [_row(tuning) for tuning in group.baseline.values()],
        "contenders": contenders,
    }


def _row(tuning: Tuning) -> dict[str, Any]:
    """What rows of the frontier and of contenders have in common."""
    finals = tuning.finals
    finite = all(math.isfinite(final) for final in finals.values())
    loss = t_interval(list(finals.values())) if finite else None
    return {
        "budget": tuning.budget,
        "lr": tuning.lr,
        "learning_rates": [
            {"lr": lr, "loss": mean if math.isfinite(mean) else None}
            for lr, mean in tuning.means.items()
        ],
        "tuning_seeds": list(tuning.tuning_seeds),
        "tuned": tuning.problem is None,
        "problem": tuning.problem,
        "loss": None if loss is None else asdict(loss),
        "loss_by_seed": {str(s): x if math.isfinite(x) else None for s, x in finals.items()},
        "seconds": _median(line.get("seconds") for line in tuning.runs.values()),
    }


def _contender_row(
    group: Group, optimizer: str, options: dict[str, Any], tuning: Tuning
) -> dict[str, Any]:
    planted = sorted({str(x["planted"]) for x in tuning.runs.values() if x.get("planted")})
    compared = asdict(compare(tuning, group.baseline, bool(planted)))
    compared["reasons"] += tuple(f"planted: {what}" for what in planted)
    compared["speedup_by_seed"] = {
        str(seed): {"speedup": value, "bound": bound}
        for seed, (value, bound) in compared["speedup_by_seed"].items()
    }
    baseline = group.baseline.get(tuning.budget)
    statistics = [line["stats"] for line in tuning.runs.values() if line.get("stats")]
    if group.baseline_schedule not in (None, group.schedule):
        compared["reasons"] += (f"AdamW with its {group.baseline_schedule} schedule",)
    return {
        "label": label(optimizer, options),
        "optimizer": optimizer,
        "optimizer_options": options,
        **_row(tuning),
        **compared,
        "seconds_ratio": _seconds_ratio(tuning.runs, baseline.runs if baseline else {}),
        "stats": {
            name: float(np.mean([s[name] for s in statistics]))
            for name in STATISTICS
            if statistics and all(s.get(name) is not None for s in statistics)
        },
    }


def _seconds_ratio(ours: Mapping[int, Line], theirs: Mapping[int, Line]) -> float | None:
    """The median ratio of wall times, seed by seed, where the hardware was the same."""
    return _median(
        line["seconds"] / theirs[seed]["seconds"]
        for seed, line in ours.items()
        if seed in theirs
        and line.get("seconds")
        and theirs[seed].get("seconds")
        and line.get("hardware") == theirs[seed].get("hardware")
    )


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def format_estimate(estimate: Mapping[str, Any] | None, form: str, sign: str = "") -> str:
    """A mean with its interval, as tables have it."""
    if estimate is None:
        return "-"
    text = f"{sign}{estimate['mean']:{form}}"
    if estimate["low"] in (None, estimate["high"]):  # no interval, or every seed at one bound
        return text
    return f"{text} ({estimate['low']:{form}} to {estimate['high']:{form}})"


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
    """A Markdown table, nothing for no rows; a bar within a cell does not end it."""
    if not rows:
        return "None."
    parts = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in p)} |" for p in parts)


def markdown(summary: Mapping[str, Any]) -> str:
    """A summary as Markdown, with the plots that it names."""
    seeds = ", ".join(map(str, summary["seeds"]))
    parts = ["# Gradient evaluations against tuned AdamW"]
    parts += ["\n".join(f"{i}. {text}" for i, text in enumerate(summary["how"], 1))]
    parts += [
        f"{summary['runs']:,} runs ({summary['diverged_runs']:,} diverged), seeds {seeds}.",
        *(f"Hardware: {_plain(x)}." for x in summary["hardware"]),
        *(f"Versions: {_plain(x)}." for x in summary["versions"]),
    ]
    for task in summary["tasks"]:
        parts.append(f"## {task['title']}\n\nLoss: {', '.join(task['metric'])}.")
        parts.append(markdown_table([contender_cells(row) for row in task["contenders"]]))
        name = label("AdamW", task["baseline_options"])
        parts.append(f"Frontier of {name} ({task['baseline_schedule']} schedule):")
        parts.append(markdown_table([frontier_cells(row) for row in task["frontier"]]))
        parts += [f"![{name}]({name})" for name in task.get("plots", ())]
    return "\n\n".join(parts) + "\n"


def _plain(value: object) -> str:
    return label("", value).lstrip(", ") if isinstance(value, Mapping) else str(value)


def print_tables(summary: Mapping[str, Any], console: Console) -> None:
    """Prints two short tables a task, narrow enough for a terminal."""
    for task in summary["tasks"]:
        contenders = [contender_cells(row) for row in task["contenders"]]
        frontier = [frontier_cells(row) for row in task["frontier"]]
        for title, rows in ((task["title"], contenders), ("AdamW's frontier", frontier)):
            table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD)
            columns = [name for name in (rows[0] if rows else ()) if name in PRINTED]
            for name in columns:
                left = name == "contender"
                justify: JustifyMethod = "left" if left else "right"
                table.add_column(name, justify=justify, no_wrap=not left, overflow="fold")
            for row in rows:
                table.add_row(*(escape(row[name]) for name in columns))
            if rows:
                console.print(table)


def write_report(
    lines: Iterable[Line], directory: str | Path, console: Console | None = None
) -> dict[str, Any]:
    """Writes summary.json, report.md and the plots into a directory, and prints the tables.

    Args:
        lines: Finished runs.
        directory: Is made where it is missing; files of an earlier report are replaced.
        console: Where to print; standard output if None.

    Returns:
        The summary.

    Raises:
        ValueError: If there are no lines.
    """
    lines = list(lines)
    if not lines:
        raise ValueError("lines: 0 runs; allowed is at least 1")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    summary = summarize(lines)
    stems: list[str] = []
    for group, task in zip(group_lines(lines), summary["tasks"]):
        stem = re.sub(r"[^A-Za-z0-9]+", "-", f"{group.task}-{group.schedule}").strip("-")
        stems.append(stem)
        numbered = stem if stems.count(stem) == 1 else f"{stem}-{stems.count(stem)}"
        drawn = draw_task(group.title, group.baseline, group.contenders, directory, numbered)
        task["plots"] = drawn
    text = json.dumps(summary, indent=2, allow_nan=False)
    (directory / "summary.json").write_text(text + "\n", encoding="utf-8")
    (directory / "report.md").write_text(markdown(summary), encoding="utf-8")
    print_tables(summary, console or Console())
    return summary
