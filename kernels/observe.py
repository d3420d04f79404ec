"""Running statistics of the gradients and updates, on the device.

Everything here works on a few numbers, in FP64, in one program: means and deviations of gradient
norm and loss, the inner products behind the confidence, and the rates of the slow EMA and of the
weight EMA.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_hybrid.kernels.ledger import (
    CONFIDENCE,
    COOLDOWN,
    GRADIENT_SQUARE,
    INDEX,
    LOSS,
    LOSS_COUNT,
    LOSS_MEAN,
    LOSS_PREVIOUS,
    LOSS_VARIANCE,
    NORM_COUNT,
    NORM_MEAN,
    NORM_VARIANCE,
    PULL,
    SIGNAL,
    SLOW_COUNT,
    SLOW_NOISE,
    SLOW_SLOW,
    UPDATE_COUNT,
    UPDATE_SLOW,
    UPDATE_SQUARE,
    UPDATE_UPDATE,
)

SLOWEST_RATE = tl.constexpr(0.05)
"""Floor of the averaging rate of running statistics: a memory of about 20 steps."""
DIRECTION_RATE = tl.constexpr(0.2)
"""Averaging rate of the inner products behind the confidence: about 5 steps."""
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
