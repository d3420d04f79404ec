"""Scalar decisions on the device: running statistics, and the verdict on a prediction.

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
    CONFIDENCE,
    COOLDOWN,
    FOUND_INF,
    GRADIENT_SQUARE,
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
    PULL,
    REJECTED,
    REJECTIONS,
    SIGNAL,
    SLOW_COUNT,
    SLOW_NOISE,
    SLOW_SLOW,
    STEP_FRACTION,
    STRETCH,
    UPDATE_COUNT,
    UPDATE_SLOW,
    UPDATE_SQUARE,
    UPDATE_UPDATE,
    VERDICT,
)

SLOWEST_RATE = tl.constexpr(0.05)
"""Floor of the averaging rate of running statistics: a memory of about 20 steps."""
DIRECTION_RATE = tl.constexpr(0.2)
"""Averaging rate of the inner products behind the confidence: about 5 steps."""
NORM_DEVIATION_FLOOR = tl.constexpr(0.4)
"""Smallest standard deviation of log(norm) that is believed. Gradient norms have heavy
tails; below this, ordinary steps of a short run would count as divergence."""
LOSS_DEVIATION_FLOOR = tl.constexpr(1e-3)
"""Smallest standard deviation of the loss change that is believed, relative to the loss."""
LARGEST_FRACTION = tl.constexpr(2.0)
SMALLEST_FRACTION = tl.constexpr(0.1)
FRACTION_TOLERANCE = tl.constexpr(1e-3)
"""A step fraction this close to 1 is 1: the weights keep their bits."""
SLOW_WARMUP = tl.constexpr(4.0)
"""The slow EMA remembers about a quarter of the run so far, until ``slow_beta`` is reached.
In 50 steps of GPT-2 small a decay of 0.8 predicted better than 0.9."""
OUTLIER = tl.constexpr(2.0)
"""The slow EMA takes a gradient with at most this many times the usual norm (the running
geometric mean). In GPT-2 small one gradient of 250 times the squared usual norm was the slow
EMA's direction for the 25 steps that followed."""
LEVEL_WARMUP = tl.constexpr(2.0)
LEVEL_BETA = tl.constexpr(0.85)
"""Decay of the weight EMA: n/(n+2) after n updates, up to this, about 6 steps."""
LEVEL_AGE = tl.constexpr(64.0)
"""Gradients after which the pull to the weight EMA fades, by the square of their number."""
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
def slow_decay(ledger, slow_beta):
    """Decay of the slow EMA for the coming gradient: n/(n+4) after n gradients, up to slow_beta.

    The window grows with the run, as AdEMAMix warms its slow momentum, and the weights of
    the gradients always add up to one, so no bias correction is needed.
    """
    count = tl.load(ledger + SLOW_COUNT)
    return tl.minimum(count / (count + SLOW_WARMUP), slow_beta)


@triton.jit
def slow_clip(ledger, norm, coefficient):
    """What the slow EMA multiplies a gradient with: like clipping, at `OUTLIER` usual norms."""
    usual = OUTLIER * tl.exp(tl.load(ledger + NORM_MEAN))
    limited = tl.minimum(coefficient, usual / (norm + 1e-30))
    return tl.where(tl.load(ledger + NORM_COUNT) > 0.5, limited, coefficient)


@triton.jit
def level_decay(ledger):
    """Decay of the weight EMA for the coming update; 0 for the first."""
    count = tl.load(ledger + SLOW_COUNT)
    return tl.minimum(count / (count + LEVEL_WARMUP), LEVEL_BETA)


