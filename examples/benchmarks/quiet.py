"""Training without noise: the defaults (`predictor="auto"`) beside tuned AdamW, SOAP and L-BFGS.

    python examples/benchmarks/quiet.py --output quiet.json
    python examples/benchmarks/quiet.py --predictor secant --output quiet_secant.json
    python examples/benchmarks/quiet.py --times --output times.json

Six small tasks in full batch (`quiet_tasks.py`, which has a larger one, too), so many gradient
evaluations for everybody, those of rejected moves and of L-BFGS's line search counted. AdamW and
SOAP are tuned for each task over four rates, each decayed linearly to 0. Adam before L-BFGS has
AdamW's best rate, held, for a fifth or a half of the evaluations, whichever ends lower. Ours has
AdamW's best rate and a tenth of it, held, and otherwise its defaults. A task that `--output` holds
already is not run again. SOAP comes with the extra `peers`. With `--times` nothing is compared but
the processor time of an evaluation with the step that follows it: AdamW, L-BFGS and ours in turn.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from quiet_tasks import SMALL, TASKS, Problem
from rich.console import Console
from rich.table import Table
from torch import Tensor

from frontier.optimizers import require_package
from lib.environment import environment
from lib.files import plain, write_json
from lib.flags import choice, parse, whole_number
from triton_hybrid import HybridConfig, HybridOptimizer

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SHARES = (0.2, 0.5)
"""Of the evaluations, for Adam before L-BFGS."""
FLOOR = 1e-16
"""Losses are told apart down to this, the rounding of a loss of one."""
PACKAGES = ("scikit-learn", "pytorch-optimizer")
Runs = list[list[float]]
"""The losses of each seed, evaluation by evaluation."""


def evaluation(
    optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], losses: list[float]
) -> Callable[[], Tensor]:
    """A closure that notes what it returns."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        losses.append(value.item())
        return value.detach()

    return closure


def descend(problem: Problem, make: Callable[[Any], Any], steps: int, decay: bool) -> list[float]:
    """Losses of an optimizer that takes one evaluation a step."""
    model, loss = problem
    optimizer, losses = make(model.parameters()), []  # type: ignore[var-annotated]
    rate = optimizer.param_groups[0]["lr"]
    closure = evaluation(optimizer, loss, losses)
    for step in range(steps):
        if decay:
            optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.step(closure)
    return losses


def lbfgs(problem: Problem, evaluations: int) -> list[float]:
    """Losses of torch's L-BFGS with its strong Wolfe search, one for each evaluation."""
    model, loss = problem
    losses: list[float] = []
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=evaluations, max_eval=evaluations, history_size=10,
        tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe",
    )  # fmt: skip
    optimizer.step(evaluation(optimizer, loss, losses))
    return losses[:evaluations]


def adamw(rate: float, **options: Any) -> Callable[[Any], torch.optim.Optimizer]:
    """Makes AdamW for given parameters."""
    return lambda params: torch.optim.AdamW(params, lr=rate, **options)


def soap(rate: float) -> Callable[[Any], torch.optim.Optimizer]:
    """Makes SOAP for given parameters."""
    make = require_package("pytorch_optimizer").SOAP
    return lambda params: make(params, lr=rate, weight_decay=1e-2)


def hybrid(rate: float, predictor: str) -> Callable[[Any], HybridOptimizer]:
    """Makes ours."""
    config = HybridConfig(predictor=predictor)
    return lambda params: HybridOptimizer(params, lr=rate, hybrid=config)


def adam_then_lbfgs(problem: Problem, rate: float, share: float, evaluations: int) -> list[float]:
    """Losses of Adam, without weight decay, and of L-BFGS from where it has led."""
    first = round(share * evaluations)
    losses = descend(problem, adamw(rate, weight_decay=0.0), first, decay=False)
    return losses + lbfgs(problem, evaluations - first)


def mean_log(runs: Runs) -> float:
    """Of the lowest losses."""
    return statistics.fmean(log(max(min(losses), FLOOR)) for losses in runs)


