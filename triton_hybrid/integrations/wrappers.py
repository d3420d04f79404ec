"""HybridOptimizer behind the wrappers of accelerate, Fabric, Lightning and others."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from triton_hybrid import HybridOptimizer, HybridStats, Phase, needs_backward
from triton_hybrid.wrapped import find

__all__ = [
    "clip_inside",
    "find",
    "needs_backward",
    "observe_loss",
    "phase",
    "stats",
    "unwrap",
    "verified_weights",
]


def unwrap(optimizer: Any) -> HybridOptimizer:
    """As `find`, where there must be one.

    Raises:
        TypeError: There is none.
    """
    found = find(optimizer)
    if found is None:
        raise TypeError(
            f"optimizer={type(optimizer).__name__}: must be a HybridOptimizer, or a wrapper with "
            "one behind .optimizer or .optim"
        )
    return found


def phase(optimizer: Any) -> Phase:
    """The phase of the next `step()` behind a wrapper."""
    return unwrap(optimizer).phase


def stats(optimizer: Any) -> HybridStats:
    """`HybridOptimizer.stats` behind a wrapper. Waits for the device."""
    return unwrap(optimizer).stats()


def observe_loss(optimizer: Any, loss: Tensor | float) -> None:
    """`HybridOptimizer.observe_loss` behind a wrapper; other optimizers hear nothing of it."""
    found = find(optimizer)
    if found is not None:
        found.observe_loss(loss)


def verified_weights(optimizer: Any) -> AbstractContextManager[None]:
    """`HybridOptimizer.verified_weights` behind a wrapper."""
    return unwrap(optimizer).verified_weights()


def clip_inside(optimizer: Any, max_grad_norm: float | None) -> None:
    """Lets the step itself clip by the global norm, so that it sees the norm that was clipped.

    A limit that the optimizer was made with stays; one that was set here gives way to the next.

    Args:
        optimizer: A HybridOptimizer, or a wrapper of one.
        max_grad_norm: The limit; None or 0 for none.

    Raises:
        ValueError: A limit that is negative or not finite.
    """
    binding = unwrap(optimizer)._binding
    before, limit = binding.settings.max_grad_norm, max_grad_norm or None
    if (before is None or binding.clipped_outside) and before != limit:
        settings = dataclasses.replace(binding.settings, max_grad_norm=limit)
        binding.unbind()
        binding.settings, binding.clipped_outside = settings, True