@triton.jit
def observe(
    ledger, norm, used, update_square, update_slow, slow_slow, slow_ema_square, pull, slow_beta,
    SLOW: tl.constexpr, MEASURE: tl.constexpr,
):  # fmt: skip
    """Takes one applied base update into the running statistics (see `observe_reference`)."""
    count = tl.load(ledger + NORM_COUNT)
    rate = tl.maximum(1.0 / (count + 1.0), SLOWEST_RATE)
    deviation = tl.log(norm + 1e-30) - tl.load(ledger + NORM_MEAN)
    variance = tl.load(ledger + NORM_VARIANCE)
    tl.store(ledger + NORM_MEAN, tl.load(ledger + NORM_MEAN) + rate * deviation)
    tl.store(ledger + NORM_VARIANCE, (1.0 - rate) * (variance + rate * deviation * deviation))
    tl.store(ledger + NORM_COUNT, count + 1.0)

    loss = tl.load(ledger + LOSS)
    previous = tl.load(ledger + LOSS_PREVIOUS)
    if tl.abs(loss) < float("inf"):
        if tl.abs(previous) < float("inf"):
            loss_count = tl.load(ledger + LOSS_COUNT)
            loss_rate = tl.maximum(1.0 / (loss_count + 1.0), SLOWEST_RATE)
            change = loss - previous - tl.load(ledger + LOSS_MEAN)
            loss_variance = tl.load(ledger + LOSS_VARIANCE)
            tl.store(ledger + LOSS_MEAN, tl.load(ledger + LOSS_MEAN) + loss_rate * change)
            tl.store(
                ledger + LOSS_VARIANCE,
                (1.0 - loss_rate) * (loss_variance + loss_rate * change * change),
            )
            tl.store(ledger + LOSS_COUNT, loss_count + 1.0)
        tl.store(ledger + LOSS_PREVIOUS, loss)

    if MEASURE:
        updates = tl.load(ledger + UPDATE_COUNT)
        update_rate = tl.maximum(1.0 / (updates + 1.0), SLOWEST_RATE)
        mean = tl.load(ledger + UPDATE_SQUARE)
        tl.store(ledger + UPDATE_SQUARE, mean + update_rate * (update_square - mean))
        tl.store(ledger + UPDATE_COUNT, updates + 1.0)
        keep = 1.0 - DIRECTION_RATE
        us = keep * tl.load(ledger + UPDATE_SLOW) + DIRECTION_RATE * update_slow
        uu = keep * tl.load(ledger + UPDATE_UPDATE) + DIRECTION_RATE * update_square
        ss = keep * tl.load(ledger + SLOW_SLOW) + DIRECTION_RATE * slow_slow
        tl.store(ledger + UPDATE_SLOW, us)
        tl.store(ledger + UPDATE_UPDATE, uu)
        tl.store(ledger + SLOW_SLOW, ss)
        cosine = us / tl.sqrt(uu * ss + 1e-300)
        tl.store(ledger + CONFIDENCE, tl.minimum(tl.maximum(cosine, 0.0), 1.0))
    if SLOW:
        beta = slow_decay(ledger, slow_beta)
        gradients = tl.load(ledger + GRADIENT_SQUARE)
        gradients = gradients + (1.0 - beta) * (used * used - gradients)
        noise = tl.load(ledger + SLOW_NOISE)
        noise = beta * beta * noise + (1.0 - beta) * (1.0 - beta)
        ratio = slow_ema_square / (gradients + 1e-300)
        signal = (ratio - noise) / tl.maximum(1.0 - noise, 1e-9)
        signal = tl.where(noise < 0.999, tl.minimum(tl.maximum(signal, 0.0), 1.0), 0.0)
        # Before the first update the weight EMA is the weights, and the product is zero.
        pulls = tl.load(ledger + PULL)
        tl.store(ledger + PULL, pulls + DIRECTION_RATE * (pull - pulls))
        tl.store(ledger + SLOW_COUNT, tl.load(ledger + SLOW_COUNT) + 1.0)
        tl.store(ledger + SLOW_NOISE, noise)
        tl.store(ledger + GRADIENT_SQUARE, gradients)
        if MEASURE:
            tl.store(ledger + SIGNAL, signal)
    tl.store(ledger + COOLDOWN, tl.maximum(tl.load(ledger + COOLDOWN) - 1.0, 0.0))


def slow_decay_reference(ledger: Tensor, slow_beta: float) -> Tensor:
    """`slow_decay` in plain torch; 0-dim FP64."""
    count: Tensor = ledger[INDEX["slow_count"]]
    decay: Tensor = (count / (count + SLOW_WARMUP.value)).clamp(max=slow_beta)
    return decay


def slow_clip_reference(ledger: Tensor, norm: Tensor, coefficient: Tensor) -> Tensor:
    """`slow_clip` in plain torch; 0-dim FP64."""
    usual = OUTLIER.value * ledger[INDEX["norm_mean"]].exp()
    limited = torch.minimum(coefficient, usual / (norm + 1e-30))
    return torch.where(ledger[INDEX["norm_count"]] > 0.5, limited, coefficient)


def level_decay_reference(ledger: Tensor) -> Tensor:
    """`level_decay` in plain torch; 0-dim FP64."""
    count: Tensor = ledger[INDEX["slow_count"]]
    decay: Tensor = (count / (count + LEVEL_WARMUP.value)).clamp(max=LEVEL_BETA.value)
    return decay


