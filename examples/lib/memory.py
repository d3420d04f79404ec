"""Memory of a training run: what the process does with what it frees, and how much a run takes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
from collections.abc import Iterator

import psutil  # type: ignore[import-untyped]
import torch

# glibc's names in malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
GROWTH_BYTES = 1 << 28
SAMPLE_SECONDS = 0.02


def keep_freed_memory(device: torch.device) -> bool:
    """Lets the process keep what it frees, instead of giving it back to the system.

    Gradients and activations are freed in every step. Given back, each step faults their pages in
    again: GPT-2 small in FP32 on 2 cores, 4 x 64 tokens, had 200,000 page faults a step, which
    made forward and backward pass 1.2 to 2.0 s long; without them it is 1.02 s, with a spread of
    0.01 s. Every configuration runs like this.

    Returns:
        Whether the C library was told to; only glibc can be, and only for a model on the CPU.
    """
    if device.type != "cpu":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
        settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_TOP_PAD: GROWTH_BYTES}
        return all([mallopt(*setting) == 1 for setting in settings.items()])
    except (OSError, AttributeError, TypeError):
        return False


def release_memory() -> None:
    """Gives what the last run freed back, so that the next starts where it did."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    # What the C library keeps would count as the next run's; only glibc has this.
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
    """Watches the most memory in use: of the GPU, or of the whole process on a CPU.

    Attributes:
        peak: The most seen so far, in bytes.
        last: Of the last `watch`, in bytes: a GPU's peak in it, or what a process had at its end.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._process = device, psutil.Process()
        self._watching, self._stop = threading.Event(), threading.Event()
        self.peak = self.last = 0

    def used(self) -> int:
        """Returns the bytes in use now."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        return int(self._process.memory_info().rss)

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Watches for as long as the context lasts; several contexts share one peak."""
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._watching.set()
        try:
            yield
        finally:
            self._watching.clear()
            self.last = torch.cuda.max_memory_allocated(self._device) if on_gpu else self.used()
            self.peak = max(self.peak, self.last)

    @contextlib.contextmanager
    def sampler(self) -> Iterator[None]:
        """Runs the thread that a CPU's peak needs: a process has no counter to reset."""
        if self._device.type == "cuda":
            yield
            return

        def sample() -> None:
            while not self._stop.wait(SAMPLE_SECONDS):
                if self._watching.is_set():
                    self.peak = max(self.peak, self.used())

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
