"""Training without noise: the defaults (`predictor="auto"`) beside tuned AdamW and torch's L-BFGS.

    python examples/benchmarks/quiet.py --output quiet.json
    python examples/benchmarks/quiet.py --predictor secant --output quiet_secant.json

Four tasks in full batch, so many gradient evaluations for everybody, those of rejected moves and of
L-BFGS's line search counted. AdamW is tuned for each task over four rates, each decayed linearly to
0; ours has AdamW's best rate and a tenth of it, held constant, and otherwise its defaults.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lib.environment import environment
from lib.files import write_json
from lib.flags import choice, parse, whole_number
from lib.scikit_data import scikit_datasets
from triton_hybrid import HybridConfig, HybridOptimizer

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
Problem = tuple[nn.Module, Callable[[], Tensor]]
Evaluate = Callable[[], Tensor]


def network(seed: int, *sizes: int) -> nn.Sequential:
    """A tanh network."""
    torch.manual_seed(seed)
    layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def spirals(seed: int) -> Problem:
    """Two spirals of 200 points each, to be told apart."""
    generator = torch.Generator().manual_seed(seed)
    angle = 3 * math.pi * torch.rand(200, generator=generator).sqrt()
    arm = torch.stack([angle.cos() * angle, angle.sin() * angle], 1) / 10
    x = torch.cat([arm, -arm]) + 0.02 * torch.randn(400, 2, generator=generator)
    y = torch.arange(2).repeat_interleave(200)
    model = network(seed, 2, 64, 64, 2)
    return model, lambda: nn.functional.cross_entropy(model(x), y)


def regression(seed: int) -> Problem:
    """A function of two scales, in FP64."""
    model = network(seed, 1, 64, 64, 1).double()
    x = torch.linspace(-1, 1, 256, dtype=torch.float64).unsqueeze(1)
    y = (4 * math.pi * x).sin() + 0.3 * (10 * math.pi * x).sin()
    return model, lambda: (model(x) - y).square().mean()


def poisson(seed: int) -> Problem:
    """A physics-informed network for u'' = f with u = 0 at both ends, in FP64."""
    model = network(seed, 1, 32, 32, 1).double()
    x = torch.linspace(0, 1, 128, dtype=torch.float64).unsqueeze(1).requires_grad_()
    wave = (math.pi * x).sin() + 4 * (4 * math.pi * x).sin()
    source = (-(math.pi**2) * wave).detach()
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)

    def loss() -> Tensor:
        first = torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]
        second = torch.autograd.grad(first.sum(), x, create_graph=True)[0]
        residual = (second - source).square().mean() / source.square().mean()
        return 100 * (residual + model(ends).square().mean())

    return model, loss


def digits(seed: int) -> Problem:
    """1,400 handwritten digits, all in every gradient."""
    data = scikit_datasets().load_digits()
    x = torch.tensor(data.data[:1400] / 16.0, dtype=torch.float32)
    y = torch.tensor(data.target[:1400])
    model = network(seed, 64, 128, 128, 10)
    return model, lambda: nn.functional.cross_entropy(model(x), y)


TASKS = {"spirals": spirals, "regression": regression, "poisson": poisson, "digits": digits}


def evaluation(optimizer: torch.optim.Optimizer, loss: Evaluate, losses: list[float]) -> Evaluate:
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


def run_task(
    name: str, seeds: Sequence[int], evaluations: int, predictor: str = "auto"
) -> dict[str, Any]:
    """All optimizers on one task: lowest losses, and evaluations to AdamW's."""
    make = TASKS[name]

    def adamw(seed: int, rate: float) -> list[float]:
        def made(params: Any) -> torch.optim.Optimizer:
            return torch.optim.AdamW(params, lr=rate)

        return descend(make(seed), made, evaluations, decay=True)

    def ours(seed: int, rate: float) -> list[float]:
        def made(params: Any) -> HybridOptimizer:
            return HybridOptimizer(params, lr=rate, hybrid=HybridConfig(predictor=predictor))

        return descend(make(seed), made, evaluations, decay=False)

    tried = {rate: [adamw(seed, rate) for seed in seeds] for rate in RATES}
    logs = {
        rate: statistics.fmean(math.log(max(min(losses), 1e-300)) for losses in runs)
        for rate, runs in tried.items()
    }
    best = min(RATES, key=logs.__getitem__)
    runs = {
        "AdamW": tried[best],
        "L-BFGS": [lbfgs(make(seed), evaluations) for seed in seeds],
        predictor: [ours(seed, best) for seed in seeds],
        f"{predictor}, rate / 10": [ours(seed, best / 10) for seed in seeds],
    }
    goals = [min(losses) for losses in runs["AdamW"]]
    return {
        "adamw_rate": best,
        "adamw_mean_log_loss": {str(rate): value for rate, value in logs.items()},
        "lowest_loss": {who: [min(losses) for losses in its] for who, its in runs.items()},
        "evaluations_to_adamw": {
            who: [first_below(losses, goal) for losses, goal in zip(its, goals)]
            for who, its in runs.items()
        },
    }


