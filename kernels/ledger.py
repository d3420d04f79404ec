"""The ledger: every scalar that decisions are made of, in one FP64 vector on the device.

A step never waits for the device. What it measures (norms, losses, verdicts) is written
here by the kernels and read there by the next ones; the host reads the whole ledger in one
copy when it must decide, at most once a cycle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import triton.language as tl
from torch import Tensor

FIELDS: tuple[str, ...] = (
    # The last real gradient.
    "norm",  # global L2 norm before clipping
    "nonfinite",  # 1 when it held an infinity or a NaN
    "skipped",  # how many gradients were skipped for that
    "applied",  # how many base updates were applied
    "hold",  # 1: the next base update is left out (its point was taken back)
    "loss_scale",  # what the coming gradient was multiplied with
    "growth_tracker",  # finite gradients since the scale last changed; -1: it never does
    "found_inf",  # 1: a GradScaler found the coming gradient not finite
    # Running statistics over real steps: logarithm of the norm, change of the loss.
    "norm_count",
    "norm_mean",
    "norm_variance",
    "loss",  # observed for the coming step; NaN when none was
    "loss_previous",
    "loss_count",
    "loss_mean",
    "loss_variance",
    # Size and direction of base updates.
    "update_count",
    "update_square",  # running mean of the squared norm of a base update
    "gradient_square",  # running mean of the squared gradient norm, at the slow EMA's rate
    "slow_count",  # gradients in the slow EMA
    "slow_noise",  # sum of their squared weights: the share of noise that is left
    "update_slow",  # running inner product of base update and slow direction
    "update_update",
    "slow_slow",
    "confidence",
    "pull",  # running inner product of gradient and weight minus weight EMA
    "signal",  # share of the squared gradient that is signal; the rest is noise
    # The prediction under way and its past.
    "moved",  # 1: the weights are away from the snapshot
    "stretch",  # predicted steps since the snapshot
    "jump_square",  # squared distance from the snapshot
    "verdict",  # on the last prediction: 0 none, 1 accepted, 2 taken back
    "horizon",  # factor on every displacement; halved by a rejection
    "rejections",  # rejections in a row
    "cooldown",  # real steps before the next prediction is allowed
    "blocked",  # non-finite gradients in a row at the predicted point
    "step_fraction",  # mean secant step fraction of the last correction
    # Counters.
    "accepted",
    "rejected",
    "cause_nonfinite",
    "cause_jump",
    "cause_norm",
    "cause_loss",
)
"""Names of the ledger's entries, in order."""

INDEX = {name: index for index, name in enumerate(FIELDS)}

NORM = tl.constexpr(INDEX["norm"])
NONFINITE = tl.constexpr(INDEX["nonfinite"])
SKIPPED = tl.constexpr(INDEX["skipped"])
APPLIED = tl.constexpr(INDEX["applied"])
HOLD = tl.constexpr(INDEX["hold"])
LOSS_SCALE = tl.constexpr(INDEX["loss_scale"])
GROWTH_TRACKER = tl.constexpr(INDEX["growth_tracker"])
FOUND_INF = tl.constexpr(INDEX["found_inf"])
NORM_COUNT = tl.constexpr(INDEX["norm_count"])
NORM_MEAN = tl.constexpr(INDEX["norm_mean"])
NORM_VARIANCE = tl.constexpr(INDEX["norm_variance"])
LOSS = tl.constexpr(INDEX["loss"])
LOSS_PREVIOUS = tl.constexpr(INDEX["loss_previous"])
LOSS_COUNT = tl.constexpr(INDEX["loss_count"])
LOSS_MEAN = tl.constexpr(INDEX["loss_mean"])
LOSS_VARIANCE = tl.constexpr(INDEX["loss_variance"])
UPDATE_COUNT = tl.constexpr(INDEX["update_count"])
UPDATE_SQUARE = tl.constexpr(INDEX["update_square"])
GRADIENT_SQUARE = tl.constexpr(INDEX["gradient_square"])
SLOW_COUNT = tl.constexpr(INDEX["slow_count"])
SLOW_NOISE = tl.constexpr(INDEX["slow_noise"])
UPDATE_SLOW = tl.constexpr(INDEX["update_slow"])
UPDATE_UPDATE = tl.constexpr(INDEX["update_update"])
SLOW_SLOW = tl.constexpr(INDEX["slow_slow"])
CONFIDENCE = tl.constexpr(INDEX["confidence"])
PULL = tl.constexpr(INDEX["pull"])
SIGNAL = tl.constexpr(INDEX["signal"])
MOVED = tl.constexpr(INDEX["moved"])
STRETCH = tl.constexpr(INDEX["stretch"])
JUMP_SQUARE = tl.constexpr(INDEX["jump_square"])
VERDICT = tl.constexpr(INDEX["verdict"])
HORIZON = tl.constexpr(INDEX["horizon"])
REJECTIONS = tl.constexpr(INDEX["rejections"])
COOLDOWN = tl.constexpr(INDEX["cooldown"])
BLOCKED = tl.constexpr(INDEX["blocked"])
STEP_FRACTION = tl.constexpr(INDEX["step_fraction"])
ACCEPTED = tl.constexpr(INDEX["accepted"])
REJECTED = tl.constexpr(INDEX["rejected"])
CAUSE_NONFINITE = tl.constexpr(INDEX["cause_nonfinite"])
CAUSE_JUMP = tl.constexpr(INDEX["cause_jump"])
CAUSE_NORM = tl.constexpr(INDEX["cause_norm"])
CAUSE_LOSS = tl.constexpr(INDEX["cause_loss"])


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
    """A fresh ledger: FP64, one entry for each of ``FIELDS``."""
    return write_ledger(START, device)


def read_ledger(ledger: Tensor) -> dict[str, float]:
    """All entries as Python floats. Waits for the device."""
    return dict(zip(FIELDS, ledger.tolist()))


def write_ledger(values: Mapping[str, float], device: torch.device) -> Tensor:
    """A ledger with the given entries, zero elsewhere."""
    return torch.tensor([float(values.get(name, 0.0)) for name in FIELDS], dtype=torch.float64).to(
        device
    )
