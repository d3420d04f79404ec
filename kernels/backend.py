"""The two backends: the same functions with the same signatures, chosen once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from triton_hybrid.kernels.gram import gram, gram_torch
from triton_hybrid.kernels.ledger import decide
from triton_hybrid.kernels.ledger_torch import decide_torch
from triton_hybrid.kernels.predict import predict, predict_torch
from triton_hybrid.kernels.step import step
from triton_hybrid.kernels.step_torch import step_torch
from triton_hybrid.kernels.verify import (
    check_move,
    check_move_torch,
    correct,
    correct_torch,
    slopes,
    slopes_torch,
)


@dataclass(frozen=True)
class Backend:
    """What runs the steps.

    Attributes:
        name: ``"triton"`` or ``"torch"``.
        step: One base step.
        predict: One predicted step.
        check_move: Keeps a predicted step, or rolls it back at once.
        slopes: Measures a gradient along the displacement.
        decide: Decides on the prediction.
        correct: Does what was decided.
        gram: Ends a cycle of a trajectory.
        measures_slopes_in_passing: Whether slopes cost nothing beside what is measured anyway.
    """

    name: str
    step: Callable[..., None]
    predict: Callable[..., None]
    check_move: Callable[..., None]
    slopes: Callable[..., None]
    decide: Callable[..., None]
    correct: Callable[..., None]
    gram: Callable[..., None]
    measures_slopes_in_passing: bool


TRITON = Backend("triton", step, predict, check_move, slopes, decide, correct, gram, True)
TORCH = Backend(
    "torch",
    step_torch,
    predict_torch,
    check_move_torch,
    slopes_torch,
    decide_torch,
    correct_torch,
    gram_torch,
    False,
)
BACKENDS = {backend.name: backend for backend in (TRITON, TORCH)}
