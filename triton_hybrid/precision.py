"""FP32 masters behind 16-bit parameters, and the scale of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from triton_hybrid.kernels.ledger import FIRST_SCALE
from triton_hybrid.kernels.multi_tensor import assembled, remainder_of
from triton_hybrid.kernels.rows import NONE, OWN, SPLIT

SIXTEEN_BIT = (torch.float16, torch.bfloat16)


def state_dtype(param: Tensor) -> torch.dtype:
    """The dtype of moments and masters: FP32, or FP64 for FP64 parameters."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def kept_as(value: str, dtype: torch.dtype) -> int:
    """How the kernels find the weights of parameters of a dtype."""
    if dtype not in SIXTEEN_BIT or value == "auto":
        return OWN
    return SPLIT if value == "split" else NONE


@torch.no_grad()
def loaded_remainder(param: Tensor, entry: Mapping[str, Any]) -> Tensor:
    """The remainder of a parameter: from a checkpoint with remainders or masters, or zero.

    A master whose rounded value is not the parameter belongs to other weights.
    """
    fresh = torch.zeros_like(param, dtype=torch.int16, memory_format=torch.preserve_format)
    master, remainder = entry.get("master"), entry.get("remainder")
    if isinstance(remainder, Tensor) and remainder.shape == param.shape:
        fresh.copy_(remainder)
    elif isinstance(master, Tensor) and master.shape == param.shape:
        placed = torch.empty_like(param, dtype=torch.float32).copy_(master)
        belongs = placed.to(param.dtype) == param
        fresh.copy_(torch.where(belongs, remainder_of(placed, param.detach()), fresh))
    return fresh


@torch.no_grad()
def loaded_master(param: Tensor, entry: Mapping[str, Any]) -> Tensor:
    """The FP32 master of a parameter, which rounded gives the parameter back.

    From a checkpoint with masters or remainders, where its elements round to the parameter's.
    """
    fresh = param.detach().to(dtype=torch.float32, copy=True, memory_format=torch.preserve_format)
    master, remainder = entry.get("master"), entry.get("remainder")
    if isinstance(master, Tensor) and master.shape == param.shape:
        fresh.copy_(master)
        adopt_parameter(param, fresh)
    elif isinstance(remainder, Tensor) and remainder.shape == param.shape:
        placed = torch.empty_like(param, dtype=torch.int16).copy_(remainder)
        fresh.copy_(assembled(param.detach(), placed))
        adopt_parameter(param, fresh)
    return fresh


@torch.no_grad()
def adopt_parameter(param: Tensor, master: Tensor) -> None:
    """Takes over what somebody else wrote into a parameter.

    Elements whose master still rounds to the parameter keep their master's extra bits.
    """
    kept = master.to(param.dtype) == param
    master.copy_(torch.where(kept, master, param.to(master.dtype)))


def scale_entries(loss_scale: float | str | None, ledger: Mapping[str, float]) -> dict[str, float]:
    """Ledger entries of the loss scale at the start, or after a checkpoint.

    Args:
        loss_scale: As HybridOptimizer takes it.
        ledger: Entries of a checkpoint; a dynamic scale goes on where it was.
    """
    if loss_scale is None:
        return {"loss_scale": 1.0, "growth_tracker": -1.0}
    if loss_scale != "dynamic":
        return {"loss_scale": float(loss_scale), "growth_tracker": -1.0}
    tracker = ledger.get("growth_tracker", -1.0)
    if tracker >= 0:
        return {"loss_scale": ledger["loss_scale"], "growth_tracker": tracker}
    return {"loss_scale": FIRST_SCALE, "growth_tracker": 0.0}


class ChangeWatch:
    """Notices parameters that were written by somebody else between two steps.

    A checkpoint loaded into the model, an averaged set of weights swapped in: without this,
    the next step would write the old master over it. PyTorch counts in-place changes of a
    tensor; reading the counter costs nothing.
    """

    def __init__(self) -> None:
        self._seen: list[int] = []

    def remember(self, params: list[Tensor]) -> None:
        """Call after our own writes."""
        self._seen = [param._version for param in params]

    def changed(self, params: list[Tensor]) -> list[int]:
        """Indices of the parameters written since `remember`."""
        return [i for i, (p, seen) in enumerate(zip(params, self._seen)) if p._version != seen]
