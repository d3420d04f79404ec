"""HybridOptimizer behind the wrappers of others."""

from __future__ import annotations

from typing import Any

from triton_hybrid.optimizer import HybridOptimizer


def find(optimizer: Any) -> HybridOptimizer | None:
    """The HybridOptimizer behind ``.optimizer`` and ``.optim`` of wrappers, or None.

    Looks to the end even where a wrapper calls itself one, as Fabric's and Lightning's do.
    """
    found = None
    for _ in range(10):
        if isinstance(optimizer, HybridOptimizer):
            found = optimizer
        inner = getattr(optimizer, "optimizer", None)
        optimizer = getattr(optimizer, "optim", None) if inner is None else inner
        if optimizer is None:
            break
    return found
