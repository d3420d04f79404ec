"""The two backends: the same functions with the same signatures, chosen once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from triton_hybrid.kernels.direction import (
    along,
    along_torch,
    direct,
    direct_torch,
    lengthen,
    lengthen_torch,
)
from triton_hybrid.kernels.fingerprint import (
    find_writes,
    find_writes_torch,
    fingerprint,
    fingerprint_torch,
    note_weights,
    note_weights_torch,
)
from triton_hybrid.kernels.gram import gram, gram_torch
from triton_hybrid.kernels.ledger import decide
from triton_hybrid.kernels.ledger_torch import decide_torch
from triton_hybrid.kernels.predict import predict, predict_torch
from triton_hybrid.kernels.secant import move, products, settle
from triton_hybrid.kernels.secant_torch import move_torch, products_torch, settle_torch
from triton_hybrid.kernels.shift import shift, shift_torch
from triton_hybrid.kernels.slopes import slopes, slopes_torch
from triton_hybrid.kernels.step import measure, step
from triton_hybrid.kernels.step_torch import measure_torch, step_torch
from triton_hybrid.kernels.trapezoid import base_slope, base_slope_torch
from triton_hybrid.kernels.verify import (
    check_move,
    check_move_torch,
    correct,
    correct_torch,
)


@dataclass(frozen=True)
class Backend:
    """What runs the steps."""

    name: str
    measure: Callable[..., None]  # what the gradients have in common
    step: Callable[..., None]  # one base step
    predict: Callable[..., None]  # one predicted step
    check_move: Callable[..., None]  # keeps a predicted step, or rolls it back at once
    slopes: Callable[..., None]  # measures a gradient along the displacement
    decide: Callable[..., None]  # on the prediction
    correct: Callable[..., None]  # does what was decided
    gram: Callable[..., None]  # ends a cycle of a trajectory
    fingerprint: Callable[..., None]  # of all parameters of a set
    note_weights: Callable[..., None]  # as a step leaves them
    find_writes: Callable[..., None]  # that others have made since
    products: Callable[..., Any]  # of the pairs of a quasi-Newton move
    move: Callable[..., None]  # makes it
    settle: Callable[..., None]  # notes its pair, places the weights
    shift: Callable[..., None]  # adds a move that was found in other bases
    base_slope: Callable[..., Tensor]  # of a gradient along the last base step
    along: Callable[..., None]  # the momentum as the rule sees it
    lengthen: Callable[..., None]  # gives what was made of it a length
    direct: Callable[..., None]  # all of it: seen, orthogonalised, at that length


TRITON = Backend(
    "triton", measure, step, predict, check_move, slopes, decide, correct, gram,
    fingerprint, note_weights, find_writes, products, move, settle, shift, base_slope,
    along, lengthen, direct,
)  # fmt: skip
TORCH = Backend(
    "torch", measure_torch, step_torch, predict_torch, check_move_torch, slopes_torch,
    decide_torch, correct_torch, gram_torch, fingerprint_torch, note_weights_torch,
    find_writes_torch, products_torch, move_torch, settle_torch, shift_torch, base_slope_torch,
    along_torch, lengthen_torch, direct_torch,
)  # fmt: skip
BACKENDS = {backend.name: backend for backend in (TRITON, TORCH)}
