"""A PyTorch optimizer that needs fewer backward passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# In a source checkout the kernels lie beside this package instead of in it (their plain
# name belongs to another project on PyPI); an installed package has them inside.
_CHECKOUT = Path(__file__).resolve().parent.parent
if (_CHECKOUT / "kernels" / "multi_tensor.py").is_file():
    __path__.append(str(_CHECKOUT))

from triton_hybrid.accumulation import AccumulationConfig
from triton_hybrid.config import HybridConfig
from triton_hybrid.groups import split_param_groups
from triton_hybrid.optimizer import HybridOptimizer
from triton_hybrid.phases import Phase
from triton_hybrid.shards import reshard
from triton_hybrid.stats import HybridStats
from triton_hybrid.wrapped import find

__all__ = [
    "AccumulationConfig",
    "HybridConfig",
    "HybridOptimizer",
    "HybridStats",
    "Phase",
    "needs_backward",
    "reshard",
    "split_param_groups",
]

__version__ = "0.1.0"


def needs_backward(optimizer: Any) -> bool:
    """Whether the next `step()` of an optimizer reads gradients.

    For loops that hold a wrapper: looks through ``.optimizer`` (accelerate, Lightning) and
    ``.optim`` (ZeroRedundancyOptimizer) down to a HybridOptimizer. True for every other optimizer.
    """
    found = find(optimizer)
    return found is None or found.needs_backward
