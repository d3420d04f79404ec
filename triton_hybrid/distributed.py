"""Deciding together: what the ranks of data-parallel training must agree on.

Gradients and weights are the same on every rank of `DistributedDataParallel`, and so is what
follows from them. The loss that a rank observes is not, and what others write to its weights need
not be: these two are reduced, at every gradient step, in one small sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from triton_hybrid.kernels.ledger import INDEX

_MODULUS = 1 << 20
"""Signatures are smaller, so that FP64 holds the sum of their squares over 2^13 ranks exactly."""


class Ranks:
    """The ranks that decide together.

    Args:
        group: Their process group; None is the default group, where one is initialised.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self._introduced = False

    @property
    def together(self) -> bool:
        """Whether there is more than this rank."""
        ready = dist.is_available() and dist.is_initialized()
        return ready and dist.get_world_size(self._group) > 1

    def pooled(self, values: Tensor) -> tuple[Tensor, int]:
        """Means over the ranks, and how many ranks there are.

        Args:
            values: FP64 ``[n]``, on every rank.

        Returns:
            FP64 ``[2, n]``, of the values and of their squares: where all ranks have the same
            value, and only there, the second is the square of the first.
        """
        sums = torch.stack([values, values * values])
        if not self.together:
            return sums, 1
        dist.all_reduce(sums, group=self._group)
        ranks = dist.get_world_size(self._group)
        return sums / ranks, ranks

    def agree(self, ledger: Tensor, fingerprints: Callable[[], Tensor], decides: bool) -> None:
        """Averages the observed losses, and lets everybody know what anybody's weights suffered.

        Args:
            ledger: FP64, changed in place.
            fingerprints: Of all parameters; in the first step they must be the same everywhere.
            decides: Whether anything is ever decided by the ledger. If not, only the first step
                waits for the others.

        Raises:
            NotImplementedError: In the first step, if the ranks hold different parameters.
        """
        first, self._introduced = not self._introduced, True
        if not (first or decides):
            return
        loss, written = ledger[INDEX["loss"]], ledger[INDEX["written"]]
        seen = ~loss.isnan()
        signature = torch.zeros_like(loss)
        if first:
            found = fingerprints()
            signature = (found.double().sum() + len(found)) % _MODULUS
        known = torch.where(seen, loss, torch.zeros_like(loss))
        sums = torch.stack([known, seen.double(), written, signature, signature * signature])
        dist.all_reduce(sums, group=self._group)
        if first and float(sums[4]) * dist.get_world_size(self._group) != float(sums[3]) ** 2:
            raise NotImplementedError(
                "the ranks hold different parameters (FSDP, ZeroRedundancyOptimizer, pipelines): "
                "norms and decisions would be those of a shard, which is not built yet. Use "
                "DistributedDataParallel, or, where every rank trains a model of its own, "
                "process_group=torch.distributed.new_group([rank], use_local_synchronization=True)"
            )
        loss.copy_(torch.where(sums[1] > 0, sums[0] / sums[1], torch.nan))
        written.copy_(sums[2].clamp(max=1.0))


def check_process_group(group: Any) -> None:
    """Refuses what is no process group with a ValueError."""
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise ValueError(
            f"process_group={group!r}: must be a torch.distributed.ProcessGroup or None"
        )
