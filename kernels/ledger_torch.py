"""The programs on the ledger in plain torch and plain Python, without waiting for the device."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from triton_hybrid.kernels import ledger as rules
from triton_hybrid.kernels import running
from triton_hybrid.kernels.ledger import INDEX
from triton_hybrid.kernels.scalar_math import (
    Number,
    Truth,
    beside,
    clamp,
    exp,
    exp2,
    finite,
    larger,
    log,
    named,
    negate,
    number,
    rounded,
    smaller,
    sqrt,
    total,
    where,
    write,
)

if TYPE_CHECKING:
    from triton_hybrid.kernels.scalars import Scalars

Entries = dict[str, Number]
"""Entries of a ledger by name."""


def entries_of(ledger: Tensor) -> Entries:
    """All of a ledger, to be written back by `write`."""
    return named(ledger, INDEX)


def enter(entries: Entries, condition: Truth, **values: Number) -> None:
    """Gives entries new values where a condition holds."""
    for name, value in values.items():
        entries[name] = where(condition, value, entries[name])


def count(entries: Entries, **events: Truth) -> None:
    """Adds one to the counters of the events that happened."""
    for name, event in events.items():
        entries[name] = entries[name] + event


def slow_decay_torch(entries: Entries, largest: float) -> Number:
    """`slow_decay` in plain torch."""
    gradients = entries["slow_count"]
    return clamp(gradients / (gradients + running.SLOW_WARMUP.value), most=largest)


def slow_share_torch(entries: Entries, norm: Number, clip: Number) -> Number:
    """`slow_share` in plain torch."""
    usual = running.OUTLIER.value * exp(entries["norm_mean"])
    limited = smaller(clip, usual / (norm + 1e-30))
    limited = where(entries["norm_count"] > 0.5, limited, clip)
    return limited / clamp(clip, 1e-300)


def _rate(updates: Number) -> Number:
    """Of an exponential mean: the first updates are averaged evenly."""
    return clamp(1.0 / (updates + 1.0), running.SLOWEST_RATE.value)


def _average(entries: Entries, name: str, value: Number, floor: Number, condition: Truth) -> Number:
    """`_average` of ``running``, where a condition holds."""
    names = [f"{name}_{part}" for part in ("count", "mean", "variance", "limited")]
    before, mean, variance, last = (entries[part] for part in names)
    rate, away = _rate(before), value - mean
    far = running.FAR.value * larger(sqrt(variance), floor)
    limited = (before > 1.5) & (far > 0) & (last == 0) & (abs(away) > far)
    deviation = where(limited, larger(smaller(away, far), -far), away)
    variance = (1.0 - rate) * (variance + rate * deviation * deviation)
    flag = where(limited, beside(away, 1.0), beside(away, 0.0))
    values = (before + 1.0, mean + rate * deviation, variance, flag)
    enter(entries, condition, **dict(zip(names, values)))
    return where(condition, away - deviation, beside(away, 0.0))


def _follow(entries: Entries, loss: Number, change: Number, condition: Truth) -> None:
    """`_follow` of ``running``, where a condition holds."""
    n, noise, early = (entries[name] for name in ("losses", "loss_noise", "loss_early"))
    rate, late = 1.0 / (n / running.EARLY.value + 1.0), entries["loss_late"]
    noise = noise + rate * (0.5 * change * change - noise)
    late = late + (loss - late) / (n / running.LATE.value + 1.0)
    reach = sqrt(noise * running.APART.value / (n + 1.0))
    apart = larger(smaller(early + rate * (loss - early) - late, reach), -reach)
    means = {"loss_late": late, "loss_early": late + apart}
    enter(entries, condition, losses=n + 1.0, loss_noise=noise, **means)


def observe_torch(
    entries: Entries,
    norm: Number,
    used: Number,
    sums: Sequence[Number],
    slow_beta: float,
    applied: Truth,
    measured: bool = True,
) -> None:
    """Takes one applied base update into the running statistics.

    The signal share follows from two expectations: of the squared gradient, s + n, and of the
    squared EMA, s + c·n, where c is the sum of the squared weights of its gradients, and s and n
    are the squared norms of the mean gradient and of its noise.

    Args:
        entries: Of the ledger; changed.
        norm: Norm of the gradient as it came; `decide` compares with it.
        used: Its norm as the slow EMA takes it, clipped and without outliers.
        sums: What `UPDATE_SUMS` names.
        slow_beta: Largest decay of the slow EMA; 0 without one.
        applied: False leaves every entry as it is.
        measured: Whether update, slow direction and slow EMA were measured in this step.
    """
    before = dict(entries)
    update_square, update_slow, slow_slow, slow_ema_square = sums
    known = norm > 0  # a batch that is masked altogether says nothing of the usual norm
    least = beside(norm, rules.NORM_DEVIATION_FLOOR.value)
    _average(entries, "norm", log(where(known, norm, 1.0)), least, known)
    loss, previous = entries["loss"], entries["loss_previous"]
    least = rules.LOSS_DEVIATION_FLOOR.value * abs(previous)
    taken = _average(entries, "loss", loss - previous, least, finite(loss) & finite(previous))
    loss = loss - taken
    enter(entries, finite(loss), loss_previous=loss)
    change = where(finite(previous), loss - previous, beside(loss, 0.0))
    _follow(entries, loss, change, finite(loss))

    if measured:
        step = running.DIRECTION_RATE.value
        mean, updates = entries["update_square"], entries["update_count"]
        entries["update_square"] = mean + _rate(updates) * (update_square - mean)
        entries["update_count"] = updates + 1.0
        products = {"update_slow": update_slow, "update_update": update_square}
        for name, value in (products | {"slow_slow": slow_slow}).items():
            entries[name] = (1.0 - step) * entries[name] + step * value
        product = entries["update_update"] * entries["slow_slow"]
        cosine = entries["update_slow"] / sqrt(product + 1e-300)
        entries["confidence"] = clamp(cosine, 0.0, 1.0)
    if slow_beta > 0:
        beta = slow_decay_torch(entries, slow_beta)
        gradients = entries["gradient_square"]
        gradients = gradients + (1.0 - beta) * (used * used - gradients)
        noise = beta * beta * entries["slow_noise"] + (1.0 - beta) * (1.0 - beta)
        if measured:
            ratio = slow_ema_square / (gradients + 1e-300)
            signal = clamp((ratio - noise) / clamp(1.0 - noise, 1e-9), 0.0, 1.0)
            entries["signal"] = where(noise < 0.999, signal, 0.0)
        entries["slow_count"] = entries["slow_count"] + 1.0
        entries["slow_noise"] = noise
        entries["gradient_square"] = gradients
    entries["cooldown"] = clamp(entries["cooldown"] - 1.0, 0.0)
    entries.update({name: where(applied, entries[name], before[name]) for name in before})


def move_loss_scale_torch(entries: Entries, nonfinite: Truth) -> None:
    """Takes a gradient into account, where the scale is dynamic; it is an FP32 number.

    ``nonfinite``: whether the gradient held an infinity or a NaN.
    """
    tracker, scale = entries["growth_tracker"], entries["loss_scale"]
    dynamic = tracker >= 0
    if dynamic is False:
        return
    passed = tracker + 1.0 == rules.GROWTH_INTERVAL.value
    grown = rounded(scale * rules.GROWTH.value)
    grown = where(passed & finite(grown), grown, scale)
    moved = where(nonfinite, rounded(scale * rules.BACKOFF.value), grown)
    counted = where(nonfinite | passed, 0.0, tracker + 1.0)
    enter(entries, dynamic, loss_scale=moved, growth_tracker=counted)


def is_flat_torch(entries: Mapping[str, Number]) -> Truth:
    """`is_flat` in plain torch."""
    n, apart = entries["losses"], entries["loss_early"] - entries["loss_late"]
    flat = n * apart * apart < entries["loss_noise"] * rules.FLAT.value
    return (n >= rules.LEAST_LOSSES.value) & flat


def is_sure_torch(entries: Mapping[str, Number], threshold: float) -> Truth:
    """Whether the model is confident enough; where the loss is flat that counts for nothing."""
    confidence = entries["confidence"]
    return where(is_flat_torch(entries), beside(confidence, 0.0), confidence) >= threshold


def gate_torch(entries: Entries, threshold: float) -> Truth:
    """Whether the weights may move."""
    fresh = entries["stretch"] == 0
    calm = (entries["cooldown"] == 0) & (entries["nonfinite"] == 0)
    going_on = negate(fresh) & (entries["moved"] > 0)
    return ((fresh & calm & is_sure_torch(entries, threshold)) | going_on) & (
        entries["written"] == 0
    )


def reject_torch(entries: Entries, cooldown: float, rejected: Truth) -> None:
    """`reject`, where ``rejected`` is true."""
    enter(entries, rejected, horizon=0.5 * entries["horizon"])
    wait_longer(entries, cooldown, rejected)


def wait_longer(entries: Entries, cooldown: float, rejected: Truth) -> None:
    """Forces steps of the base rule, twice as many with each rejection in a row."""
    doublings = clamp(entries["rejections"], most=rules.LONGEST_COOLDOWN.value)
    enter(entries, rejected, cooldown=cooldown * exp2(doublings))
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
    ledger, sums = scalars.ledger, scalars.sums
    entries = entries_of(ledger)
    norm = sqrt(total(sums[:, 1]))
    nonfinite = (total(sums[:, 2]) > 0) | (entries["found_inf"] > 0)
    moved = entries["moved"] > 0
    blocked = where(nonfinite, entries["blocked"] + 1.0, 0.0)
    point_to_blame = nonfinite & (blocked >= rules.BLOCKED_LIMIT.value)

    deviation = clamp(sqrt(entries["norm_variance"]), rules.NORM_DEVIATION_FLOOR.value)
    excess = log(norm + 1e-30) - entries["norm_mean"]
    hidden = entries["norm_variance"] < rules.PINNED_VARIANCE.value
    back = total(sums[:, 0]) > rules.BACKWARD.value * norm * sqrt(entries["jump_square"])
    by_norm = (excess > threshold * deviation) | (hidden & back)
    by_norm = by_norm & (entries["norm_count"] > 1.5) & negate(nonfinite)
    loss, previous = entries["loss"], entries["loss_previous"]
    floor = rules.LOSS_DEVIATION_FLOOR.value * abs(previous)
    spread = larger(sqrt(entries["loss_variance"]), floor)
    known = (previous == previous) & (entries["loss_count"] > 1.5)
    by_loss = known & (loss - (previous + entries["loss_mean"]) > threshold * spread)
    by_loss = (by_loss | (abs(loss) == math.inf)) & negate(nonfinite)

    rejected = moved & (point_to_blame | by_norm | by_loss)
    accepted = moved & negate(rejected | nonfinite)
    decided, undone = accepted | rejected, rejected
    written = decided & (entries["written"] > 0)
    accepted, rejected = accepted & negate(written), rejected & negate(written)

    mean = beside(norm, 1.0)
    if decided is not False:
        trust = clamp(2.0 * entries["signal"] - 1.0, 0.0, 1.0)
        mean = _place(scalars, trust, accepted, undone, decided)
    entries["blocked"] = where(moved & negate(undone), blocked, 0.0)
    grown = clamp(entries["horizon"] * rules.HORIZON_GROWTH.value, most=1.0)
    enter(entries, accepted, rejections=0.0, horizon=grown, step_fraction=mean)
    reject_torch(entries, cooldown, rejected)
    enter(entries, rejected, hold=1.0, loss=math.nan)
    enter(entries, decided, moved=0.0, stretch=0.0, jump_square=0.0, written=0.0)
    count(
        entries,
        accepted=accepted,
        cause_nonfinite=rejected & point_to_blame,
        cause_norm=rejected & by_norm,
        cause_loss=rejected & by_loss,
    )
    entries["decision"] = accepted + 2.0 * rejected + 3.0 * written
    write(ledger, entries)


def _place(
    scalars: Scalars, trust: Number, accepted: Truth, undone: Truth, decided: Truth
) -> Number:
    """Decides where each tensor is placed along the move; returns the mean fraction."""
    sums, prediction = scalars.sums, scalars.prediction
    columns = (rules.FACTOR_COLUMN, rules.SLOPE_COLUMN, rules.FRACTION_COLUMN, rules.PART_COLUMN)
    factors, slopes, fractions, parts = (prediction[:, column.value] for column in columns)
    after, before = sums[:, 0], slopes.double()
    curved = (before < 0) & (after > before)
    secant = torch.where(curved, before / torch.where(curved, before - after, 1.0), 1.0)
    secant = secant.clamp(rules.SMALLEST_FRACTION.value, rules.LARGEST_FRACTION.value)
    fraction = 1.0 + trust * (secant - 1.0)
    fraction = torch.where((fraction - 1.0).abs() < rules.FRACTION_TOLERANCE.value, 1.0, fraction)
    otherwise = where(undone, torch.zeros_like(fraction), torch.ones_like(fraction))
    fraction = torch.where(parts > 0, where(accepted, fraction, otherwise), 1.0)
    scale = (1.0 + rules.SCALE_MEMORY.value * (factors.double() - 1.0)) * fraction
    scale = scale.clamp(rules.SMALLEST_SCALE.value, rules.LARGEST_SCALE.value).float()
    fractions.copy_(where(decided, fraction.float(), fractions))
    factors.copy_(where(accepted, scale, factors))
    slopes.copy_(where(decided, torch.zeros_like(slopes), slopes))
    return number(fraction.mean())
