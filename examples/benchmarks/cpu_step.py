"""Time of an optimizer step on the CPU, for GPT-2 small's parameters, beside torch's AdamW.

    python examples/benchmarks/cpu_step.py --output step.json

All optimizers take a step in turn, round after round, so that a machine that slows down slows
all of them; the ratios are of the same round. Gradients are random, the same for all.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from lib.environment import environment
from lib.files import write_json
from lib.flags import parse, whole_number
from lib.gpt2_shapes import PARAMETERS, gpt2_small_shapes
from lib.progress import progress
from triton_hybrid import HybridConfig, HybridOptimizer, Phase

REFERENCE = "AdamW(foreach=True)"
LIMIT = 1.15  # what a Full step may take, as a multiple of `REFERENCE`
CHECKS = "checks"  # part of every step: has anybody changed parameters, memory or state?
WARM_UP = 2  # rounds before, in which state is made


def contenders(shapes: Sequence[tuple[int, ...]]) -> dict[str, torch.optim.Optimizer]:
    """Every optimizer with parameters of its own and one set of gradients for all."""
    generator = torch.Generator().manual_seed(0)
    gradients = [1e-2 * torch.randn(shape, generator=generator) for shape in shapes]

    def parameters() -> list[nn.Parameter]:
        made = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        for parameter, gradient in zip(made, gradients):
            parameter.grad = gradient
        return made

    def hybrid(predictor: str) -> HybridOptimizer:
        # Predict and Correct alternate with Full, so that every phase is in every round.
        config = HybridConfig(
            warmup_steps=1, full_steps=1, max_predict_steps=1, confidence_threshold=0.0,
            predictor=predictor, inline=False,
        )  # fmt: skip
        return HybridOptimizer(parameters(), hybrid=config)

    return {
        REFERENCE: torch.optim.AdamW(parameters(), foreach=True),
        "AdamW(fused=True)": torch.optim.AdamW(parameters(), fused=True),
        "HybridOptimizer(predictor='none')": hybrid("none"),
        "HybridOptimizer(predictor='slow_ema')": hybrid("slow_ema"),
    }


def measure(count: int, report: Callable[[int, str], None]) -> list[dict[str, Any]]:
    """Lets every optimizer step in turn; returns a row for each of its kinds of steps."""
    optimizers = contenders(gpt2_small_shapes())
    samples: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for number in range(WARM_UP + count):
        taken = {}
        for name, optimizer in optimizers.items():
            for phase in one_round(optimizer):
                started = time.perf_counter()
                optimizer.step()
                taken[name, phase] = time.perf_counter() - started
            if isinstance(optimizer, HybridOptimizer):
                started = time.perf_counter()
                optimizer._binding.bind(optimizer.param_groups, optimizer.state)
                taken[name, CHECKS] = time.perf_counter() - started
        if number >= WARM_UP:
            for key, seconds in taken.items():
                samples.setdefault(key, []).append((seconds, seconds / taken[REFERENCE, ""]))
        report(number + 1, "Steps")
    return [summary(*key, *rounds) for key, rounds in samples.items()]


def summary(optimizer: str, phase: str, *rounds: tuple[float, float]) -> dict[str, Any]:
    """Medians and ranges of seconds, and of ratios to `REFERENCE` in the same round."""
    seconds, ratios = zip(*rounds)
    return {
        "optimizer": optimizer,
        "phase": phase,
        "rounds": len(seconds),
        "seconds_median": statistics.median(seconds),
        "seconds_range": [min(seconds), max(seconds)],
        "ratio_median": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }


def one_round(optimizer: torch.optim.Optimizer) -> Iterator[str]:
    """Yields the phase of each coming step of a round: one of each there is, "" for torch's."""
    if not isinstance(optimizer, HybridOptimizer):
        yield ""
        return
    seen: set[Phase] = set()
    while optimizer.phase not in seen:
        seen.add(optimizer.phase)
        yield optimizer.phase.value


@dataclass(frozen=True)
class Options:
    """The flags."""

    rounds: Annotated[int, whole_number(1)] = 15  # steps of each kind
    output: Path | None = None  # the JSON file


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; the exit status says whether a Full step is within the limit."""
    options: Options = parse(Options, arguments, prog="cpu_step.py", description=__doc__)
    console = Console()
    with progress(console, WARM_UP + options.rounds, "rounds") as report:
        rows = measure(options.rounds, report)
    table = Table(title=f"One step, {PARAMETERS:,} parameters, FP32, CPU")
    for name in ("optimizer", "phase", "seconds", "times the first row"):
        table.add_column(name, overflow="fold")
    for row in rows:
        low, high = row["ratio_range"]
        table.add_row(
            row["optimizer"], row["phase"], f"{row['seconds_median']:.5f}",
            f"{row['ratio_median']:.4f} ({low:.2f} to {high:.2f})",
        )  # fmt: skip
    console.print(table)
    if options.output is not None:
        content = {"benchmark": "cpu_step", **environment(torch.device("cpu"))}
        content |= {"parameters": PARAMETERS, "limit": LIMIT, "rows": rows}
        write_json(options.output, content)
    return int(max(x["ratio_median"] for x in rows if x["phase"] == Phase.FULL.value) > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
