"""Adaptive accumulation against fixed windows, on the small language model of the frontier.

    python examples/benchmarks/accumulation.py --output accumulation.json --maximum 4 --lr 5.6e-3
        --fixed 2000 --adaptive 900 1053 1250 --seeds 2 3 4 5 6

Budgets count micro-batches, each a forward and a backward pass; every budget has its own complete
linear schedule, after a rise over a tenth, and the schedule goes by micro-batches. The learning
rate is that of windows of ``maximum``, the best one on another seed.

The speed-up of windows, base and predictor is the largest budget of AdamW in fixed windows, without
prediction, over the budget at which they would reach its final held-out loss: between two budgets
the loss is interpolated over their logarithm; where the smallest reaches it already, the speed-up
is "at least" that. What the file holds already is not run again.
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
from matplotlib import colormaps
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from frontier.optimizers import FUSED_NAMES, FUSED_PARTS
from frontier.tasks import build_task
from lib.choices import PREDICTORS
from lib.environment import environment
from lib.files import save_figure, write_json
from lib.flags import choice, parse, real_number, whole_number
from lib.statistics import estimate, estimate_ratio, paired_ratios
from triton_hybrid import AccumulationConfig, HybridConfig, HybridOptimizer, split_param_groups

RISE = 0.1  # of a budget, in which the learning rate rises
PARTS = 10  # of a run, for which noise and windows are told

Count = Annotated[int, whole_number(1)]
Counts = Annotated[tuple[int, ...], whole_number(1, many=True)]
Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What decides a run."""

    maximum: int
    minimum: int
    budget: int  # micro-batches
    micro_batch: int  # sequences of 64 tokens
    lr: float  # of windows of `maximum`
    base: str
    predictor: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags of this example.

    Attributes:
        output: JSON file; it is continued.
        maximum: Micro-batches of the longest window, and of the fixed ones.
        micro_batch: Sequences of 64 tokens in a micro-batch.
        lr: Learning rate of windows of ``maximum``.
        fixed: Micro-batches of each run with windows of ``maximum``.
        adaptive: Micro-batches of each run with windows from one to ``maximum``.
        seeds: Of weights and data.
        base: Rule of the hidden matrices.
        predictor: What HybridOptimizer predicts with; none is the base alone.
    """

    output: Path
    maximum: Count = 4
    micro_batch: Count = 16
    lr: Annotated[float, real_number(0, above=True)] = 5.6e-3
    fixed: Counts = ()
    adaptive: Counts = ()
    seeds: Annotated[tuple[int, ...], whole_number(0, many=True)] = (1, 2, 3)
    base: Annotated[str, choice(("adamw", "muon"))] = "adamw"
    predictor: Annotated[str, choice(PREDICTORS)] = "none"

    def runs(self) -> Iterator[Run]:
        """All combinations, seed by seed."""
        for seed in self.seeds:
            for least, budgets in ((self.maximum, self.fixed), (1, self.adaptive)):
                for budget in budgets:
                    yield Run(
                        self.maximum, least, budget, self.micro_batch, self.lr,
                        self.base, self.predictor, seed,
                    )  # fmt: skip


def rate(index: int, budget: int) -> float:
    """Learning rate before a micro-batch, relative to its peak."""
    rise = max(1, round(RISE * budget))
    return (index + 1) / rise if index < rise else 1.0 - (index - rise) / (budget - rise)


def train(run: Run) -> Record:
    """Trains once; returns what came out."""
    task = build_task("lm", {"batch_size": run.micro_batch})
    model = task.model(run.seed)
    params: Any = model.parameters()
    if run.base == "muon":
        params = split_param_groups(model, blocks={FUSED_NAMES: FUSED_PARTS})
    optimizer = HybridOptimizer(
        params,
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


def grouped(runs: Sequence[Record], names: Sequence[str]) -> dict[tuple[Any, ...], list[Record]]:
    """Runs by the values of some fields."""
    found: dict[tuple[Any, ...], list[Record]] = {}
    for run in sorted(runs, key=lambda run: int(run["seed"])):
        found.setdefault(tuple(run[name] for name in names), []).append(run)
    return found


def is_reference(run: Record) -> bool:
    """Whether a run is of AdamW alone in fixed windows."""
    long = 1 < run["maximum"] == run["minimum"]
    return long and (run["base"], run["predictor"]) == ("adamw", "none")


def speed_ups(runs: Sequence[Record]) -> list[Record]:
    """How many fewer micro-batches take to the loss of AdamW in fixed windows, seed by seed."""
    goals: dict[tuple[Any, ...], Record] = {}
    for run in sorted(filter(is_reference, runs), key=lambda run: int(run["budget"])):
        goals[run["maximum"], run["micro_batch"], run["seed"]] = run
    kind = "maximum", "minimum", "micro_batch", "lr", "base", "predictor"
    found = []
    for key, its in sorted(grouped(runs, kind).items()):
        seeds: dict[int, Record] = {}
        for (seed,), of_seed in grouped(its, ("seed",)).items():
            goal = goals.get((its[0]["maximum"], its[0]["micro_batch"], seed))
            if goal is None or goal in of_seed:
                continue
            points = sorted((int(run["budget"]), float(run["held_out"])) for run in of_seed)
            needed = budget_to(goal["held_out"], points)
            reached = [budget for budget, loss in points if loss <= goal["held_out"]]
            seeds[seed] = {
                "fixed": [goal["budget"], goal["held_out"]],
                "runs": points,
                "speed_up": needed and goal["budget"] / needed,
                "at_least": goal["budget"] / min(reached) if reached else None,
            }
        if seeds:
            ratios = [one["speed_up"] for one in seeds.values()]
            mean = None if None in ratios else estimate_ratio(ratios)
            found.append(
                {**dict(zip(kind, key)), "seeds": seeds, "speed_up": mean and mean.interval()}
            )
    return found


def differences(runs: Sequence[Record]) -> list[Record]:
    """Adaptive windows beside every fixed one of as many micro-batches, paired by seed."""
    found = []
    same = "budget", "micro_batch", "base", "predictor"
    for key, its in sorted(grouped(runs, same).items()):
        kinds = grouped(its, ("maximum", "minimum", "lr"))
        for (most, least, lr), adaptive in kinds.items():
            if least == most:
                continue
            for (window, shortest, fixed_lr), fixed in kinds.items():
                pairs = [(a, b) for a in adaptive for b in fixed if a["seed"] == b["seed"]]
                if window != shortest or not pairs:
                    continue
                losses = estimate([a["held_out"] - b["held_out"] for a, b in pairs], scale=1.0)
                times = [[one["processor_seconds"] for one in side] for side in zip(*pairs)]
                found.append({
                    **dict(zip(same, key)), "maximum": most, "lr": lr,
                    "window": window, "window_lr": fixed_lr,
                    "adaptive": statistics.mean(a["held_out"] for a, _ in pairs),
                    "fixed": statistics.mean(b["held_out"] for _, b in pairs),
                    "difference": losses and losses.interval(),
                    "processor_time": paired_ratios(*times).interval(),
                })  # fmt: skip
    return found


def plot(runs: Sequence[Record], path: Path) -> None:
    """Draws final losses over budgets, and what windows and noise were in the course of a run.

    Lines are means over seeds; those of adaptive windows are dashed.
    """
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    losses, noise, windows = figure.subplots(1, 3)
    losses.set_prop_cycle(color=colormaps["tab20"].resampled(20)(range(20)))
    tenths = [(part + 0.5) / PARTS for part in range(PARTS)]
    kinds = grouped(runs, ("micro_batch", "maximum", "minimum", "base", "predictor", "lr"))
    for (micro_batch, most, least, base, predictor, lr), its in sorted(kinds.items()):
        label = f"{micro_batch} x 64 tokens, {least} to {most}, {base}, {predictor}, lr {lr:g}"
        budgets, means = zip(*(
            (budget, statistics.mean(run["held_out"] for run in same))
            for (budget,), same in sorted(grouped(its, ("budget",)).items())
        ))  # fmt: skip
        style = "--" if least < most else "-"
        (line,) = losses.plot(budgets, means, marker="o", ms=4, ls=style, label=label)
        if least == most:
            continue
        longest = [run for run in its if run["budget"] == budgets[-1]]
        for axis, name in ((noise, "noise_scale"), (windows, "mean_windows")):
            known = [
                [x for x in part if x is not None] for part in zip(*(run[name] for run in longest))
            ]
            values = [statistics.mean(part) if part else math.nan for part in known]
            axis.plot(tenths[: len(values)], values, ls="--", color=line.get_color())
    losses.set(xlabel="micro-batches", ylabel="held-out loss at the end", xscale="log")
    losses.legend(fontsize=6)
    noise.set(
        xlabel="part of the longest run", ylabel="noise scale, micro-batches", yscale="symlog"
    )
    windows.set(xlabel="part of the longest run", ylabel="mean window, micro-batches")
    save_figure(path, figure)


def show(console: Console, lines: Sequence[Record], names: Sequence[str]) -> None:
    """Prints lines as a table; intervals as mean (low to high)."""
    table = Table(*names)
    for line in lines:
        table.add_row(*(_cell(line[name]) for name in names))
    console.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, dict) and "mean" in value:
        ends = (value[name] for name in ("mean", "low", "high"))
        mean, low, high = ("?" if end is None else f"{end:.3f}" for end in ends)
        return f"{mean} ({low} to {high})"
    if isinstance(value, dict):
        its = [(one["speed_up"], one["at_least"]) for one in value.values()]
        return ", ".join(f"{x:.2f}" if x else f">= {y:.2f}" if y else "-" for x, y in its)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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
            console.print({**asdict(run), "held_out": known[-1]["held_out"]}, highlight=False)
        content = {"example": "accumulation", **environment(torch.device("cpu"))}
        content |= {"data": build_task("lm", {}).data(), "speed_ups": speed_ups(known)}
        content |= {"differences": differences(known), "runs": known}
        write_json(flags.output, content)
    plot(known, flags.output.with_suffix(".png"))
    kind = "maximum", "minimum", "lr", "base", "predictor", "seeds", "speed_up"
    show(console, speed_ups(known), kind)
    beside = "maximum", "lr", "window", "window_lr", "budget", "adaptive", "fixed"
    show(console, differences(known), ("micro_batch", *beside, "difference", "processor_time"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
