"""Refuses bad arguments, each by name, before anything is touched."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from triton_hybrid.base.muon import SCALES, matrix_settings
from triton_hybrid.kernels.chunks import TRITON_DTYPES, dense_view
from triton_hybrid.kernels.matrices import SCRATCH_DTYPES

BACKENDS = ("auto", "triton", "torch")
MASTER_WEIGHTS = ("auto", "split", "none")


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
        _check_muon_group(group)


def _check_muon_group(group: Mapping[str, Any]) -> None:
    _number("momentum", group["momentum"], "a number in [0, 1)", 0.0, 1.0)
    if not isinstance(group["nesterov"], bool):
        raise ValueError(f"nesterov={group['nesterov']!r}: must be True or False")
    steps = group["ns_steps"]
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps < 100:
        raise ValueError(f"ns_steps={steps!r}: must be a whole number from 1 to 99")
    given = group["ns_coefficients"]
    every = given if isinstance(given, (tuple, list)) else ()
    nested = [c for c in every if isinstance(c, (tuple, list))]
    triples = nested if nested else [every]
    if len(nested) not in (0, len(every)) or any(
        len(triple) != 3 or not all(_is_finite(c) for c in triple) for triple in triples
    ):
        raise ValueError(
            f"ns_coefficients={given!r}: must be three finite numbers, or three for each step"
        )
    if group["adjust_lr_fn"] not in (None, *SCALES):
        raise ValueError(f"adjust_lr_fn={group['adjust_lr_fn']!r}: must be one of {SCALES} or None")
    if group["ns_dtype"] not in SCRATCH_DTYPES:
        raise ValueError(f"ns_dtype={group['ns_dtype']!r}: must be one of {tuple(SCRATCH_DTYPES)}")
    count = len(group["params"]) if "params" in group else None
    blocks = group["blocks"]
    pairs = blocks if _is_list(blocks, count, _is_pair) else [blocks]
    if not all(_is_pair(pair) for pair in pairs):
        raise ValueError(
            f"blocks={blocks!r}: must be two whole numbers >= 1 (blocks along rows and columns), "
            "or such a pair for every parameter of the group"
        )
    transposed = group["transposed"]
    if not isinstance(transposed, bool) and not _is_list(
        transposed, count, lambda value: isinstance(value, bool)
    ):
        raise ValueError(
            f"transposed={transposed!r}: must be True or False, or one of them for every "
            "parameter of the group"
        )


def _is_finite(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in value)
    )


def _is_list(value: Any, count: int | None, suits: Callable[[Any], bool]) -> bool:
    """Whether a value holds something that suits for every parameter."""
    listed = isinstance(value, (tuple, list)) and all(suits(entry) for entry in value)
    return listed and count in (None, len(value))


def check_matrix(group: Mapping[str, Any], index: int, param: Any) -> None:
    """Checks that a parameter of a Muon group can be orthogonalised.

    Raises:
        ValueError: Not a matrix, or not divisible into the blocks asked for.
    """
    if not isinstance(param, Tensor):
        return
    if param.ndim != 2:
        raise ValueError(
            f"params: parameter {index} of a group with base='muon' has shape "
            f"{tuple(param.shape)}, must be a matrix; split_param_groups(model) makes the groups"
        )
    grid = matrix_settings(group, index, param).grid
    if any(size % parts for size, parts in zip(param.shape, grid)):
        raise ValueError(
            f"blocks={grid}: must divide the shape {tuple(param.shape)} of parameter {index}"
        )


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


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}={value!r}: must be one of {allowed}")
    return value


def check_master_weights(value: Any) -> str:
    """Returns how FP32 masters are kept.

    Raises:
        ValueError: Not one of ``MASTER_WEIGHTS``.
    """
    return _one_of("master_weights", value, MASTER_WEIGHTS)


def check_splittable(value: str, dtype: torch.dtype) -> None:
    """Checks that the masters of a parameter can be kept in this way.

    Raises:
        ValueError: ``"split"`` for FP16: its exponent has 5 bits, that of FP32 8, so what is
            missing is not 16 bits, and small weights would lose all of it.
    """
    if value == "split" and dtype == torch.float16:
        raise ValueError(
            "master_weights='split' with an FP16 parameter: allowed for BF16 only, whose bits are "
            "the upper half of FP32's; use 'auto' (FP32 masters) or BF16"
        )


def check_loss_scale(value: Any) -> float | str | None:
    """Returns the loss scale: None, a float that FP32 can hold, or ``"dynamic"``.

    Raises:
        ValueError: Anything else.
    """
    if value is None or value == "dynamic":
        return None if value is None else "dynamic"
    allowed = "None, 'dynamic', or a positive number that FP32 can hold"
    _number("loss_scale", value, allowed, 0.0)
    scale = float(torch.tensor(float(value), dtype=torch.float32))
    if scale == 0 or not math.isfinite(scale):
        raise ValueError(f"loss_scale={value!r}: must be {allowed}")
    return scale


def check_backend(value: Any) -> str:
    """Returns the backend's name.

    Raises:
        ValueError: Not one of ``BACKENDS``.
    """
    return _one_of("backend", value, BACKENDS)


def refuse_unbuilt(
    *,
    accumulation: Any,
    process_group: Any,
) -> None:
    """Refuses options that are part of the design but not built yet.

    Raises:
        NotImplementedError: A value that is not built yet.
    """
    for name, value in (
        ("accumulation", accumulation),
        ("process_group", process_group),
    ):
        if value is not None:
            raise NotImplementedError(f"{name}={value!r} is not built yet: must be None")
