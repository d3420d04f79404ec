"""Parts of the suite in processes of their own: what hangs or crashes there harms nobody else."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

SUITE = Path(__file__).resolve().with_name("gpu_suite.py")


class Child:
    """A part of the suite that runs beside this process.

    Args:
        flags: Of `gpu_suite.py`.
    """

    running: ClassVar[list[Child]] = []

    def __init__(self, flags: Sequence[str]) -> None:
        # A file, not a pipe: what was printed before a deadlock stays readable.
        self._output = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, str(SUITE), *flags], stdout=self._output, stderr=subprocess.STDOUT
        )
        self.seconds = 0.0
        self.lines: list[str] = []
        self.running.append(self)

    def wait(self, seconds: float) -> int | None:
        """Waits for the end, and stops the process where it does not come.

        Args:
            seconds: How long to wait.

        Returns:
            The exit status; None if the process had to be stopped.
        """
        try:
            code: int | None = self._process.wait(max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            self.stop()
        self.seconds = time.monotonic() - self._started
        self._output.seek(0)
        self.lines = self._output.read().splitlines()
        self._output.close()
        return code

    def stop(self) -> None:
        """Ends the process if it still runs."""
        if self in self.running:
            self.running.remove(self)
        if self._process.poll() is None:
            self._process.kill()
            # The driver may need a while to stop a kernel; the suite does not wait for it.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10.0)
