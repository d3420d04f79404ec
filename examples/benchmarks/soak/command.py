"""Thousands of steps in which nothing may grow.

    python examples/benchmarks/soak.py
    python examples/benchmarks/soak.py --steps 2000 --drive inline --predictors slow_ema
    python examples/benchmarks/soak.py --offload cpu

A small model with FP32 and BF16 parameters, in a Muon and in an AdamW group, goes through all
phases. On its way predictions are made to fail, gradients are not finite, missing, zeroed in
place or in another memory order, and every 25 steps a new optimizer goes on from a saved state
dict, in the other drive. Each dynamics model is a leg of its own, with a model of its own.

After the first 100 steps of a leg the number of live tensors and their bytes, the device's bytes
and the optimizer's state may not grow at all from one sample to the next in the same phase and
drive; what a leg leaves behind may not grow either. Resident memory is the allocator's affair
too: after the first 100 steps of the legs it may grow by twice what a control moves by, the same
run with torch.optim.AdamW in a process of its own, or by a megabyte. Exit status 1 where
something grew or went wrong.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
from rich.console import Console

from lib import choices
from lib.environment import environment
from lib.files import write_json
from lib.flags import INTERRUPTED, choice, default_device, device, parse, refuse, whole_number
from lib.progress import progress
from soak.leg import ADAMW, DRIVES, HYBRID, ROUND, Leg, LegReport, SoakRunner, run_leg
from soak.measure import EXACT, SETTLED, Sample, Watch, allowance, resident_growth
from soak.plot import write_plot
from triton_hybrid import offload

# `secant` shortens a bad move before it takes it back: its faults cannot be counted as the others'.
PREDICTORS = (
    *(name for name in choices.PREDICTORS if name not in ("auto", "none", "secant")),
    "auto",
)
GREW = 1
SAMPLES_AFTER_SETTLING = 4
MEBIBYTE = 2**20

AfterStep = Callable[[SoakRunner], None]


@dataclass(frozen=True)
class Options:
    """The flags."""

    steps: Annotated[int, whole_number(1)] = 10_000  # calls of step(), in all legs together
    # both: in turn, changed at every round trip through a state dict
    drive: Annotated[str, choice(("both", *DRIVES))] = "both"
    predictors: Annotated[tuple[str, ...], choice(PREDICTORS, many=True)] = PREDICTORS  # the legs
    seed: Annotated[int, whole_number(0)] = 0
    device: Annotated[torch.device, device()] = field(default_factory=default_device)
    backend: Annotated[str, choice(("auto", "torch", "triton"))] = "auto"  # the optimizer's
    # where state lives that AdamW does not have; on a CPU it is copied all the same here, from
    # host memory to host memory
    offload: Annotated[str, choice(choices.OFFLOADS)] = "none"
    # CPU threads; the tensors are so small that more would wait for each other
    threads: Annotated[int, whole_number(1)] = 1
    subject: Annotated[str, choice((HYBRID, ADAMW))] = HYBRID  # adamw: torch's, as in the control
    no_control: bool = False  # resident memory then may grow by the least allowance
    output: Path = Path("runs/soak.json")  # the JSON file; the plot lies beside it


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Reads the command line; a bad flag ends the program with a message that names it."""
    options: Options = parse(Options, arguments, prog="soak.py", description=__doc__)
    # Every leg must have something to compare.
    legs = len(options.predictors)
    least = legs * (SETTLED + SAMPLES_AFTER_SETTLING * ROUND)
    if options.steps < least:
        refuse("--steps", options.steps, f"whole numbers from {least} for {legs} predictors")
    if options.output.is_dir():
        refuse("--output", options.output, "a file, not a folder")
    return options


def soak(options: Options, after_step: AfterStep) -> tuple[Watch, list[LegReport]]:
    """Runs a leg for each predictor; `after_step` is called after every step."""
    watch, reports, done = Watch(), [], 0
    share, rest = divmod(options.steps, len(options.predictors))
    drives = DRIVES if options.drive == "both" else (options.drive,)
    where = options.seed, options.device, options.backend, options.offload
    for index, predictor in enumerate(options.predictors):
        steps = share + (index < rest)
        leg = Leg(options.subject, predictor, drives, steps, done, *where)
        reports.append(run_leg(leg, watch.add, after_step))
        done += steps
        watch.leave(leg.name, done)
    return watch, reports


