"""What a section gets: where it runs, until when, and how it tells what it finds."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FP32 = torch.float32


class OutOfTimeError(Exception):
    """The section has used up its share of the time budget."""


@dataclass
class Context:
    """Where a section runs, and whom it tells.

    On the CPU, for tests, sizes are those for the interpreter, and times are the host's and never
    reported. `tell` takes a kind (``row``, ``check``, ``skip`` or ``fact``) and its content, at
    once: it outlives a section that hangs or crashes later.
    """

    device: torch.device
    tell: Callable[[str, dict[str, Any]], None]
    seed: int = 0
    deadline: float = math.inf  # in `time.monotonic` seconds
    folder: Path = Path()  # for what is kept beside the results
    cooperative: bool = True  # or `gpu.fallback` is in force, in processes of its own, too

    @property
    def on_gpu(self) -> bool:
        """Whether there is a device apart from the host."""
        return self.device.type == "cuda"

    def check_time(self) -> None:
        """Ends the section by an OutOfTimeError where its time is up."""
        if self.left < 0:
            raise OutOfTimeError

    @property
    def left(self) -> float:
        """Seconds until then."""
        return self.deadline - time.monotonic()

    def row(self, **cells: Any) -> None:
        """Tells a line of a table; lines with the same cells make one."""
        self.tell("row", cells)

    def check(
        self,
        name: str, passed: bool, value: float | None = None, limit: float | None = None,
        detail: str = "",
    ) -> None:  # fmt: skip
        """Tells whether something holds, and what was measured and allowed."""
        found = {"name": name, "passed": bool(passed), "value": value, "limit": limit}
        self.tell("check", {**found, "detail": detail})

    def skip(self, what: str, reason: str) -> None:
        """Tells what is left out."""
        self.tell("skip", {"what": what, "reason": reason})

    def has_room(self, what: str, needed: int) -> bool:
        """Whether so many bytes are free, else tells what is left out; ends a section in time."""
        self.check_time()
        self.release_memory()
        if not self.on_gpu:
            return True
        free, _ = torch.cuda.mem_get_info(self.device)
        if needed > 0.9 * free:
            self.skip(what, f"needs {needed >> 20} MiB of device memory, {free >> 20} are free")
        return needed <= 0.9 * free

    def release_memory(self) -> None:
        """Gives unused device memory back to the device."""
        if self.on_gpu:
            gc.collect()
            torch.cuda.empty_cache()

    def synchronise(self) -> None:
        """Waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def normal(
        self, shapes: Sequence[Any], size: float, offset: int = 0, dtype: torch.dtype = FP32
    ) -> list[Tensor]:
        """Random tensors on the device, always the same for the seed and an offset."""
        generator = torch.Generator(self.device).manual_seed(self.seed + offset)
        made: dict[str, Any] = {"generator": generator, "device": self.device}
        return [torch.randn(shape, **made).mul_(size).to(dtype) for shape in shapes]


def parameters(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[nn.Parameter]:
    """Parameters in the memory of weights, with these gradients."""
    params = [nn.Parameter(weight) for weight in weights]
    for param, gradient in zip(params, gradients):
        param.grad = gradient
    return params


def different(left: Sequence[Tensor], right: Sequence[Tensor]) -> int:
    """How many tensors differ in any bit; NaN equals itself."""
    bits = [[t.detach().flatten().view(torch.uint8) for t in side] for side in (left, right)]
    return sum(not torch.equal(a, b) for a, b in zip(*bits, strict=True))
