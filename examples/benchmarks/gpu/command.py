"""Checks and measures triton_hybrid on a GPU: one command, tables, one JSON file.

    python examples/benchmarks/gpu --minutes 8
    python examples/benchmarks/gpu --train

Without --train: kernels, promises and single steps; what is worth most comes first, and in 5.5
minutes every section gets its turn. With it, whole runs of GPT-2 small: the configurations of
three_configurations.py on three seeds, then 16 x 1,024 tokens in BF16; finished runs are kept
(gpu_train/finished.jsonl beside gpu_train.json), and the same command goes on from there.

It ends within --minutes, writes the JSON file after everything that it finds, also when a section
fails, hangs or crashes, and prints tables last. The exit status is 0 when everything held, 1 when
something failed or time was up, and 2 without a GPU or with wrong flags.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import psutil  # type: ignore[import-untyped]
import torch
from tyro.conf import arg

from gpu.record import Record, SectionResult
from gpu.worker import REAP, Task, Worker
from lib.flags import (
    INTERRUPTED,
    LARGEST_SEED,
    choice,
    fail,
    parse,
    real_number,
    refuse,
    whole_number,
)

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
    ahead: str = ""  # what its process imports beside the target's module before its time begins


BARRIER = "barrier"
GPT2 = "transformers.models.gpt2.modeling_gpt2"
ENVIRONMENT = Section("environment", "Environment", 0.02, "gpu.machine:environment", True, 30.0)
# Device figures first, then what shows that the kernels are right (its compiling takes most of the
# time), then what follows from both. What a section leaves over, the later ones get.
SUITE = (
    ENVIRONMENT,
    Section(BARRIER, "Grid barrier", 0.05, "gpu.kernels:barrier", True, 30.0),
    Section("bandwidth", "Bandwidth, every input and output once", 0.18, "gpu.kernels:bandwidth"),
    Section("steps", "A step, parameters of GPT-2 small", 0.07, "gpu.training:steps"),
    Section("waiting", "Steps that do not wait, steps in graphs", 0.10, "gpu.promises:waiting"),
    Section("correctness", "Tests on the device", 0.28, "gpu.machine:correctness", True),
    Section("gpt2", "Training GPT-2 small, random tokens", 0.08, "gpu.training:gpt2", ahead=GPT2),
    Section("ranks", "One rank of NCCL", 0.05, "gpu.ranks:ranks"),
    Section("memory", "Device memory", 0.05, "gpu.promises:memory"),
    Section("offload", "State in host memory", 0.05, "gpu.promises:offload", ahead=GPT2),
    Section("muon", "Muon's step for GPT-2's matrices", 0.07, "gpu.muon:muon"),
)
TRAINING = (
    ENVIRONMENT,
    Section("source", "The source's setting, GPT-2 small, 4 x 64 tokens", 0.43, "gpu.runs:source"),
    Section("large", "GPT-2 small, 16 x 1,024 tokens, BF16", 0.55, "gpu.runs:large"),
)
MINUTES = {False: 8.0, True: 5.0}  # with --train?
NAMES = tuple(s.name for s in (*SUITE, *TRAINING) if not s.required)


@dataclass(frozen=True)
class Options:
    """The flags.

    Attributes:
        train: Train GPT-2 small instead of checking and measuring steps.
        minutes: For everything; None: 8, with --train 5.
        output: The JSON file; None: gpu_suite.json, with --train gpu_train.json.
        only: Sections, beside those that are always run; none: all.
        seed: Of random data; None: another every time.
    """

    train: bool = False
    minutes: Annotated[float | None, real_number(0, 120, above=True)] = None
    output: Annotated[Path | None, arg(metavar="FILE")] = None
    only: Annotated[tuple[str, ...], choice(NAMES, many=True)] = ()
    seed: Annotated[int | None, whole_number(0, LARGEST_SEED)] = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the suite; returns the exit status."""
    options: Options = parse(Options, arguments, prog="gpu", description=__doc__)
    sections = TRAINING if options.train else SUITE
    if strange := set(options.only) - {section.name for section in sections}:
        where = "without" if options.train else "with"
        refuse("--only", ", ".join(sorted(strange)), f"{where} --train only")
    if not torch.cuda.is_available():
        fail("no GPU that torch can use was found; this suite measures nothing without one")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        fail("TRITON_INTERPRET is set: kernels would be interpreted; allowed: unset")
    chosen = [s for s in sections if s.required or s.name in options.only or not options.only]
    name = "gpu_train" if options.train else "gpu_suite"
    output = options.output or Path(f"{name}.json")
    minutes = options.minutes or MINUTES[options.train]
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    results = [SectionResult(section.name, section.title) for section in chosen]
    record = Record(output, seed, minutes, results, name)
    # A folder that cannot be written to must not be found out at the end.
    try:
        record.write()
    except OSError as error:
        fail(f"argument --output: {output}: {error}; allowed: a file that can be written")
    # Importing torch has taken many seconds of the time already.
    spent = time.time() - psutil.Process().create_time()
    return run(chosen, record, 60.0 * minutes - spent)


def run(sections: Sequence[Section], record: Record, seconds: float, device: str = "cuda") -> int:
    """Runs sections one after another into their results; returns the exit status.

    This process never asks the device for anything: it ends in time whatever happens there.
    """
    started = time.monotonic()
    latest = started + seconds - REAP
    shares = sum(section.share for section in sections)
    spent, cooperative, following = 0.0, True, [*sections[1:], None]
    workers: list[Worker] = []
    try:
        for section, result, after in zip(sections, record.sections, following, strict=True):
            spent += section.share / shares
            left = started + SOFT_SHARE * seconds * spent - time.monotonic()
            left = max(left, min(section.least, started + SOFT_SHARE * seconds - time.monotonic()))
            if left <= 0:
                continue
            print(f"{section.title} ...", file=sys.stderr, flush=True)
            worker = workers.pop() if workers else Worker(section.target, section.ahead)
            workers = [worker, *([Worker(after.target, after.ahead)] if after else [])]
            folder = str(record.output.with_suffix(""))
            task = Task(section.target, left, record.seed, cooperative, device, folder)
            grace = min(max(GRACE * seconds, 1.0), max(latest - time.monotonic() - left, 0.0))
            worker.run(task, result, grace, record.write)
            workers.remove(worker)
            worker.stop()
            if section.name == BARRIER:
                cooperative = result.status == "passed"
            record.write()
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        for worker in workers:
            worker.stop()
        record.write()
        record.show()
    return 0 if record.held else 1
