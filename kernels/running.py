"""Running statistics of real steps, in the ledger: what is usual, and how updates are followed.

``ledger_torch`` has the same in plain torch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton_hybrid.kernels.ledger import (
    CONFIDENCE,
    COOLDOWN,
    GRADIENT_SQUARE,
    LOSS,
    LOSS_COUNT,
    LOSS_DEVIATION_FLOOR,
    LOSS_EARLY,
    LOSS_LATE,
    LOSS_NOISE,
    LOSS_PREVIOUS,
    LOSSES,
    NORM_COUNT,
    NORM_DEVIATION_FLOOR,
    NORM_MEAN,
    SIGNAL,
    SLOW_COUNT,
    SLOW_NOISE,
    SLOW_SLOW,
    UPDATE_COUNT,
    UPDATE_SLOW,
    UPDATE_SQUARE,
    UPDATE_UPDATE,
    add,
    between,
)
from triton_hybrid.kernels.sums import column_total

SLOWEST_RATE = tl.constexpr(0.05)
"""Floor of the averaging rate of running statistics: a memory of about 20 steps."""
FAR = tl.constexpr(5.0)
"""Standard deviations by which a lone number counts at most. Unlimited, one loss of ten times the
usual was as good as no loss for 300 steps: nothing seemed high beside it. The second in a row is
another level, or other noise, and is believed."""
DIRECTION_RATE = tl.constexpr(0.2)
"""Averaging rate of the inner products behind the confidence: about 5 steps."""
SLOW_WARMUP = tl.constexpr(4.0)
"""The slow EMA remembers about a quarter of the run so far, until ``slow_beta`` is reached.
In 50 steps of GPT-2 small a decay of 0.8 predicted better than 0.9."""
EARLY, LATE = tl.constexpr(4.0), tl.constexpr(10.0)
"""Of the two means of all n losses: the k-th has the weight k^(q - 1), so they look back over a
share of the run, a fifth and an eleventh in the mean, and see a slower fall in a longer run."""
APART = tl.constexpr(50.2)
"""Squared distance of the two at which it is cut, in units of variance / n (6 standard deviations):
what has fallen long ago would hide a floor. One that is reached after 300 losses is seen after 550
where they fell by 30 standard deviations of one, after 780 where by 300."""
OUTLIER = tl.constexpr(2.0)
"""The slow EMA takes a gradient with at most this many times the usual norm (the running
geometric mean). In GPT-2 small one gradient of 250 times the squared usual norm was the slow
EMA's direction for the 25 steps that followed."""


@triton.jit
def slow_decay(ledger, largest):
    """Decay of the slow EMA after n gradients: n / (n + SLOW_WARMUP), at most ``largest``.

    The window grows with the run, as AdEMAMix warms its slow momentum, and the weights of
    the gradients always add up to one, so no bias correction is needed.
    """
    count = tl.load(ledger + SLOW_COUNT)
    return tl.minimum(count / (count + SLOW_WARMUP), largest)


@triton.jit
def slow_share(ledger, norm, clip):
    """What the slow EMA takes of a gradient that was clipped: 1 but for an `OUTLIER`."""
    usual = OUTLIER * tl.exp(tl.load(ledger + NORM_MEAN))
    limited = tl.minimum(clip, usual / (norm + 1e-30))
    return tl.where(tl.load(ledger + NORM_COUNT) > 0.5, limited, clip) / tl.maximum(clip, 1e-300)


@triton.jit
def _average(cells, value, floor):
    """Takes a number into a count, a mean and a variance that lie side by side, limited to `FAR`.

    Not the second in a row, nor where nothing is known of their spread. Returns what that takes
    from the number, 0 for most.
    """
    count, mean, known = tl.load(cells), tl.load(cells + 1), tl.load(cells + 2)
    rate = tl.maximum(1.0 / (count + 1.0), SLOWEST_RATE)
    away = value - mean
    far = FAR * tl.maximum(tl.sqrt(known), floor)
    limited = (count > 1.5) & (far > 0) & (tl.load(cells + 3) == 0) & (tl.abs(away) > far)
    deviation = tl.where(limited, between(away, -far, far), away)
    tl.store(cells, count + 1.0)
    tl.store(cells + 1, mean + rate * deviation)
    tl.store(cells + 2, (1.0 - rate) * (known + rate * deviation * deviation))
    tl.store(cells + 3, limited.to(tl.float64))
    return away - deviation


