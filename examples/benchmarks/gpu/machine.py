"""Sections: hardware and versions; the tests of the kernels and of the promises on the device."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import psutil  # type: ignore[import-untyped]
import torch

from gpu.context import Context, OutOfTimeError
from lib.environment import environment as surroundings

ROOT = Path(__file__).resolve().parents[3]
BENCHMARKS = ROOT / "examples" / "benchmarks"


def environment(context: Context) -> None:
    """Describes the machine, the versions, and which commit is measured."""
    found = surroundings(context.device, ("pytest", "hypothesis"))
    versions, hardware = found["versions"], found["hardware"]
    git = ("git", "-C", str(ROOT))
    versions["git_commit"] = output(*git, "rev-parse", "HEAD")
    versions["git_changes"] = output(*git, "status", "--porcelain")
    if context.on_gpu:
        properties = torch.cuda.get_device_properties(context.device)
        hardware["gpu_processors"] = properties.multi_processor_count
        queried = ("driver_version", "clocks.sm", "clocks.mem", "temperature.gpu")
        command = ("nvidia-smi", f"--query-gpu={','.join(queried)}", "--format=csv,noheader")
        state = (output(*command) or "").split(", ")
        hardware.update(zip(("gpu_driver", *queried[1:]), state))
    context.tell("fact", found)
    shown = {"gpu": hardware.get("gpu"), "driver": hardware.get("gpu_driver")}
    names = ("python", "torch", "triton", "triton_hybrid", "git_commit")
    context.row(**shown, **{name: versions[name] for name in names})


def output(*command: str) -> str | None:
    """What a command prints; None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


FIRST = ("verify", "predict", "secant_passes", "trapezoid", "step")
"""Of the kernels, what has changed since a GPU ran it: time may not last for all."""
OPTIMIZER = ("secant", "auto", "accumulation")


def paths(root: Path = ROOT) -> list[str]:
    """The files of tests, in their order."""
    found = {path.stem: path for path in sorted(root.glob("tests/kernels/test_*.py"))}
    del found["test_audit"]  # which compiles, and needs no device
    first = [found.pop(f"test_{name}") for name in FIRST]
    others = [root / "tests" / "optimizer" / f"test_{name}.py" for name in OPTIMIZER]
    files = [*first, root / "tests" / "test_promises.py", *others, *found.values()]
    return [str(path.relative_to(root)) for path in files]


NEEDED = ("pytest", "hypothesis")
MOST_PROCESSES = 16  # compiling takes most of the time
FAREWELL = 10.0  # seconds in which pytest, interrupted, writes what it has found so far


def correctness(context: Context, tests: Sequence[str] = (), folder: Path = ROOT) -> None:
    """Runs pytest in a process of its own until time is up, and takes over what it reports.

    Args:
        context: Where it runs, and until when.
        tests: Files; none: those of `paths`.
        folder: Where they lie.

    Raises:
        RuntimeError: Something else went wrong than a test.
        OutOfTimeError: Some of them were not run.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(f"{' and '.join(missing)} not installed: nothing was tested")
    with tempfile.TemporaryDirectory() as temporary:
        report, log = Path(temporary, "report.xml"), Path(temporary, "log")
        command = [sys.executable, "-m", "pytest", *(tests or paths()), "-v"]
        command += ["-p", "no:cacheprovider", f"--junit-xml={report}"]
        if not context.cooperative:
            command += ["-p", "gpu.fallback", "-k", "not cooperative"]
        found = filter(None, (str(BENCHMARKS), os.environ.get("PYTHONPATH")))
        variables = {**os.environ, "CI": "true", "PYTHONPATH": os.pathsep.join(found)}
        if importlib.util.find_spec("xdist") is not None:
            processes = min(MOST_PROCESSES, os.cpu_count() or 1)
            # Tests begin in their order, a few at a time to each process.
            command += ["-n", str(processes), "--dist", "load", "--maxschedchunk", "2"]
        with log.open("w") as output:
            process = subprocess.Popen(
                command, cwd=folder, stdout=output, stderr=output, env=variables,
                # A shell lets what it starts in the background ignore interrupts, and so pytest.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip
            left = max(context.deadline - FAREWELL - time.monotonic(), 0.0)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(left)
            late = process.poll() is None
            if late:
                # Its workers too: it waits for them, and a hanging one would cost the report.
                pytest = psutil.Process(process.pid)
                for each in (*pytest.children(recursive=True), pytest):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(FAREWELL - 1.0)
                process.kill()
        tail = " / ".join(log.read_text(errors="replace").splitlines()[-4:])[-600:]
        context.tell("fact", {"command": command[1:], "output": tail})
        if report.exists():
            take(context, report)
    if late:
        raise OutOfTimeError
    # 0: all passed; 1: some failed, and are checks of their own.
    if process.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with status {process.returncode}: {tail}")


def take(context: Context, report: Path) -> None:
    """Takes a junit file over."""
    files: dict[str, dict[str, float]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("classname", "")
        if not name:  # what an interruption leaves behind
            continue
        counts = files.setdefault(name, {"passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0})
        counts["seconds"] += float(case.get("time", 0.0))
        bad = [each for kind in ("failure", "error") for each in case.findall(kind)]
        skipped = case.find("skipped") is not None
        counts["failed" if bad else "skipped" if skipped else "passed"] += 1
        for each in bad[:1]:
            lines = (each.get("message") or each.text or "").strip().splitlines()
            context.check(f"{name}::{case.get('name')}", False, detail=" / ".join(lines[:3])[:400])
    for name, counts in sorted(files.items()):  # processes finish in any order
        context.row(file=name, **counts)
        if not counts["failed"]:
            context.check(f"{name}: {counts['passed']:.0f} tests", counts["passed"] > 0)