def run_task(
    name: str, seeds: Sequence[int], evaluations: int, predictor: str = "auto"
) -> dict[str, Any]:
    """All optimizers on one task: lowest losses, and evaluations to AdamW's."""

    def for_seeds(run: Callable[[Problem], list[float]]) -> Runs:
        return [run(TASKS[name](seed)) for seed in seeds]

    def descents(make: Callable[[Any], Any], decay: bool) -> Runs:
        return for_seeds(lambda problem: descend(problem, make, evaluations, decay))

    def mixed(share: float) -> Runs:
        return for_seeds(lambda problem: adam_then_lbfgs(problem, best, share, evaluations))

    def ours(rate: float) -> Runs:
        return descents(hybrid(rate, predictor), decay=False)

    def log_losses(tried: dict[float, Runs]) -> dict[float, float]:
        return {setting: mean_log(its) for setting, its in tried.items()}

    tried = {
        who: {rate: descents(make(rate), decay=True) for rate in RATES}
        for who, make in (("AdamW", adamw), ("SOAP", soap))
    }
    best = min(RATES, key=log_losses(tried["AdamW"]).__getitem__)
    tried["Adam, then L-BFGS"] = {share: mixed(share) for share in SHARES}
    runs = {who: min(its.values(), key=mean_log) for who, its in tried.items()}
    runs["L-BFGS"] = for_seeds(lambda problem: lbfgs(problem, evaluations))
    runs |= {predictor: ours(best), f"{predictor}, rate / 10": ours(best / 10)}
    goals = [min(losses) for losses in runs["AdamW"]]
    return {
        "adamw_rate": best,
        "mean_log_loss_by_setting": {who: log_losses(its) for who, its in tried.items()},
        "lowest_loss": {who: [min(losses) for losses in its] for who, its in runs.items()},
        "evaluations_to_adamw": {
            who: [first_below(losses, goal) for losses, goal in zip(its, goals)]
            for who, its in runs.items()
        },
    }


def milliseconds(
    name: str, seed: int, evaluations: int, predictor: str, rounds: int = 5
) -> dict[str, list[float]]:
    """Processor time of an evaluation and its step, in turn; each optimizer's rounds, sorted."""

    def descending(make: Callable[[Any], Any]) -> Callable[[Problem], list[float]]:
        return lambda problem: descend(problem, make, evaluations, decay=False)

    runs = {
        "AdamW": descending(adamw(1e-2)),
        "L-BFGS": lambda problem: lbfgs(problem, evaluations),
        predictor: descending(hybrid(1e-2, predictor)),
    }
    taken: dict[str, list[float]] = {who: [] for who in runs}
    for number in range(rounds + 1):
        for who, run in runs.items():
            problem = TASKS[name](seed)
            started = time.process_time()
            count = len(run(problem))
            if number:  # the first one imports and compiles
                taken[who].append(round(1e3 * (time.process_time() - started) / count, 3))
    return {who: sorted(its) for who, its in taken.items()}


def first_below(losses: Sequence[float], goal: float) -> int | None:
    """Evaluations after which a loss is no higher than a goal; None where it never is."""
    return next((index for index, loss in enumerate(losses, 1) if loss <= goal), None)


def speed_ups(tasks: dict[str, Any], who: str, evaluations: int) -> dict[str, float]:
    """Geometric means over seeds of AdamW's evaluations over ours; never counts as all of them."""
    found = {}
    for name, result in tasks.items():
        ours = [count or evaluations for count in result["evaluations_to_adamw"][who]]
        adamw = result["evaluations_to_adamw"]["AdamW"]
        found[name] = statistics.geometric_mean(a / b for a, b in zip(adamw, ours))
    return {**found, "geometric mean": statistics.geometric_mean(found.values())}


def loss_ratios(tasks: dict[str, Any], who: str, other: str) -> dict[str, float]:
    """Lowest losses over another optimizer's, geometric means over seeds, down to `FLOOR`."""

    def mean(losses: list[float]) -> float:
        return statistics.geometric_mean(max(loss, FLOOR) for loss in losses)

    lowest = {name: result["lowest_loss"] for name, result in tasks.items()}
    return {name: mean(its[who]) / mean(its[other]) for name, its in lowest.items()}