@triton.jit
def _follow(ledger, loss, change):
    """Takes a loss into the means that tell whether losses are flat, its change into their noise.

    Half the mean squared change is the variance, whatever the trend.
    """
    n, late = tl.load(ledger + LOSSES), tl.load(ledger + LOSS_LATE)
    early, noise = tl.load(ledger + LOSS_EARLY), tl.load(ledger + LOSS_NOISE)
    rate = 1.0 / (n / EARLY + 1.0)
    noise += rate * (0.5 * change * change - noise)
    late += (loss - late) / (n / LATE + 1.0)
    reach = tl.sqrt(noise * APART / (n + 1.0))
    early = late + between(early + rate * (loss - early) - late, -reach, reach)
    tl.store(ledger + LOSSES, n + 1.0)
    tl.store(ledger + LOSS_LATE, late)
    tl.store(ledger + LOSS_EARLY, early)
    tl.store(ledger + LOSS_NOISE, noise)


@triton.jit
def observe(
    ledger, partials, norm, clip, slow_beta,
    SLOW: tl.constexpr, MEASURE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Takes one applied base update into the running statistics (see `observe_torch`)."""
    share = slow_share(ledger, norm, clip) if SLOW else 1.0
    if norm > 0:  # a batch that is masked altogether says nothing of the usual norm
        _average(ledger + NORM_COUNT, tl.log(norm), NORM_DEVIATION_FLOOR)
    loss = tl.load(ledger + LOSS)
    previous = tl.load(ledger + LOSS_PREVIOUS)
    if tl.abs(loss) < float("inf"):
        if tl.abs(previous) < float("inf"):
            floor = LOSS_DEVIATION_FLOOR * tl.abs(previous)
            loss -= _average(ledger + LOSS_COUNT, loss - previous, floor)
        tl.store(ledger + LOSS_PREVIOUS, loss)
        _follow(ledger, loss, tl.where(tl.abs(previous) < float("inf"), loss - previous, 0.0))

    if MEASURE:
        update_square = column_total(partials, 2, COLUMNS)
        updates = tl.load(ledger + UPDATE_COUNT)
        mean = tl.load(ledger + UPDATE_SQUARE)
        rate = tl.maximum(1.0 / (updates + 1.0), SLOWEST_RATE)
        tl.store(ledger + UPDATE_SQUARE, mean + rate * (update_square - mean))
        tl.store(ledger + UPDATE_COUNT, updates + 1.0)
        keep = 1.0 - DIRECTION_RATE
        along = column_total(partials, 3, COLUMNS)
        slow = column_total(partials, 4, COLUMNS)
        us = keep * tl.load(ledger + UPDATE_SLOW) + DIRECTION_RATE * along
        uu = keep * tl.load(ledger + UPDATE_UPDATE) + DIRECTION_RATE * update_square
        ss = keep * tl.load(ledger + SLOW_SLOW) + DIRECTION_RATE * slow
        tl.store(ledger + UPDATE_SLOW, us)
        tl.store(ledger + UPDATE_UPDATE, uu)
        tl.store(ledger + SLOW_SLOW, ss)
        tl.store(ledger + CONFIDENCE, between(us / tl.sqrt(uu * ss + 1e-300), 0.0, 1.0))
    if SLOW:
        used = norm * clip * share
        beta = slow_decay(ledger, slow_beta)
        gradients = tl.load(ledger + GRADIENT_SQUARE)
        gradients = gradients + (1.0 - beta) * (used * used - gradients)
        noise = beta * beta * tl.load(ledger + SLOW_NOISE) + (1.0 - beta) * (1.0 - beta)
        add(ledger + SLOW_COUNT, 1.0)
        tl.store(ledger + SLOW_NOISE, noise)
        tl.store(ledger + GRADIENT_SQUARE, gradients)
        if MEASURE:
            ratio = column_total(partials, 5, COLUMNS) / (gradients + 1e-300)
            signal = between((ratio - noise) / tl.maximum(1.0 - noise, 1e-9), 0.0, 1.0)
            tl.store(ledger + SIGNAL, tl.where(noise < 0.999, signal, 0.0))
    tl.store(ledger + COOLDOWN, tl.maximum(tl.load(ledger + COOLDOWN) - 1.0, 0.0))