def first_below(losses: Sequence[float], goal: float) -> int | None:
    """Evaluations after which a loss is no higher than a goal; None where it never is."""
    return next((index for index, loss in enumerate(losses, 1) if loss <= goal), None)


def speed_ups(tasks: dict[str, Any], who: str, evaluations: int) -> dict[str, float]:
    """Geometric means over seeds of AdamW's evaluations over ours; never counts as 1."""
    found = {}
    for name, result in tasks.items():
        ours = [count or evaluations for count in result["evaluations_to_adamw"][who]]
        adamw = result["evaluations_to_adamw"]["AdamW"]
        found[name] = statistics.geometric_mean(a / b for a, b in zip(adamw, ours))
    return {**found, "geometric mean": statistics.geometric_mean(found.values())}


@dataclass(frozen=True)
class Options:
    """What is compared."""

    output: Path | None = None
    """JSON file to write."""
    seeds: Annotated[tuple[int, ...], whole_number(0, many=True)] = (41, 42, 43)
    """Of weights and points."""
    evaluations: Annotated[int, whole_number(40)] = 500
    """Gradients of every run."""
    tasks: Annotated[tuple[str, ...], choice(tuple(TASKS), many=True)] = tuple(TASKS)
    """Which tasks."""
    predictor: Annotated[str, choice(("auto", "secant"))] = "auto"
    """Ours."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs and reports; returns the exit status."""
    options: Options = parse(Options, arguments, prog="quiet.py", description=__doc__)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    console, tasks = Console(), {}
    table = Table("task", "optimizer", "lowest loss by seed", "evaluations to AdamW's lowest")
    for name in options.tasks:
        tasks[name] = result = run_task(name, options.seeds, options.evaluations, options.predictor)
        for who, losses in result["lowest_loss"].items():
            counts = map(str, result["evaluations_to_adamw"][who])
            table.add_row(name, who, ", ".join(f"{x:.1e}" for x in losses), ", ".join(counts))
    console.print(table)
    names = ("L-BFGS", options.predictor, f"{options.predictor}, rate / 10")
    gains = {who: speed_ups(tasks, who, options.evaluations) for who in names}
    for who, its in gains.items():
        console.print(who, ", ".join(f"{name} {gain:.1f}x" for name, gain in its.items()))
    if options.output is not None:
        content = {
            "environment": environment(torch.device("cpu"), ("scikit-learn",)),
            "configuration": {
                "seeds": options.seeds, "evaluations": options.evaluations, "adamw_rates": RATES,
                "ours": HybridConfig(predictor=options.predictor).to_dict(), "weight_decay": 1e-2,
            },
            "tasks": tasks,
            "speed_up_over_adamw": gains,
        }  # fmt: skip
        write_json(options.output, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
