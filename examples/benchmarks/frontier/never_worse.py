"""Whether HybridOptimizer with its defaults is worse than the AdamW it takes the place of.

Nothing is tuned: both get the same rate, seeds, data and number of gradients. It is the question of
who changes one line of a training script; the frontier asks what a tuned run gains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.optim import AdamW, Optimizer

from frontier.report import STATISTICS, format_estimate, markdown_table
from frontier.swap_tasks import SWAP_TASKS, Told
from lib.environment import environment
from lib.files import replacing, write_json
from lib.progress import progress
from lib.statistics import Estimate, paired_ratios
from triton_hybrid import HybridConfig, HybridOptimizer

MARGIN = 1.05
"""Largest upper end of the ratio's interval that is *not worse*.

With a margin of zero, equal optimizers would fail 39 times in 40. On the development seeds a rate
10% larger moves AdamW's measure by 3 to 4% (small-batch, shift): nobody tunes it more finely.
"""
ROUNDING = 1.001  # ratios below count as equal
GAIN = 1.1
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": AdamW,
    "hybrid": HybridOptimizer,
    "hybrid-told": Told,
    "hybrid-none": partial(HybridOptimizer, hybrid=HybridConfig(predictor="none")),
    "adamw-gain": lambda params, lr, **others: AdamW(params, lr=GAIN * lr, **others),
}
REFERENCE, *CONTENDERS = OPTIMIZERS

HOW = (
    "Ratio = the contender's measure ÷ that of torch.optim.AdamW with the same seed (initial "
    "weights, data), learning rate and number of gradient evaluations; lower is better. Geometric "
    "mean over seeds, 95% interval by Student's t on the logarithm.",
    f"*not worse*: the interval ends at {MARGIN} or below; *worse*: it ends above and begins above "
    "1; else *undecided*. A run that diverged where AdamW's did not makes it *worse*. Of the seeds "
    f"those are worse whose ratio is above {ROUNDING}.",
    "`hybrid` has its defaults and is told no loss, `hybrid-told` each one. Controls: "
    f"`hybrid-none` is AdamW up to rounding, `adamw-gain` is AdamW at {GAIN} times the rate.",
)


def train_once(task: str, optimizer: str, seed: int, steps: int | None = None) -> dict[str, Any]:
    """Trains once; returns the measures, and what each HybridOptimizer said at the end."""
    chosen, made = SWAP_TASKS[task], list[Optimizer]()

    def make(params: Any) -> Optimizer:
        made.append(OPTIMIZERS[optimizer](params, lr=chosen.lr, betas=chosen.betas))
        return made[-1]

    measures = chosen.train(seed, make, steps)
    said = [one.stats().to_dict() for one in made if isinstance(one, HybridOptimizer)]
    stats = [{name: one[name] for name in (*STATISTICS, "confidence", "signal")} for one in said]
    run = {"task": task, "optimizer": optimizer, "seed": seed}
    return run | {"measures": measures, "stats": stats}


def judge(contender: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """Compares measures that are paired by seed; those of diverged runs are not finite."""
    pairs = list(zip(contender, reference, strict=True))
    finite = [pair for pair in pairs if all(map(math.isfinite, pair))]
    ratio = paired_ratios(*zip(*finite)) if finite else None
    diverged = sum(math.isfinite(y) and not math.isfinite(x) for x, y in pairs)
    return {
        "ratio": ratio and ratio.interval(),
        "worse": diverged + sum(x > ROUNDING * y for x, y in finite),
        "seeds": len(pairs),
        "diverged": diverged,
        "verdict": "worse" if diverged else _verdict(ratio),
    }


def _verdict(ratio: Estimate | None) -> str:
    if ratio is None or ratio.low is None or ratio.high is None:
        return "undecided"
    if ratio.high <= MARGIN:
        return "not worse"
    return "worse" if ratio.low > 1.0 else "undecided"


def compare_runs(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Judges every contender by every measure of each task."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for run in sorted(runs, key=lambda run: int(run["seed"])):
        for measure, value in run["measures"].items():
            of_task = found.setdefault((run["task"], measure), {})
            of_task.setdefault(run["optimizer"], []).append(value)
    return [
        {"task": task, "measure": measure, "contender": name, **judge(ours, values[REFERENCE])}
        for (task, measure), values in found.items()
        for name, ours in values.items()
        if name != REFERENCE
    ]


def cells(row: Mapping[str, Any]) -> dict[str, str]:
    """A row of the report's table, by column."""
    return {
        **{name: row[name] for name in ("task", "measure", "contender")},
        "ratio (95%)": format_estimate(row["ratio"], ".3f"),
        "seeds worse": f"{row['worse']} of {row['seeds']}",
        "verdict": row["verdict"],
    }


def measure_never_worse(
    tasks: Sequence[str], seeds: Sequence[int], folder: Path, steps: int | None = None
) -> str:
    """Trains all there is, writes summary.json and report.md, and returns the report.

    Every run takes one thread, so its bits do not depend on the machine's load. `steps` of every
    run are the task's own if None.
    """
    wanted = [(task, seed, name) for task in tasks for seed in seeds for name in OPTIMIZERS]
    runs, threads = list[dict[str, Any]](), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with progress(Console(stderr=True), len(wanted), "runs") as report:
            for task, seed, name in wanted:
                runs.append(train_once(task, name, seed, steps))
                report(len(runs), f"{task} {name} seed {seed}")
        where = environment(torch.device("cpu"))
    finally:
        torch.set_num_threads(threads)
    rows = compare_runs(runs)
    settings = {
        name: vars(task) | {"problem": task.problem.__name__, "steps": steps or task.steps}
        for name, task in SWAP_TASKS.items()
        if name in tasks
    }
    summary = {"how": HOW, **where, "seeds": seeds, "margin": MARGIN, "tasks": settings,
               "hybrid": HybridConfig().to_dict(), "comparisons": rows, "runs": runs}  # fmt: skip
    write_json(folder / "summary.json", summary)
    parts = [
        "# HybridOptimizer's defaults in AdamW's place",
        "\n".join(f"{number}. {text}" for number, text in enumerate(HOW, 1)),
        f"Seeds {', '.join(map(str, seeds))}. {where['hardware']['processor']}, 1 thread, "
        f"torch {where['versions']['torch']}.",
        markdown_table([cells(row) for row in rows]),
    ]
    text = "\n\n".join(parts) + "\n"
    with replacing(folder / "report.md") as part:
        part.write_text(text, encoding="utf-8")
    return text
