"""The programs on the ledger in plain torch, without waiting for the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from triton_hybrid.kernels import ledger as rules
from triton_hybrid.kernels.ledger import INDEX

if TYPE_CHECKING:
    from triton_hybrid.kernels.scalars import Scalars


def slow_decay_torch(ledger: Tensor, slow_beta: float) -> Tensor:
    """`slow_decay` in plain torch; 0-dim FP64."""
    count: Tensor = ledger[INDEX["slow_count"]]
    decay: Tensor = (count / (count + rules.SLOW_WARMUP.value)).clamp(max=slow_beta)
    return decay


def slow_clip_torch(ledger: Tensor, norm: Tensor, coefficient: Tensor) -> Tensor:
    """`slow_clip` in plain torch; 0-dim FP64."""
    usual = rules.OUTLIER.value * ledger[INDEX["norm_mean"]].exp()
    limited = torch.minimum(coefficient, usual / (norm + 1e-30))
    return torch.where(ledger[INDEX["norm_count"]] > 0.5, limited, coefficient)


def observe_torch(
    ledger: Tensor,
    norm: Tensor,
    used: Tensor,
    update_square: Tensor,
    update_slow: Tensor,
    slow_slow: Tensor,
    slow_ema_square: Tensor,
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
        norm: 0-dim FP64, norm of the gradient as it came; `decide` compares with it.
        used: 0-dim FP64, its norm as the slow EMA takes it, clipped and without outliers.
        update_square: 0-dim FP64, squared norm of the base update.
        update_slow: 0-dim FP64, inner product of base update and older slow direction.
        slow_slow: 0-dim FP64, squared norm of the older slow direction.
        slow_ema_square: 0-dim FP64, squared norm of the slow EMA.
        slow_beta: Largest decay of the slow EMA; 0 without one.
        applied: 0-dim bool; False leaves every entry as it is.
        measured: Whether update, slow direction and slow EMA were measured in this step.
    """
    old = dict(zip(INDEX, ledger.unbind()))
    new = dict(old)
    count = old["norm_count"]
    rate = (1.0 / (count + 1.0)).clamp(min=rules.SLOWEST_RATE.value)
    deviation = (norm + 1e-30).log() - old["norm_mean"]
    new["norm_mean"] = old["norm_mean"] + rate * deviation
    new["norm_variance"] = (1.0 - rate) * (old["norm_variance"] + rate * deviation * deviation)
    new["norm_count"] = count + 1.0

    seen = old["loss"].isfinite()
    both = seen & old["loss_previous"].isfinite()
    loss_rate = (1.0 / (old["loss_count"] + 1.0)).clamp(min=rules.SLOWEST_RATE.value)
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
        update_rate = (1.0 / (updates + 1.0)).clamp(min=rules.SLOWEST_RATE.value)
        mean = old["update_square"]
        new["update_square"] = mean + update_rate * (update_square - mean)
        new["update_count"] = updates + 1.0
        step = rules.DIRECTION_RATE.value
        for name, value in (
            ("update_slow", update_slow),
            ("update_update", update_square),
            ("slow_slow", slow_slow),
        ):
            new[name] = (1.0 - step) * old[name] + step * value
        product = new["update_update"] * new["slow_slow"]
        new["confidence"] = (new["update_slow"] / (product + 1e-300).sqrt()).clamp(0.0, 1.0)
    if slow_beta > 0:
        beta = slow_decay_torch(ledger, slow_beta)
        gradients = old["gradient_square"]
        gradients = gradients + (1.0 - beta) * (used * used - gradients)
        noise = beta * beta * old["slow_noise"] + (1.0 - beta) * (1.0 - beta)
        ratio = slow_ema_square / (gradients + 1e-300)
        signal = ((ratio - noise) / (1.0 - noise).clamp(min=1e-9)).clamp(0.0, 1.0)
        if measured:
            new["signal"] = torch.where(noise < 0.999, signal, torch.zeros_like(signal))
        new["slow_count"] = old["slow_count"] + 1.0
        new["slow_noise"] = noise
        new["gradient_square"] = gradients
    new["cooldown"] = (old["cooldown"] - 1.0).clamp(min=0.0)
    ledger.copy_(torch.where(applied, torch.stack(list(new.values())), ledger))


def move_loss_scale_torch(ledger: Tensor, nonfinite: Tensor) -> None:
    """Takes a gradient into account, where the scale is dynamic.

    Args:
        ledger: FP64 ledger, changed in place; the scale is an FP32 number.
        nonfinite: 0-dim bool, whether the gradient held an infinity or a NaN.
    """
    tracker, scale = ledger[INDEX["growth_tracker"]], ledger[INDEX["loss_scale"]]
    dynamic = tracker >= 0
    passed = tracker + 1.0 == rules.GROWTH_INTERVAL.value
    grown = (scale * rules.GROWTH.value).float()
    grown = torch.where(passed & grown.isfinite(), grown.double(), scale)
    shrunk = (scale * rules.BACKOFF.value).float().double()
    moved = torch.where(nonfinite, shrunk, grown)
    counted = torch.where(nonfinite | passed, torch.zeros_like(tracker), tracker + 1.0)
    ledger[INDEX["loss_scale"]] = torch.where(dynamic, moved, scale)
    ledger[INDEX["growth_tracker"]] = torch.where(dynamic, counted, tracker)


def gate_torch(ledger: Tensor, threshold: float) -> Tensor:
    """Whether the weights may move; 0-dim bool."""
    fresh = ledger[INDEX["stretch"]] == 0
    calm = (ledger[INDEX["cooldown"]] == 0) & (ledger[INDEX["nonfinite"]] == 0)
    sure = ledger[INDEX["confidence"]] >= threshold
    return (fresh & calm & sure) | (~fresh & (ledger[INDEX["moved"]] > 0))


