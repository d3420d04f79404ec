"""Thousands of steps in which nothing may grow.

    python examples/benchmarks/soak.py
    python examples/benchmarks/soak.py --steps 2000 --drive inline --predictors subspace
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

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from flag_types import device_name, whole_number
from rich.console import Console
from run_files import environment, write_json
from soak_measure import (
    EXACT,
    SETTLED,
    Growth,
    ResidentGrowth,
    Sample,
    Watch,
    allowance,
    live_tensors,
    resident_growth,
    storage_bytes,
)
from soak_plot import write_plot
from soak_progress import StepCounter
from soak_run import ADAMW, DRIVES, HYBRID, ROUND, Leg, LegReport, SoakRunner, run_leg

from triton_hybrid import offload
from triton_hybrid.config import OFFLOADS

PREDICTORS = ("slow_ema", "subspace", "linear", "auto")
GREW = 1
INTERRUPTED = 130
SAMPLES_AFTER_SETTLING = 4
MEBIBYTE = 2**20

AfterStep = Callable[[SoakRunner], None]


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all flags."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--steps", type=whole_number(1), default=10_000, help="calls of step(), in all legs "
        "together (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--drive", choices=("both", *DRIVES), default="both", help="both: in turn, changed at "
        "every round trip through a state dict (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--predictors", choices=PREDICTORS, nargs="+", default=list(PREDICTORS),
        help="a leg for each (default: all)",
    )  # fmt: skip
    parser.add_argument("--seed", type=whole_number(0), default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--device", type=device_name, default="auto", help="auto is a GPU where there is one, "
        "else the CPU (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--backend", choices=("auto", "torch", "triton"), default="auto",
        help="the optimizer's backend (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--offload", choices=OFFLOADS, default="none", help="where state lives that AdamW does not "
        "have; on a CPU it is copied all the same here, from host memory to host memory "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=whole_number(1), default=1, help="CPU threads; the tensors are so small "
        "that more would wait for each other (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--subject", choices=(HYBRID, ADAMW), default=HYBRID, help="adamw: torch.optim.AdamW "
        "alone, as in the control (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--no-control", action="store_true", help="leave the control out; resident memory then "
        "may grow by the least allowance",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=Path("runs") / "soak.json", metavar="FILE",
        help="the JSON file; the plot lies beside it (default: %(default)s)",
    )  # fmt: skip
    return parser


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; a bad flag ends the program with a message that names it.

    Args:
        arguments: The flags; None for those of this process.

    Returns:
        The options.
    """
    parser = build_parser()
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    legs = len(options.predictors)
    if len(set(options.predictors)) < legs:
        parser.error(
            f"argument --predictors: {options.predictors} has one twice; allowed: each once"
        )
    # Every leg must have something to compare.
    least = legs * (SETTLED + SAMPLES_AFTER_SETTLING * ROUND)
    if options.steps < least:
        parser.error(
            f"argument --steps: {options.steps} is not possible; allowed: whole numbers from "
            f"{least} for {legs} predictors"
        )
    if options.output.is_dir():
        parser.error(f"argument --output: {options.output} is a folder; allowed: a file")
    return options


def plan(options: argparse.Namespace) -> list[Leg]:
    """Returns the legs of a run.

    Args:
        options: The flags.
    """
    predictors = options.predictors
    share, rest = divmod(options.steps, len(predictors))
    legs, first = [], 0
    for index, predictor in enumerate(predictors):
        steps = share + (index < rest)
        legs.append(
            Leg(
                subject=options.subject,
                predictor=predictor,
                drives=DRIVES if options.drive == "both" else (options.drive,),
                steps=steps,
                first_step=first,
                seed=options.seed,
                device=options.device,
                backend=options.backend,
                offload=options.offload,
            )
        )
        first += steps
    return legs


def soak(
    legs: Sequence[Leg], after_step: AfterStep
) -> tuple[Watch, list[LegReport], list[dict[str, Any]], list[Growth]]:
    """Runs all legs.

    Args:
        legs: Which.
        after_step: Called after every step.

    Returns:
        The samples, what happened in each leg, what each left behind, and what of it grew.
    """
    watch, reports = Watch(), []
    left: list[dict[str, Any]] = []
    grown: list[Growth] = []
    for leg in legs:
        reports.append(run_leg(leg, watch.add, after_step))
        tensors = live_tensors()
        left.append(
            {
                "leg": leg.name,
                "step": leg.first_step + leg.steps,
                "tensors": len(tensors),
                "tensor_bytes": storage_bytes(tensors),
            }
        )
        del tensors
        # The first leg leaves what the process keeps for good, such as torch's constants.
        for quantity in ("tensors", "tensor_bytes"):
            if left[-1][quantity] > left[0][quantity]:
                grown.append(
                    Growth(
                        f"{quantity} left behind",
                        f"after {leg.name}",
                        left[0][quantity],
                        left[-1][quantity],
                        left[0]["step"],
                        left[-1]["step"],
                    )
                )
    return watch, reports, left, grown


