"""Many runs of the frontier: in parallel, resumable, each finished one a line of JSON.

A file of runs only grows. What stands in it is not run again, whatever changed in the code
since: after a change to the optimizer, begin a new file.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import torch
from frontier_lines import Outcome, append_line, read_lines
from frontier_tasks import build_task
from frontier_training import Run, RunSpec
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

__all__ = ["RunSpec", "read_lines", "run", "run_all"]


def run(spec: RunSpec) -> Outcome:
    """Trains once and returns the line that records it.

    Args:
        spec: What to run.

    Raises:
        ValueError: The specification is not possible.
        RuntimeError: A package is missing.
    """
    current = Run(spec)
    current.train()
    return current.line()


def run_all(
    specs: Sequence[RunSpec],
    path: Path,
    workers: int = 1,
    threads: int = 1,
    console: Console | None = None,
) -> int:
    """Runs what is not in the file yet, the longest first.

    One worker runs in this process, more in processes of their own. After Ctrl-C all that had
    finished stands in the file, and the same call goes on from there.

    Args:
        specs: What to run.
        path: The file; each finished run becomes a line.
        workers: Runs at a time.
        threads: Threads of each. One makes a run's bits independent of the machine's load.
        console: Where progress is shown.

    Returns:
        How many runs were added.

    Raises:
        ValueError: A specification is not possible. Nothing was run.
        RuntimeError: A package is missing, and nothing was run; or runs have failed, and all
            others are in the file.
    """
    for name, value in (("workers", workers), ("threads", threads)):
        if value < 1:
            raise ValueError(f"{name}={value!r}: must be an integer >= 1")
    known = {line["key"] for line in read_lines(path)}
    waiting = list({spec.key: spec for spec in specs if spec.key not in known}.values())
    waiting.sort(key=lambda spec: -spec.budget)
    for spec in waiting:
        spec.check()
    for task, options in {(s.task, json.dumps(s.task_options)) for s in waiting}:
        build_task(task, json.loads(options)).prepare()

    failures: list[str] = []
    outcomes = _in_this_process if workers == 1 else _in_processes
    with _progress(console or Console(stderr=True), waiting) as advance:
        for spec, outcome in outcomes(waiting, workers, threads):
            if isinstance(outcome, Exception):
                failures.append(f"{_title(spec)}: {type(outcome).__name__}: {outcome}")
            else:
                append_line(path, outcome)
            advance(spec, outcome)
    if failures:
        raise RuntimeError(
            f"{len(failures)} of {len(waiting)} runs failed, the others are in {path}:\n"
            + "\n".join(failures)
        )
    return len(waiting)


Finished = Iterator[tuple[RunSpec, Outcome | Exception]]


def _in_this_process(specs: Sequence[RunSpec], workers: int, threads: int) -> Finished:
    before = torch.get_num_threads()
    _use_threads(threads)
    try:
        for spec in specs:
            try:
                outcome: Outcome | Exception = run(spec)
            except Exception as error:  # one bad run must not end a night of them
                outcome = error
            yield spec, outcome
    finally:
        torch.set_num_threads(before)


def _in_processes(specs: Sequence[RunSpec], workers: int, threads: int) -> Finished:
    if not specs:
        return
    executor = ProcessPoolExecutor(
        min(workers, len(specs)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(threads,),
    )
    futures = {executor.submit(run, spec): spec for spec in specs}
    try:
        for future in as_completed(futures):
            error = future.exception()
            if error is not None and not isinstance(error, Exception):
                raise error
            yield futures[future], future.result() if error is None else error
        executor.shutdown()
    except BaseException:
        # Ctrl-C, or a reader that has had enough: what is under way is worth nothing.
        executor.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise


def _start_worker(threads: int) -> None:
    # The terminal sends Ctrl-C to every process; only the parent is to act on it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _use_threads(threads)


def _use_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    # What torch loads for the first gradient and the first step is not part of any run.
    layer = torch.nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    torch.optim.AdamW(layer.parameters(), fused=True).step()


class _TimeLeft(ProgressColumn):
    """Time so far, times what is left of the budgets, over what is done of them."""

    def render(self, task: Task) -> Text:
        """See `ProgressColumn.render`."""
        return Text(_time_left(task.elapsed or 0.0, task.completed, task.total or 0.0))


def _time_left(elapsed: float, done: float, total: float) -> str:
    if done <= 0:
        return "time left unknown"
    seconds = round(elapsed / done * (total - done))
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"


@contextmanager
def _progress(
    console: Console, specs: Iterable[RunSpec]
) -> Iterator[Callable[[RunSpec, Outcome | Exception], None]]:
    """Shows a bar in a terminal, and a line for each finished run elsewhere."""
    specs = list(specs)
    total, done, started = sum(spec.budget for spec in specs), 0, time.monotonic()
    bar = Progress(
        TextColumn("{task.fields[runs]} of " + f"{len(specs)} runs"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        _TimeLeft(),
        TextColumn("{task.description}"),
        console=console,
        disable=not console.is_terminal or not specs,
    )
    with bar:
        shown = bar.add_task("", total=total, runs=0)
        finished = 0

        def advance(spec: RunSpec, outcome: Outcome | Exception) -> None:
            nonlocal done, finished
            done, finished = done + spec.budget, finished + 1
            loss = "failed" if isinstance(outcome, Exception) else _loss(outcome["final"])
            text = f"{_title(spec)}: {loss}"
            bar.update(shown, completed=done, runs=finished, description=text)
            if not console.is_terminal:
                left = _time_left(time.monotonic() - started, done, total)
                console.print(
                    f"{finished} of {len(specs)} runs, {left}; {text}",
                    highlight=False,
                    soft_wrap=True,
                )

        yield advance


def _loss(final: float | None) -> str:
    return "diverged" if final is None else f"{final:.4g}"


def _title(spec: RunSpec) -> str:
    return f"{spec.task} {spec.optimizer} lr {spec.lr:g} budget {spec.budget} seed {spec.seed}"
