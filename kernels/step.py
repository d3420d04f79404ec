"""The base step over many tensors: statistics of the gradient, then the update.

One kernel in two parts. The first sums up the squared gradient and looks for non-finite values;
the second updates. The second needs the result of the first for *all* tensors (global-norm
clipping; a non-finite gradient must change nothing), so between them lies either a grid barrier
(one cooperative launch) or the end of a launch (two launches).

What an update does is the rule's (`UpdateRule`); clipping, weight decay, masters, the slow EMA, the
weight EMA and the measurements are the same for every rule, and written here once. With AdamW the
update moves 28 bytes a parameter, in FP32 and in 16 bit with FP32 masters; the first part reads
the gradient once more, the slow EMA adds 8 bytes and the weight EMA 8.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from triton_hybrid.kernels.launch import INTERPRETED, RESIDENT_LAUNCH, on_device
from triton_hybrid.kernels.ledger import (
    APPLIED,
    FOUND_INF,
    HOLD,
    LOSS,
    NONFINITE,
    NORM,
    SKIPPED,
    move_loss_scale,
    observe,
    slow_clip,
    slow_decay,
    weight_ema_decay,
)
from triton_hybrid.kernels.multi_tensor import TensorSet, chunk_at, chunk_length
from triton_hybrid.kernels.rows import (
    GRAD,
    TAIL_SHARE,
    address_row,
    load_row,
    load_weight,
    remaining,
    store_row,
    store_weight,
)
from triton_hybrid.kernels.scalars import (
    HYPER_COLUMNS,
    LR,
    SIGN,
    WEIGHT_DECAY,
    Scalars,
    clip_coefficient,
    gradient_norm,
)
from triton_hybrid.kernels.update_rule import UpdateRule

SLOW_EMA = address_row("slow_ema")
WEIGHT_EMA = address_row("weight_ema")
STATISTICS, UPDATE = 1, 2


@triton.jit
def _gradient_sums(
    addresses, tensor, start, count, length,
    GRAD_TYPE: tl.constexpr, STATE: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Squared norm of a chunk's gradient, and 1 where it holds a non-finite value."""
    square = tl.zeros([BLOCK], tl.float32)
    bad = tl.zeros([BLOCK], tl.float32)
    for inner in range(0, count, BLOCK):
        g = load_row(addresses, GRAD, tensor, start + inner, length, GRAD_TYPE, STATE, BLOCK, FULL)
        square += (g * g).to(tl.float32)
        bad = tl.maximum(bad, tl.where(tl.abs(g) < float("inf"), 0.0, 1.0))
    return tl.sum(square, axis=0), tl.max(bad, axis=0)