@contextmanager
def in_own_process(options: Options) -> Iterator[Callable[[], list[Sample]]]:
    """Runs the control in a process of its own; yields what waits for its samples."""
    executor = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _ignore_interrupts)
    future = executor.submit(control, options)
    try:
        yield future.result
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()


def _ignore_interrupts() -> None:
    # The terminal sends Ctrl-C to every process; only the parent is to act on it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def control(options: Options) -> list[Sample]:
    """Has torch's AdamW go through the same."""
    torch.set_num_threads(options.threads)
    return soak(replace(options, subject=ADAMW), lambda runner: None)[0].samples


def finish(
    options: Options,
    watch: Watch,
    reports: Sequence[LegReport],
    seconds: float,
    control_samples: Sequence[Sample],
) -> tuple[list[str], list[str]]:
    """Writes the files; returns what grew or went wrong, and a summary of lines to print."""
    noise = resident_growth(control_samples) if control_samples else None
    resident, allowed = resident_growth(watch.samples), allowance(noise)
    found = [str(growth) for growth in (*watch.growths, *watch.left_growths)]
    if resident.growth > allowed:
        found.append(
            f"resident memory grew by {_mebibytes(resident.growth)} after step {SETTLED} of the "
            f"legs; allowed: {_mebibytes(allowed)}"
        )
    found += [text for report in reports for text in report.wrong]
    content = {
        "benchmark": "soak",
        **environment(options.device),
        "options": {name: value for name, value in vars(options).items() if name != "output"},
        "seconds": seconds,
        "exact": EXACT,
        "settled_after_steps_of_a_leg": SETTLED,
        "samples_compared": watch.points,
        "resident": {
            "growth_bytes": resident.growth,
            "spread_bytes": resident.spread,
            "control_growth_bytes": noise and noise.growth,
            "control_spread_bytes": noise and noise.spread,
            "allowed_growth_bytes": allowed,
        },
        "left_behind": watch.left,
        "found": found,
        "legs": [
            {name: value for name, value in vars(report).items() if name != "wrong"}
            for report in reports
        ],
        "samples": list(map(vars, watch.samples)),
        "control_samples": list(map(vars, control_samples)),
    }
    write_json(options.output, content)
    write_plot(options.output.with_suffix(".png"), watch.samples, control_samples, allowed)
    lines = [
        f"{sum(watch.points.values())} samples compared at {len(watch.points)} points: "
        f"{len(watch.growths)} quantities grew",
        f"resident memory: {_mebibytes(resident.growth)}, spread {_mebibytes(resident.spread)}; "
        f"allowed: {_mebibytes(allowed)}",
    ]
    if noise is not None:
        growth, spread = _mebibytes(noise.growth), _mebibytes(noise.spread)
        lines.append(f"control, torch.optim.AdamW: {growth}, spread {spread}")
    lines += [*(f"FAILED: {text}" for text in found), f"Results: {options.output}"]
    return found, lines


def _mebibytes(count: int) -> str:
    return f"{count / MEBIBYTE:.2f} MiB"


def main(arguments: Sequence[str] | None = None, after_step: AfterStep | None = None) -> int:
    """Runs the command line and returns its exit status: 1 if something grew or went wrong.

    Tests plant their leaks in `after_step`, which is called after every step.
    """
    options = parse_options(arguments)
    console = Console()
    torch.set_num_threads(options.threads)
    offload.COPY_ON_CPU = options.offload != "none"
    with_control = options.subject == HYBRID and not options.no_control
    # Also for rich to load now what it prints with: 0.6 MiB, or the last sample has them.
    more = ", beside them torch.optim.AdamW in a process of its own" if with_control else ""
    console.print(f"{options.steps:,} steps{more}", highlight=False, soft_wrap=True)
    try:
        beside = in_own_process(options) if with_control else nullcontext(list[Sample])
        with beside as control_samples:
            started = time.perf_counter()
            with progress(console, options.steps, "steps") as show:

                def after(runner: SoakRunner) -> None:
                    show(runner.leg.first_step + runner.report.counts["steps"], runner.leg.name)
                    if after_step is not None:
                        after_step(runner)

                watch, reports = soak(options, after)
            seconds = time.perf_counter() - started
            found, lines = finish(options, watch, reports, seconds, control_samples())
    except KeyboardInterrupt:
        console.print("Interrupted; nothing was judged.")
        return INTERRUPTED
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return GREW if found else 0
