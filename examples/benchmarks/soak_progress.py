"""Shows how a soak run gets on."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from soak_run import SoakRunner

SECONDS_BETWEEN_LINES = 30.0


class StepCounter:
    """Shows how the run gets on: a bar in a terminal, now and then a line elsewhere.

    Args:
        console: Where.
        steps: How many steps there are.
    """

    def __init__(self, console: Console, steps: int) -> None:
        self._console, self._steps = console, steps
        self._done = 0
        self._last = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("time left"), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip

    def __enter__(self) -> Callable[[SoakRunner], None]:
        self._bar.start()
        self._task = self._bar.add_task("", total=self._steps)
        return self._count

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _count(self, runner: SoakRunner) -> None:
        self._done += 1
        self._bar.update(self._task, completed=self._done, description=runner.leg.name)
        if self._console.is_terminal or time.monotonic() - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = time.monotonic()
        self._console.print(
            f"{runner.leg.name}: step {self._done:,} of {self._steps:,}", highlight=False
        )