def observe_reference(
    ledger: Tensor,
    norm: Tensor,
    used: Tensor,
    update_square: Tensor,
    update_slow: Tensor,
    slow_slow: Tensor,
    slow_ema_square: Tensor,
    pull: Tensor,
    slow_beta: float,
    applied: Tensor,
    measured: bool = True,
) -> None:
    """Takes one applied base update into the running statistics.

    Means and variances are exponential with rate max(1/(count+1), 0.05), so the first
    steps are averaged evenly. The signal share follows from two expectations: of the
    squared gradient, s + n, and of the squared EMA, s + c·n, where c is the sum of the
    squared weights of its gradients, and s and n are the squared norms of the mean
    gradient and of its noise.

    Args:
        ledger: FP64 ledger, changed in place.
        norm: 0-dim FP64, norm of the gradient as it came; `judge` compares with it.
        used: 0-dim FP64, its norm as the slow EMA takes it, clipped and without outliers.
        update_square: 0-dim FP64, squared norm of the base update.
        update_slow: 0-dim FP64, inner product of base update and older slow direction.
        slow_slow: 0-dim FP64, squared norm of the older slow direction.
        slow_ema_square: 0-dim FP64, squared norm of the slow EMA.
        pull: 0-dim FP64, inner product of that gradient with weight minus weight EMA:
            positive where going back to the weight EMA lowers the loss.
        slow_beta: Largest decay of the slow EMA; 0 without one.
        applied: 0-dim bool; False leaves every entry as it is.
        measured: Whether update, slow direction and slow EMA were measured in this step.
    """
    old = dict(zip(INDEX, ledger.unbind()))
    new = dict(old)
    count = old["norm_count"]
    rate = (1.0 / (count + 1.0)).clamp(min=SLOWEST_RATE.value)
    deviation = (norm + 1e-30).log() - old["norm_mean"]
    new["norm_mean"] = old["norm_mean"] + rate * deviation
    new["norm_variance"] = (1.0 - rate) * (old["norm_variance"] + rate * deviation * deviation)
    new["norm_count"] = count + 1.0

    seen = old["loss"].isfinite()
    both = seen & old["loss_previous"].isfinite()
    loss_rate = (1.0 / (old["loss_count"] + 1.0)).clamp(min=SLOWEST_RATE.value)
    change = old["loss"] - old["loss_previous"] - old["loss_mean"]
    new["loss_mean"] = torch.where(both, old["loss_mean"] + loss_rate * change, old["loss_mean"])
    new["loss_variance"] = torch.where(
        both,
        (1.0 - loss_rate) * (old["loss_variance"] + loss_rate * change * change),
        old["loss_variance"],
    )
    new["loss_count"] = old["loss_count"] + both
    new["loss_previous"] = torch.where(seen, old["loss"], old["loss_previous"])

    if measured:
        updates = old["update_count"]
        update_rate = (1.0 / (updates + 1.0)).clamp(min=SLOWEST_RATE.value)
        mean = old["update_square"]
        new["update_square"] = mean + update_rate * (update_square - mean)
        new["update_count"] = updates + 1.0
        step = DIRECTION_RATE.value
        for name, value in (
            ("update_slow", update_slow),
            ("update_update", update_square),
            ("slow_slow", slow_slow),
        ):
            new[name] = (1.0 - step) * old[name] + step * value
        product = new["update_update"] * new["slow_slow"]
        new["confidence"] = (new["update_slow"] / (product + 1e-300).sqrt()).clamp(0.0, 1.0)
    if slow_beta > 0:
        beta = slow_decay_reference(ledger, slow_beta)
        gradients = old["gradient_square"]
        gradients = gradients + (1.0 - beta) * (used * used - gradients)
        noise = beta * beta * old["slow_noise"] + (1.0 - beta) * (1.0 - beta)
        ratio = slow_ema_square / (gradients + 1e-300)
        signal = ((ratio - noise) / (1.0 - noise).clamp(min=1e-9)).clamp(0.0, 1.0)
        if measured:
            new["signal"] = torch.where(noise < 0.999, signal, torch.zeros_like(signal))
        new["pull"] = old["pull"] + DIRECTION_RATE.value * (pull - old["pull"])
        new["slow_count"] = old["slow_count"] + 1.0
        new["slow_noise"] = noise
        new["gradient_square"] = gradients
    new["cooldown"] = (old["cooldown"] - 1.0).clamp(min=0.0)
    ledger.copy_(torch.where(applied, torch.stack(list(new.values())), ledger))


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
