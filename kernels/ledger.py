"""The ledger: every scalar that decisions are made of, in one FP64 vector on the device.

A step never waits for the device. What it measures (norms, losses, decisions) is written
here by the kernels and read there by the next ones; the host reads the whole ledger in one
copy when it must decide, at most once a cycle. The small programs that work on it alone are here,
in FP64; `ledger_torch` has the same in plain torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_hybrid.kernels.launch import LAUNCH, Launch, prepared
from triton_hybrid.kernels.repeated import repeated
from triton_hybrid.kernels.rows import number
from triton_hybrid.kernels.sums import totals

if TYPE_CHECKING:
    from triton_hybrid.kernels.scalars import Scalars

INDEX: dict[str, int] = {}
"""Place of each entry in the ledger, by name."""
_entry = functools.partial(number, INDEX)

# The last real gradient.
NORM = _entry("norm")  # global L2 norm before clipping
NONFINITE = _entry("nonfinite")  # 1 when it held an infinity or a NaN
SKIPPED = _entry("skipped")  # how many gradients were skipped for that
APPLIED = _entry("applied")  # how many base updates were applied
HOLD = _entry("hold")  # 1: the next base update is left out (its point was rolled back)
LOSS_SCALE = _entry("loss_scale")  # what the coming gradient was multiplied with
# Finite gradients since the scale last changed; -1: it never does.
GROWTH_TRACKER = _entry("growth_tracker")
FOUND_INF = _entry("found_inf")  # 1: a GradScaler found the coming gradient not finite
# Running statistics over real steps: logarithm of the norm, change of the loss; whether the last
# number was limited.
NORM_COUNT, NORM_MEAN, NORM_VARIANCE = map(_entry, ("norm_count", "norm_mean", "norm_variance"))
NORM_LIMITED = _entry("norm_limited")
LOSS = _entry("loss")  # observed for the coming step; NaN when none was
LOSS_PREVIOUS = _entry("loss_previous")
LOSS_COUNT, LOSS_MEAN, LOSS_VARIANCE = map(_entry, ("loss_count", "loss_mean", "loss_variance"))
LOSS_LIMITED = _entry("loss_limited")
# Of all losses: their number, a mean of earlier and one of later ones, and their variance.
LOSSES, LOSS_EARLY, LOSS_LATE = map(_entry, ("losses", "loss_early", "loss_late"))
LOSS_NOISE = _entry("loss_noise")
# Size and direction of base updates: running means of squares and of inner products.
UPDATE_COUNT, UPDATE_SQUARE = map(_entry, ("update_count", "update_square"))
GRADIENT_SQUARE = _entry("gradient_square")  # at the slow EMA's rate
SLOW_COUNT = _entry("slow_count")  # gradients in the slow EMA
SLOW_NOISE = _entry("slow_noise")  # sum of their squared weights: the share of noise that is left
UPDATE_SLOW, UPDATE_UPDATE, SLOW_SLOW = map(_entry, ("update_slow", "update_update", "slow_slow"))
CONFIDENCE = _entry("confidence")  # cosine of base update and slow direction, at least 0
SIGNAL = _entry("signal")  # share of the squared gradient that is signal; the rest is noise
# The prediction under way and its past.
MOVED = _entry("moved")  # 1: the weights are away from the snapshot
STRETCH = _entry("stretch")  # predicted steps since the snapshot
JUMP_SQUARE = _entry("jump_square")  # squared distance from the snapshot
# On the last prediction: 0 none, 1 accepted, 2 rolled back, 3 ended by what others wrote.
DECISION = _entry("decision")
HORIZON = _entry("horizon")  # factor on every displacement; halved by a rejection
REJECTIONS = _entry("rejections")  # in a row
COOLDOWN = _entry("cooldown")  # real steps before the next prediction is allowed
BLOCKED = _entry("blocked")  # non-finite gradients in a row at the predicted point
WRITTEN = _entry("written")  # 1: somebody else wrote weights since they were last looked at
STEP_FRACTION = _entry("step_fraction")  # mean secant step fraction of the last correction
# Counters.
ACCEPTED, REJECTED = map(_entry, ("accepted", "rejected"))
CAUSE_NONFINITE, CAUSE_JUMP = map(_entry, ("cause_nonfinite", "cause_jump"))
CAUSE_NORM, CAUSE_LOSS = map(_entry, ("cause_norm", "cause_loss"))


START = {
    **dict.fromkeys(("horizon", "step_fraction", "loss_scale"), 1.0),
    **dict.fromkeys(("loss", "loss_previous"), math.nan),
    "growth_tracker": -1.0,
}
"""Entries of a fresh ledger that are not zero."""


def new_ledger(device: torch.device) -> Tensor:
    """A fresh ledger: FP64, one entry for each name in ``INDEX``."""
    return write_ledger(START, device)


def read_ledger(ledger: Tensor) -> dict[str, float]:
    """All entries as Python floats. Waits for the device."""
    return dict(zip(INDEX, ledger.tolist()))


def write_ledger(values: Mapping[str, float], device: torch.device) -> Tensor:
    """A ledger with the given entries, zero elsewhere."""
    entries = [float(values.get(name, 0.0)) for name in INDEX]
    return torch.tensor(entries, dtype=torch.float64, device=device)


FACTOR_COLUMN, SLOPE_COLUMN, FRACTION_COLUMN, PART_COLUMN = map(tl.constexpr, range(4))
FINGERPRINT_COLUMN, PREDICTION_COLUMNS = map(tl.constexpr, (4, 6))
"""Columns of the table of predictions: a tensor's own factor on the horizon, the slope before the
move, where verification placed the weights along it, whether the tensor takes part (1 or 0; -1
where somebody else has written it since the prediction began), and two for the fingerprint of the
parameter as a step left it (0 where that is not known)."""


@triton.jit
def add(cell, amount):
    """Adds to an entry."""
    tl.store(cell, tl.load(cell) + amount)


@triton.jit
def between(x, low, high):
    """The number of an interval that is nearest to x."""
    return tl.minimum(tl.maximum(x, low), high)


# --------------------------------------------------------------------------------------- loss scale

FIRST_SCALE = 65536.0
GROWTH = tl.constexpr(2.0)
BACKOFF = tl.constexpr(0.5)
GROWTH_INTERVAL = tl.constexpr(2000)
"""GradScaler's defaults: twice the scale after so many finite gradients in a row, half of it
after one that is not."""


@triton.jit
def move_loss_scale(ledger, nonfinite):
    """Takes a gradient into account, where the scale is dynamic; it is an FP32 number."""
    tracker = tl.load(ledger + GROWTH_TRACKER)
    if tracker >= 0:
        scale = tl.load(ledger + LOSS_SCALE)
        passed = tracker + 1.0 == GROWTH_INTERVAL
        grown = (scale * GROWTH).to(tl.float32)
        grown = tl.where(passed & (grown < float("inf")), grown.to(tl.float64), scale)
        shrunk = (scale * BACKOFF).to(tl.float32).to(tl.float64)
        tl.store(ledger + LOSS_SCALE, tl.where(nonfinite, shrunk, grown))
        tl.store(ledger + GROWTH_TRACKER, tl.where(nonfinite | passed, 0.0, tracker + 1.0))


@triton.jit
def close_gradient(ledger, norm, nonfinite, applied):
    """Enters a gradient that is done with, and makes room for the next."""
    if nonfinite == 0:
        tl.store(ledger + NORM, norm)
    tl.store(ledger + NONFINITE, nonfinite.to(tl.float64))
    add(ledger + SKIPPED, nonfinite.to(tl.float64))
    add(ledger + APPLIED, applied.to(tl.float64))
    tl.store(ledger + LOSS, float("nan"))
    tl.store(ledger + HOLD, 0.0)
    tl.store(ledger + FOUND_INF, 0.0)
    move_loss_scale(ledger, nonfinite)


# ---------------------------------------------------------------------------------------- decisions

NORM_DEVIATION_FLOOR = tl.constexpr(0.4)
"""Smallest standard deviation of log(norm) that is believed. Gradient norms have heavy
tails; below this, ordinary steps of a short run would count as divergence."""
PINNED_VARIANCE = tl.constexpr(1e-4)
"""Variance of log(norm) below which something else fixes the norm: gradients that were clipped."""
BACKWARD = tl.constexpr(0.5)
"""Cosine of gradient and move from which on the move went too far, where the norm says nothing."""
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
LEAST_LOSSES = tl.constexpr(400)
"""Losses before which they are not called flat. Between the 200th and the 400th a language model's
of 256 tokens a step are for a while; without predictions there it ended 0.011 higher."""
FLAT = tl.constexpr(5.58)
"""Squared distance of the two means of n losses, in units of their variance / n, that noise alone
exceeds once in twenty (two standard deviations). With weights k^(q - 1), as `running` gives them,
the variance of a mean is q² / (2 q - 1), the covariance of two p q / (p + q - 1): 4 · 1.395."""


@triton.jit
def is_flat(ledger):
    """Whether the observed losses neither fall nor rise by more than their noise."""
    n = tl.load(ledger + LOSSES)
    apart = tl.load(ledger + LOSS_EARLY) - tl.load(ledger + LOSS_LATE)
    return (n >= LEAST_LOSSES) & (n * apart * apart < tl.load(ledger + LOSS_NOISE) * FLAT)


@triton.jit
def gate(ledger, threshold):
    """Whether the weights may move.

    At the start of a stretch, if the model is confident, which is worth nothing where the loss
    is flat, and nothing forbids it; later in it, if the first move was not rolled back. Never
    where somebody else has written them.
    """
    fresh = tl.load(ledger + STRETCH) == 0
    calm = (tl.load(ledger + COOLDOWN) == 0) & (tl.load(ledger + NONFINITE) == 0)
    sure = tl.where(is_flat(ledger), 0.0, tl.load(ledger + CONFIDENCE)) >= threshold
    going_on = (fresh == 0) & (tl.load(ledger + MOVED) > 0)
    return ((fresh & calm & sure) | going_on) & (tl.load(ledger + WRITTEN) == 0)


@triton.jit
def reject(ledger, cooldown):
    """Enters a rejection: halved horizon, and a Full phase that doubles with each in a row."""
    doublings = tl.minimum(tl.load(ledger + REJECTIONS), LONGEST_COOLDOWN)
    tl.store(ledger + COOLDOWN, cooldown * tl.exp2(doublings))
    add(ledger + REJECTIONS, 1.0)
    add(ledger + REJECTED, 1.0)
    tl.store(ledger + HORIZON, 0.5 * tl.load(ledger + HORIZON))


@triton.jit
def _decide_kernel(
    ledger, sums, prediction, n_tensors, threshold, cooldown, TENSORS: tl.constexpr
):  # fmt: skip
    slope, square, nonfinite = totals(sums, n_tensors, TENSORS)
    norm = tl.sqrt(square)
    nonfinite = nonfinite | (tl.load(ledger + FOUND_INF) > 0)
    moved = tl.load(ledger + MOVED) > 0
    blocked = tl.where(nonfinite, tl.load(ledger + BLOCKED) + 1.0, 0.0)
    point_to_blame = nonfinite & (blocked >= BLOCKED_LIMIT)

    deviation = tl.maximum(tl.sqrt(tl.load(ledger + NORM_VARIANCE)), NORM_DEVIATION_FLOOR)
    excess = tl.log(norm + 1e-30) - tl.load(ledger + NORM_MEAN)
    # Clipped outside, the gradient hides its norm, but not that it points back along the move.
    hidden = tl.load(ledger + NORM_VARIANCE) < PINNED_VARIANCE
    back = slope > BACKWARD * norm * tl.sqrt(tl.load(ledger + JUMP_SQUARE))
    by_norm = (excess > threshold * deviation) | (hidden & back)
    by_norm = by_norm & (tl.load(ledger + NORM_COUNT) > 1.5) & (nonfinite == 0)
    loss = tl.load(ledger + LOSS)
    previous = tl.load(ledger + LOSS_PREVIOUS)
    floor = LOSS_DEVIATION_FLOOR * tl.abs(previous)
    spread = tl.maximum(tl.sqrt(tl.load(ledger + LOSS_VARIANCE)), floor)
    known = (previous == previous) & (tl.load(ledger + LOSS_COUNT) > 1.5)
    by_loss = known & (loss - (previous + tl.load(ledger + LOSS_MEAN)) > threshold * spread)
    by_loss = (by_loss | (tl.abs(loss) == float("inf"))) & (nonfinite == 0)

    rejected = moved & (point_to_blame | by_norm | by_loss)
    accepted = moved & (rejected == 0) & (nonfinite == 0)
    decided = accepted | rejected
    # Where others wrote weights, the decision is about what they wrote too: the rest is placed by
    # it, but nothing is learnt, and the gradient is one at weights that stay.
    written = decided & (tl.load(ledger + WRITTEN) > 0)
    undone, accepted, rejected = rejected, accepted & (written == 0), rejected & (written == 0)
    n_accepted = tl.where(accepted, n_tensors, 0)
    n_decided = tl.where(decided, n_tensors, 0)
    trust = between(2.0 * tl.load(ledger + SIGNAL) - 1.0, 0.0, 1.0)
    total = tl.zeros([TENSORS], dtype=tl.float64)
    for begin in range(0, n_tensors, TENSORS):
        t = begin + tl.arange(0, TENSORS)
        here = t < n_tensors
        cell = prediction + PREDICTION_COLUMNS * t
        after = tl.load(sums + 3 * t, mask=here, other=0.0)
        before = tl.load(cell + SLOPE_COLUMN, mask=here, other=0.0).to(tl.float64)
        curved = (before < 0) & (after > before)
        secant = tl.where(curved, before / tl.where(curved, before - after, 1.0), 1.0)
        fraction = 1.0 + trust * (between(secant, SMALLEST_FRACTION, LARGEST_FRACTION) - 1.0)
        fraction = tl.where(tl.abs(fraction - 1.0) < FRACTION_TOLERANCE, 1.0, fraction)
        fraction = tl.where(accepted, fraction, tl.where(undone, 0.0, 1.0))
        fraction = tl.where(tl.load(cell + PART_COLUMN, mask=here, other=0.0) > 0, fraction, 1.0)
        scale = tl.load(cell + FACTOR_COLUMN, mask=here, other=1.0).to(tl.float64)
        scale = (1.0 + SCALE_MEMORY * (scale - 1.0)) * fraction
        scale = between(scale, SMALLEST_SCALE, LARGEST_SCALE)
        tl.store(cell + FRACTION_COLUMN, fraction.to(tl.float32), mask=t < n_decided)
        tl.store(cell + FACTOR_COLUMN, scale.to(tl.float32), mask=t < n_accepted)
        tl.store(cell + SLOPE_COLUMN, tl.zeros([TENSORS], tl.float32), mask=t < n_decided)
        total += tl.where(here, fraction, 0.0)

    # One thread writes the ledger; first every thread must have read what it decides by.
    tl.debug_barrier()
    tl.store(ledger + BLOCKED, tl.where(moved & (undone == 0), blocked, 0.0))
    if accepted:
        add(ledger + ACCEPTED, 1.0)
        tl.store(ledger + REJECTIONS, 0.0)
        tl.store(ledger + HORIZON, tl.minimum(tl.load(ledger + HORIZON) * HORIZON_GROWTH, 1.0))
        tl.store(ledger + STEP_FRACTION, tl.sum(total, axis=0) / n_tensors)
    if rejected:
        reject(ledger, cooldown)
        tl.store(ledger + HOLD, 1.0)
        tl.store(ledger + LOSS, float("nan"))
        add(ledger + CAUSE_NONFINITE, point_to_blame.to(tl.float64))
        add(ledger + CAUSE_NORM, by_norm.to(tl.float64))
        add(ledger + CAUSE_LOSS, by_loss.to(tl.float64))
    outcome = tl.where(rejected, 2.0, tl.where(written, 3.0, 0.0))
    tl.store(ledger + DECISION, tl.where(accepted, 1.0, outcome))
    if decided:
        tl.store(ledger + WRITTEN, 0.0)
        tl.store(ledger + MOVED, 0.0)
        tl.store(ledger + STRETCH, 0.0)
        tl.store(ledger + JUMP_SQUARE, 0.0)


@repeated
def decide(scalars: Scalars, threshold: float, cooldown: float) -> list[Launch]:
    """Decides on a prediction by the real gradient at the predicted point. One launch.

    Reads what `slopes` measured of all tensors of the device; changes the ledger, and writes their
    step fractions: 0 is the rollback, 1 leaves the weights where the prediction put them, τ places
    them at snapshot + τ · displacement. Norm and loss may be ``threshold`` standard deviations over
    their running mean; a first rejection forces ``cooldown`` real steps before the next prediction.
    """
    prediction = scalars.prediction
    launch = prepared(
        _decide_kernel, (1,),
        scalars.ledger, scalars.sums, prediction, prediction.shape[0], float(threshold),
        float(cooldown), TENSORS=128, **LAUNCH,
    )  # fmt: skip
    return [launch]
