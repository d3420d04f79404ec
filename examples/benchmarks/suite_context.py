"""What the sections of the GPU suite share while they run."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from suite_records import Check, SectionResult, Skip

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ANY = "any"
"""Stands for the dtype where a kernel has none."""


class OutOfTimeError(Exception):
    """The section has used up its share of the time budget."""


@dataclass
class Context:
    """How the suite runs, and what earlier sections found out.

    Attributes:
        device: Where everything runs.
        seed: What the random data is drawn from.
        dtypes: Which are checked.
        tiny: Whether to use sizes for Triton's interpreter instead of a GPU.
        cooperative: Whether the launch with the grid barrier can be trusted.
        deadline: When the present section must end, in `time.monotonic` seconds.
        verified: For each kernel and dtype, whether all its checks held.
    """

    device: torch.device
    seed: int = 0
    dtypes: tuple[str, ...] = tuple(DTYPES)
    tiny: bool = False
    cooperative: bool = True
    deadline: float = math.inf
    verified: dict[tuple[str, str], bool] = field(default_factory=dict)

    def check_time(self) -> None:
        """Ends the section where its time is up.

        Raises:
            OutOfTimeError: It is.
        """
        if time.monotonic() > self.deadline:
            raise OutOfTimeError

    def note(self, result: SectionResult, check: Check) -> None:
        """Keeps a check, and what it says about its kernel."""
        result.checks.append(check)
        if check.kernel:
            key = (check.kernel, check.dtype)
            self.verified[key] = self.verified.get(key, True) and check.passed

    def refusal(self, kernels: Iterable[str], dtype: str) -> str | None:
        """Why no speed may be told of something that uses these kernels; None if it may."""
        for kernel in kernels:
            known = self.verified.get((kernel, dtype), self.verified.get((kernel, ANY)))
            if known is None:
                return f"the correctness of {kernel} was not checked"
            if not known:
                return f"a correctness check of {kernel} failed"
        return None

    def refuses(self, result: SectionResult, what: str, kernels: Iterable[str], dtype: str) -> bool:
        """Whether a speed must not be told; says so in the result."""
        reason = self.refusal(kernels, dtype)
        if reason is not None:
            result.skipped.append(Skip(what, reason))
        return reason is not None

    def has_room(self, result: SectionResult, what: str, needed: int) -> bool:
        """Whether so many bytes of device memory are free; says so in the result if not."""
        release_memory()
        if self.device.type != "cuda":
            return True
        free, _ = torch.cuda.mem_get_info(self.device)
        if needed <= 0.9 * free:
            return True
        reason = f"needs {needed / 2**30:.0f} GiB of device memory, {free / 2**30:.0f} are free"
        result.skipped.append(Skip(what, reason))
        return False


def release_memory() -> None:
    """Gives unused device memory back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
