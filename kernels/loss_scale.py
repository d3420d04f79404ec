"""The dynamic loss scale, as ``torch.amp.GradScaler`` moves it, on the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_hybrid.kernels.ledger import GROWTH_TRACKER, INDEX, LOSS_SCALE

FIRST_SCALE = 65536.0
GROWTH = tl.constexpr(2.0)
BACKOFF = tl.constexpr(0.5)
GROWTH_INTERVAL = tl.constexpr(2000)
"""GradScaler's defaults: twice the scale after so many finite gradients in a row, half of it
after one that is not."""


@triton.jit
def move_loss_scale(ledger, nonfinite):
    """Takes a gradient into account; see `move_loss_scale_reference`."""
    tracker = tl.load(ledger + GROWTH_TRACKER)
    if tracker >= 0:
        scale = tl.load(ledger + LOSS_SCALE)
        passed = tracker + 1.0 == GROWTH_INTERVAL
        grown = (scale * GROWTH).to(tl.float32)
        grown = tl.where(passed & (grown < float("inf")), grown.to(tl.float64), scale)
        shrunk = (scale * BACKOFF).to(tl.float32).to(tl.float64)
        tl.store(ledger + LOSS_SCALE, tl.where(nonfinite, shrunk, grown))
        tl.store(ledger + GROWTH_TRACKER, tl.where(nonfinite | passed, 0.0, tracker + 1.0))


def move_loss_scale_reference(ledger: Tensor, nonfinite: Tensor) -> None:
    """Takes a gradient into account, where the scale is dynamic.

    Args:
        ledger: FP64 ledger, changed in place; the scale is an FP32 number.
        nonfinite: 0-dim bool, whether the gradient held an infinity or a NaN.
    """
    tracker, scale = ledger[INDEX["growth_tracker"]], ledger[INDEX["loss_scale"]]
    dynamic = tracker >= 0
    passed = tracker + 1.0 == GROWTH_INTERVAL.value
    grown = (scale * GROWTH.value).float()
    grown = torch.where(passed & grown.isfinite(), grown.double(), scale)
    shrunk = (scale * BACKOFF.value).float().double()
    moved = torch.where(nonfinite, shrunk, grown)
    counted = torch.where(nonfinite | passed, torch.zeros_like(tracker), tracker + 1.0)
    ledger[INDEX["loss_scale"]] = torch.where(dynamic, moved, scale)
    ledger[INDEX["growth_tracker"]] = torch.where(dynamic, counted, tracker)