@triton.jit
def _update_chunk(
    addresses, tensor, start, length, row, step, factor, clip, slow_rate, steady, ema_rate,
    CONSTANTS: tl.constexpr, DIRECTION: tl.constexpr, ALONG: tl.constexpr,
    PARAM_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, STATE: tl.constexpr,
    UPDATE_TYPE: tl.constexpr, MASTER: tl.constexpr, KEPT: tl.constexpr,
    SLOW: tl.constexpr, WEIGHT_AVERAGE: tl.constexpr, COMPARE: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Updates a chunk; returns what `UPDATE_SUMS` names."""
    lr = tl.load(row + LR)
    decay = (1.0 - lr * tl.load(row + WEIGHT_DECAY)).to(STATE)
    size, a, b, c, d = CONSTANTS(row, step, lr * factor, STATE)
    uu = tl.full((), 0.0, tl.float32)
    us = tl.full((), 0.0, tl.float32)
    ss = tl.full((), 0.0, tl.float32)
    ee = tl.full((), 0.0, tl.float32)
    pull = tl.full((), 0.0, tl.float32)
    for inner in range(0, chunk_length(start, length, CHUNK, FULL), BLOCK):
        begin = start + inner
        w = load_weight(addresses, tensor, begin, length, PARAM_TYPE, STATE, KEPT, BLOCK, FULL)
        g = load_row(addresses, GRAD, tensor, begin, length, GRAD_TYPE, STATE, BLOCK, FULL) * clip
        if WEIGHT_AVERAGE:
            # Read here and, from cache, once more at the end: kept in between, it would spill
            # registers (8 bytes on sm_120, 51 registers of 16-bit weights on gfx942).
            average = load_row(
                addresses, WEIGHT_EMA, tensor, begin, length, STATE, STATE, BLOCK, FULL
            )
            pull += tl.sum((g * (w - average)).to(tl.float32), axis=0)
        direction, denominator = DIRECTION(
            addresses, tensor, begin, length, g, a, b, c, d, STATE, UPDATE_TYPE, BLOCK, FULL
        )
        update = size * direction
        w = w * decay - update
        store_weight(
            addresses, tensor, begin, length, w, PARAM_TYPE, STATE, MASTER, KEPT, BLOCK, FULL
        )
        if SLOW:
            s = load_row(addresses, SLOW_EMA, tensor, begin, length, STATE, STATE, BLOCK, FULL)
            if COMPARE:
                ahead = size * ALONG(
                    addresses, tensor, begin, length, s, denominator,
                    STATE, UPDATE_TYPE, BLOCK, FULL,
                )  # fmt: skip
                uu += tl.sum((update * update).to(tl.float32), axis=0)
                us += tl.sum((update * ahead).to(tl.float32), axis=0)
                ss += tl.sum((ahead * ahead).to(tl.float32), axis=0)
            s = s + slow_rate * (steady * g - s)
            ee += tl.sum((s * s).to(tl.float32), axis=0)
            store_row(addresses, SLOW_EMA, tensor, begin, length, s, STATE, STATE, BLOCK, FULL)
        if WEIGHT_AVERAGE:
            average = load_row(
                addresses, WEIGHT_EMA, tensor, begin, length, STATE, STATE, BLOCK, FULL
            )
            average = average + ema_rate * (w - average)
            store_row(
                addresses, WEIGHT_EMA, tensor, begin, length, average, STATE, STATE, BLOCK, FULL
            )
    return uu, us, ss, ee, pull


@triton.jit
def _total(partials, row, COLUMNS: tl.constexpr):
    """One first-stage sum over all programs."""
    columns = row * COLUMNS + tl.arange(0, COLUMNS)
    return tl.sum(tl.load(partials + columns, cache_modifier=".cg").to(tl.float64), axis=0)


@triton.jit
def _close_step(
    partials, ledger, steps, present, n_tensors, max_norm, slow_beta,
    CLIP: tl.constexpr, SLOW: tl.constexpr, MEASURE: tl.constexpr, OBSERVE: tl.constexpr,
    LAST: tl.constexpr, COLUMNS: tl.constexpr, TENSORS: tl.constexpr,
):  # fmt: skip
    """Counts the step, and takes it into the running statistics."""
    # Looked up again: kept through the update, they would cost registers there.
    norm, nonfinite, _ = gradient_norm(partials, ledger, COLUMNS)
    applied = (nonfinite == 0) & (tl.load(ledger + HOLD) <= 0)
    # One thread writes the ledger; first every thread must have read what it decides by.
    tl.debug_barrier()
    for begin in range(0, n_tensors, TENSORS):
        t = begin + tl.arange(0, TENSORS)
        here = t < n_tensors
        advance = tl.where(applied, tl.load(present + t, mask=here, other=0), 0)
        old = tl.load(steps + t, mask=here, other=0.0)
        tl.store(steps + t, old + advance.to(tl.float32), mask=here)
    if LAST:
        if nonfinite == 0:
            tl.store(ledger + NORM, norm)
        tl.store(ledger + NONFINITE, nonfinite.to(tl.float64))
        tl.store(ledger + SKIPPED, tl.load(ledger + SKIPPED) + nonfinite.to(tl.float64))
        tl.store(ledger + APPLIED, tl.load(ledger + APPLIED) + applied.to(tl.float64))
        clip = clip_coefficient(norm, max_norm, CLIP)
        used = norm * clip
        steady = 1.0
        if SLOW:
            clip = tl.maximum(clip, 1e-300)
            steady = slow_clip(ledger, norm, clip) / clip
        if OBSERVE:  # noqa: SIM102 - known when compiled, unlike the next
            # A norm that overflowed would spoil every running mean for good.
            if applied & (used < float("inf")):
                observe(
                    ledger,
                    norm,
                    used * steady,
                    _total(partials, 2, COLUMNS),
                    _total(partials, 3, COLUMNS),
                    _total(partials, 4, COLUMNS),
                    _total(partials, 5, COLUMNS),
                    _total(partials, 6, COLUMNS) * steady,
                    slow_beta,
                    SLOW,
                    MEASURE,
                )
        tl.store(ledger + LOSS, float("nan"))
        tl.store(ledger + HOLD, 0.0)
        tl.store(ledger + FOUND_INF, 0.0)
        move_loss_scale(ledger, nonfinite)


@triton.jit
def _step_kernel(
    addresses, extents, n_tensors, places, n_chunks, present,
    group, hyperparameters, steps, rate_factors,
    partials, first_column, arrivals, ledger,
    max_norm, slow_beta,
    CONSTANTS: tl.constexpr, DIRECTION: tl.constexpr, ALONG: tl.constexpr, FACTORED: tl.constexpr,
    PARAM_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, STATE: tl.constexpr,
    UPDATE_TYPE: tl.constexpr, MASTER: tl.constexpr, KEPT: tl.constexpr,
    SLOW: tl.constexpr, WEIGHT_AVERAGE: tl.constexpr, COMPARE: tl.constexpr,
    MEASURE: tl.constexpr, CLIP: tl.constexpr,
    STATISTICS_PART: tl.constexpr, UPDATE_PART: tl.constexpr, LAST: tl.constexpr,
    OBSERVE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr, TENSORS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    column = first_column + program
    TAIL: tl.constexpr = BLOCK // TAIL_SHARE

    if STATISTICS_PART:
        square = tl.full((), 0.0, tl.float32)
        bad = tl.full((), 0.0, tl.float32)
        for chunk in range(program, n_chunks, programs):
            tensor, start, length, full = chunk_at(chunk, places, extents, BLOCK, CHUNK)
            if full:
                chunk_square, chunk_bad = _gradient_sums(
                    addresses, tensor, start, CHUNK, length, GRAD_TYPE, STATE, BLOCK, True
                )
            else:
                chunk_square, chunk_bad = _gradient_sums(
                    addresses, tensor, start, remaining(start, length, CHUNK), length,
                    GRAD_TYPE, STATE, TAIL, False,
                )  # fmt: skip
            square += chunk_square
            bad = tl.maximum(bad, chunk_bad)
        tl.store(partials + column, square)
        tl.store(partials + COLUMNS + column, bad)

    if STATISTICS_PART and UPDATE_PART:
        # A grid barrier: all programs are resident together (cooperative launch), each
        # adds one when its sums are written, and waits for the others.
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals, 1, sem="acq_rel") + 1
        while arrived < programs:
            arrived = tl.atomic_add(arrivals, 0, sem="acquire")
        tl.debug_barrier()

    if UPDATE_PART:
        norm, nonfinite, unscale = gradient_norm(partials, ledger, COLUMNS)
        held = tl.load(ledger + HOLD) > 0
        coefficient = clip_coefficient(norm, max_norm, CLIP)
        slow_rate = 0.0
        steady = 1.0
        ema_rate = 0.0
        if SLOW:
            slow_rate = (1.0 - slow_decay(ledger, slow_beta)).to(STATE)
            # How much less than the clipped gradient the slow EMA takes; 1 but for outliers.
            steady = slow_clip(ledger, norm, coefficient) / tl.maximum(coefficient, 1e-300)
            steady = steady.to(STATE)
        if WEIGHT_AVERAGE:
            ema_rate = (1.0 - weight_ema_decay(ledger)).to(STATE)

        sum_uu = tl.full((), 0.0, tl.float32)
        sum_us = tl.full((), 0.0, tl.float32)
        sum_ss = tl.full((), 0.0, tl.float32)
        sum_ee = tl.full((), 0.0, tl.float32)
        sum_pull = tl.full((), 0.0, tl.float32)
        n_updated = tl.where(nonfinite | held, 0, n_chunks)
        for chunk in range(program, n_updated, programs):
            tensor, start, length, full = chunk_at(chunk, places, extents, BLOCK, CHUNK)
            row = hyperparameters + tl.load(group + tensor) * HYPER_COLUMNS
            step = tl.load(steps + tensor).to(tl.float64) + 1.0
            factor = 1.0
            if FACTORED:
                factor = tl.load(rate_factors + tensor)
            clip = (coefficient * unscale * tl.load(row + SIGN)).to(STATE)
            if full:
                uu, us, ss, ee, pull = _update_chunk(
                    addresses, tensor, start, length, row, step, factor,
                    clip, slow_rate, steady, ema_rate, CONSTANTS, DIRECTION, ALONG,
                    PARAM_TYPE, GRAD_TYPE, STATE, UPDATE_TYPE, MASTER, KEPT,
                    SLOW, WEIGHT_AVERAGE, COMPARE, BLOCK, CHUNK, True,
                )  # fmt: skip
            else:
                uu, us, ss, ee, pull = _update_chunk(
                    addresses, tensor, start, length, row, step, factor,
                    clip, slow_rate, steady, ema_rate, CONSTANTS, DIRECTION, ALONG,
                    PARAM_TYPE, GRAD_TYPE, STATE, UPDATE_TYPE, MASTER, KEPT,
                    SLOW, WEIGHT_AVERAGE, COMPARE, TAIL, CHUNK, False,
                )  # fmt: skip
            sum_uu += uu
            sum_us += us
            sum_ss += ss
            sum_ee += ee
            sum_pull += pull
        if SLOW:
            tl.store(partials + 2 * COLUMNS + column, sum_uu)
            tl.store(partials + 3 * COLUMNS + column, sum_us)
            tl.store(partials + 4 * COLUMNS + column, sum_ss)
            tl.store(partials + 5 * COLUMNS + column, sum_ee)
            tl.store(partials + 6 * COLUMNS + column, sum_pull)

        # The last program to finish closes the step: nobody else reads its scalars any more.
        tl.debug_barrier()
        finished = tl.atomic_add(arrivals + 1, 1, sem="acq_rel") + 1
        if finished == programs:
            tl.store(arrivals, 0)
            tl.store(arrivals + 1, 0)
            _close_step(
                partials, ledger, steps, present, n_tensors, max_norm, slow_beta,
                CLIP, SLOW, MEASURE, OBSERVE, LAST, COLUMNS, TENSORS,
            )  # fmt: skip


@functools.cache
def cooperative_launches(device: torch.device) -> bool:
    """Whether statistics and update can share one launch on this device.

    True for the interpreter (one program, nobody to wait for) and for a Triton that can
    launch cooperatively (not 3.2).
    """
    if device.type != "cuda":
        return True
    from triton.compiler import make_backend
    from triton.runtime import driver

    options = make_backend(driver.active.get_current_target()).parse_options(dict(RESIDENT_LAUNCH))
    return hasattr(options, "launch_cooperative_grid")


def step(
    sets: Sequence[TensorSet],
    scalars: Scalars,
    *,
    max_norm: float | None,
    slow_beta: float,
    observed: bool,
    measured: bool = True,
    weight_ema: bool = True,
    cooperative: bool | None = None,
) -> None:
    """One base step over tensor sets of different dtypes and rules on one device.

    One launch for a single set (statistics, grid barrier, update); two for each set otherwise,
    or where Triton cannot launch cooperatively, and those of the rule's `prepare` between them.

    Args:
        sets: Tensor sets with rows ``param``, ``grad``, ``weight``, those of their rule and, when
            ``slow_beta`` is positive, ``slow_ema``. Their ``steps`` are advanced.
        scalars: Of these sets. ``hold`` in the ledger keeps the update back.
        max_norm: Global-norm clipping threshold, or None.
        slow_beta: Largest decay of the slow EMA, 0 to leave it out. The rest of the decay
            warms up with the number of gradients (see `slow_decay`).
        observed: Whether the running statistics take this step in.
        measured: Whether update, slow direction and slow EMA are compared for them; False saves
            the arithmetic, and leaves what rests on it as it is.
        weight_ema: Whether ``weight_ema`` is kept up to date, where there is one.
        cooperative: None chooses; True or False forces one or two launches.

    Raises:
        ValueError: A cooperative launch of several programs in the interpreter.
    """
    compares = [measured and slow_beta > 0 and not tensors.frozen for tensors in sets]
    if cooperative is None:
        cooperative = cooperative_launches(sets[0].device)
    if cooperative and INTERPRETED and any(tensors.tiling.programs > 1 for tensors in sets):
        raise ValueError(
            "cooperative=True: allowed in the interpreter only with a tiling of programs=1, "
            "because there programs run one after another and cannot wait for each other"
        )
    single = cooperative and len(sets) == 1 and _rule(sets[0]).prepare is None
    parts = [STATISTICS | UPDATE] if single else [STATISTICS, UPDATE]
    extra = {"launch_cooperative_grid": True} if single and not INTERPRETED else {}
    for part in parts:
        for index, tensors in enumerate(sets):
            rule = _rule(tensors)
            if rule.prepare is not None and part == UPDATE:
                rule.prepare(tensors, scalars, compares[index], max_norm)
            addresses, extents = tensors.tables()
            chunks = tensors.chunks()
            with on_device(tensors.device):
                _step_kernel[(tensors.tiling.programs,)](
                    addresses, extents, len(tensors), chunks.places, chunks.count, chunks.present,
                    tensors.group, scalars.hyperparameters, tensors.steps, tensors.factors,
                    scalars.partials, tensors.first_column, scalars.arrivals, scalars.ledger,
                    max_norm or 0.0, float(slow_beta),
                    CONSTANTS=rule.constants, DIRECTION=rule.direction, ALONG=rule.along,
                    FACTORED=tensors.rate_factors is not None,
                    GRAD_TYPE=tensors.dtype_of("grad"), UPDATE_TYPE=tensors.dtype_of("update"),
                    MASTER=tensors.has_master, SLOW=slow_beta > 0,
                    WEIGHT_AVERAGE=weight_ema and slow_beta > 0 and tensors.has("weight_ema"),
                    COMPARE=compares[index], MEASURE=measured and slow_beta > 0,
                    CLIP=max_norm is not None,
                    STATISTICS_PART=bool(part & STATISTICS), UPDATE_PART=bool(part & UPDATE),
                    LAST=index == len(sets) - 1, OBSERVE=observed,
                    COLUMNS=scalars.partials.shape[1], TENSORS=128,
                    **tensors.layout(), **RESIDENT_LAUNCH, **extra,
                )  # fmt: skip


def _rule(tensors: TensorSet) -> UpdateRule:
    assert tensors.rule is not None, "a tensor set without a rule cannot be updated"
    return tensors.rule