@dataclass(frozen=True)
class Options:
    """What is compared."""

    output: Path | None = None
    """JSON file to write, and to go on with."""
    seeds: Annotated[tuple[int, ...], whole_number(0, many=True)] = (111, 112, 113, 114, 115)
    """Of weights and points."""
    evaluations: Annotated[int, whole_number(40)] = 500
    """Gradients of every run."""
    tasks: Annotated[tuple[str, ...], choice(tuple(TASKS), many=True)] = SMALL
    """Which tasks."""
    predictor: Annotated[str, choice(("auto", "secant"))] = "auto"
    """Ours."""
    times: bool = False
    """Only measure the processor time of an evaluation."""


def summary(tasks: dict[str, Any], predictor: str, evaluations: int) -> dict[str, Any]:
    """What the runs say: speed-ups over AdamW, and lowest losses over those of others."""
    ours = (predictor, f"{predictor}, rate / 10")
    others = ("L-BFGS", "Adam, then L-BFGS", "SOAP")
    return {
        "speed_up_over_adamw": {
            who: speed_ups(tasks, who, evaluations) for who in (*others, *ours)
        },
        "lowest_loss_over": {
            who: {other: loss_ratios(tasks, who, other) for other in others} for who in ours
        },
    }


def show_times(options: Options) -> None:
    """Measures every task's evaluations, and writes what they take."""
    table = Table("task", "optimizer", "ms of the processor, median (least to most)")
    found = {}
    for name in options.tasks:
        found[name] = milliseconds(name, options.seeds[0], options.evaluations, options.predictor)
        for who, its in found[name].items():
            median = statistics.median(its)
            table.add_row(name, who, f"{median:.2f} ({its[0]:.2f} to {its[-1]:.2f})")
    if options.output is not None:
        content = {
            "environment": environment(torch.device("cpu"), PACKAGES),
            "evaluations": options.evaluations, "milliseconds": found,
        }  # fmt: skip
        write_json(options.output, content)
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs and reports; returns the exit status."""
    options: Options = parse(Options, arguments, prog="quiet.py", description=__doc__)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if options.times:
        show_times(options)
        return 0
    configuration = {
        "seeds": options.seeds, "evaluations": options.evaluations, "rates": RATES,
        "adam_shares": SHARES, "weight_decay": 1e-2, "loss_floor": FLOOR,
        "ours": HybridConfig(predictor=options.predictor).to_dict(),
    }  # fmt: skip
    content: dict[str, Any] = {"tasks": {}}
    if options.output is not None and options.output.is_file():
        known = json.loads(options.output.read_text(encoding="utf-8"))
        content = known if known["configuration"] == plain(configuration) else content
    console, tasks = Console(), content["tasks"]
    table = Table("task", "optimizer", "lowest loss by seed", "evaluations to AdamW's lowest")
    for name in options.tasks:
        if name not in tasks:
            tasks[name] = run_task(name, options.seeds, options.evaluations, options.predictor)
            content |= {
                "environment": environment(torch.device("cpu"), PACKAGES),
                "configuration": configuration,
                **summary(tasks, options.predictor, options.evaluations),
            }
            if options.output is not None:
                write_json(options.output, content)
        for who, losses in tasks[name]["lowest_loss"].items():
            counts = map(str, tasks[name]["evaluations_to_adamw"][who])
            table.add_row(name, who, ", ".join(f"{x:.1e}" for x in losses), ", ".join(counts))
    console.print(table)
    for who, its in content["speed_up_over_adamw"].items():
        console.print(who, ", ".join(f"{name} {gain:.1f}x" for name, gain in its.items()))
    for who, others in content["lowest_loss_over"].items():
        for other, ratios in others.items():
            each = ", ".join(f"{name} {ratio:.2g}" for name, ratio in ratios.items())
            console.print(f"{who}, lowest loss over that of {other}: {each}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
