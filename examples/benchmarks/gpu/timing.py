"""Timers: the device's time by CUDA events, the host's by its clock, and contenders in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from gpu.context import Context

Run = Callable[[], object]
CYCLES_PER_SECOND = 2.2e9  # more than any GPU's clock: a pause lasts at least as asked for
LONGEST_PAUSE = 0.05
CACHES, UNKNOWN_CACHE = 2, 64 << 20  # second-level caches overwritten before a measurement
DROPPED = 2  # first rounds, which compile and make state
ENOUGH = 3  # rounds with which a measurement may end where time is up


class Clock:
    """Measures runs; on the CPU both times are the host's, for tests, and never reported."""

    def __init__(self, context: Context) -> None:
        self._context = context
        if context.on_gpu:
            properties = torch.cuda.get_device_properties(context.device)
            size = CACHES * (getattr(properties, "L2_cache_size", 0) or UNKNOWN_CACHE)
            self._cache = torch.empty(size, dtype=torch.uint8, device=context.device)

    def measure(self, run: Run, ahead: float = 0.0) -> tuple[float, float]:
        """Milliseconds of the device and of the host for one run.

        It begins with an idle device, and none of its data in the cache. The host gets ahead by so
        many seconds: or the events around a few short kernels measure how fast Python is.
        """
        if not self._context.on_gpu:
            started = time.perf_counter()
            run()
            elapsed = 1e3 * (time.perf_counter() - started)
            return elapsed, elapsed
        self._cache.zero_()
        torch.cuda.synchronize()
        pause = getattr(torch.cuda, "_sleep", None)  # what torch's own tests use
        if pause is not None and ahead > 0:
            pause(int(min(ahead, LONGEST_PAUSE) * CYCLES_PER_SECOND))
        start = mark()
        started = time.perf_counter()
        run()
        elapsed = 1e3 * (time.perf_counter() - started)
        stop = mark()
        torch.cuda.synchronize()
        return start.elapsed_time(stop), elapsed

    def in_turn(
        self, runs: Mapping[str, Run], rounds: int, prepare: Run = lambda: None
    ) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        """Measures all contenders round after round; `prepare` comes before each run, unmeasured.

        Returns:
            Milliseconds of the device by name, of each round: with the host ahead, and from an
            idle device.
        """
        ahead: dict[str, list[float]] = {name: [] for name in runs}
        alone: dict[str, list[float]] = {name: [] for name in runs}
        for number, name in turns(list(runs), rounds, self._context):
            prepare()
            idle, host = self.measure(runs[name])
            if number >= 0:
                prepare()
                ahead[name].append(self.measure(runs[name], 2e-3 * host)[0])
                alone[name].append(idle)
        return ahead, alone


def turns(names: Sequence[str], rounds: int, context: Context) -> Iterator[tuple[int, str]]:
    """Yields the number of the round, negative for those that compile, and whose turn it is.

    Each round begins with another, and a machine that slows down slows all of them; ratios are of
    the same round. On the CPU there is one round.
    """
    for number in range(-DROPPED, rounds) if context.on_gpu else (0,):
        if number < ENOUGH:
            context.check_time()
        elif time.monotonic() > context.deadline:
            return
        for index in range(len(names)):
            yield number, names[(number + index) % len(names)]


def mark() -> torch.cuda.Event:
    """A point in the device's time."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, 20th and 80th percentile, and how many."""
    median, low, high = (float(x) for x in np.quantile(values, (0.5, 0.2, 0.8)))
    return {"median": median, "p20": low, "p80": high, "samples": len(values)}


def ratios(left: Sequence[float], right: Sequence[float]) -> dict[str, Any]:
    """The ratios of the same rounds, summarised."""
    return spread([a / b for a, b in zip(left, right, strict=True)])
