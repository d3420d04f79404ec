"""Are tensors still of the kind that was looked at before?

Dtype, device, shape and strides of a tensor cost 0.3 µs to read one by one from Python. Torch's
compiler guards its code by the same comparison, for all tensors in one call (0.05 µs each).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

try:
    from torch._C._dynamo.guards import TensorGuards as _Guards  # torch names it in no manual
except ImportError:
    _Guards = None  # type: ignore[assignment,misc]


def likeness(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """A function of as many tensors: whether each is like the one that it was made of.

    That is in type, dtype, layout, device, shape, strides, and in requiring a gradient. False may
    be wrong (inside autocast or inference mode, if it was made outside), True never is.
    """
    if _Guards is not None:
        # No dimension is dynamic: sizes and strides must be those of these tensors.
        guards = _Guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        check: Callable[..., bool] = guards.check
        return check
    known = [*map(_kind, tensors)]
    return lambda *others: [*map(_kind, others)] == known


def _kind(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    kind = (type(tensor), tensor.dtype, tensor.layout, tensor.device, tensor.requires_grad)
    return (*kind, tensor.shape, tensor.stride() if tensor.layout is torch.strided else None)
