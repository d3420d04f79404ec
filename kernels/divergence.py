"""Scalar decisions on the device: the verdict on a prediction.

Everything here works on a few numbers, in FP64, in one program. The kernels read what the
bandwidth kernels summed up, and write the ledger and one step fraction for each tensor:

    0  take the move back, bit for bit
    1  leave the weights where the prediction put them
    τ  place them at snapshot + τ · displacement
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_hybrid.kernels.chunks import LAUNCH, on_device
from triton_hybrid.kernels.ledger import (
    ACCEPTED,
    BLOCKED,
    CAUSE_LOSS,
    CAUSE_NONFINITE,
    CAUSE_NORM,
    COOLDOWN,
    FOUND_INF,
    HOLD,
    HORIZON,
    INDEX,
    JUMP_SQUARE,
    LOSS,
    LOSS_COUNT,
    LOSS_MEAN,
    LOSS_PREVIOUS,
    LOSS_VARIANCE,
    MOVED,
    NORM_COUNT,
    NORM_MEAN,
    NORM_VARIANCE,
    REJECTED,
    REJECTIONS,
    SIGNAL,
    STEP_FRACTION,
    STRETCH,
    VERDICT,
)

NORM_DEVIATION_FLOOR = tl.constexpr(0.4)
"""Smallest standard deviation of log(norm) that is believed. Gradient norms have heavy
tails; below this, ordinary steps of a short run would count as divergence."""
LOSS_DEVIATION_FLOOR = tl.constexpr(1e-3)
"""Smallest standard deviation of the loss change that is believed, relative to the loss."""
LARGEST_FRACTION = tl.constexpr(2.0)
SMALLEST_FRACTION = tl.constexpr(0.1)
FRACTION_TOLERANCE = tl.constexpr(1e-3)
"""A step fraction this close to 1 is 1: the weights keep their bits."""
SMALLEST_SCALE = tl.constexpr(0.125)
LARGEST_SCALE = tl.constexpr(4.0)
SCALE_MEMORY = tl.constexpr(0.9)
"""A tensor's horizon factor relaxes towards 1 by a tenth with every accepted prediction."""
HORIZON_GROWTH = tl.constexpr(1.25)
"""Growth of a halved horizon with every accepted prediction, up to 1."""
LONGEST_COOLDOWN = tl.constexpr(10)
"""The Full phase doubles with every rejection in a row, at most this often."""
BLOCKED_LIMIT = tl.constexpr(2)
"""Non-finite gradients in a row at the predicted point after which the point is to blame.
One alone is left to the loss scaler."""

HORIZON_COLUMN = tl.constexpr(0)
SLOPE_COLUMN = tl.constexpr(1)
FRACTION_COLUMN = tl.constexpr(2)
MEMORY_COLUMNS = tl.constexpr(3)
"""Columns of the per-tensor memory: horizon factor, slope before the move, step fraction."""


@triton.jit
def take_back(ledger, cooldown):
    """Enters a rejection: halved horizon, and a Full phase that doubles with each in a row."""
    rejections = tl.load(ledger + REJECTIONS)
    doublings = tl.minimum(rejections, LONGEST_COOLDOWN)
    tl.store(ledger + COOLDOWN, cooldown * tl.exp2(doublings))
    tl.store(ledger + REJECTIONS, rejections + 1.0)
    tl.store(ledger + REJECTED, tl.load(ledger + REJECTED) + 1.0)
    tl.store(ledger + HORIZON, 0.5 * tl.load(ledger + HORIZON))


def take_back_reference(entries: dict[str, Tensor], cooldown: float, rejected: Tensor) -> None:
    """`take_back` on a dictionary of ledger entries, where ``rejected`` is true."""
    doublings = entries["rejections"].clamp(max=LONGEST_COOLDOWN.value)
    wait = cooldown * torch.exp2(doublings)
    entries["cooldown"] = torch.where(rejected, wait, entries["cooldown"])
    entries["rejections"] = entries["rejections"] + rejected
    entries["rejected"] = entries["rejected"] + rejected
    entries["horizon"] = torch.where(rejected, 0.5 * entries["horizon"], entries["horizon"])


