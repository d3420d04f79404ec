"""Adaptive accumulation against fixed windows, on the small language model of the frontier.

    python examples/benchmarks/accumulation.py --output accumulation.json --fixed-budget 2000
        --budgets 1000 1250 --maximum 4 --lr 5.6e-3 --seeds 1 2 3

Budgets count micro-batches, each a forward and a backward pass; every budget has its own complete
linear schedule, after a rise over a tenth, and the schedule goes by micro-batches. The learning
rate is that of windows of ``maximum``, the best one on another seed. The speed-up is the budget of
fixed windows over that at which adaptive ones would reach their final held-out loss: between two
budgets the loss is interpolated over their logarithm; where the smallest reaches it already, the
speed-up is "at least" that. What the file holds already is not run again.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from rich.console import Console
from rich.table import Table

from frontier.tasks import build_task
from lib.choices import PREDICTORS
from lib.environment import environment
from lib.files import write_json
from lib.flags import choice, parse, real_number, whole_number
from lib.statistics import estimate_ratio
from triton_hybrid import AccumulationConfig, HybridConfig, HybridOptimizer

RISE = 0.1  # of a budget, in which the learning rate rises
PARTS = 10  # of a run, for which noise and windows are told

Count = Annotated[int, whole_number(1)]


@dataclass(frozen=True)
class Run:
    """What decides a run."""

    maximum: int
    minimum: int
    budget: int  # micro-batches
    micro_batch: int  # sequences of 64 tokens
    lr: float  # of windows of `maximum`
    predictor: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of this example.

    Attributes:
        output: JSON file; it is continued.
        maximum: Micro-batches of the longest window, and of the fixed one.
        micro_batch: Sequences of 64 tokens in a micro-batch.
        lr: Learning rate of windows of ``maximum``.
        fixed_budget: Micro-batches of the runs with fixed windows; None: no such runs.
        budgets: Micro-batches of the runs with adaptive windows.
        ones: Micro-batches of runs with windows of one, whose rate is ``lr``.
        seeds: Of weights and data.
        predictor: What HybridOptimizer predicts with; none is AdamW.
    """

    output: Path
    maximum: Count = 4
    micro_batch: Count = 16
    lr: Annotated[float, real_number(0, above=True)] = 5.6e-3
    fixed_budget: Annotated[int | None, whole_number(1)] = None
    budgets: Annotated[tuple[int, ...], whole_number(1, many=True)] = ()
    ones: Annotated[tuple[int, ...], whole_number(1, many=True)] = ()
    seeds: Annotated[tuple[int, ...], whole_number(0, many=True)] = (1, 2, 3)
    predictor: Annotated[str, choice(PREDICTORS)] = "none"

    def runs(self) -> Iterator[Run]:
        """All combinations, seed by seed."""
        fixed = () if self.fixed_budget is None else (self.fixed_budget,)
        windows = (
            (self.maximum, self.maximum, fixed), (self.maximum, 1, self.budgets), (1, 1, self.ones)
        )  # fmt: skip
        for seed in self.seeds:
            for most, least, budgets in windows:
                for budget in budgets:
                    yield Run(most, least, budget, self.micro_batch, self.lr, self.predictor, seed)


def rate(index: int, budget: int) -> float:
    """Learning rate before a micro-batch, relative to its peak."""
    rise = max(1, round(RISE * budget))
    return (index + 1) / rise if index < rise else 1.0 - (index - rise) / (budget - rise)


def train(run: Run) -> dict[str, Any]:
    """Trains once; returns what came out."""
    task = build_task("lm", {"batch_size": run.micro_batch})
    model = task.model(run.seed)
    optimizer = HybridOptimizer(
        model.parameters(),
        lr=run.lr,
        weight_decay=task.weight_decay,
        hybrid=HybridConfig(predictor=run.predictor),
        accumulation=AccumulationConfig(run.maximum, minimum=run.minimum),
    )
    noise: list[float | None] = []
    lengths: list[int] = []
    used = 0
    started, processor = time.perf_counter(), time.process_time()
    while used < run.budget:
        factor, first = rate(used, run.budget), used
        while used < run.budget:
            loss = task.loss(model, task.batch(run.seed, used))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.observe_loss(loss)
            used += 1
            if optimizer.window_complete:
                break
        for group in optimizer.param_groups:
            group["lr"] = run.lr * factor
        optimizer.step()
        optimizer.zero_grad()
        lengths.append(used - first)
        if len(noise) < PARTS * used // run.budget:
            noise.append(optimizer.stats().noise_scale)
    times = time.perf_counter() - started, time.process_time() - processor
    stats = optimizer.stats()
    with optimizer.verified_weights():
        final = task.held_out(model.eval())
    return {
        **asdict(run),
        "held_out": final,
        "steps": stats.windows,
        "micro_batches": stats.micro_batches,
        "mean_windows": [round(statistics.mean(part), 3) for part in parts(lengths)],
        "noise_scale": noise,
        "seconds": round(times[0], 1),
        "processor_seconds": round(times[1], 1),
    }


