"""The base step over many tensors: statistics of the gradient, then the update.

One kernel in two parts. The first sums up the squared gradient and looks for non-finite values;
the second updates. The second needs the result of the first for *all* tensors (global-norm
clipping; a non-finite gradient must change nothing), so between them lies either a grid barrier
(one cooperative launch) or the end of a launch (two launches).

What an update does is the rule's (`UpdateRule`); clipping, weight decay, masters, the slow EMA and
the measurements are the same for every rule, and written here once. With AdamW the
update moves 28 bytes a parameter, in FP32 and in 16 bit with FP32 masters; the first part reads
the gradient once more, the slow EMA adds 8 bytes, masters after a prediction (`placement`) none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_hybrid.kernels.displacement import Displacement, computed_again
from triton_hybrid.kernels.launch import INTERPRETED, RESIDENT_LAUNCH, Launch
from triton_hybrid.kernels.ledger import close_gradient
from triton_hybrid.kernels.multi_tensor import TensorSet, chunk_at, chunk_length
from triton_hybrid.kernels.placement import accepted_move, load_placed, placed_by_update
from triton_hybrid.kernels.repeated import repeated
from triton_hybrid.kernels.rows import (
    EXP_AVG,
    GRAD,
    TAIL_SHARE,
    address_row,
    load_row,
    load_weight,
    store_row,
    store_weight,
)
from triton_hybrid.kernels.running import observe, slow_decay, slow_share
from triton_hybrid.kernels.scalars import (
    HYPER_COLUMNS,
    LR,
    SIGN,
    WEIGHT_DECAY,
    Scalars,
    gradient_norm,
    own,
)
from triton_hybrid.kernels.step_torch import Gradient, averaging_rates, close_step_torch
from triton_hybrid.kernels.sums import fold, no_sums

SLOW_EMA = address_row("slow_ema")


@triton.jit
def _gradient_sums(
    addresses, tensor, start, length, GRAD_TYPE: tl.constexpr, STATE: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Squared norm of a chunk's gradient, and 1 where it holds a non-finite value."""
    # Not by `fold`: a 16-bit row would change hands for it (3% of a step on an H200).
    square = tl.zeros([BLOCK], tl.float32)
    bad = tl.zeros([BLOCK], tl.float32)
    for inner in range(0, chunk_length(start, length, CHUNK, FULL), BLOCK):
        g = load_row(addresses, GRAD, tensor, start + inner, length, GRAD_TYPE, STATE, BLOCK, FULL)
        square += (g * g).to(tl.float32)
        bad = tl.maximum(bad, tl.where(tl.abs(g) < float("inf"), 0.0, 1.0))
    return tl.sum(square, axis=0), tl.max(bad, axis=0)