@triton.jit
def _judge_kernel(
    ledger,
    sums,
    memory,
    n_tensors,
    threshold,
    cooldown,
    TENSORS: tl.constexpr,
):
    square = tl.zeros([TENSORS], dtype=tl.float64)
    bad = tl.zeros([TENSORS], dtype=tl.float64)
    for begin in range(0, n_tensors, TENSORS):
        t = begin + tl.arange(0, TENSORS)
        square += tl.load(sums + 3 * t + 1, mask=t < n_tensors, other=0.0)
        bad += tl.load(sums + 3 * t + 2, mask=t < n_tensors, other=0.0)
    norm = tl.sqrt(tl.sum(square, axis=0))
    nonfinite = (tl.sum(bad, axis=0) > 0) | (tl.load(ledger + FOUND_INF) > 0)

    moved = tl.load(ledger + MOVED) > 0
    blocked = tl.load(ledger + BLOCKED)
    blocked = tl.where(nonfinite, blocked + 1.0, 0.0)
    point_to_blame = nonfinite & (blocked >= BLOCKED_LIMIT)

    deviation = tl.maximum(tl.sqrt(tl.load(ledger + NORM_VARIANCE)), NORM_DEVIATION_FLOOR)
    excess = tl.log(norm + 1e-30) - tl.load(ledger + NORM_MEAN)
    by_norm = (excess > threshold * deviation) & (tl.load(ledger + NORM_COUNT) > 1.5)
    by_norm = by_norm & (nonfinite == 0)
    loss = tl.load(ledger + LOSS)
    previous = tl.load(ledger + LOSS_PREVIOUS)
    expected = previous + tl.load(ledger + LOSS_MEAN)
    spread = tl.maximum(
        tl.sqrt(tl.load(ledger + LOSS_VARIANCE)), LOSS_DEVIATION_FLOOR * tl.abs(previous)
    )
    known = (previous == previous) & (tl.load(ledger + LOSS_COUNT) > 1.5)
    by_loss = known & (loss - expected > threshold * spread) & (nonfinite == 0)
    observed_inf = (tl.abs(loss) == float("inf")) & (nonfinite == 0)
    by_loss = by_loss | observed_inf

    rejected = moved & (point_to_blame | by_norm | by_loss)
    accepted = moved & (rejected == 0) & (nonfinite == 0)
    trust = tl.minimum(tl.maximum(2.0 * tl.load(ledger + SIGNAL) - 1.0, 0.0), 1.0)
    n_accepted = tl.where(accepted, n_tensors, 0)
    n_settled = tl.where(accepted | rejected, n_tensors, 0)

    total = tl.zeros([TENSORS], dtype=tl.float64)
    for begin in range(0, n_tensors, TENSORS):
        t = begin + tl.arange(0, TENSORS)
        here = t < n_tensors
        after = tl.load(sums + 3 * t, mask=here, other=0.0)
        slope_cell = memory + MEMORY_COLUMNS * t + SLOPE_COLUMN
        before = tl.load(slope_cell, mask=here, other=0.0).to(tl.float64)
        curved = (before < 0) & (after > before)
        secant = tl.where(curved, before / tl.where(curved, before - after, 1.0), 1.0)
        secant = tl.minimum(tl.maximum(secant, SMALLEST_FRACTION), LARGEST_FRACTION)
        fraction = 1.0 + trust * (secant - 1.0)
        fraction = tl.where(tl.abs(fraction - 1.0) < FRACTION_TOLERANCE, 1.0, fraction)
        fraction = tl.where(accepted, fraction, tl.where(rejected, 0.0, 1.0))
        scale_cell = memory + MEMORY_COLUMNS * t + HORIZON_COLUMN
        scale = tl.load(scale_cell, mask=here, other=1.0).to(tl.float64)
        scale = (1.0 + SCALE_MEMORY * (scale - 1.0)) * fraction
        scale = tl.minimum(tl.maximum(scale, SMALLEST_SCALE), LARGEST_SCALE)
        fraction_cell = memory + MEMORY_COLUMNS * t + FRACTION_COLUMN
        tl.store(fraction_cell, fraction.to(tl.float32), mask=t < n_settled)
        tl.store(scale_cell, scale.to(tl.float32), mask=t < n_accepted)
        tl.store(slope_cell, tl.zeros([TENSORS], tl.float32), mask=t < n_settled)
        total += tl.where(here, fraction, 0.0)

    # One thread writes the ledger; first every thread must have read what it decides by.
    tl.debug_barrier()
    tl.store(ledger + BLOCKED, tl.where(moved & (rejected == 0), blocked, 0.0))
    if accepted:
        tl.store(ledger + ACCEPTED, tl.load(ledger + ACCEPTED) + 1.0)
        tl.store(ledger + REJECTIONS, 0.0)
        horizon = tl.minimum(tl.load(ledger + HORIZON) * HORIZON_GROWTH, 1.0)
        tl.store(ledger + HORIZON, horizon)
        tl.store(ledger + STEP_FRACTION, tl.sum(total, axis=0) / n_tensors)
    if rejected:
        take_back(ledger, cooldown)
        tl.store(ledger + HOLD, 1.0)
        tl.store(ledger + LOSS, float("nan"))
        if point_to_blame:
            tl.store(ledger + CAUSE_NONFINITE, tl.load(ledger + CAUSE_NONFINITE) + 1.0)
        if by_norm:
            tl.store(ledger + CAUSE_NORM, tl.load(ledger + CAUSE_NORM) + 1.0)
        if by_loss:
            tl.store(ledger + CAUSE_LOSS, tl.load(ledger + CAUSE_LOSS) + 1.0)
    tl.store(ledger + VERDICT, tl.where(accepted, 1.0, tl.where(rejected, 2.0, 0.0)))
    if accepted | rejected:
        tl.store(ledger + MOVED, 0.0)
        tl.store(ledger + STRETCH, 0.0)
        tl.store(ledger + JUMP_SQUARE, 0.0)


