"""The gradient noise scale, measured without keeping a gradient.

The sum S_k of the gradients of k micro-batches has E|S_k|² = k · tr Σ + k² · |G|², where G is the
mean gradient and Σ the covariance of one micro-batch's. So squared norms of the running sum, for
two or more k, are enough (McCandlish et al., arXiv 1812.06162, appendix A, with two batch sizes).
The *noise scale* tr Σ / |G|², here in micro-batches, says of how many of them the mean is as long
as its noise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MEMORY_SHARE, LONGEST_MEMORY = 0.25, 100.0
"""The noise scale remembers a quarter of the windows measured so far, and this many at most."""
SCALE_MEMORY = 0.9
SCALE_JUMP = 2.0
"""Windows are measured relative to the squared norm of those before them, which does not favour
chance; of one that is this many times larger or smaller, relative to its own."""


@dataclass
class NoiseScale:
    """tr Σ and |G|² by least squares, from squared norms of sums of micro-batch gradients.

    Without a mean gradient the steps D_k = |S_k|² - |S_{k-1}|² are uncorrelated and have variances
    2 (2k - 1) tr Σ², and E D_k = tr Σ + (2k - 1) |G|². So the best linear unbiased estimate
    weights D_k by 1 / (2k - 1). The sums of its normal equations are kept from window to window.
    """

    noise_noise: float = 0.0
    noise_signal: float = 0.0
    signal_signal: float = 0.0
    noise_seen: float = 0.0
    signal_seen: float = 0.0
    scale: float = 0.0  # |S_K|² / K of the windows before, to compare windows by
    windows: float = 0.0  # that were measured

    def take(self, squares: Sequence[float], apart: Sequence[int] | None = None) -> None:
        """Takes a window in, unless something in it is not finite.

        Args:
            squares: |S_k|² for k = 1, 2, ...; their mean, where every rank has an S_k of its own.
            apart: For each k, how many ranks have one of their own (DistributedDataParallel inside
                ``no_sync``); 1 where S_k is the mean of all ranks. None: everywhere 1.
        """
        if len(squares) < 2 or not all(0 < x < math.inf for x in squares):
            return
        own = squares[-1] / len(squares)
        if not own / SCALE_JUMP <= self.scale <= own * SCALE_JUMP:
            self.scale = own
        self.windows += 1.0
        memory = min(1.0 + MEMORY_SHARE * (self.windows - 1.0), LONGEST_MEMORY)
        sums = [(1.0 - 1.0 / memory) * x for x in dataclasses.astuple(self)[:5]]
        last, before = 0.0, 0
        for k, (square, ranks) in enumerate(zip(squares, apart or [1] * len(squares)), 1):
            # The step from a sum of one's own to the mean of all ranks is no D_k.
            steps = ranks == before or k == 1
            noise, signal = (1.0, 2.0 * k - 1.0) if steps else (float(k), float(k * k))
            noise *= ranks
            seen = (square - last if steps else square) / self.scale
            terms = (noise * noise, noise * signal, signal * signal, noise * seen, signal * seen)
            sums = [x + term / signal for x, term in zip(sums, terms)]
            last, before = square, ranks
        (self.noise_noise, self.noise_signal, self.signal_signal,
         self.noise_seen, self.signal_seen) = sums  # fmt: skip
        self.scale = SCALE_MEMORY * self.scale + (1.0 - SCALE_MEMORY) * own

    @property
    def micro_batches(self) -> float:
        """Tr Σ / |G|²: the noise scale in micro-batches.

        Infinite where no signal is seen; NaN before the first window of two or more.
        """
        if not self.scale:
            return math.nan
        noise = self.signal_signal * self.noise_seen - self.noise_signal * self.signal_seen
        signal = self.noise_noise * self.signal_seen - self.noise_signal * self.noise_seen
        return max(noise, 0.0) / signal if signal > 0 else math.inf


@torch.no_grad()
def squared_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Squared norm of all gradients together, 0-dim FP64, each of them read once."""
    alike: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        if gradient.numel():
            alike.setdefault(gradient.dtype, []).append(gradient)
    total = torch.zeros((), dtype=torch.float64, device=gradients[0].device)
    for dtype, its in alike.items():
        wide = dtype if dtype == torch.float64 else torch.float32
        total += torch.stack(torch._foreach_norm(its, 2, wide)).double().square().sum()
    return total
