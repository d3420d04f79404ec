"""The hyperparameter table, and the arithmetic that several kernels share."""

from __future__ import annotations

import triton
import triton.language as tl
from triton_hybrid.kernels.ledger import FOUND_INF, LOSS_SCALE

HYPER_FIELDS: tuple[str, ...] = (
    "lr",
    "beta1",
    "beta2",
    "log_beta1",
    "log_beta2",
    "eps",
    "weight_decay",
    "sign",
    "horizon",
    "level",
    "look_ahead",
)
"""Columns of the hyperparameter table, FP64, one row a parameter group. ``sign`` is -1 when
maximising; ``horizon`` is how many base steps one predicted step stands for, ``level`` which
part of the way to the weight EMA it goes. Of a Muon group ``beta1`` is the momentum, and
``look_ahead`` the weight of the momentum against the gradient in what is orthogonalised."""

HYPER = {name: index for index, name in enumerate(HYPER_FIELDS)}
HYPER_COLUMNS = tl.constexpr(len(HYPER_FIELDS))
LR = tl.constexpr(HYPER["lr"])
BETA1 = tl.constexpr(HYPER["beta1"])
BETA2 = tl.constexpr(HYPER["beta2"])
LOG_BETA1 = tl.constexpr(HYPER["log_beta1"])
LOG_BETA2 = tl.constexpr(HYPER["log_beta2"])
EPS = tl.constexpr(HYPER["eps"])
WEIGHT_DECAY = tl.constexpr(HYPER["weight_decay"])
SIGN = tl.constexpr(HYPER["sign"])
HORIZON = tl.constexpr(HYPER["horizon"])
LEVEL_SHARE = tl.constexpr(HYPER["level"])
LOOK_AHEAD = tl.constexpr(HYPER["look_ahead"])


@triton.jit
def precise_sqrt(x):
    """Square root, correctly rounded."""
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def precise_div(x, y):
    """Quotient, correctly rounded."""
    return tl.div_rn(x, y) if x.dtype == tl.float32 else x / y


@triton.jit
def gradient_verdict(partials, ledger, COLUMNS: tl.constexpr):
    """Norm of all gradients, whether one is not finite, and what undoes the loss scale."""
    columns = tl.arange(0, COLUMNS)
    squares = tl.load(partials + columns, cache_modifier=".cg")
    flags = tl.load(partials + COLUMNS + columns, cache_modifier=".cg")
    unscale = 1.0 / tl.load(ledger + LOSS_SCALE)
    norm = tl.sqrt(tl.sum(squares.to(tl.float64), axis=0)) * unscale
    nonfinite = (tl.max(flags, axis=0) > 0) | (tl.load(ledger + FOUND_INF) > 0)
    return norm, nonfinite, unscale


@triton.jit
def clip_coefficient(norm, max_norm, CLIP: tl.constexpr):
    """What global-norm clipping multiplies the gradient with."""
    coefficient = 1.0
    if CLIP:
        coefficient = tl.minimum(max_norm / (norm + 1e-6), 1.0)
    return coefficient
