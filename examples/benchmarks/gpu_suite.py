"""Checks and measures triton_hybrid on a GPU: one command, one table, one JSON file.

    python examples/benchmarks/gpu_suite.py --output gpu_suite.json

It ends within ``--minutes`` (8), writes the JSON file after every section, also when one fails
or hangs, and prints a table last. The exit status is 0 when everything held, 1 when something
failed, and 2 without a GPU or with wrong flags.
"""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import importlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import random
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# Where Python is told not to add a script's folder to the path, its neighbours are not found.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from suite_context import Context, OutOfTimeError, release_memory
from suite_process import Child
from suite_records import SectionResult, Skip, SuiteRecord

ROOT = Path(__file__).resolve().parents[2]
FAILED, REFUSED, INTERRUPTED = 1, 2, 130
SOFT_SHARE = 0.93
"""Of the time budget: sections end here, so that the last one has time to finish."""
HARD_SHARE = 0.97
"""Of the time budget: here the suite ends even if the device does not answer. The rest is for
what came before the clock was started: importing torch takes many seconds."""


@dataclass(frozen=True)
class Section:
    """One part of the suite.

    Attributes:
        name: On the command line and in the JSON file.
        title: Of its table.
        run: Fills in the result; what it has put there stays when it raises.
        share: Its part of the time budget. What earlier sections leave over is added.
        required: Whether it always runs, and must not be cut short.
    """

    name: str
    title: str
    run: Callable[[Context, SectionResult], None]
    share: float
    required: bool = False


def imported(module: str, function: str) -> Callable[[Context, SectionResult], None]:
    """A section of another module, imported when it runs.

    What cannot be imported, for want of Triton, fails as a section and not as the suite.
    """

    def run(context: Context, result: SectionResult) -> None:
        getattr(importlib.import_module(module), function)(context, result)

    run.__qualname__ = f"{module}.{function}"
    return run


def all_sections() -> tuple[Section, ...]:
    """The sections, in their order."""
    return (
        Section("environment", "Environment", environment, 0.02, required=True),
        Section("barrier", "Grid barrier", imported("suite_barrier", "barrier"), 0.14, True),
        Section(
            "correctness", "Correctness", imported("suite_correctness", "correctness"), 0.32, True
        ),
        Section(
            "bandwidth", "Bandwidth: each input and output counted once",
            imported("suite_bandwidth", "bandwidth"), 0.14,
        ),
        Section(
            "steps", "One step of the optimizer, parameters of GPT-2 small",
            imported("suite_steps", "optimizer_steps"), 0.09,
        ),
        Section(
            "gpt2", "Training GPT-2 small, random tokens",
            imported("suite_gpt2", "gpt2_training"), 0.06,
        ),
        Section("memory", "Device memory", imported("suite_promises", "memory"), 0.04),
        Section(
            "waiting", "Steps that do not wait, and a step in a CUDA graph",
            imported("suite_promises", "no_waiting"), 0.03,
        ),
        Section("offload", "State in host memory", imported("suite_offload", "offload"), 0.05),
        # Last: it takes what the others leave over, and torch.compile its time.
        Section("muon", "Muon's step for GPT-2's matrices", imported("suite_muon", "muon"), 0.11),
    )  # fmt: skip


