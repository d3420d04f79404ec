"""Timers: the device's time by CUDA events, the host's by its clock, never one for the other."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from suite_records import Timing

CYCLES_PER_SECOND = 2.2e9
"""More than any GPU's clock, so that a pause lasts at least as long as asked for."""
LONGEST_PAUSE = 0.05


def occupy(seconds: float) -> None:
    """Keeps the device busy so that the host gets ahead of it.

    Without it the events around a few short kernels would measure how fast Python launches
    them. `torch.cuda._sleep` is what torch's own tests use; without it, only short regions
    are measured too long.
    """
    pause = getattr(torch.cuda, "_sleep", None)
    if pause is not None and seconds > 0:
        pause(int(min(seconds, LONGEST_PAUSE) * CYCLES_PER_SECOND))


def host_milliseconds(run: Callable[[int], object], repeats: int, first: int = 0) -> list[float]:
    """How long the host is inside ``run``, each time beginning with an idle device.

    Args:
        run: Gets the number of the call, to take another buffer each time.
        repeats: How often.
        first: Number of the first call.
    """
    samples = []
    for number in range(first, first + repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run(number)
        samples.append(1e3 * (time.perf_counter() - started))
    torch.cuda.synchronize()
    return samples


def device_timing(run: Callable[[int], object], repeats: int, warmup: int = 3) -> Timing:
    """How long the device works on ``run``, which must not wait for it.

    Args:
        run: Gets the number of the call, to take another buffer each time.
        repeats: How often it is measured.
        warmup: Calls before that: compilation, and the host's own time.
    """
    for number in range(warmup):
        run(number)
    head_start = 2e-3 * sorted(host_milliseconds(run, 3, warmup))[1]
    pairs = []
    for number in range(warmup + 3, warmup + 3 + repeats):
        start, stop = new_event(), new_event()
        occupy(head_start)
        start.record()
        run(number)
        stop.record()
        pairs.append((start, stop))
    torch.cuda.synchronize()
    return Timing.of([start.elapsed_time(stop) for start, stop in pairs])


def new_event() -> torch.cuda.Event:
    """An event that can be timed."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