def judge(ledger: Tensor, sums: Tensor, memory: Tensor, threshold: float, cooldown: float) -> None:
    """Decides on a prediction by the real gradient at the predicted point. One launch.

    Args:
        ledger: FP64 ledger, changed in place.
        sums: FP64 ``[tensors, 3]``: for each tensor the inner product of gradient and
            displacement, the squared gradient, and how many gradients were non-finite.
        memory: FP32 ``[tensors, 3]``: horizon factor, slope before the move (both
            changed in place) and the step fraction (written).
        threshold: Standard deviations above the running mean that norm and loss may have.
        cooldown: Real steps that a first rejection forces before the next prediction.
    """
    with on_device(ledger.device):
        _judge_kernel[(1,)](
            ledger,
            sums,
            memory,
            len(memory),
            threshold,
            cooldown,
            TENSORS=128,
            **LAUNCH,
        )


def judge_reference(
    ledger: Tensor, sums: Tensor, memory: Tensor, threshold: float, cooldown: float
) -> None:
    """`judge` in plain torch, without waiting for the device.

    The step fraction is the secant rule: with slope ``a`` before and ``b`` after the move,
    the minimum along it lies at a / (a - b). Noise makes single slopes worthless: the
    correction is weighted by 2 · signal - 1, and none is made where half of the squared
    gradient or more is noise. (Weighted by the signal share alone, the few slopes of the
    first steps set horizon factors of 0.7 to 1.6, and a small language model ended at a
    loss of 2.29 instead of 2.14.)
    """
    entries = dict(zip(INDEX, ledger.unbind()))
    norm = sums[:, 1].sum().sqrt()
    nonfinite = (sums[:, 2].sum() > 0) | (entries["found_inf"] > 0)
    moved = entries["moved"] > 0
    zero = torch.zeros_like(norm)
    blocked = torch.where(nonfinite, entries["blocked"] + 1.0, zero)
    point_to_blame = nonfinite & (blocked >= BLOCKED_LIMIT.value)

    deviation = entries["norm_variance"].sqrt().clamp(min=NORM_DEVIATION_FLOOR.value)
    excess = (norm + 1e-30).log() - entries["norm_mean"]
    by_norm = (excess > threshold * deviation) & (entries["norm_count"] > 1.5) & ~nonfinite
    loss, previous = entries["loss"], entries["loss_previous"]
    spread = torch.maximum(
        entries["loss_variance"].sqrt(), LOSS_DEVIATION_FLOOR.value * previous.abs()
    )
    known = ~previous.isnan() & (entries["loss_count"] > 1.5)
    by_loss = known & (loss - (previous + entries["loss_mean"]) > threshold * spread)
    by_loss = (by_loss | loss.isinf()) & ~nonfinite

    rejected = moved & (point_to_blame | by_norm | by_loss)
    accepted = moved & ~rejected & ~nonfinite

    after, before = sums[:, 0], memory[:, SLOPE_COLUMN.value].double()
    curved = (before < 0) & (after > before)
    one = torch.ones_like(before)
    secant = torch.where(curved, before / torch.where(curved, before - after, one), one)
    secant = secant.clamp(SMALLEST_FRACTION.value, LARGEST_FRACTION.value)
    trust = (2.0 * entries["signal"] - 1.0).clamp(0.0, 1.0)
    fraction = 1.0 + trust * (secant - 1.0)
    fraction = torch.where((fraction - 1.0).abs() < FRACTION_TOLERANCE.value, one, fraction)
    fraction = torch.where(accepted, fraction, torch.where(rejected, 0.0 * one, one))
    scale = memory[:, HORIZON_COLUMN.value].double()
    scale = (1.0 + SCALE_MEMORY.value * (scale - 1.0)) * fraction
    scale = scale.clamp(SMALLEST_SCALE.value, LARGEST_SCALE.value).float()
    memory[:, FRACTION_COLUMN.value] = torch.where(
        accepted | rejected, fraction.float(), memory[:, FRACTION_COLUMN.value]
    )
    memory[:, HORIZON_COLUMN.value] = torch.where(accepted, scale, memory[:, HORIZON_COLUMN.value])
    settled = accepted | rejected
    memory[:, SLOPE_COLUMN.value] = torch.where(
        settled, torch.zeros_like(scale), memory[:, SLOPE_COLUMN.value]
    )

    entries["blocked"] = torch.where(moved & ~rejected, blocked, zero)
    entries["accepted"] = entries["accepted"] + accepted
    entries["rejections"] = torch.where(accepted, zero, entries["rejections"])
    grown = (entries["horizon"] * HORIZON_GROWTH.value).clamp(max=1.0)
    entries["horizon"] = torch.where(accepted, grown, entries["horizon"])
    entries["step_fraction"] = torch.where(accepted, fraction.mean(), entries["step_fraction"])
    take_back_reference(entries, cooldown, rejected)
    entries["hold"] = torch.where(rejected, torch.ones_like(zero), entries["hold"])
    entries["loss"] = torch.where(rejected, torch.full_like(zero, torch.nan), entries["loss"])
    entries["cause_nonfinite"] = entries["cause_nonfinite"] + (rejected & point_to_blame)
    entries["cause_norm"] = entries["cause_norm"] + (rejected & by_norm)
    entries["cause_loss"] = entries["cause_loss"] + (rejected & by_loss)
    for name in ("moved", "stretch", "jump_square"):
        entries[name] = torch.where(settled, zero, entries[name])
    entries["verdict"] = accepted + 2.0 * rejected
    ledger.copy_(torch.stack(list(entries.values())))