@triton.jit
def _update_chunk(
    addresses, tensor, start, length, row, step, factor, clip, slow_rate, share, uu, us, ss, ee,
    ledger, prediction, moves,
    CONSTANTS: tl.constexpr, DIRECTION: tl.constexpr, ALONG: tl.constexpr,
    DISPLACEMENT: tl.constexpr, DENOMINATOR: tl.constexpr, AGAIN: tl.constexpr,
    PARAM_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, STATE: tl.constexpr,
    UPDATE_TYPE: tl.constexpr, MASTER: tl.constexpr, KEPT: tl.constexpr,
    SLOW: tl.constexpr, COMPARE: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Updates a chunk, and adds what `UPDATE_SUMS` names."""
    lr = tl.load(row + LR)
    keep = (1.0 - lr * tl.load(row + WEIGHT_DECAY)).to(STATE)
    size, a, b, c, d = CONSTANTS(row, step, lr * factor, STATE)
    if AGAIN:
        fraction, written, moved, p, q, r, t = accepted_move(
            ledger, prediction, moves, tensor, STATE
        )
    for inner in range(0, chunk_length(start, length, CHUNK, FULL), BLOCK):
        begin = start + inner
        if AGAIN:
            # Before anything is stored: then the compiler takes the rows that it reads as loaded.
            if SLOW:
                s = load_row(addresses, SLOW_EMA, tensor, begin, length, STATE, STATE, BLOCK, FULL)
            w = load_placed(
                addresses, tensor, begin, length, fraction, written, moved, p, q, r, t, moves,
                DISPLACEMENT, DENOMINATOR, ALONG, PARAM_TYPE, STATE, KEPT, BLOCK, FULL,
            )  # fmt: skip
        else:
            w = load_weight(addresses, tensor, begin, length, PARAM_TYPE, STATE, KEPT, BLOCK, FULL)
        g = load_row(addresses, GRAD, tensor, begin, length, GRAD_TYPE, STATE, BLOCK, FULL) * clip
        if COMPARE and not SLOW:
            s = load_row(addresses, EXP_AVG, tensor, begin, length, STATE, STATE, BLOCK, FULL)
        direction, denominator = DIRECTION(
            addresses, tensor, begin, length, g, a, b, c, d, STATE, UPDATE_TYPE, BLOCK, FULL
        )
        update = size * direction
        w = w * keep - update
        store_weight(
            addresses, tensor, begin, length, w, PARAM_TYPE, STATE, MASTER, KEPT, BLOCK, FULL
        )
        if SLOW and not AGAIN:
            s = load_row(addresses, SLOW_EMA, tensor, begin, length, STATE, STATE, BLOCK, FULL)
        if COMPARE:
            ahead = size * ALONG(
                addresses, tensor, begin, length, s, denominator, STATE, BLOCK, FULL
            )  # fmt: skip
            uu += fold(update * update, BLOCK, FULL)
            us += fold(update * ahead, BLOCK, FULL)
            ss += fold(ahead * ahead, BLOCK, FULL)
        if SLOW:
            s = s + slow_rate * (share * g - s)
            if not AGAIN:
                ee += fold(s * s, BLOCK, FULL)
            store_row(addresses, SLOW_EMA, tensor, begin, length, s, STATE, STATE, BLOCK, FULL)
    return uu, us, ss, ee


@triton.jit
def _close_step(
    partials, ledger, steps, present, n_tensors, max_norm, slow_beta,
    CLIP: tl.constexpr, SLOW: tl.constexpr, MEASURE: tl.constexpr, OBSERVE: tl.constexpr,
    LAST: tl.constexpr, COLUMNS: tl.constexpr, TENSORS: tl.constexpr,
):  # fmt: skip
    """Counts the step, and takes it into the running statistics."""
    # Looked up again: kept through the update, they would cost registers there.
    norm, nonfinite, applied, clip, _ = gradient_norm(partials, ledger, max_norm, CLIP, COLUMNS)
    # One thread writes the ledger; first every thread must have read what it decides by.
    tl.debug_barrier()
    for begin in range(0, n_tensors, TENSORS):
        t = begin + tl.arange(0, TENSORS)
        here = t < n_tensors
        advance = tl.where(applied, tl.load(present + t, mask=here, other=0), 0)
        old = tl.load(steps + t, mask=here, other=0.0)
        tl.store(steps + t, old + advance.to(tl.float32), mask=here)
    if LAST:
        if OBSERVE:  # noqa: SIM102 - known when compiled, unlike the next
            # A norm that overflowed would spoil every running mean for good.
            if applied & (norm * clip < float("inf")):
                observe(ledger, partials, norm, clip, slow_beta, SLOW, MEASURE, COLUMNS)
        close_gradient(ledger, norm, nonfinite, applied)


@triton.jit
def _step_kernel(
    addresses, extents, places, n_chunks,
    present, n_tensors, group, hyperparameters, steps, rate_factors, prediction, moves,
    partials, first_column, arrivals, ledger, max_norm, slow_beta,
    CONSTANTS: tl.constexpr, DIRECTION: tl.constexpr, ALONG: tl.constexpr, FACTORED: tl.constexpr,
    DISPLACEMENT: tl.constexpr, DENOMINATOR: tl.constexpr, AGAIN: tl.constexpr,
    PARAM_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, STATE: tl.constexpr,
    UPDATE_TYPE: tl.constexpr, MASTER: tl.constexpr, KEPT: tl.constexpr,
    SLOW: tl.constexpr, COMPARE: tl.constexpr, AVERAGED: tl.constexpr,
    MEASURE: tl.constexpr, CLIP: tl.constexpr, STATISTICS: tl.constexpr, UPDATE: tl.constexpr,
    LAST: tl.constexpr, OBSERVE: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr, TENSORS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    own = partials + first_column + program

    if STATISTICS:
        zero = tl.full((), 0.0, tl.float32)
        square, bad = zero, zero
        for chunk in range(program, n_chunks, programs):
            tensor, start, length, full = chunk_at(chunk, places, extents, BLOCK, CHUNK)
            chunk_square, chunk_bad = zero, zero
            for FULL in tl.static_range(2):
                if full == FULL:
                    chunk_square, chunk_bad = _gradient_sums(
                        addresses, tensor, start, length, GRAD_TYPE, STATE,
                        BLOCK if FULL else BLOCK // TAIL_SHARE, CHUNK, FULL,
                    )  # fmt: skip
            square += chunk_square
            bad = tl.maximum(bad, chunk_bad)
        tl.store(own, square)
        tl.store(own + COLUMNS, bad)

    if STATISTICS and UPDATE:
        # A grid barrier: all programs are resident together (cooperative launch), each
        # adds one when its sums are written, and waits for the others.
        tl.debug_barrier()
        arrived = tl.atomic_add(arrivals, 1, sem="acq_rel") + 1
        while arrived < programs:
            arrived = tl.atomic_add(arrivals, 0, sem="acquire")
        tl.debug_barrier()

    if UPDATE:
        norm, _, applied, coefficient, unscale = gradient_norm(
            partials, ledger, max_norm, CLIP, COLUMNS
        )
        scale = (coefficient * unscale).to(STATE)
        slow_rate = 0.0
        share = 1.0
        if SLOW:
            slow_rate = (1.0 - slow_decay(ledger, slow_beta)).to(STATE)
            share = slow_share(ledger, norm, coefficient).to(STATE)

        # Placing takes registers: half of a block at a time leaves enough of them.
        PIECE: tl.constexpr = BLOCK // 2 if AGAIN else BLOCK
        uu = no_sums(BLOCK, True)
        us = no_sums(BLOCK, True)
        ss = no_sums(BLOCK, True)
        ee = no_sums(BLOCK, True)
        for chunk in range(program, tl.where(applied, n_chunks, 0), programs):
            tensor, start, length, full = chunk_at(chunk, places, extents, BLOCK, CHUNK)
            row = hyperparameters + tl.load(group + tensor) * HYPER_COLUMNS
            step = tl.load(steps + tensor).to(tl.float64) + 1.0
            factor = tl.load(rate_factors + tensor) if FACTORED else 1.0
            clip = scale * tl.load(row + SIGN).to(STATE)
            for FULL in tl.static_range(2):
                if full == FULL:
                    uu, us, ss, ee = _update_chunk(
                        addresses, tensor, start, length, row, step, factor,
                        clip, slow_rate, share, uu, us, ss, ee, ledger, prediction, moves,
                        CONSTANTS, DIRECTION, ALONG, DISPLACEMENT, DENOMINATOR, AGAIN,
                        PARAM_TYPE, GRAD_TYPE, STATE, UPDATE_TYPE, MASTER, KEPT, SLOW,
                        COMPARE, PIECE if FULL else BLOCK // TAIL_SHARE, CHUNK, FULL,
                    )  # fmt: skip
        if AVERAGED:
            tl.store(own + 2 * COLUMNS, tl.sum(uu, axis=0))
            tl.store(own + 3 * COLUMNS, tl.sum(us, axis=0))
            tl.store(own + 4 * COLUMNS, tl.sum(ss, axis=0))
            tl.store(own + 5 * COLUMNS, tl.sum(ee, axis=0))

        # The last program to finish closes the step: nobody else reads its scalars any more.
        tl.debug_barrier()
        finished = tl.atomic_add(arrivals + 1, 1, sem="acq_rel") + 1
        if finished == programs:
            tl.store(arrivals, 0)
            tl.store(arrivals + 1, 0)
            _close_step(
                partials, ledger, steps, present, n_tensors, max_norm, slow_beta,
                CLIP, AVERAGED, MEASURE, OBSERVE, LAST, COLUMNS, TENSORS,
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
    cooperative: bool | None = None,
    known: bool = False,
    reduce: Callable[[Tensor], Tensor] | None = None,
    again: Sequence[Displacement] | None = None,
) -> None:
    """One base step over tensor sets of different dtypes and rules on one device.

    One launch for a single set (statistics, grid barrier, update); two for each set otherwise,
    or where Triton cannot launch cooperatively, and those of the rule's `prepare` between them.

    Args:
        sets: Tensor sets with rows ``param``, ``grad``, ``weight``, those of their rule and, if
            they keep one, ``slow_ema``. Their ``steps`` are advanced.
        scalars: Of these sets. ``hold`` in the ledger keeps the update back.
        max_norm: Global-norm clipping threshold, or None.
        slow_beta: Largest decay of the slow EMA, 0 to leave it out. The rest of the decay
            warms up with the number of gradients (see `slow_decay`).
        observed: Whether the running statistics take this step in.
        measured: Whether update, slow direction and slow EMA are compared for them; of sets
            without a slow EMA update and exp_avg before it. False leaves what rests on it as it is.
        cooperative: None chooses; True or False forces one or two launches.
        known: Whether ``scalars.gradient`` holds what `measure` found, here or on all processes.
        reduce: Adds FP64 sums up over the processes that hold the other parts of these tensors;
            None where there are none.
        again: In the step of a verification, of each set the displacement that `correct` left to
            it: masters of an accepted prediction begin where it puts them. Not with ``measured``.

    Raises:
        ValueError: A cooperative launch of several programs in the interpreter.
    """
    alone = not INTERPRETED or all([tensors.tiling.programs == 1 for tensors in sets])
    if cooperative is None:
        cooperative = alone and cooperative_launches(sets[0].device)
    elif cooperative and not alone:
        raise ValueError(
            "cooperative=True: allowed in the interpreter only with a tiling of programs=1, "
            "because there programs run one after another and cannot wait for each other"
        )
    rules = [tensors.rule for tensors in sets if tensors.rule is not None]
    assert len(rules) == len(sets), "a tensor set without a rule cannot be updated"
    options: dict[str, Any] = {"max_norm": max_norm, "slow_beta": slow_beta}
    options |= {"observed": observed, "measured": measured and slow_beta > 0}
    each = again or (None,) * len(sets)
    assert again is None or (slow_beta > 0 and not measured), "again: such a step places nothing"
    if known:
        scalars.partials[:2].zero_()  # where the first part would have left it
        scalars.partials[:2, 0] = scalars.gradient
    elif cooperative and len(sets) == 1 and rules[0].prepare is None:
        _launch(sets[0], scalars, statistics=True, update=True, last=True, again=each[0], **options)
        return
    else:
        for tensors in sets:
            _launch(tensors, scalars, statistics=True, update=False, last=False, **options)
    gradient = None if reduce is None else Gradient.of(scalars, max_norm)
    for tensors, rule, its in zip(sets, rules, each):
        if rule.prepare is not None:
            rule.prepare(tensors, scalars, max_norm)
        last = reduce is None and tensors is sets[-1]
        _launch(tensors, scalars, statistics=False, update=True, last=last, again=its, **options)
    if reduce is not None and gradient is not None:
        steady, (norm, _, _, coefficient, _) = None, gradient
        if slow_beta > 0:
            steady = averaging_rates(scalars.ledger, slow_beta, norm, coefficient)[1]
        sums, measured = _weighted(sets, scalars, slice(2, None)), bool(options["measured"])
        if measured:
            sums = reduce(sums)
        close_step_torch(scalars.ledger, gradient, sums, steady, slow_beta, observed, measured)


def measure(sets: Sequence[TensorSet], scalars: Scalars) -> None:
    """Looks at the gradients: the first part of a step, of which several processes need the sum.

    Leaves the sum of squares, and how many programs found something not finite, in
    ``scalars.gradient``; each set counts with its ``share``.
    """
    options: dict[str, Any] = {"max_norm": None, "slow_beta": 0.0}
    options |= {"observed": False, "measured": False}
    for tensors in sets:
        _launch(tensors, scalars, statistics=True, update=False, last=False, **options)
    scalars.gradient.copy_(_weighted(sets, scalars, slice(2)))


def _weighted(sets: Sequence[TensorSet], scalars: Scalars, rows: slice) -> Tensor:
    """First-stage sums over the programs of all sets, FP64, each set with its share."""
    first = scalars.partials[rows].double()
    ends = [tensors.first_column + tensors.tiling.programs for tensors in sets]
    own = [first[:, its.first_column : end].sum(1) * its.share for its, end in zip(sets, ends)]
    return torch.stack(own).sum(0)


@repeated
def _launch(
    tensors: TensorSet,
    scalars: Scalars,
    *,
    statistics: bool,
    update: bool,
    last: bool,
    max_norm: float | None,
    slow_beta: float,
    observed: bool,
    measured: bool,
    again: Displacement | None = None,
) -> list[Launch]:
    rule, averaged = tensors.rule, slow_beta > 0
    assert rule is not None
    single = statistics and update and not INTERPRETED
    placing = again is not None and placed_by_update(tensors)
    tables = scalars.prediction, scalars.moves
    extra = {"launch_cooperative_grid": True} if single else {}
    launch = tensors.prepared(
        _step_kernel, tensors.chunks().present, len(tensors),
        tensors.group, scalars.hyperparameters, tensors.steps, tensors.factors,
        *([own(table, tensors) for table in tables] if placing else tables),
        scalars.partials, tensors.first_column, scalars.arrivals, scalars.ledger,
        max_norm or 0.0, float(slow_beta),
        CONSTANTS=rule.constants, DIRECTION=rule.direction,
        **{**computed_again(tensors, again, placing), "ALONG": rule.along},
        FACTORED=tensors.rate_factors is not None, MASTER=tensors.has_master,
        GRAD_TYPE=tensors.dtype_of("grad"), UPDATE_TYPE=tensors.dtype_of("update"),
        SLOW=averaged and tensors.has("slow_ema"), COMPARE=measured and not tensors.frozen,
        AVERAGED=averaged, MEASURE=measured,
        CLIP=max_norm is not None, STATISTICS=statistics, UPDATE=update, LAST=last,
        OBSERVE=observed, COLUMNS=scalars.partials.shape[1], TENSORS=128,
        options={**RESIDENT_LAUNCH, **extra},
    )  # fmt: skip
    return [launch]