def parts(values: Sequence[int]) -> Iterator[Sequence[int]]:
    """Tenths of some values."""
    for part in range(PARTS):
        cut = values[len(values) * part // PARTS : len(values) * (part + 1) // PARTS]
        if cut:
            yield cut


def budget_to(goal: float, points: Sequence[tuple[int, float]]) -> float | None:
    """The budget at which a loss is reached; None beyond the budgets that were run."""
    points = sorted(points)
    for (b1, l1), (b2, l2) in pairwise(points):
        if l2 <= goal <= l1:
            share = (l1 - goal) / (l1 - l2) if l1 > l2 else 0.0
            return math.exp(math.log(b1) + share * (math.log(b2) - math.log(b1)))
    return None


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compares adaptive windows with fixed ones, seed by seed."""
    found = []
    same = ("maximum", "micro_batch", "lr", "predictor")
    for key in sorted({tuple(run[name] for name in same) for run in runs if run["maximum"] > 1}):
        its = [run for run in runs if tuple(run[name] for name in same) == key]
        line: dict[str, Any] = {**dict(zip(same, key)), "seeds": {}}
        for fixed in (run for run in its if run["minimum"] == run["maximum"]):
            adaptive = [
                (run["budget"], run["held_out"])
                for run in its
                if run["seed"] == fixed["seed"] and run["minimum"] < run["maximum"]
            ]
            needed = budget_to(fixed["held_out"], adaptive)
            reached = [budget for budget, loss in adaptive if loss <= fixed["held_out"]]
            line["seeds"][fixed["seed"]] = {
                "fixed": [fixed["budget"], fixed["held_out"]],
                "adaptive": sorted(adaptive),
                "speed_up": None if needed is None else fixed["budget"] / needed,
                "at_least": fixed["budget"] / min(reached) if reached else None,
            }
        ratios = [one["speed_up"] for one in line["seeds"].values()]
        if len(ratios) > 1 and None not in ratios:
            found_ratio = estimate_ratio(ratios)
            line["speed_up"] = found_ratio and found_ratio.interval()
        found.append(line)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the file does not hold yet, and returns the exit status."""
    flags: Flags = parse(Flags, arguments, description=__doc__)
    torch.set_num_threads(1)  # a run's bits do not depend on the machine's load
    console = Console()
    known = json.loads(flags.output.read_text("utf-8"))["runs"] if flags.output.exists() else []
    names = list(Run.__dataclass_fields__)
    for run in flags.runs():
        if all({name: one[name] for name in names} != asdict(run) for one in known):
            known.append(train(run))
            console.print({**known[-1], "noise_scale": "..."}, highlight=False)
        content = {"example": "accumulation", **environment(torch.device("cpu"))}
        content |= {"data": build_task("lm", {}).data(), "summary": summary(known)}
        content["runs"] = known
        write_json(flags.output, content)
    headings = "maximum", "micro-batch", "lr", "predictor", "seed", "fixed", "adaptive", "speed-up"
    table = Table(*headings)
    for line in summary(known):
        for seed, one in line["seeds"].items():
            its = [str(line[name]) for name in ("maximum", "micro_batch", "lr", "predictor")]
            ratio = "" if one["at_least"] is None else f"at least {one['at_least']:.2f}"
            ratio = ratio if one["speed_up"] is None else f"{one['speed_up']:.2f}"
            table.add_row(*its, str(seed), str(one["fixed"]), str(one["adaptive"]), ratio)
    console.print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
