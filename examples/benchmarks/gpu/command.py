"""Checks and measures triton_hybrid on a GPU: one command, tables, one JSON file.

    python examples/benchmarks/gpu_suite.py --output gpu_suite.json

It ends within ``--minutes``, writes the JSON file after every section, also when one fails, hangs
or crashes, and prints tables last. The exit status is 0 when everything held, 1 when something
failed or time was up, and 2 without a GPU or with wrong flags.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import psutil  # type: ignore[import-untyped]
import torch
from tyro.conf import arg

from gpu.record import Record, SectionResult
from gpu.worker import REAP, Task, Worker
from lib.flags import INTERRUPTED, LARGEST_SEED, choice, fail, parse, real_number, whole_number

SOFT_SHARE = 0.93  # of the time budget: sections end here, so that what hangs can be killed
GRACE = 0.02  # of it: by so much a section may be late before its process is killed


@dataclass(frozen=True)
class Section:
    """One part of the suite."""

    name: str  # on the command line and in the JSON file
    title: str  # of its tables
    share: float  # of the time budget; what earlier sections leave over is added
    target: str  # what runs it, ``module:function``
    required: bool = False  # does it always run?
    least: float = 0.0  # seconds that it gets anyhow: torch may come from a cold disk


BARRIER = "barrier"
SECTIONS = (
    Section("environment", "Environment", 0.03, "gpu.machine:environment", True, 30.0),
    Section(BARRIER, "Grid barrier", 0.10, "gpu.kernels:barrier", True, 30.0),
    Section("correctness", "Tests on the device", 0.36, "gpu.machine:correctness", required=True),
    Section("bandwidth", "Bandwidth, every input and output once", 0.14, "gpu.kernels:bandwidth"),
    Section("steps", "A step, parameters of GPT-2 small", 0.09, "gpu.training:steps"),
    Section("gpt2", "Training GPT-2 small, random tokens", 0.07, "gpu.training:gpt2"),
    Section("memory", "Device memory", 0.04, "gpu.promises:memory"),
    Section("waiting", "Steps that do not wait, a step in a graph", 0.03, "gpu.promises:waiting"),
    Section("offload", "State in host memory", 0.05, "gpu.promises:offload"),
    # Last: it takes what the others leave over, and torch.compile its time.
    Section("muon", "Muon's step for GPT-2's matrices", 0.09, "gpu.muon:muon"),
)
OPTIONAL = tuple(section.name for section in SECTIONS if not section.required)


@dataclass(frozen=True)
class Options:
    """The flags."""

    output: Annotated[Path, arg(metavar="FILE")] = Path("gpu_suite.json")  # the JSON file
    minutes: Annotated[float, real_number(0, 120, above=True)] = 8.0  # for everything
    only: Annotated[tuple[str, ...], choice(OPTIONAL, many=True)] = OPTIONAL  # after the checks
    seed: Annotated[int, whole_number(0, LARGEST_SEED)] = field(
        default_factory=lambda: random.SystemRandom().randrange(2**31)
    )  # of random data


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the suite; returns the exit status."""
    options: Options = parse(Options, arguments, prog="gpu_suite.py", description=__doc__)
    if not torch.cuda.is_available():
        fail("no GPU that torch can use was found; this suite measures nothing without one")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        fail("TRITON_INTERPRET is set: kernels would be interpreted; allowed: unset")
    chosen = [s for s in SECTIONS if s.required or s.name in options.only]
    results = [SectionResult(section.name, section.title) for section in chosen]
    record = Record(options.output, options.seed, options.minutes, results)
    # A folder that cannot be written to must not be found out at the end.
    try:
        record.write()
    except OSError as error:
        fail(f"argument --output: {options.output}: {error}; allowed: a file that can be written")
    # Importing torch has taken many seconds of the time already.
    spent = time.time() - psutil.Process().create_time()
    return run(chosen, record, 60.0 * options.minutes - spent)


def run(sections: Sequence[Section], record: Record, seconds: float, device: str = "cuda") -> int:
    """Runs sections one after another into their results; returns the exit status.

    This process never asks the device for anything: it ends in time whatever happens there.
    """
    started = time.monotonic()
    latest = started + seconds - REAP
    shares = sum(section.share for section in sections)
    spent, cooperative = 0.0, True
    worker: Worker | None = None
    try:
        for section, result in zip(sections, record.sections, strict=True):
            spent += section.share / shares
            left = started + SOFT_SHARE * seconds * spent - time.monotonic()
            left = max(left, min(section.least, started + SOFT_SHARE * seconds - time.monotonic()))
            if left <= 0:
                continue
            print(f"{section.title} ...", file=sys.stderr, flush=True)
            worker = worker or Worker()
            task = Task(section.target, left, record.seed, cooperative, device)
            grace = min(max(GRACE * seconds, 1.0), max(latest - time.monotonic() - left, 0.0))
            if not worker.run(task, result, grace) or section.name == BARRIER:
                worker.stop()
                worker = None
            if section.name == BARRIER:
                cooperative = result.status == "passed"
            record.write()
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        if worker is not None:
            worker.stop()
        record.write()
        record.show()
    return 0 if record.held else 1
