"""Refuses bad arguments, each by name, before anything is touched."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from triton_hybrid.kernels.chunks import TRITON_DTYPES, dense_view

BACKENDS = ("auto", "triton", "torch")


def _number(name: str, value: Any, allowed: str, low: float, high: float = math.inf) -> None:
    """Refuses what is not a number with low <= value < high."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}={value!r}: must be {allowed}")
    if not low <= value < high:
        raise ValueError(f"{name}={value!r}: must be {allowed}")


def check_group(group: Mapping[str, Any]) -> None:
    """Checks the options of a parameter group.

    Raises:
        ValueError: A value out of range.
        NotImplementedError: A base rule that is not built yet.
    """
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr has shape {tuple(lr.shape)}: a tensor must have one element")
        if lr.device.type == "cpu":
            _number("lr", float(lr), "a finite number >= 0", 0.0)
    else:
        _number("lr", lr, "a finite number >= 0, or a one-element tensor", 0.0)
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas={betas!r}: must be two numbers in [0, 1)")
    for index, beta in enumerate(betas):
        _number(f"betas[{index}]", beta, "a number in [0, 1)", 0.0, 1.0)
    _number("eps", group["eps"], "a finite number >= 0", 0.0)
    _number("weight_decay", group["weight_decay"], "a finite number >= 0", 0.0)
    if not isinstance(group["maximize"], bool):
        raise ValueError(f"maximize={group['maximize']!r}: must be True or False")
    base = group["base"]
    if base not in ("adamw", "muon"):
        raise ValueError(f"base={base!r}: must be 'adamw' or 'muon'")
    if base == "muon":
        raise NotImplementedError("base='muon' is not built yet: use base='adamw'")


def check_parameter(param: Any) -> None:
    """Checks that a parameter can be optimised; leaves wrong types to torch.

    Raises:
        ValueError: Wrong dtype or layout.
        NotImplementedError: A distributed tensor.
    """
    if not isinstance(param, Tensor):
        return
    if hasattr(param, "placements"):
        raise NotImplementedError("DTensor parameters (FSDP2, tensor parallel) are not built yet")
    if param.layout is not torch.strided:
        raise ValueError(f"params: layout {param.layout}, must be torch.strided")
    if param.dtype not in TRITON_DTYPES:
        raise ValueError(f"params: dtype {param.dtype}, must be one of {list(TRITON_DTYPES)}")
    try:
        dense_view(param.detach())
    except ValueError as error:
        raise ValueError(f"params: {error}") from None


def check_max_grad_norm(value: Any) -> float | None:
    """Returns the clipping threshold as a float, or None.

    Raises:
        ValueError: Not a positive finite number.
    """
    if value is None:
        return None
    allowed = "a positive finite number, or None"
    _number("max_grad_norm", value, allowed, 0.0)
    if value == 0:
        raise ValueError(f"max_grad_norm={value!r}: must be {allowed}")
    return float(value)


def check_backend(value: Any) -> str:
    """Returns the backend's name.

    Raises:
        ValueError: Not one of ``BACKENDS``.
    """
    if not isinstance(value, str) or value not in BACKENDS:
        raise ValueError(f"backend={value!r}: must be one of {BACKENDS}")
    return value


def refuse_unbuilt(
    *,
    master_weights: Any,
    loss_scale: Any,
    accumulation: Any,
    process_group: Any,
    offload: str,
) -> None:
    """Refuses options that are part of the design but not built yet.

    Raises:
        ValueError: A value that the design does not have either.
        NotImplementedError: A value that is not built yet.
    """
    if master_weights not in ("auto", "split", "none"):
        raise ValueError(
            f"master_weights={master_weights!r}: must be 'auto' ('split', 'none': not built yet)"
        )
    if master_weights != "auto":
        raise NotImplementedError(f"master_weights={master_weights!r} is not built yet: use 'auto'")
    for name, value in (
        ("loss_scale", loss_scale),
        ("accumulation", accumulation),
        ("process_group", process_group),
    ):
        if value is not None:
            raise NotImplementedError(f"{name}={value!r} is not built yet: must be None")
    if offload != "none":
        raise NotImplementedError(f"offload={offload!r} is not built yet: use 'none'")
