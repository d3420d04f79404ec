"""Sections run in other processes: what hangs there or crashes the device harms nobody else.

A worker imports what its section needs before it is given one: that of the next section is started
while another runs, or torch, from a cold disk, would take 8 seconds of each. What a worker tells
arrives at once, and outlives it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu.record import SectionResult

COMMAND = Path(__file__).resolve().parent
LINES = 8  # of a dead worker's output, which are kept
REAP = 5.0  # seconds that a killed process gets: the driver may need a while to stop a kernel


@dataclass(frozen=True)
class Task:
    """A section to run."""

    target: str  # ``module:function``; it takes a `gpu.context.Context`
    seconds: float
    seed: int = 0
    cooperative: bool = True  # may the launch with the grid barrier be used?
    device: str = "cuda"
    folder: str = ""  # for what it keeps beside the results


class Worker:
    """A process, seen from the one that survives.

    Args:
        targets: What it will run: their modules are imported ahead.
    """

    def __init__(self, *targets: str) -> None:
        # A file, not a pipe: what was printed before a deadlock stays readable.
        self._output = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, str(COMMAND), "worker", *filter(None, targets)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._output, text=True, start_new_session=True,
        )  # fmt: skip
        self._messages: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def run(
        self,
        task: Task,
        result: SectionResult,
        grace: float,
        told: Callable[[], None] = lambda: None,
    ) -> bool:
        """Runs a section into a result; whether the process may be used again.

        It is killed `grace` seconds after the task's own time. `told` is called after everything
        that it tells.
        """
        started, result.status = time.monotonic(), "unfinished"
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(vars(task)) + "\n")
            self._process.stdin.flush()
        kind = ""
        while kind != "end":
            left = started + task.seconds + grace - time.monotonic()
            kind, content = self._next(max(left, 0.0))
            if kind != "end":
                result.take(kind, content)
                told()
        if str(content["error"]).startswith("SystemExit"):  # an example has said why
            content["error"] += f"; last output: {self._tail()}"
        result.end(**content)
        result.seconds = time.monotonic() - started
        return result.error is None and result.status != "timeout"

    def _next(self, seconds: float) -> tuple[str, dict[str, Any]]:
        """The next message; one of our own where the process does not answer, or has ended."""
        try:
            line = self._messages.get(timeout=seconds)
        except queue.Empty:
            self.stop()
            return "end", {"error": f"no answer in time; last output: {self._tail()}", "late": True}
        if line is None:
            self.stop()
            died = f"its process ended with status {self._process.returncode}"
            return "end", {"late": False, "error": f"{died}; last output: {self._tail()}"}
        kind, content = json.loads(line)
        return kind, content

    def stop(self) -> None:
        """Kills the process, and those that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(REAP)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.endswith("\n"):  # or it was cut short
                self._messages.put(line)
        self._messages.put(None)

    def _tail(self) -> str:
        self._output.seek(0)
        return " / ".join(self._output.read().splitlines()[-LINES:])[-1500:]


def serve(targets: Iterable[str] = ()) -> None:
    """What the process does: imports targets, then runs sections that come by standard input."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no message

    def tell(kind: str, content: dict[str, Any]) -> None:
        channel.write(json.dumps([kind, content], default=str) + "\n")
        channel.flush()

    for target in targets:
        with contextlib.suppress(Exception):  # it fails again in the section, and says so
            importlib.import_module(target.partition(":")[0])
    for line in sys.stdin:
        task = Task(**json.loads(line))
        deadline = time.monotonic() + task.seconds
        tell("end", _outcome(task, deadline, tell))


def _outcome(task: Task, deadline: float, tell: Callable[..., None]) -> dict[str, Any]:
    """Runs a section; returns the arguments of `SectionResult.end`."""
    late = False
    try:
        # Imported here: what cannot be imported fails as a section.
        import torch

        from gpu.context import Context, OutOfTimeError

        if not task.cooperative:
            importlib.import_module("gpu.fallback")
        module, _, function = task.target.partition(":")
        given: dict[str, Any] = {
            "seed": task.seed,
            "deadline": deadline,
            "folder": Path(task.folder),
        }
        context = Context(torch.device(task.device), tell, cooperative=task.cooperative, **given)
        try:
            getattr(importlib.import_module(module), function)(context)
        except OutOfTimeError:
            late = True
        # Raises where the section has broken the device for this process.
        context.synchronise()
        context.release_memory()
    except (Exception, SystemExit) as error:  # of an example that refuses to go on
        traceback.print_exc()
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        first = (str(error).splitlines() or [""])[0]
        return {"error": f"{type(error).__name__}: {first} ({where})", "late": late}
    return {"error": None, "late": late}
