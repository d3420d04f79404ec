"""Shows how far a long job is: a bar in a terminal, now and then a line elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

SECONDS_BETWEEN_DRAWINGS = 0.1


@contextmanager
def progress(
    console: Console, total: int, unit: str, seconds_between_lines: float = 30.0
) -> Iterator[Callable[[int, str], None]]:
    """Shows how far a job is, and how long it will still take.

    Args:
        console: Where; what it prints is flushed at once.
        total: How much there is to do.
        unit: What that is a number of, such as "steps".
        seconds_between_lines: Least time from one line to the next, where there is no terminal.

    Yields:
        What to call as ``report(done, text)``; `text` says what is going on.
    """
    started, last = time.monotonic(), -math.inf  # what is done first is shown at once
    pause = SECONDS_BETWEEN_DRAWINGS if console.is_terminal else seconds_between_lines
    # Drawn between steps and never beside one: a thread of its own would slow what is timed.
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"))
    bar = Progress(*columns, console=console, auto_refresh=False, disable=not console.is_terminal)
    shown = bar.add_task("", total=total, state="")

    def report(done: int, text: str) -> None:
        nonlocal last
        now = time.monotonic()
        if done < total and now - last < pause:
            return
        last = now
        left = timedelta(seconds=round((now - started) * (total - done) / max(done, 1)))
        state = f"{done:,} of {total:,} {unit}, {left} left"
        bar.update(shown, completed=done, description=text, state=state, refresh=True)
        if not console.is_terminal:
            console.print(f"{text}: {state}", highlight=False, markup=False, soft_wrap=True)

    with bar:
        yield report
