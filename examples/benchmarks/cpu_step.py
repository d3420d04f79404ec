"""Time of an optimizer step on the CPU, for GPT-2 small's parameters, beside torch's AdamW.

    python examples/benchmarks/cpu_step.py --output step.json

All optimizers take a step in turn, round after round, so that a machine that slows down slows
all of them; the ratios are of the same round. Gradients are random, the same for all.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from flag_types import whole_number
from rich.console import Console
from rich.progress import track
from rich.table import Table
from run_files import environment
from suite_gpt2_shapes import PARAMETERS, gpt2_small_shapes
from torch import nn

from triton_hybrid import HybridConfig, HybridOptimizer, Phase

REFERENCE = "AdamW(foreach=True)"
LIMIT = 1.15
"""What a Full step may take, as a multiple of `REFERENCE`."""
GRADIENT_SCALE = 1e-2


@dataclasses.dataclass(frozen=True)
class Row:
    """What one kind of step took.

    Attributes:
        optimizer: Which, and its options.
        phase: Of the step; empty for torch's own.
        seconds: Of each round.
        ratios: To `REFERENCE` in the same round.
    """

    optimizer: str
    phase: str
    seconds: list[float]
    ratios: list[float]

    def summary(self) -> dict[str, Any]:
        """Medians and the range, for the JSON file."""
        return {
            "optimizer": self.optimizer,
            "phase": self.phase,
            "rounds": len(self.seconds),
            "seconds_median": statistics.median(self.seconds),
            "seconds_range": [min(self.seconds), max(self.seconds)],
            "ratio_median": statistics.median(self.ratios),
            "ratio_range": [min(self.ratios), max(self.ratios)],
        }


def contenders(shapes: Sequence[tuple[int, ...]]) -> dict[str, torch.optim.Optimizer]:
    """Every optimizer with parameters of its own and one set of gradients for all."""
    generator = torch.Generator().manual_seed(0)
    gradients = [GRADIENT_SCALE * torch.randn(shape, generator=generator) for shape in shapes]

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


def measure(rounds: int, progress: Callable[[range], Any], warm_up: int = 2) -> list[Row]:
    """Lets every optimizer step in turn.

    Args:
        rounds: How often.
        progress: Wraps the range of rounds, to show how far it is.
        warm_up: Rounds before, in which state is made.
    """
    optimizers = contenders(gpt2_small_shapes())
    samples: dict[tuple[str, str], list[float]] = {}
    ratios: dict[tuple[str, str], list[float]] = {}
    for number in progress(range(warm_up + rounds)):
        taken = {}
        for name, optimizer in optimizers.items():
            for phase in one_round(optimizer):
                started = time.perf_counter()
                optimizer.step()
                taken[name, phase] = time.perf_counter() - started
        if number >= warm_up:
            for key, seconds in taken.items():
                samples.setdefault(key, []).append(seconds)
                ratios.setdefault(key, []).append(seconds / taken[REFERENCE, ""])
    return [Row(*key, samples[key], ratios[key]) for key in samples]


def one_round(optimizer: torch.optim.Optimizer) -> Any:
    """Yields the phase of each coming step of a round: one of each phase there is."""
    if not isinstance(optimizer, HybridOptimizer):
        yield ""
        return
    seen: set[Phase] = set()
    while optimizer.phase not in seen:
        seen.add(optimizer.phase)
        yield optimizer.phase.value


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; the exit status says whether a Full step is within the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=whole_number(1), default=15, help="(default: 15)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write the JSON")
    options = parser.parse_args(arguments)
    console = Console()
    rows = measure(options.rounds, lambda numbers: track(numbers, "Steps", console=console))
    table = Table(title=f"One step, {PARAMETERS:,} parameters, FP32, CPU")
    for head in ("optimizer", "phase", "seconds", "times the first row"):
        table.add_column(head)
    for row in rows:
        values = row.summary()
        low, high = values["ratio_range"]
        table.add_row(
            row.optimizer, row.phase, f"{values['seconds_median']:.3f}",
            f"{values['ratio_median']:.2f} ({low:.2f} to {high:.2f})",
        )  # fmt: skip
    console.print(table)
    if options.output is not None:
        content = {
            "benchmark": "cpu_step",
            **environment(torch.device("cpu")),
            "parameters": PARAMETERS,
            "limit": LIMIT,
            "rows": [row.summary() for row in rows],
        }
        options.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    full = [row for row in rows if row.phase == Phase.FULL.value]
    return int(max(statistics.median(row.ratios) for row in full) > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
