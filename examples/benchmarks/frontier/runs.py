"""Many runs of the frontier: in parallel, resumable, each finished one a line of JSON.

A file of runs only grows. What stands in it is not run again, whatever changed in the code
since: after a change to the optimizer, begin a new file.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from rich.console import Console

from frontier.tasks import build_task
from frontier.training import Run, RunSpec
from lib.progress import progress
from lib.run_store import Line, RunStore

Finished = Iterator[tuple[RunSpec, Line | Exception]]


def run(spec: RunSpec) -> Line:
    """Trains once and returns the line that records it."""
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
        console: Where progress is shown; standard error if None.

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
    store = RunStore(path)
    waiting = list({spec.key: spec for spec in specs if store.get(spec.key) is None}.values())
    waiting.sort(key=lambda spec: -spec.budget)
    for spec in waiting:
        spec.check()
    for task in {build_task(spec.task, spec.task_options) for spec in waiting}:
        task.prepare()

    failures: list[str] = []
    done, total = 0, sum(spec.budget for spec in waiting)
    outcomes = _in_this_process if workers == 1 else _in_processes
    console = console or Console(stderr=True)
    with progress(console, total, "gradient evaluations", seconds_between_lines=0) as report:
        for number, (spec, outcome) in enumerate(outcomes(waiting, workers, threads), 1):
            done += spec.budget
            title = (f"{spec.task} {spec.optimizer} lr {spec.lr:g} budget {spec.budget} "
                     f"seed {spec.seed}")  # fmt: skip
            if isinstance(outcome, Exception):
                failures.append(f"{title}: {type(outcome).__name__}: {outcome}")
                result = "failed"
            else:
                store.add(outcome)
                result = "diverged" if outcome["diverged"] else f"{outcome['final']:.4g}"
            report(done, f"{number} of {len(waiting)} runs; {title}: {result}")
    if failures:
        raise RuntimeError(
            f"{len(failures)} of {len(waiting)} runs failed, the others are in {path}:\n"
            + "\n".join(failures)
        )
    return len(waiting)


def _in_this_process(specs: Sequence[RunSpec], workers: int, threads: int) -> Finished:
    before = torch.get_num_threads()
    _use_threads(threads)
    try:
        for spec in specs:
            try:
                outcome: Line | Exception = run(spec)
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
