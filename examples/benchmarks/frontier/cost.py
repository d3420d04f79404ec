"""What a gradient costs with the step that follows it: processor time, optimizers in turn.

A speed-up in gradients is one by the clock only where it is larger than this.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from frontier.optimizers import find_optimizer
from frontier.tasks import TASKS
from frontier.training import Run, RunSpec
from lib.environment import environment
from lib.files import write_json
from lib.progress import progress

MILLISECONDS = 1e3


def measure_cost(
    tasks: Mapping[str, dict[str, Any]],
    optimizers: Mapping[str, dict[str, Any]],
    gradients: int,
    rounds: int,
    path: Path,
) -> Table:
    """Trains each a few times for a while, in turn, and writes the processor's time as JSON.

    That of all threads, without evaluations; other programs disturb it less than the clock's.

    Args:
        tasks: Options of each.
        optimizers: Options of each; the others are compared with the first.
        gradients: Of each run, those of Warmup among them.
        rounds: Runs of each; round k is one with seed k.
        path: Of the JSON.
    """
    rows: list[dict[str, Any]] = []
    done, count = 0, len(tasks) * len(optimizers) * rounds
    with progress(Console(stderr=True), count, "runs") as report:
        for task, options in tasks.items():
            found: dict[str, list[float]] = {name: [] for name in optimizers}
            for seed in range(rounds):
                for name, settings in optimizers.items():
                    rates = find_optimizer(name).grid(TASKS[task].learning_rates)
                    lr = rates[len(rates) // 2]
                    spec = RunSpec(task, name, lr, gradients, seed, "linear", options, settings)
                    found[name].append(_milliseconds(Run(spec, measured=False)))
                    done += 1
                    report(done, f"{task} {name}: {found[name][-1]:.1f} ms")
            first = found[next(iter(optimizers))]
            rows += [_row(task, options, name, times, first) for name, times in found.items()]
    content = {"gradients": gradients, "rows": rows, **environment(torch.device("cpu"))}
    write_json(path, content)
    table = Table("task", "optimizer", "ms", "quartiles", "of the first's", "all rounds")
    for row in rows:
        ratios = row["ratios"]
        table.add_row(
            f"{row['task']} {row['task_options'] or ''}", row["optimizer"],
            f"{row['milliseconds']:.1f}", "{:.1f} to {:.1f}".format(*row["quartiles"]),
            f"{row['ratio']:.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}",
        )  # fmt: skip
    return table


def _milliseconds(run: Run) -> float:
    """Processor time of a gradient with its step."""
    run.task.batch(run.seed, 0)  # reads the data
    started = time.process_time()
    run.train()
    return (time.process_time() - started) / run.gradients * MILLISECONDS


def _row(
    task: str, options: dict[str, Any], name: str, times: Sequence[float], first: Sequence[float]
) -> dict[str, Any]:
    ratios = [its / others for its, others in zip(times, first, strict=True)]
    quartiles = statistics.quantiles(times, n=4, method="inclusive")
    return {
        **{"task": task, "task_options": options, "optimizer": name},
        **{"milliseconds": statistics.median(times), "quartiles": [quartiles[0], quartiles[2]]},
        **{"ratio": statistics.median(ratios), "ratios": ratios},
    }
