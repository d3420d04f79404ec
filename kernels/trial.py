"""What is decided of a quasi-Newton move: few numbers, in FP64, without waiting for the device.

A move on trial stands in the weights until the next gradient judges it. `judge` decides on it,
`solve` finds the coefficients of the next one, `limit` keeps that within its trust radius. They
read and write two vectors on the device: the ledger, and a *trial* of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import triton.language as tl
from torch import Tensor
from triton_hybrid.kernels.ledger import BLOCKED_LIMIT, INDEX
from triton_hybrid.kernels.ledger_torch import count, enter, wait_longer
from triton_hybrid.kernels.scalar_math import (
    beside,
    clamp,
    divide,
    finite,
    larger,
    named,
    negate,
    number,
    numbers_of,
    sqrt,
    vector_of,
    where,
    write,
)

TRIAL = (
    "slot", "pairs", "based", "loss", "slope", "shortened", "ready", "again", "noise", "turned"
)  # fmt: skip
"""Entries of a trial: which pair is written next, how many there are, whether the snapshot is where
the last gradient was taken, the loss there, the slope of the move there, how often the move was
shortened, whether the next move may be made, whether the coming loss is one at the weights of the
last, whether such a loss was another one, and one more than the pairs noted since matrices got the
bases in which the pairs are kept (``bases.py``), or 0."""
ORDERS = ("pair", "restart", "fraction", "slot")
"""What `judge` and `limit` want done to weights and rows (see `settle`)."""

LEAST_PAIRS = tl.constexpr(3)
"""Pairs from which on the gradients that they remember make the metric (``pairs.py``)."""
SUFFICIENT = 1e-4
"""Share of the decrease promised by the slope that a move must bring (Armijo 1966)."""
ROUNDING = 1e-6
"""Changes of the loss up to this share of it say nothing, and the slopes judge alone: the
approximate Wolfe condition of Hager and Zhang (2005), and their value."""
SHORTEST, LONGEST = 0.1, 0.5
"""What a rejected move is multiplied with at most and at least, and how often, before it is given
up."""
MOST_SHORTENED = 3
RADIUS, GROWTH, SHRINKAGE = 3.0, 1.2, 0.5
"""First trust radius, in steps of the base rule with its present moments, in the metric, and its
factors after an accepted and a rejected move; the ledger's horizon is the radius over the first.
With 10 and 1.5, 7 of 16 runs of two spirals (8 seeds, rates 3e-2 and 3e-3) ended in poor minima;
with these 3 did, and 6 of a regression of two scales ended at 1.3e-3 instead of 3.2e-3 in the
geometric mean."""
SAME = 1e-4
"""Part of it by which a loss may differ at the same weights where training is deterministic."""
LARGEST_HORIZON = 1e12
LEAST_CURVATURE = 1e-8
"""Cosine, in the metric, of move and gradient change up to which a pair is left out."""
MOST_DECAY = 0.01
"""Share of a move's slope that weight decay may take. With 0.5 it held fits back: a Poisson network
and a regression of two scales (8 seeds, two rates) ended 2 to 4 times higher."""


def new_trial(device: torch.device, values: Mapping[str, float] | None = None) -> Tensor:
    """A trial with the given entries; FP64 ``[len(TRIAL)]``."""
    known = {"loss": math.nan, **(values or {})}
    entries = [float(known.get(name, 0.0)) for name in TRIAL]
    return torch.tensor(entries, dtype=torch.float64, device=device)


def judge(
    ledger: Tensor, trial: Tensor, sums: Tensor, *, last: bool, cooldown: float, history: int
) -> Tensor:
    """Decides on the move on trial, if there is one, by the gradient at hand.

    A move is accepted if the loss fell by `SUFFICIENT` of what the slope had promised. Where no
    loss was observed, or its change is rounding, the trapezoid of both slopes stands for it. A
    rejected one is shortened to the minimum of the parabola through what is known of it. After
    `MOST_SHORTENED` attempts it is rolled back, and the pairs are dropped.

    Args:
        ledger: FP64, changed in place.
        trial: FP64, changed in place.
        sums: FP64 ``[tensors, 3]`` of `slopes`.
        last: Whether a move may follow this gradient.
        cooldown: Steps of the base rule that a first rollback forces before the next move.
        history: Pairs that are kept.

    Returns:
        The `ORDERS`, FP64.
    """
    entries, its = named(ledger, INDEX), named(trial, TRIAL)
    after, _, bad = numbers_of(sums.sum(0))
    nonfinite = (bad > 0) | (entries["found_inf"] > 0)
    standing, written = entries["moved"] > 0, entries["written"] > 0
    loss, base, slope = entries["loss"], its["loss"], its["slope"]

    known = (loss == loss) & (base == base)
    trapezoid = 0.5 * (slope + after)
    change = where(known, loss - base, trapezoid)
    rounded = known & (abs(change) <= ROUNDING * abs(base)) & (trapezoid <= SUFFICIENT * slope)
    fell = (change <= SUFFICIENT * slope) | rounded
    blocked = where(nonfinite & standing, entries["blocked"] + 1.0, 0.0)
    to_blame = nonfinite & (blocked >= BLOCKED_LIMIT.value)
    accepted = standing & negate(nonfinite) & fell
    failed = standing & (negate(nonfinite | fell) | to_blame)
    undone = failed & ((its["shortened"] >= MOST_SHORTENED) | written)
    shortened = failed & negate(undone)

    share = divide(-slope, 2.0 * (change - slope))
    share = where(nonfinite | (share != share), SHORTEST, clamp(share, SHORTEST, LONGEST))
    fraction = where(shortened, share, where(undone, beside(slope, 0.0), 1.0))
    # A pair without curvature along the move would be left out, and would cost another one; one
    # of a move that does not last is no link in the chain of gradients that makes the metric.
    curved = negate(standing) | (accepted & (after > slope))
    pair = negate(nonfinite | written) & (its["based"] > 0) & curved
    restart = negate(nonfinite | failed)
    again = restart & (its["again"] > 0)
    one = beside(slope, 1.0)
    enter(its, again, noise=one * negate(abs(loss - base) <= SAME * abs(base)))
    orders = vector_of([one * pair, one * restart, fraction, its["slot"]], trial.device)

    decided, learnt = accepted | undone, negate(written)
    written = decided & written
    enter(its, pair, slot=(its["slot"] + 1.0) % history)
    enter(its, pair, pairs=clamp(its["pairs"] + 1.0, most=history))
    enter(its, pair & (its["turned"] > 0), turned=its["turned"] + 1.0)
    enter(its, restart, based=1.0, loss=loss, shortened=0.0)
    enter(its, shortened, slope=fraction * slope, shortened=its["shortened"] + 1.0)
    enter(its, undone | written, pairs=0.0, based=0.0, shortened=0.0, turned=0.0)
    its["again"] = where(restart | written, 0.0, larger(its["again"], one * undone))
    its["ready"] = one * (restart & negate(written) & (entries["cooldown"] <= 1.0)) * last

    accepted, rejected = accepted & learnt, undone & learnt
    grown = clamp(entries["horizon"] * GROWTH, most=LARGEST_HORIZON)
    enter(entries, accepted, horizon=grown, rejections=0.0)
    enter(entries, failed & learnt, horizon=SHRINKAGE * entries["horizon"])
    enter(entries, failed & learnt, hold=1.0, loss=math.nan)
    wait_longer(entries, cooldown, rejected)
    seen = rejected & negate(nonfinite)
    count(entries, accepted=accepted, cause_nonfinite=rejected & nonfinite)
    count(entries, cause_loss=seen & known, cause_norm=seen & negate(known))
    enter(entries, decided, moved=0.0, stretch=0.0, jump_square=0.0, written=0.0)
    entries["blocked"] = where(standing & negate(failed), blocked, 0.0)
    entries["confidence"] = one
    entries["decision"] = accepted + 2.0 * rejected + 3.0 * written + 4.0 * shortened
    write(ledger, entries)
    write(trial, its)
    return orders


def solve(products: Tensor, trial: Tensor, history: int) -> Tensor:
    """The coefficients of the next move, from all inner products.

    The two loops of L-BFGS (Nocedal 1980) for the gradient g and the pairs S, Y, oldest first, are
    two triangular systems. With R the upper triangle of SᵀY, E its diagonal, and γ D the first
    inverse Hessian, D the metric (``pairs.py``)::

        R α = Sᵀg,   Rᵀδ = E α - γ Yᵀ D (g - Y α),   move = -γ D (g - Y α) - S δ

    γ² = sᵀD⁻¹s / yᵀDy of the newest pair: in the metric the geometric mean of the long and the
    short step of Barzilai and Borwein (1988), sᵀD⁻¹s / sᵀy and sᵀy / yᵀDy. With the short one,
    Nocedal's, fits ended 1.3 to 3 times higher (as at `MOST_DECAY`).
    Without a pair the move is that of the gradient alone, with γ = 1. Of the weight decay the move
    takes as much as costs it `MOST_DECAY` of its slope.

    Args:
        products: FP64, as `products` adds them up: ``[S; D Y]ᵀ[Y, g]``, sᵀD⁻¹s, gᵀDg, the
            squared step of the rule, and the slope against the weight decay.
        trial: FP64.
        history: Pairs that are kept.

    Returns:
        FP64 ``[3 + 2 · history]``: whether to move, γ, the share of the weight decay, α and δ by
        slot.
    """
    gram = products[: 2 * history * (history + 1)].view(2, history, history + 1)
    rest = products[2 * history * (history + 1) :]
    slot, pairs, ready = (trial[TRIAL.index(name)] for name in ("slot", "pairs", "ready"))
    places = torch.arange(history, device=trial.device)
    order = torch.remainder(slot.long() + places, history)
    along, against = gram[:, order].unbind()
    sy, sg, ydy, ydg = along[:, order], along[:, -1], against[:, order], against[:, -1]
    diagonal, moved, changed = sy.diagonal(), rest[:history][order], ydy.diagonal()
    curved = diagonal > LEAST_CURVATURE * (moved * changed).sqrt()
    valid = (places >= history - pairs) & curved

    newest = (valid * (places + 1)).argmax().view(1)
    some = valid.any()
    last_move, last_change = moved.index_select(0, newest), changed.index_select(0, newest)
    gamma = torch.where(some, last_move / torch.where(some, last_change, 1.0), 1.0).sqrt()
    upper = torch.where(valid.unsqueeze(1) & valid, sy, 0.0).triu(1)
    upper = upper + torch.where(valid, diagonal, 1.0).diag()
    alpha = _triangular(upper, torch.where(valid, sg, 0.0), upper=True)
    right = diagonal * alpha - gamma * (ydg - ydy @ alpha)
    delta = _triangular(upper.T, torch.where(valid, right, 0.0), upper=False)

    square, _, decay = rest[-3:].unbind()
    slope = -gamma * (square - alpha.dot(ydg)) - delta.dot(sg)
    # The decay leads along -decay.
    against_it = (-decay).clamp(min=1e-300)
    share = torch.where(decay < 0, (-MOST_DECAY * slope / against_it).clamp(0.0, 1.0), 1.0)
    back = torch.empty_like(order)
    back[order] = places
    return torch.cat([ready.view(1), gamma, share.view(1), alpha[back], delta[back]])


def _triangular(matrix: Tensor, right: Tensor, upper: bool) -> Tensor:
    solved: Tensor = torch.linalg.solve_triangular(matrix, right.unsqueeze(1), upper=upper)
    return solved.squeeze(1)


def limit(ledger: Tensor, trial: Tensor, sums: Tensor, products: Tensor, cooldown: float) -> Tensor:
    """Keeps a move within its trust radius, or rolls it back at once.

    Rolled back is what leads uphill or is not finite.

    Args:
        ledger: FP64, changed in place.
        trial: FP64, changed in place.
        sums: FP64 ``[tensors, 3]`` of `move`.
        products: FP64, as `solve` takes them.
        cooldown: As `judge` takes it.

    Returns:
        The `ORDERS`, FP64: a fraction for the move just made.
    """
    entries, its = named(ledger, INDEX), named(trial, TRIAL)
    slope, square, bad = numbers_of(sums.sum(0))
    moving = its["ready"] > 0
    usual = sqrt(number(products[-2]))
    radius = RADIUS * entries["horizon"] * usual
    fraction = clamp(radius / clamp(sqrt(square), 1e-300), most=1.0)
    good = (bad == 0) & finite(square) & (slope < 0)
    kept, undone = moving & good, moving & negate(good)
    fraction = where(kept, fraction, where(undone, beside(slope, 0.0), 1.0))

    enter(its, moving, slope=fraction * slope, ready=0.0)
    enter(its, undone, pairs=0.0, based=0.0, again=1.0, turned=0.0)
    wait_longer(entries, cooldown, undone)
    count(entries, cause_nonfinite=undone & (bad > 0), cause_jump=undone & (bad == 0))
    enter(entries, kept, moved=1.0, stretch=1.0, jump_square=fraction * fraction * square)
    write(ledger, entries)
    write(trial, its)
    zero = beside(slope, 0.0)
    return vector_of([zero, zero, fraction, zero], trial.device)
