"""The programs on the ledger in plain torch, without waiting for the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from triton_hybrid.kernels import ledger as rules
from triton_hybrid.kernels.ledger import INDEX

if TYPE_CHECKING:
    from triton_hybrid.kernels.scalars import Scalars

Entries = dict[str, Tensor]
"""Entries of a ledger by name; 0-dim FP64."""


def enter(entries: Entries, where: Tensor, **values: Tensor | float) -> None:
    """Gives entries new values where a condition holds."""
    for name, value in values.items():
        entries[name] = torch.where(where, value, entries[name])


def count(entries: Entries, **events: Tensor) -> None:
    """Adds one to the counters of the events that happened."""
    for name, event in events.items():
        entries[name] = entries[name] + event


def slow_decay_torch(ledger: Tensor, largest: float) -> Tensor:
    """`slow_decay` in plain torch; 0-dim FP64."""
    gradients: Tensor = ledger[INDEX["slow_count"]]
    decay: Tensor = gradients / (gradients + rules.SLOW_WARMUP.value)
    return decay.clamp(max=largest)


def slow_share_torch(ledger: Tensor, norm: Tensor, clip: Tensor) -> Tensor:
    """`slow_share` in plain torch; 0-dim FP64."""
    usual = rules.OUTLIER.value * ledger[INDEX["norm_mean"]].exp()
    limited = torch.minimum(clip, usual / (norm + 1e-30))
    limited = torch.where(ledger[INDEX["norm_count"]] > 0.5, limited, clip)
    return limited / clip.clamp(min=1e-300)


def _rate(updates: Tensor) -> Tensor:
    """Of an exponential mean: the first updates are averaged evenly."""
    return (1.0 / (updates + 1.0)).clamp(min=rules.SLOWEST_RATE.value)


def _average(entries: Entries, name: str, value: Tensor, where: Tensor) -> None:
    """Takes a number into a count, a mean and a variance."""
    before, mean, variance = (entries[f"{name}_{part}"] for part in ("count", "mean", "variance"))
    rate = _rate(before)
    deviation = value - mean
    variance = (1.0 - rate) * (variance + rate * deviation * deviation)
    changed = {"count": before + 1.0, "mean": mean + rate * deviation, "variance": variance}
    enter(entries, where, **{f"{name}_{part}": number for part, number in changed.items()})


def observe_torch(
    ledger: Tensor,
    norm: Tensor,
    used: Tensor,
    sums: Tensor,
    slow_beta: float,
    applied: Tensor,
    measured: bool = True,
) -> None:
    """Takes one applied base update into the running statistics.

    The signal share follows from two expectations: of the squared gradient, s + n, and of the
    squared EMA, s + c·n, where c is the sum of the squared weights of its gradients, and s and n
    are the squared norms of the mean gradient and of its noise.

    Args:
        ledger: FP64 ledger, changed in place.
        norm: 0-dim FP64, norm of the gradient as it came; `decide` compares with it.
        used: 0-dim FP64, its norm as the slow EMA takes it, clipped and without outliers.
        sums: FP64, what `UPDATE_SUMS` names.
        slow_beta: Largest decay of the slow EMA; 0 without one.
        applied: 0-dim bool; False leaves every entry as it is.
        measured: Whether update, slow direction and slow EMA were measured in this step.
    """
    entries = dict(zip(INDEX, ledger.unbind()))
    update_square, update_slow, slow_slow, slow_ema_square = sums.unbind()
    known = norm > 0  # a batch that is masked altogether says nothing of the usual norm
    _average(entries, "norm", torch.where(known, norm, 1.0).log(), known)
    loss, previous = entries["loss"], entries["loss_previous"]
    _average(entries, "loss", loss - previous, loss.isfinite() & previous.isfinite())
    enter(entries, loss.isfinite(), loss_previous=loss)

    if measured:
        step = rules.DIRECTION_RATE.value
        mean, updates = entries["update_square"], entries["update_count"]
        entries["update_square"] = mean + _rate(updates) * (update_square - mean)
        entries["update_count"] = updates + 1.0
        products = {"update_slow": update_slow, "update_update": update_square}
        for name, value in (products | {"slow_slow": slow_slow}).items():
            entries[name] = (1.0 - step) * entries[name] + step * value
        product = entries["update_update"] * entries["slow_slow"]
        cosine = entries["update_slow"] / (product + 1e-300).sqrt()
        entries["confidence"] = cosine.clamp(0.0, 1.0)
    if slow_beta > 0:
        beta = slow_decay_torch(ledger, slow_beta)
        gradients = entries["gradient_square"]
        gradients = gradients + (1.0 - beta) * (used * used - gradients)
        noise = beta * beta * entries["slow_noise"] + (1.0 - beta) * (1.0 - beta)
        if measured:
            ratio = slow_ema_square / (gradients + 1e-300)
            signal = ((ratio - noise) / (1.0 - noise).clamp(min=1e-9)).clamp(0.0, 1.0)
            entries["signal"] = torch.where(noise < 0.999, signal, 0.0)
        entries["slow_count"] = entries["slow_count"] + 1.0
        entries["slow_noise"] = noise
        entries["gradient_square"] = gradients
    entries["cooldown"] = (entries["cooldown"] - 1.0).clamp(min=0.0)
    ledger.copy_(torch.where(applied, torch.stack(list(entries.values())), ledger))


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
    going_on = ~fresh & (ledger[INDEX["moved"]] > 0)
    return ((fresh & calm & sure) | going_on) & (ledger[INDEX["written"]] == 0)


def reject_torch(entries: Entries, cooldown: float, rejected: Tensor) -> None:
    """`reject`, where ``rejected`` is true."""
    doublings = entries["rejections"].clamp(max=rules.LONGEST_COOLDOWN.value)
    wait = cooldown * torch.exp2(doublings)
    enter(entries, rejected, cooldown=wait, horizon=0.5 * entries["horizon"])
    count(entries, rejections=rejected, rejected=rejected)


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
    blocked = torch.where(nonfinite, entries["blocked"] + 1.0, 0.0)
    point_to_blame = nonfinite & (blocked >= rules.BLOCKED_LIMIT.value)

    deviation = entries["norm_variance"].sqrt().clamp(min=rules.NORM_DEVIATION_FLOOR.value)
    excess = (norm + 1e-30).log() - entries["norm_mean"]
    hidden = entries["norm_variance"] < rules.PINNED_VARIANCE.value
    back = sums[:, 0].sum() > rules.BACKWARD.value * norm * entries["jump_square"].sqrt()
    by_norm = (excess > threshold * deviation) | (hidden & back)
    by_norm = by_norm & (entries["norm_count"] > 1.5) & ~nonfinite
    loss, previous = entries["loss"], entries["loss_previous"]
    floor = rules.LOSS_DEVIATION_FLOOR.value * previous.abs()
    spread = torch.maximum(entries["loss_variance"].sqrt(), floor)
    known = ~previous.isnan() & (entries["loss_count"] > 1.5)
    by_loss = known & (loss - (previous + entries["loss_mean"]) > threshold * spread)
    by_loss = (by_loss | loss.isinf()) & ~nonfinite

    rejected = moved & (point_to_blame | by_norm | by_loss)
    accepted = moved & ~rejected & ~nonfinite
    decided, undone = accepted | rejected, rejected
    written = decided & (entries["written"] > 0)
    accepted, rejected = accepted & ~written, rejected & ~written

    columns = (rules.FACTOR_COLUMN, rules.SLOPE_COLUMN, rules.FRACTION_COLUMN, rules.PART_COLUMN)
    factors, slopes, fractions, parts = (prediction[:, column.value] for column in columns)
    after, before = sums[:, 0], slopes.double()
    curved = (before < 0) & (after > before)
    secant = torch.where(curved, before / torch.where(curved, before - after, 1.0), 1.0)
    secant = secant.clamp(rules.SMALLEST_FRACTION.value, rules.LARGEST_FRACTION.value)
    trust = (2.0 * entries["signal"] - 1.0).clamp(0.0, 1.0)
    fraction = 1.0 + trust * (secant - 1.0)
    fraction = torch.where((fraction - 1.0).abs() < rules.FRACTION_TOLERANCE.value, 1.0, fraction)
    fraction = torch.where(accepted, fraction, torch.where(undone, 0.0, 1.0))
    fraction = torch.where(parts > 0, fraction, 1.0)
    scale = (1.0 + rules.SCALE_MEMORY.value * (factors.double() - 1.0)) * fraction
    scale = scale.clamp(rules.SMALLEST_SCALE.value, rules.LARGEST_SCALE.value).float()
    fractions.copy_(torch.where(decided, fraction.float(), fractions))
    factors.copy_(torch.where(accepted, scale, factors))
    slopes.copy_(torch.where(decided, 0.0, slopes))

    entries["blocked"] = torch.where(moved & ~undone, blocked, 0.0)
    grown = (entries["horizon"] * rules.HORIZON_GROWTH.value).clamp(max=1.0)
    enter(entries, accepted, rejections=0.0, horizon=grown, step_fraction=fraction.mean())
    reject_torch(entries, cooldown, rejected)
    enter(entries, rejected, hold=1.0, loss=torch.nan)
    enter(entries, decided, moved=0.0, stretch=0.0, jump_square=0.0, written=0.0)
    count(
        entries,
        accepted=accepted,
        cause_nonfinite=rejected & point_to_blame,
        cause_norm=rejected & by_norm,
        cause_loss=rejected & by_loss,
    )
    entries["decision"] = accepted + 2.0 * rejected + 3.0 * written
    ledger.copy_(torch.stack(list(entries.values())))