def reject_torch(entries: dict[str, Tensor], cooldown: float, rejected: Tensor) -> None:
    """`reject` on a dictionary of ledger entries, where ``rejected`` is true."""
    doublings = entries["rejections"].clamp(max=rules.LONGEST_COOLDOWN.value)
    wait = cooldown * torch.exp2(doublings)
    entries["cooldown"] = torch.where(rejected, wait, entries["cooldown"])
    entries["rejections"] = entries["rejections"] + rejected
    entries["rejected"] = entries["rejected"] + rejected
    entries["horizon"] = torch.where(rejected, 0.5 * entries["horizon"], entries["horizon"])


def decide_torch(scalars: Scalars, threshold: float, cooldown: float) -> None:
    """`decide` in plain torch, without waiting for the device.

    The step fraction is the secant rule: with slope ``a`` before and ``b`` after the move,
    the minimum along it lies at a / (a - b). Noise makes single slopes worthless: the
    correction is weighted by 2 · signal - 1, and none is made where half of the squared
    gradient or more is noise. (Weighted by the signal share alone, the few slopes of the
    first steps set horizon factors of 0.7 to 1.6, and a small language model ended at a
    loss of 2.29 instead of 2.14.)
    """
    ledger, sums, prediction = scalars.ledger, scalars.sums, scalars.prediction
    entries = dict(zip(INDEX, ledger.unbind()))
    norm = sums[:, 1].sum().sqrt()
    nonfinite = (sums[:, 2].sum() > 0) | (entries["found_inf"] > 0)
    moved = entries["moved"] > 0
    zero = torch.zeros_like(norm)
    blocked = torch.where(nonfinite, entries["blocked"] + 1.0, zero)
    point_to_blame = nonfinite & (blocked >= rules.BLOCKED_LIMIT.value)

    deviation = entries["norm_variance"].sqrt().clamp(min=rules.NORM_DEVIATION_FLOOR.value)
    excess = (norm + 1e-30).log() - entries["norm_mean"]
    by_norm = (excess > threshold * deviation) & (entries["norm_count"] > 1.5) & ~nonfinite
    loss, previous = entries["loss"], entries["loss_previous"]
    spread = torch.maximum(
        entries["loss_variance"].sqrt(), rules.LOSS_DEVIATION_FLOOR.value * previous.abs()
    )
    known = ~previous.isnan() & (entries["loss_count"] > 1.5)
    by_loss = known & (loss - (previous + entries["loss_mean"]) > threshold * spread)
    by_loss = (by_loss | loss.isinf()) & ~nonfinite

    rejected = moved & (point_to_blame | by_norm | by_loss)
    accepted = moved & ~rejected & ~nonfinite

    after, before = sums[:, 0], prediction[:, rules.SLOPE_COLUMN.value].double()
    curved = (before < 0) & (after > before)
    one = torch.ones_like(before)
    secant = torch.where(curved, before / torch.where(curved, before - after, one), one)
    secant = secant.clamp(rules.SMALLEST_FRACTION.value, rules.LARGEST_FRACTION.value)
    trust = (2.0 * entries["signal"] - 1.0).clamp(0.0, 1.0)
    fraction = 1.0 + trust * (secant - 1.0)
    fraction = torch.where((fraction - 1.0).abs() < rules.FRACTION_TOLERANCE.value, one, fraction)
    fraction = torch.where(accepted, fraction, torch.where(rejected, 0.0 * one, one))
    scale = prediction[:, rules.FACTOR_COLUMN.value].double()
    scale = (1.0 + rules.SCALE_MEMORY.value * (scale - 1.0)) * fraction
    scale = scale.clamp(rules.SMALLEST_SCALE.value, rules.LARGEST_SCALE.value).float()
    prediction[:, rules.FRACTION_COLUMN.value] = torch.where(
        accepted | rejected, fraction.float(), prediction[:, rules.FRACTION_COLUMN.value]
    )
    prediction[:, rules.FACTOR_COLUMN.value] = torch.where(
        accepted, scale, prediction[:, rules.FACTOR_COLUMN.value]
    )
    decided = accepted | rejected
    prediction[:, rules.SLOPE_COLUMN.value] = torch.where(
        decided, torch.zeros_like(scale), prediction[:, rules.SLOPE_COLUMN.value]
    )

    entries["blocked"] = torch.where(moved & ~rejected, blocked, zero)
    entries["accepted"] = entries["accepted"] + accepted
    entries["rejections"] = torch.where(accepted, zero, entries["rejections"])
    grown = (entries["horizon"] * rules.HORIZON_GROWTH.value).clamp(max=1.0)
    entries["horizon"] = torch.where(accepted, grown, entries["horizon"])
    entries["step_fraction"] = torch.where(accepted, fraction.mean(), entries["step_fraction"])
    reject_torch(entries, cooldown, rejected)
    entries["hold"] = torch.where(rejected, torch.ones_like(zero), entries["hold"])
    entries["loss"] = torch.where(rejected, torch.full_like(zero, torch.nan), entries["loss"])
    entries["cause_nonfinite"] = entries["cause_nonfinite"] + (rejected & point_to_blame)
    entries["cause_norm"] = entries["cause_norm"] + (rejected & by_norm)
    entries["cause_loss"] = entries["cause_loss"] + (rejected & by_loss)
    for name in ("moved", "stretch", "jump_square"):
        entries[name] = torch.where(decided, zero, entries[name])
    entries["decision"] = accepted + 2.0 * rejected
    ledger.copy_(torch.stack(list(entries.values())))
