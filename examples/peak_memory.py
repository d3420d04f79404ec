"""How much memory a run takes at most."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import psutil  # type: ignore[import-untyped]
import torch

SAMPLE_SECONDS = 0.02


class PeakMemory:
    """Watches the most memory in use: of the GPU, or of the whole process on a CPU."""

    def __init__(self, device: torch.device) -> None:
        """Prepares to watch.

        Args:
            device: Whose memory.
        """
        self._device = device
        self._process = psutil.Process()
        self._watching = threading.Event()
        self._stop = threading.Event()
        self.peak = 0

    def used(self) -> int:
        """Returns the bytes in use now."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        return int(self._process.memory_info().rss)

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Watches for as long as the context lasts; several contexts share one peak."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._watching.set()
        try:
            yield
        finally:
            self._watching.clear()
            if self._device.type == "cuda":
                self.peak = max(self.peak, torch.cuda.max_memory_allocated(self._device))
            else:
                self.peak = max(self.peak, self.used())

    @contextlib.contextmanager
    def sampler(self) -> Iterator[None]:
        """Runs the thread that a CPU's peak needs: a process has no counter to reset."""
        if self._device.type == "cuda":
            yield
            return
        thread = threading.Thread(target=self._sample, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            if self._watching.is_set():
                self.peak = max(self.peak, self.used())