class Control:
    """Torch's AdamW on its way through the same, beside this process and in one of its own.

    Args:
        options: The flags.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._file = Path(self._folder.name) / "control.json"
        flags = {
            "--steps": options.steps, "--seed": options.seed, "--device": options.device,
            "--threads": options.threads, "--drive": options.drive, "--output": self._file,
        }  # fmt: skip
        command = [sys.executable, str(Path(__file__).resolve()), "--subject", ADAMW]
        command += [str(part) for flag in flags.items() for part in flag]
        command += ["--predictors", *options.predictors]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def samples(self) -> list[Sample]:
        """Waits for it, and returns its samples.

        Raises:
            RuntimeError: It failed.
        """
        status = self._process.wait()
        if not self._file.is_file():
            raise RuntimeError(f"the control ended with status {status} and no result")
        content = json.loads(self._file.read_text(encoding="utf-8"))
        return [Sample(**sample) for sample in content["samples"]]

    def stop(self) -> None:
        """Ends it, if it still runs, and removes its file."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()


def judge(
    watch: Watch,
    reports: Sequence[LegReport],
    left_behind: Sequence[Growth],
    resident: ResidentGrowth,
    allowed: int,
) -> list[str]:
    """Says what grew and what went wrong; nothing is good.

    Args:
        watch: The samples.
        reports: What happened in each leg.
        left_behind: What the legs left behind more and more of.
        resident: How resident memory moved.
        allowed: By how much it may grow.
    """
    found = [str(growth) for growth in (*watch.growths, *left_behind)]
    if resident.growth > allowed:
        found.append(
            f"resident memory grew by {resident.growth / MEBIBYTE:.2f} MiB after step {SETTLED} of "
            f"the legs; "
            f"allowed: {allowed / MEBIBYTE:.2f} MiB"
        )
    return found + [text for report in reports for text in report.wrong]


def main(arguments: Sequence[str] | None = None, after_step: AfterStep | None = None) -> int:
    """Runs the soak.

    Args:
        arguments: The flags; None for those of this process.
        after_step: Called after every step; where tests plant their leaks.

    Returns:
        The exit status: 1 if something grew or went wrong.
    """
    options = parse_options(arguments)
    console = Console()
    torch.set_num_threads(options.threads)
    offload.COPY_ON_CPU = options.offload != "none"
    beside: Control | None = None
    control: list[Sample] = []
    try:
        if options.subject == HYBRID and not options.no_control:
            console.print("Beside it the control: torch.optim.AdamW, in a process of its own")
            beside = Control(options)
        started = time.perf_counter()
        legs = plan(options)
        with StepCounter(console, options.steps) as count:

            def after(runner: SoakRunner) -> None:
                count(runner)
                if after_step is not None:
                    after_step(runner)

            watch, reports, left, grown = soak(legs, after)
        seconds = time.perf_counter() - started
        if beside is not None:
            control = beside.samples()
    except KeyboardInterrupt:
        console.print("Interrupted; nothing was judged.")
        return INTERRUPTED
    finally:
        if beside is not None:
            beside.stop()
    noise = resident_growth(control) if control else None
    resident, allowed = resident_growth(watch.samples), allowance(noise)
    found = judge(watch, reports, grown, resident, allowed)
    content = {
        "benchmark": "soak",
        **environment(options.device),
        "options": {
            name: str(value) if isinstance(value, torch.device) else value
            for name, value in vars(options).items()
            if name != "output"
        },
        "seconds": seconds,
        "exact": list(EXACT),
        "settled_after_steps_of_a_leg": SETTLED,
        "samples_compared": watch.points,
        "resident": {
            "growth_bytes": resident.growth,
            "spread_bytes": resident.spread,
            "control_growth_bytes": None if noise is None else noise.growth,
            "control_spread_bytes": None if noise is None else noise.spread,
            "allowed_growth_bytes": allowed,
        },
        "left_behind": left,
        "found": found,
        "legs": [
            {
                "leg": report.leg,
                "counts": dict(report.counts),
                "round_trips_by_phase": dict(report.round_trips_by_phase),
                "stats": report.stats,
            }
            for report in reports
        ],
        "samples": [sample.to_dict() for sample in watch.samples],
        "control_samples": [sample.to_dict() for sample in control],
    }
    write_json(options.output, content)
    write_plot(options.output.with_suffix(".png"), watch.samples, control, allowed)
    console.print(summary(watch, resident, noise, allowed), highlight=False)
    for text in found:
        console.print(f"FAILED: {text}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"Results: {options.output}", highlight=False, soft_wrap=True)
    return GREW if found else 0


def summary(
    watch: Watch, resident: ResidentGrowth, noise: ResidentGrowth | None, allowed: int
) -> str:
    """Returns what was seen, in a few lines.

    Args:
        watch: The samples.
        resident: How resident memory moved.
        noise: How it moved in the control.
        allowed: By how much it may grow.
    """
    compared = sum(watch.points.values())
    text = (
        f"{compared} samples compared at {len(watch.points)} points: "
        f"{len(watch.growths)} quantities grew\n"
        f"resident memory: {resident.growth / MEBIBYTE:+.2f} MiB, spread "
        f"{resident.spread / MEBIBYTE:.2f} MiB; allowed: {allowed / MEBIBYTE:.2f} MiB"
    )
    if noise is not None:
        text += (
            f"\ncontrol, torch.optim.AdamW: {noise.growth / MEBIBYTE:+.2f} MiB, spread "
            f"{noise.spread / MEBIBYTE:.2f} MiB"
        )
    return text


if __name__ == "__main__":
    raise SystemExit(main())
