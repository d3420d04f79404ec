"""The ledger: every scalar that decisions are made of, in one FP64 vector on the device.

A step never waits for the device. What it measures (norms, losses, decisions) is written
here by the kernels and read there by the next ones; the host reads the whole ledger in one
copy when it must decide, at most once a cycle. The small programs that work on it alone are here,
in FP64; `ledger_torch` has the same in plain torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_hybrid.kernels.launch import LAUNCH, on_device

if TYPE_CHECKING:
    from triton_hybrid.kernels.scalars import Scalars

INDEX: dict[str, int] = {}
"""Place of each entry in the ledger, by name."""


def _entry(name: str) -> tl.constexpr:
    return tl.constexpr(INDEX.setdefault(name, len(INDEX)))


# The last real gradient.
NORM = _entry("norm")  # global L2 norm before clipping
NONFINITE = _entry("nonfinite")  # 1 when it held an infinity or a NaN
SKIPPED = _entry("skipped")  # how many gradients were skipped for that
APPLIED = _entry("applied")  # how many base updates were applied
HOLD = _entry("hold")  # 1: the next base update is left out (its point was rolled back)
LOSS_SCALE = _entry("loss_scale")  # what the coming gradient was multiplied with
GROWTH_TRACKER = _entry(
    "growth_tracker"
)  # finite gradients since the scale last changed; -1: it never does
FOUND_INF = _entry("found_inf")  # 1: a GradScaler found the coming gradient not finite
# Running statistics over real steps: logarithm of the norm, change of the loss.
NORM_COUNT = _entry("norm_count")
NORM_MEAN = _entry("norm_mean")
NORM_VARIANCE = _entry("norm_variance")
LOSS = _entry("loss")  # observed for the coming step; NaN when none was
LOSS_PREVIOUS = _entry("loss_previous")
LOSS_COUNT = _entry("loss_count")
LOSS_MEAN = _entry("loss_mean")
LOSS_VARIANCE = _entry("loss_variance")
# Size and direction of base updates.
UPDATE_COUNT = _entry("update_count")
UPDATE_SQUARE = _entry("update_square")  # running mean of the squared norm of a base update
GRADIENT_SQUARE = _entry(
    "gradient_square"
)  # running mean of the squared gradient norm, at the slow EMA's rate
SLOW_COUNT = _entry("slow_count")  # gradients in the slow EMA
SLOW_NOISE = _entry("slow_noise")  # sum of their squared weights: the share of noise that is left
UPDATE_SLOW = _entry("update_slow")  # running inner product of base update and slow direction
UPDATE_UPDATE = _entry("update_update")
SLOW_SLOW = _entry("slow_slow")
CONFIDENCE = _entry("confidence")
PULL = _entry("pull")  # running inner product of gradient and weight minus weight EMA
SIGNAL = _entry("signal")  # share of the squared gradient that is signal; the rest is noise
# The prediction under way and its past.
MOVED = _entry("moved")  # 1: the weights are away from the snapshot
STRETCH = _entry("stretch")  # predicted steps since the snapshot
JUMP_SQUARE = _entry("jump_square")  # squared distance from the snapshot
DECISION = _entry("decision")  # on the last prediction: 0 none, 1 accepted, 2 rolled back
HORIZON = _entry("horizon")  # factor on every displacement; halved by a rejection
REJECTIONS = _entry("rejections")  # rejections in a row
COOLDOWN = _entry("cooldown")  # real steps before the next prediction is allowed
BLOCKED = _entry("blocked")  # non-finite gradients in a row at the predicted point
STEP_FRACTION = _entry("step_fraction")  # mean secant step fraction of the last correction
# Counters.
ACCEPTED = _entry("accepted")
REJECTED = _entry("rejected")
CAUSE_NONFINITE = _entry("cause_nonfinite")
CAUSE_JUMP = _entry("cause_jump")
CAUSE_NORM = _entry("cause_norm")
CAUSE_LOSS = _entry("cause_loss")

START = {
    "loss": math.nan,
    "loss_previous": math.nan,
    "horizon": 1.0,
    "step_fraction": 1.0,
    "loss_scale": 1.0,
    "growth_tracker": -1.0,
}
"""Entries that do not begin at zero."""


def new_ledger(device: torch.device) -> Tensor:
    """A fresh ledger: FP64, one entry for each name in ``INDEX``."""
    return write_ledger(START, device)


def read_ledger(ledger: Tensor) -> dict[str, float]:
    """All entries as Python floats. Waits for the device."""
    return dict(zip(INDEX, ledger.tolist()))


def write_ledger(values: Mapping[str, float], device: torch.device) -> Tensor:
    """A ledger with the given entries, zero elsewhere."""
    return torch.tensor([float(values.get(name, 0.0)) for name in INDEX], dtype=torch.float64).to(
        device
    )


FACTOR_COLUMN = tl.constexpr(0)
SLOPE_COLUMN = tl.constexpr(1)
FRACTION_COLUMN = tl.constexpr(2)
PREDICTION_COLUMNS = tl.constexpr(3)
"""Columns of the table of predictions: a tensor's own factor on the horizon, the slope before the
move, and where verification placed the weights along it."""

# ------------------------------------------------------------------------------- running statistics

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
WEIGHT_EMA_WARMUP = tl.constexpr(2.0)
WEIGHT_EMA_BETA = tl.constexpr(0.85)
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
def weight_ema_decay(ledger):
    """Decay of the weight EMA for the coming update; 0 for the first."""
    count = tl.load(ledger + SLOW_COUNT)
    return tl.minimum(count / (count + WEIGHT_EMA_WARMUP), WEIGHT_EMA_BETA)


@triton.jit
def observe(
    ledger, norm, used, update_square, update_slow, slow_slow, slow_ema_square, pull, slow_beta,
    SLOW: tl.constexpr, MEASURE: tl.constexpr,
):  # fmt: skip
    """Takes one applied base update into the running statistics (see `observe_torch`)."""
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


# --------------------------------------------------------------------------------------- loss scale

FIRST_SCALE = 65536.0
GROWTH = tl.constexpr(2.0)
BACKOFF = tl.constexpr(0.5)
GROWTH_INTERVAL = tl.constexpr(2000)
"""GradScaler's defaults: twice the scale after so many finite gradients in a row, half of it
after one that is not."""


@triton.jit
def move_loss_scale(ledger, nonfinite):
    """Takes a gradient into account; see `move_loss_scale_torch`."""
    tracker = tl.load(ledger + GROWTH_TRACKER)
    if tracker >= 0:
        scale = tl.load(ledger + LOSS_SCALE)
        passed = tracker + 1.0 == GROWTH_INTERVAL
        grown = (scale * GROWTH).to(tl.float32)
        grown = tl.where(passed & (grown < float("inf")), grown.to(tl.float64), scale)
        shrunk = (scale * BACKOFF).to(tl.float32).to(tl.float64)
        tl.store(ledger + LOSS_SCALE, tl.where(nonfinite, shrunk, grown))
        tl.store(ledger + GROWTH_TRACKER, tl.where(nonfinite | passed, 0.0, tracker + 1.0))


# ---------------------------------------------------------------------------------------- decisions

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


@triton.jit
def gate(ledger, threshold):
    """Whether the weights may move.

    At the start of a stretch, if the model is confident and nothing forbids it; later in
    it, if the first move was not rolled back.
    """
    fresh = tl.load(ledger + STRETCH) == 0
    calm = (tl.load(ledger + COOLDOWN) == 0) & (tl.load(ledger + NONFINITE) == 0)
    sure = tl.load(ledger + CONFIDENCE) >= threshold
    return (fresh & calm & sure) | ((fresh == 0) & (tl.load(ledger + MOVED) > 0))


@triton.jit
def reject(ledger, cooldown):
    """Enters a rejection: halved horizon, and a Full phase that doubles with each in a row."""
    rejections = tl.load(ledger + REJECTIONS)
    doublings = tl.minimum(rejections, LONGEST_COOLDOWN)
    tl.store(ledger + COOLDOWN, cooldown * tl.exp2(doublings))
    tl.store(ledger + REJECTIONS, rejections + 1.0)
    tl.store(ledger + REJECTED, tl.load(ledger + REJECTED) + 1.0)
    tl.store(ledger + HORIZON, 0.5 * tl.load(ledger + HORIZON))


@triton.jit
def _decide_kernel(
    ledger,
    sums,
    prediction,
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
    n_decided = tl.where(accepted | rejected, n_tensors, 0)

    total = tl.zeros([TENSORS], dtype=tl.float64)
    for begin in range(0, n_tensors, TENSORS):
        t = begin + tl.arange(0, TENSORS)
        here = t < n_tensors
        after = tl.load(sums + 3 * t, mask=here, other=0.0)
        slope_cell = prediction + PREDICTION_COLUMNS * t + SLOPE_COLUMN
        before = tl.load(slope_cell, mask=here, other=0.0).to(tl.float64)
        curved = (before < 0) & (after > before)
        secant = tl.where(curved, before / tl.where(curved, before - after, 1.0), 1.0)
        secant = tl.minimum(tl.maximum(secant, SMALLEST_FRACTION), LARGEST_FRACTION)
        fraction = 1.0 + trust * (secant - 1.0)
        fraction = tl.where(tl.abs(fraction - 1.0) < FRACTION_TOLERANCE, 1.0, fraction)
        fraction = tl.where(accepted, fraction, tl.where(rejected, 0.0, 1.0))
        scale_cell = prediction + PREDICTION_COLUMNS * t + FACTOR_COLUMN
        scale = tl.load(scale_cell, mask=here, other=1.0).to(tl.float64)
        scale = (1.0 + SCALE_MEMORY * (scale - 1.0)) * fraction
        scale = tl.minimum(tl.maximum(scale, SMALLEST_SCALE), LARGEST_SCALE)
        fraction_cell = prediction + PREDICTION_COLUMNS * t + FRACTION_COLUMN
        tl.store(fraction_cell, fraction.to(tl.float32), mask=t < n_decided)
        tl.store(scale_cell, scale.to(tl.float32), mask=t < n_accepted)
        tl.store(slope_cell, tl.zeros([TENSORS], tl.float32), mask=t < n_decided)
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
        reject(ledger, cooldown)
        tl.store(ledger + HOLD, 1.0)
        tl.store(ledger + LOSS, float("nan"))
        if point_to_blame:
            tl.store(ledger + CAUSE_NONFINITE, tl.load(ledger + CAUSE_NONFINITE) + 1.0)
        if by_norm:
            tl.store(ledger + CAUSE_NORM, tl.load(ledger + CAUSE_NORM) + 1.0)
        if by_loss:
            tl.store(ledger + CAUSE_LOSS, tl.load(ledger + CAUSE_LOSS) + 1.0)
    tl.store(ledger + DECISION, tl.where(accepted, 1.0, tl.where(rejected, 2.0, 0.0)))
    if accepted | rejected:
        tl.store(ledger + MOVED, 0.0)
        tl.store(ledger + STRETCH, 0.0)
        tl.store(ledger + JUMP_SQUARE, 0.0)


def decide(scalars: Scalars, threshold: float, cooldown: float) -> None:
    """Decides on a prediction by the real gradient at the predicted point. One launch.

    Reads what `slopes` measured; changes the ledger, and writes the step fraction of every tensor:
    0 is the rollback, 1 leaves the weights where the prediction put them, τ places them at
    snapshot + τ · displacement.

    Args:
        scalars: Of all tensors of the device.
        threshold: Standard deviations above the running mean that norm and loss may have.
        cooldown: Real steps that a first rejection forces before the next prediction.
    """
    prediction = scalars.prediction
    with on_device(prediction.device):
        _decide_kernel[(1,)](
            scalars.ledger, scalars.sums, prediction, len(prediction), float(threshold),
            float(cooldown), TENSORS=128, **LAUNCH,
        )  # fmt: skip
