"""The rows of state: their kinds, where they are at home, and which step touches them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from triton_hybrid.kernels.chunks import TensorSet

HOST, DEVICE, SCRATCH = "host", "device", "scratch"
"""Homes of a row; scratch has none, and is lost when it leaves the device."""

MOMENTS, SLOW_EMA, WEIGHT_EMA = "moments", "slow_ema", "weight_ema"
SNAPSHOT, HISTORY, DIRECTION = "snapshot", "history", "direction"
HOST_KINDS = (SLOW_EMA, WEIGHT_EMA, SNAPSHOT, HISTORY)


def kind_of(row: str) -> str | None:
    """The kind of a row of state; None for a row that never moves."""
    if row in ("exp_avg", "exp_avg_sq"):
        return MOMENTS
    kind = HISTORY if row.startswith("history_") else row
    return kind if kind in (*HOST_KINDS, DIRECTION) else None


def home_of(row: str) -> str:
    """``HOST``, ``DEVICE`` or ``SCRATCH``, for a row that moves."""
    kind = kind_of(row)
    return SCRATCH if kind == DIRECTION else DEVICE if kind == MOMENTS else HOST


def lives_on_host(row: str) -> bool:
    """Whether state of this name is at home in host memory when state is offloaded."""
    return kind_of(row) in HOST_KINDS


def touched_by_gradient(
    young: bool, measured: bool, edge: bool, trajectory: bool
) -> frozenset[str]:
    """Kinds that a Warmup, Full or Correct step reads or writes.

    Args:
        young: Whether the weight EMA is kept up to date.
        measured: Whether update and slow direction are compared.
        edge: Whether a stretch of predictions ends or may begin.
        trajectory: Whether the model's basis is made of cycle displacements.
    """
    wanted = {
        MOMENTS: True,
        SLOW_EMA: True,
        WEIGHT_EMA: young,
        DIRECTION: measured or edge,
        SNAPSHOT: edge,
        HISTORY: edge and trajectory,
    }
    return frozenset(kind for kind, here in wanted.items() if here)


def touched_by_prediction(young: bool, first: bool, trajectory: bool) -> frozenset[str]:
    """Kinds that a Predict step of the stepped drive reads or writes.

    Args:
        young: Whether the prediction pulls to the weight EMA.
        first: Whether it is the first in a row; a trajectory measures its slope there.
        trajectory: Whether the model's basis is made of cycle displacements.
    """
    wanted = {
        SNAPSHOT: True,
        HISTORY: trajectory,
        MOMENTS: first or not trajectory,
        SLOW_EMA: not trajectory,
        DIRECTION: not trajectory,
        WEIGHT_EMA: young and not trajectory,
    }
    return frozenset(kind for kind, here in wanted.items() if here)


class Row:
    """One role of one tensor set, and where its memory is.

    Args:
        name: Its name in the tensor set, and its key in the optimizer's state.
        tensors: The tensor set.
        params: Its parameters.
        memory: Its tensors, at home; of scratch only the dtype is used.

    Attributes:
        host: The tensors in host memory, views of one buffer; None where it is never there.
        here: The tensors on the device; None while they are away.
    """

    def __init__(
        self, name: str, tensors: TensorSet, params: Sequence[Tensor], memory: list[Tensor]
    ) -> None:
        kind = kind_of(name)
        assert kind is not None
        self.name, self.kind, self.home = name, kind, home_of(name)
        self.tensors, self.params = tensors, params
        self.dtype = memory[0].dtype
        self.host = memory if self.home == HOST else None
        self.here = memory if self.home == DEVICE else None


def buffer_like(
    params: Sequence[Tensor], dtype: torch.dtype, device: torch.device, pinned: bool = False
) -> list[Tensor]:
    """One tensor for each parameter, in its shape and memory order, all views of one buffer.

    Copied as a whole, a row of state is one transfer instead of one for each tensor.

    Args:
        params: The parameters.
        dtype: Of the buffer; it is not initialised.
        device: Where it lies.
        pinned: Whether it is page-locked host memory; only where there is a GPU.
    """
    # 16-byte vectors, whatever the dtype.
    sizes = [-(-param.numel() // 8) * 8 for param in params]
    lock = pinned and device.type == "cpu" and torch.cuda.is_available()
    buffer = torch.empty(sum(sizes), dtype=dtype, device=device, pin_memory=lock)
    views, begin = [], 0
    for param, size in zip(params, sizes):
        stride = torch.empty_like(param, device="meta").stride()
        views.append(buffer.as_strided(param.shape, stride, begin))
        begin += size
    return views
