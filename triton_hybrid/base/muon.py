"""Muon (K. Jordan, 2024) as the base rule of hidden matrices: its settings.

    exp_avg ← momentum · exp_avg + (1 - momentum) · gradient
    update  = Newton-Schulz(gradient + momentum · (exp_avg - gradient))
    weight  ← (1 - lr · weight_decay) · weight - lr · scale · update

The rule itself runs in the same pass as AdamW (``kernels/adamw.py``), after the momenta of
all matrices were orthogonalised together (``kernels/newton_schulz.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from triton_hybrid.kernels.matrices import SCRATCH_DTYPES, Coefficients
from triton_hybrid.kernels.newton_schulz import QUINTIC

MUON_DEFAULTS: dict[str, Any] = {
    "momentum": 0.95,
    "nesterov": True,
    "ns_coefficients": QUINTIC[0],
    "ns_steps": 5,
    "adjust_lr_fn": "match_rms_adamw",
    "ns_dtype": "bfloat16",
    "blocks": (1, 1),
    "transposed": False,
}
"""Options of a Muon group. The first five have the names and meanings of ``torch.optim.Muon``;
its ``adjust_lr_fn`` is ``"original"`` by default."""

SCALES = ("match_rms_adamw", "original")
"""Values of ``adjust_lr_fn``; None is ``"original"``, as in ``torch.optim.Muon``."""

ADAMW_RMS = 0.2
"""Root mean square of AdamW's updates in units of the learning rate (Liu et al., arXiv
2502.16982)."""


@dataclass(frozen=True)
class MatrixSettings:
    """How one parameter is orthogonalised.

    Attributes:
        grid: Equal blocks along its two dimensions.
        coefficients: a, b, c of each Newton-Schulz step.
        scale: What the learning rate is multiplied with.
        dtype: Of the products' inputs.
    """

    grid: tuple[int, int]
    coefficients: Coefficients
    scale: float
    dtype: torch.dtype


def rate_scale(adjust_lr_fn: str | None, rows: int, columns: int) -> float:
    """What a matrix's learning rate is multiplied with.

    Args:
        adjust_lr_fn: ``"match_rms_adamw"``: the update gets the root mean square of AdamW's,
            so that one learning rate serves both. ``"original"``: that of a matrix that
            preserves the norm of what it maps.
        rows: Outputs of the matrix.
        columns: Inputs of the matrix.
    """
    if adjust_lr_fn == "match_rms_adamw":
        return ADAMW_RMS * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def schedule(group: Mapping[str, Any]) -> Coefficients:
    """Coefficients of each step of a group; the last ones given serve all further steps."""
    given = group["ns_coefficients"]
    every = [given] if not isinstance(given[0], (tuple, list)) else list(given)
    last = len(every) - 1
    steps = [every[min(step, last)] for step in range(int(group["ns_steps"]))]
    return tuple((float(a), float(b), float(c)) for a, b, c in steps)


def matrix_settings(group: Mapping[str, Any], index: int, param: Tensor) -> MatrixSettings:
    """Settings of a parameter of a Muon group.

    Args:
        group: The parameter group.
        index: Which of its parameters.
        param: That parameter.
    """
    blocks, transposed = group["blocks"], group["transposed"]
    if not isinstance(blocks[0], int):
        blocks = blocks[index]
    if not isinstance(transposed, bool):
        transposed = transposed[index]
    grid = (int(blocks[0]), int(blocks[1]))
    rows, columns = param.shape[0] // grid[0], param.shape[1] // grid[1]
    outputs, inputs = (columns, rows) if transposed else (rows, columns)
    scale = rate_scale(group["adjust_lr_fn"], outputs, max(inputs, 1))
    return MatrixSettings(grid, schedule(group), scale, SCRATCH_DTYPES[group["ns_dtype"]])


def settings_key(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """What must stay the same for the matrices of a group to stay bound."""
    if group["base"] != "muon":
        return ()
    names = ("ns_coefficients", "ns_steps", "adjust_lr_fn", "ns_dtype", "blocks", "transposed")
    return tuple(group[name] for name in names)
