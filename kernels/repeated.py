"""Launches that are prepared once, and made again while all that was said of them holds.

To look up what a launch takes costs Python more than to launch: 20 arguments, of which from step to
step nothing changes but what lies in memory.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from triton_hybrid.kernels.launch import Launch, on_device, start

MOST_KEPT = 128
"""Of the launches of one device: a limit that grows with each prediction is an argument, too."""


def repeated(prepare: Callable[..., Sequence[Launch]]) -> Callable[..., None]:
    """A launcher that makes what ``prepare`` lists, and asks it once for the same arguments.

    Args:
        prepare: Takes ``tensors`` (one set) or ``sets``, then ``scalars``, or these alone, and then
            hashable arguments; a tensor among them counts as itself, whatever it holds. It launches
            nothing itself.
    """
    first = next(iter(inspect.signature(prepare).parameters))

    def for_one(tensors: Any, scalars: Any, *told: Any, **named: Any) -> None:
        tensors.tables()  # brings what has moved to the device
        key = (prepare, tensors, told, *named, *named.values())
        known = scalars.launches.get(key)
        if known is None or known[0] is not tensors.stamp:
            _begin(scalars, key, tensors.stamp, prepare(tensors, scalars, *told, **named))
            return
        for again in known[1]:
            again()

    def for_several(sets: Any, scalars: Any, *told: Any, **named: Any) -> None:
        stamps = []
        for tensors in sets:
            tensors.tables()
            stamps.append(tensors.stamp)
        key = (prepare, *sets, told, *named, *named.values())
        known = scalars.launches.get(key)
        if known is None or known[0] != stamps:
            _begin(scalars, key, stamps, prepare(sets, scalars, *told, **named))
            return
        for again in known[1]:
            again()

    def for_none(scalars: Any, *told: Any, **named: Any) -> None:
        key = (prepare, told, *named, *named.values())
        known = scalars.launches.get(key)
        if known is None:
            _begin(scalars, key, None, prepare(scalars, *told, **named))
            return
        for again in known[1]:
            again()

    by_first: dict[str, Callable[..., None]] = {
        "tensors": for_one,
        "sets": for_several,
        "scalars": for_none,
    }
    launcher: Callable[..., None] = functools.wraps(prepare)(by_first[first])
    return launcher


def _begin(scalars: Any, key: Any, stamp: Any, launches: Sequence[Launch]) -> None:
    """Makes launches for the first time, and keeps what makes them again."""
    start(launches, scalars.device)
    again: list[Callable[[], Any]] = [launch.again for launch in launches]
    if scalars.device.type == "cuda":
        again = [functools.partial(_on_device, scalars.device, again)]
    if len(scalars.launches) >= MOST_KEPT:
        scalars.launches.clear()
    scalars.launches[key] = stamp, again


def _on_device(device: torch.device, launches: Sequence[Callable[[], Any]]) -> None:
    with on_device(device):
        for again in launches:
            again()
