"""Host time of an optimizer step: what Python needs until every launch is on its way.

    python examples/benchmarks/host_time.py --output host.json

The Triton backend runs on CPU tensors with its launches replaced by nothing, so what is left is
what a step costs beside a GPU that is never waited for: checks, decisions, arguments. Small
operations of torch still run. Beside it, in turn: torch's AdamW and Muon, and this optimizer's
plain torch backend. Tensors have 64 elements each, so that arithmetic costs next to nothing.

Times are of the thread's processor clock, which others on the machine disturb less, without
Python's garbage collection. All optimizers take turns of a few rounds with a step of each phase.
The first round finds its caches ``cold``, filled by the others; in the rest they are ``warm``.
Gradients are ``kept`` (the same memory in each step) or ``moved`` (other memory each time, as after
``zero_grad()``).
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from cpu_step import one_round
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from triton.runtime.interpreter import InterpretedFunction

from lib.environment import environment
from lib.files import write_json
from lib.flags import parse, whole_number
from lib.progress import progress
from triton_hybrid import HybridConfig, HybridOptimizer, Phase

SHAPE = (8, 8)
CHECKS = "checks"  # part of every step: has anybody changed parameters, memory, state, rates?
MICROSECONDS = 1e6
WARM_UP = 2  # turns before, in which state is made
ROUNDS = 4  # of a turn
Make = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]


def hybrid(backend: str, predictor: str, **options: Any) -> Make:
    """An optimizer whose phases are all in every round of `one_round`, and that never waits."""
    config = HybridConfig(
        warmup_steps=1, full_steps=1, max_predict_steps=1, confidence_threshold=0.0,
        predictor=predictor, inline=False,
    )  # fmt: skip
    return lambda params: HybridOptimizer(
        params, hybrid=config, backend=backend, capturable=True, **options
    )


def contenders() -> dict[str, Make]:
    """What makes each optimizer, by its name in the table."""
    made: dict[str, Make] = {
        "AdamW(foreach=True)": lambda params: torch.optim.AdamW(params, foreach=True),
        "AdamW(fused=True)": lambda params: torch.optim.AdamW(params, fused=True),
    }
    if hasattr(torch.optim, "Muon"):
        made["torch.optim.Muon"] = lambda params: torch.optim.Muon(params)
    for backend in ("triton", "torch"):
        for predictor in ("none", "slow_ema", "linear"):
            name = f"HybridOptimizer({predictor!r}), {backend}"
            made[name] = hybrid(backend, predictor)
    made["HybridOptimizer('none', base='muon'), triton"] = hybrid("triton", "none", base="muon")
    return made


class Contender:
    """An optimizer with parameters of its own, and two sets of gradients."""

    def __init__(self, make: Make, count: int, moved: bool) -> None:
        self.params = [nn.Parameter(torch.zeros(SHAPE)) for _ in range(count)]
        self.gradients = [
            [torch.full(SHAPE, 1e-2) for _ in self.params] for _ in range(2 if moved else 1)
        ]
        self.give(0)
        self.optimizer = make(self.params)

    def give(self, number: int, wanted: bool = True) -> None:
        """Sets the gradients of a step, or takes them away where it wants none."""
        gradients: list[Tensor] = self.gradients[number % len(self.gradients)]
        for param, gradient in zip(self.params, gradients):
            param.grad = gradient if wanted else None

    def round(self) -> Iterator[tuple[str, float]]:
        """Takes one step of each kind; yields the kind, and seconds."""
        optimizer = self.optimizer
        for number, phase in enumerate(one_round(optimizer)):
            self.give(number, wanted=phase != Phase.PREDICT.value)
            yield phase, seconds(optimizer.step)
        if isinstance(optimizer, HybridOptimizer):
            self.give(number + 1)
            yield CHECKS, seconds(lambda: checks(optimizer))


def seconds(work: Callable[[], Any]) -> float:
    """Processor time of this thread."""
    started = time.thread_time()
    work()
    return time.thread_time() - started


def checks(optimizer: HybridOptimizer) -> None:
    """What every step with a gradient looks at before it does anything."""
    engine = optimizer._binding.bind(optimizer.param_groups, optimizer.state)
    assert engine is not None
    with torch.no_grad():
        engine.take_gradients()


@contextmanager
def without_collection() -> Iterator[None]:
    """Python's garbage collection waits, as in `timeit`."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _nothing(*_: Any, **__: Any) -> None:
    """Stands for every launch; a mock would cost more than it replaces."""


def measure(
    count: int, moved: bool, turns: int, report: Callable[[int, str], None]
) -> list[dict[str, Any]]:
    """Lets every optimizer step in turn; returns a row for each of its kinds of steps."""
    made = {name: Contender(make, count, moved) for name, make in contenders().items()}
    samples: dict[tuple[str, str, str], list[float]] = {}
    for turn in range(WARM_UP + turns):
        for name, contender in made.items():
            for number in range(ROUNDS):
                for phase, taken in contender.round():
                    if turn >= WARM_UP:
                        caches = "warm" if number else "cold"
                        samples.setdefault((name, phase, caches), []).append(taken)
        gc.collect()
        report(turn + 1, f"{count} tensors")
    return [summary(*key, count, moved, taken) for key, taken in samples.items()]


def summary(
    optimizer: str, phase: str, caches: str, count: int, moved: bool, taken: Sequence[float]
) -> dict[str, Any]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(taken, n=4)
    return {
        "optimizer": optimizer,
        "phase": phase,
        "tensors": count,
        "gradients": "moved" if moved else "kept",
        "caches": caches,
        "steps": len(taken),
        "microseconds_median": round(MICROSECONDS * median, 2),
        "microseconds_quartiles": [round(MICROSECONDS * x, 2) for x in (low, high)],
        "microseconds_least": round(MICROSECONDS * min(taken), 2),
        "nanoseconds_per_tensor": round(1e9 * median / count, 1),
    }


@dataclass(frozen=True)
class Options:
    """The flags."""

    tensors: Annotated[tuple[int, ...], whole_number(1, many=True)] = (148, 1000, 5000)
    turns: Annotated[int, whole_number(2)] = 24  # of each optimizer at 148 tensors; fewer at more
    output: Path | None = None  # the JSON file


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    options: Options = parse(Options, arguments, prog="host_time.py", description=__doc__)
    torch.set_num_threads(1)
    console, rows = Console(), list[dict[str, Any]]()
    for count in options.tensors:
        turns = max(2, min(options.turns, options.turns * 148 // count))
        for moved in (False, True):
            with (
                mock.patch.object(InterpretedFunction, "run", _nothing),
                progress(console, WARM_UP + turns, "turns") as report,
                without_collection(),
            ):
                rows += measure(count, moved, turns, report)
    table = Table(title=f"Host time of one step, tensors of {SHAPE}, launches left out")
    columns = ("optimizer", "phase", "tensors", "gradients", "caches", "µs", "quartiles")
    for name in (*columns, "ns a tensor"):
        table.add_column(name, overflow="fold")
    for row in rows:
        low, high = row["microseconds_quartiles"]
        table.add_row(
            row["optimizer"], row["phase"], str(row["tensors"]), row["gradients"], row["caches"],
            f"{row['microseconds_median']:,.0f}", f"{low:,.0f} to {high:,.0f}",
            f"{row['nanoseconds_per_tensor']:,.0f}",
        )  # fmt: skip
    console.print(table)
    if options.output is not None:
        content = {"benchmark": "host_time", **environment(torch.device("cpu")), "rows": rows}
        write_json(options.output, content)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