OPTIONAL = ("bandwidth", "steps", "gpt2", "memory", "waiting", "offload", "muon")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the suite.

    Args:
        arguments: The flags; None for those of this process.

    Returns:
        The exit status.
    """
    options = parse(arguments)
    reason = unusable()
    if reason is not None:
        print(f"gpu_suite.py: {reason}", file=sys.stderr)
        return REFUSED
    use_checkout()
    if options.stress_barrier:
        from suite_barrier import stress

        return stress(options.seed)
    if options.check is not None:
        return check(options)
    chosen = [s for s in all_sections() if s.required or s.name in (options.only or OPTIONAL)]
    device = torch.device("cuda", torch.cuda.current_device())
    flags = {"minutes": options.minutes, "seed": options.seed, "only": options.only}
    record = SuiteRecord(options.output, flags, [SectionResult(s.name, s.title) for s in chosen])
    # Before anything else: a folder that cannot be written to must not be found out at the end.
    try:
        record.write()
    except OSError as error:
        print(f"gpu_suite.py: --output {options.output}: {error}", file=sys.stderr)
        return REFUSED
    return run_suite(chosen, record, Context(device, options.seed), 60.0 * options.minutes)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the flags."""
    parser = argparse.ArgumentParser(
        prog="gpu_suite.py", description="Checks and measures triton_hybrid on a GPU."
    )
    parser.add_argument(
        "--output", type=Path, default=Path("gpu_suite.json"), metavar="FILE",
        help="the JSON file (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=minutes, default=8.0, metavar="N",
        help="time for everything; what does not fit is left out (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=random.SystemRandom().randrange(2**31), metavar="N",
        help="of the random data (default: another one each time; it is in the JSON file)",
    )  # fmt: skip
    parser.add_argument(
        "--only", nargs="+", choices=OPTIONAL, metavar="SECTION",
        help=f"these sections after the checks: {', '.join(OPTIONAL)} (default: all)",
    )  # fmt: skip
    # How the suite calls itself for what may hang.
    parser.add_argument("--stress-barrier", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--check", help=argparse.SUPPRESS)
    parser.add_argument("--two-launches", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def minutes(text: str) -> float:
    """A flag type: a positive number of minutes."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 120:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number above 0, at most 120")
    return value


def unusable() -> str | None:
    """Why the suite cannot run here; None if it can."""
    if not torch.cuda.is_available():
        return "no GPU that torch can use was found; this suite measures nothing without one"
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set: kernels would be interpreted, must be unset"
    return None


def check(options: argparse.Namespace) -> int:
    """Runs the checks of one dtype, and writes the file whenever those of a kernel are complete.

    Args:
        options: The flags.

    Returns:
        The exit status: 0 when every check was made, whatever it found.
    """
    from suite_correctness import check_dtype, distrust_cooperation

    context = Context(torch.device("cuda", torch.cuda.current_device()), options.seed)
    if options.two_launches:
        distrust_cooperation(context)
    result = SectionResult("correctness", "")
    record = SuiteRecord(options.output, {}, [result])
    check_dtype(context, result, options.check, after=record.write)
    return 0


def use_checkout() -> None:
    """Makes ``triton_hybrid`` the package beside this file, whatever is installed.

    The commit in the JSON file is this checkout's. Its root must not be on the path: the
    folder ``kernels`` there would pass for the project of that name, which transformers uses.
    """
    if "triton_hybrid" in sys.modules:
        return
    folder = ROOT / "triton_hybrid"
    spec = importlib.util.spec_from_file_location(
        folder.name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules[folder.name] = module
    spec.loader.exec_module(module)


# ---------------------------------------------------------------------------------- running


def run_suite(
    sections: Sequence[Section], record: SuiteRecord, context: Context, seconds: float
) -> int:
    """Runs the sections one after another.

    Args:
        sections: Which.
        record: Takes what they find out; one result for each section.
        context: Shared by them.
        seconds: The time budget.

    Returns:
        The exit status.
    """
    watchdog = Watchdog(record, HARD_SHARE * seconds)
    started = time.monotonic()
    spent = 0.0
    shares = sum(section.share for section in sections)
    code = FAILED
    try:
        for section, result in zip(sections, record.sections, strict=True):
            spent += section.share / shares
            context.deadline = started + SOFT_SHARE * seconds * spent
            print(f"{section.title} ...", file=sys.stderr, flush=True)
            run_section(section, context, result)
            record.write()
        code = 0 if record.passed else FAILED
    except KeyboardInterrupt:
        code = INTERRUPTED
        record.write()
    finally:
        watchdog.stop()
    print(record.table())
    print(f"\n{'PASSED' if code == 0 else 'FAILED'}: {record.output}")
    return code


def run_section(section: Section, context: Context, result: SectionResult) -> None:
    """Runs one section, and turns what goes wrong in it into its result."""
    result.state = "running"
    started = time.monotonic()
    try:
        if torch.cuda.is_available():
            # Raises here if an earlier section has broken the device for this process.
            torch.cuda.synchronize()
        section.run(context, result)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except OutOfTimeError:
        result.skipped.append(Skip("the rest of this section", "out of time"))
        if section.required:
            result.error = "out of time before every check was made: give it more --minutes"
    except Exception as error:
        lines = str(error).splitlines() or [""]
        result.error = f"{type(error).__name__}: {lines[0]}"
        result.traceback = traceback.format_exc()
    finally:
        result.seconds = time.monotonic() - started
    result.state = "done"
    try:
        release_memory()
    except RuntimeError as error:
        result.error = result.error or f"{type(error).__name__}: {error}"


class Watchdog:
    """Ends the process when the device does not answer any more; the file is written first.

    Python cannot interrupt a wait for the device, but other threads run meanwhile.

    Args:
        record: What is written.
        seconds: When.
    """

    def __init__(self, record: SuiteRecord, seconds: float) -> None:
        self._record = record
        self._seconds = seconds
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def stop(self) -> None:
        """The suite has ended by itself."""
        self._stopped.set()

    def _watch(self) -> None:
        if self._stopped.wait(self._seconds):
            return
        faulthandler.dump_traceback(all_threads=True)
        self.report()
        for child in list(Child.running):
            child.stop()
        os._exit(FAILED)

    def report(self) -> None:
        """Writes and prints what there is, and where it ended."""
        for section in self._record.sections:
            if section.state == "running":
                section.error = f"had not ended after {self._seconds:.0f} s of the whole suite"
        try:
            self._record.write()
            print(self._record.table())
            print(f"\nFAILED: out of time; {self._record.output}", flush=True)
        except Exception:
            traceback.print_exc()


# ------------------------------------------------------------------------------ environment


def environment(context: Context, result: SectionResult) -> None:
    """Describes the machine and the versions."""
    result.facts.update(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        commit=command_output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        changes=command_output("git", "-C", str(ROOT), "status", "--porcelain"),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        processors=os.cpu_count(),
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        seed=context.seed,
    )
    for package in ("torch", "triton", "transformers"):
        try:
            result.facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            result.facts[package] = None
    if context.device.type != "cuda":
        return
    properties = torch.cuda.get_device_properties(context.device)
    result.facts.update(
        gpu=properties.name,
        multiprocessors=properties.multi_processor_count,
        memory_bytes=properties.total_memory,
        cache_bytes=getattr(properties, "L2_cache_size", None),
        capability=f"{properties.major}.{properties.minor}",
        driver=command_output(
            "nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,temperature.gpu",
            "--format=csv,noheader",
        ),
    )  # fmt: skip
    shown = ("gpu", "multiprocessors", "driver", "python", "torch", "triton", "transformers")
    result.title = ", ".join(f"{name} {result.facts[name]}" for name in shown)
    print(result.title, file=sys.stderr, flush=True)


def command_output(*command: str) -> str | None:
    """What a command prints; None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


if __name__ == "__main__":
    raise SystemExit(main())
