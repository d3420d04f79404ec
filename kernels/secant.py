"""The passes of a quasi-Newton move: note a pair, all inner products, combine and move.

A pair is a move and the change of the gradient along it; ``history`` of them lie in a ring, each
half in a row of its own. What is decided between the passes is in ``trial.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_hybrid.kernels.launch import INTERPRETED, LAUNCH
from triton_hybrid.kernels.ledger import LOSS_SCALE, PART_COLUMN, PREDICTION_COLUMNS
from triton_hybrid.kernels.multi_tensor import TensorSet, chunk_at, chunk_length
from triton_hybrid.kernels.pairs import (
    CHANGES,
    LAST_GRADIENT,
    MOVES,
    newest,
    remembered,
    tile,
)
from triton_hybrid.kernels.rows import (
    EXP_AVG,
    GRAD,
    SNAPSHOT,
    TAIL_SHARE,
    address_row,
    load_row,
    load_weight,
    narrow,
    store_row,
    store_weight,
)
from triton_hybrid.kernels.scalars import (
    HYPER_COLUMNS,
    LOG_EXP_AVG,
    LR,
    SIGN,
    WEIGHT_DECAY,
    Scalars,
    own,
)
from triton_hybrid.kernels.sums import reduce_partials

EXP_AVG_SQ = address_row("exp_avg_sq")
PART = 4096 if INTERPRETED else 32
"""Elements of all pairs that a program holds in registers at a time."""
WARPS = 4
"""Twice the usual: the pairs take so many registers that a block is spread over more threads."""


def products_size(history: int) -> int:
    """Inner products of so many pairs and a gradient (see `products`)."""
    return 2 * history * (history + 1) + history + 3


@triton.jit
def _settle_chunk(
    addresses, tensor, start, length, factor, orders, takes_part, here,
    PARAM_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, STATE: tl.constexpr,
    MASTER: tl.constexpr, KEPT: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    pair = tl.load(orders) > 0
    restart = tl.load(orders + 1) > 0
    fraction = tl.load(orders + 2).to(STATE)
    slot = tl.load(orders + 3).to(tl.int32)
    for inner in range(0, chunk_length(start, length, CHUNK, FULL), BLOCK):
        begin = start + inner
        w = load_weight(addresses, tensor, begin, length, PARAM_TYPE, STATE, KEPT, BLOCK, FULL)
        origin = load_row(addresses, SNAPSHOT, tensor, begin, length, STATE, STATE, BLOCK, FULL)
        if pair | restart:
            g = tl.zeros([BLOCK], STATE)
            if here:
                g = load_row(addresses, GRAD, tensor, begin, length, GRAD_TYPE, STATE, BLOCK, FULL)
                g = g * factor
            if pair:
                last = load_row(
                    addresses, LAST_GRADIENT, tensor, begin, length, STATE, STATE, BLOCK, FULL
                )
                moved, change = tl.where(here, w - origin, 0.0), tl.where(here, g - last, 0.0)
                store_row(
                    addresses, MOVES + slot, tensor, begin, length, moved, STATE, STATE, BLOCK, FULL
                )
                store_row(
                    addresses, CHANGES + slot, tensor, begin, length, change,
                    STATE, STATE, BLOCK, FULL,
                )  # fmt: skip
            if restart:
                store_row(addresses, SNAPSHOT, tensor, begin, length, w, STATE, STATE, BLOCK, FULL)
                store_row(
                    addresses, LAST_GRADIENT, tensor, begin, length, g, STATE, STATE, BLOCK, FULL
                )
        if takes_part & (fraction != 1.0):
            placed = tl.where(fraction == 0.0, origin, origin + fraction * (w - origin))
            store_weight(
                addresses, tensor, begin, length, placed,
                PARAM_TYPE, STATE, MASTER, KEPT, BLOCK, FULL,
            )  # fmt: skip


@triton.jit
def _settle_kernel(
    addresses, extents, places, n_chunks,
    group, hyperparameters, present, prediction, ledger, orders,
    PARAM_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, STATE: tl.constexpr,
    MASTER: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    unscale = 1.0 / tl.load(ledger + LOSS_SCALE)
    idle = (tl.load(orders) <= 0) & (tl.load(orders + 1) <= 0) & (tl.load(orders + 2) == 1.0)
    for chunk in range(tl.program_id(0), tl.where(idle, 0, n_chunks), tl.num_programs(0)):
        tensor, start, length, full = chunk_at(chunk, places, extents, BLOCK, CHUNK)
        row = hyperparameters + tl.load(group + tensor) * HYPER_COLUMNS
        factor = (tl.load(row + SIGN) * unscale).to(STATE)
        takes_part = tl.load(prediction + PREDICTION_COLUMNS * tensor + PART_COLUMN) > 0
        here = tl.load(present + tensor) > 0
        for FULL in tl.static_range(2):
            if full == FULL:
                _settle_chunk(
                    addresses, tensor, start, length, factor, orders, takes_part, here,
                    PARAM_TYPE, GRAD_TYPE, STATE, MASTER, KEPT,
                    BLOCK if FULL else BLOCK // TAIL_SHARE, CHUNK, FULL,
                )  # fmt: skip


def settle(tensors: TensorSet, scalars: Scalars, orders: Tensor, history: int) -> None:
    """Notes a pair, begins anew from here, places the weights: as far as it is ordered. One launch.

    Args:
        tensors: With rows ``param``, ``grad``, ``weight``, ``snapshot``, ``last_gradient`` and the
            pairs. A tensor without a gradient has pairs of zero.
        scalars: Of these tensors.
        orders: FP64 ``[4]``: whether weight - snapshot and gradient - last_gradient are written to
            the pair; whether weight and gradient become ``snapshot`` and ``last_gradient``; the
            fraction of weight - snapshot at which the weights of tensors that take part are placed
            (0: the very bits of the snapshot, 1: they stay); which pair is written.
        history: Pairs that are kept.
    """
    tensors.launch(
        _settle_kernel, tensors.group, scalars.hyperparameters, tensors.chunks().present,
        own(scalars.prediction, tensors), scalars.ledger, orders,
        every=True, GRAD_TYPE=tensors.dtype_of("grad"), MASTER=tensors.has_master,
    )  # fmt: skip


@triton.jit
def _products_chunk(
    addresses, tensor, start, length, row, step, trial, along, against, moves_square,
    square, usual, slope,
    CONSTANTS: tl.constexpr, DENOMINATOR: tl.constexpr, HISTORY: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PARAM_TYPE: tl.constexpr, STATE: tl.constexpr, KEPT: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Adds the inner products of a chunk to what was summed up so far, in FP64."""
    lr = tl.load(row + LR)
    decay = lr * tl.load(row + WEIGHT_DECAY)
    _, a, b, c, d = CONSTANTS(row, step, step, STATE)
    correction1 = 1.0 - tl.exp(step * tl.load(row + LOG_EXP_AVG))
    # Corrected at the end: one number less to hold, which AMD's scalar registers need.
    average = tl.full((), 0.0, tl.float64)
    columns = tl.arange(0, COLUMNS)
    for inner in range(0, chunk_length(start, length, CHUNK, FULL), BLOCK):
        begin = start + inner
        g = load_row(addresses, LAST_GRADIENT, tensor, begin, length, STATE, STATE, BLOCK, FULL)
        before, squares = g, g * g
        slot, pairs = tl.load(trial).to(tl.int32), tl.load(trial + 1).to(tl.int32)
        for back in range(0, pairs):
            pair = CHANGES + newest(slot, back, HISTORY)
            before -= load_row(addresses, pair, tensor, begin, length, STATE, STATE, BLOCK, FULL)
            squares += before * before
        denominator = DENOMINATOR(addresses, tensor, begin, length, a, b, c, d, STATE, BLOCK, FULL)
        denominator = remembered(squares, pairs, row, denominator, STATE)
        metric = lr.to(STATE) / denominator
        moves = tile(addresses, MOVES, tensor, begin, length, HISTORY, ROWS, STATE, BLOCK, FULL)
        changes = tile(addresses, CHANGES, tensor, begin, length, HISTORY, ROWS, STATE, BLOCK, FULL)
        # Where the rate is 0 nothing moves.
        inverse = denominator * (1.0 / tl.where(lr > 0, lr, 1.0)).to(STATE)
        moves_square += tl.sum(moves * moves * inverse[None, :], axis=1).to(tl.float64)
        changes = changes * metric[None, :]
        square += tl.sum(metric * g * g, axis=0).to(tl.float64)
        m = load_row(addresses, EXP_AVG, tensor, begin, length, STATE, STATE, BLOCK, FULL)
        average += tl.sum(metric * m * m, axis=0).to(tl.float64)
        w = load_weight(addresses, tensor, begin, length, PARAM_TYPE, STATE, KEPT, BLOCK, FULL)
        slope += decay * tl.sum(g * w, axis=0).to(tl.float64)
        for number in range(HISTORY + 1):
            # The last column is the gradient's.
            source = tl.where(number < HISTORY, CHANGES + number, LAST_GRADIENT)
            x = load_row(addresses, source, tensor, begin, length, STATE, STATE, BLOCK, FULL)
            left = tl.sum(moves * x[None, :], axis=1).to(tl.float64)
            right = tl.sum(changes * x[None, :], axis=1).to(tl.float64)
            now = (columns == number)[None, :]
            along += tl.where(now, left[:, None], 0.0)
            against += tl.where(now, right[:, None], 0.0)
    usual += average / (correction1 * correction1)
    return along, against, moves_square, square, usual, slope


@triton.jit
def _products_kernel(
    addresses, extents, places, n_chunks,
    group, hyperparameters, steps, prediction, trial, partials,
    CONSTANTS: tl.constexpr, DENOMINATOR: tl.constexpr, HISTORY: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr,
    PARAM_TYPE: tl.constexpr, STATE: tl.constexpr, KEPT: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    along = tl.zeros([ROWS, COLUMNS], tl.float64)
    against = tl.zeros([ROWS, COLUMNS], tl.float64)
    moves_square = tl.zeros([ROWS], tl.float64)
    square = tl.full((), 0.0, tl.float64)
    usual, slope = square, square
    for chunk in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        tensor, start, length, full = chunk_at(chunk, places, extents, BLOCK, CHUNK)
        row = hyperparameters + tl.load(group + tensor) * HYPER_COLUMNS
        step = tl.maximum(tl.load(steps + tensor).to(tl.float64), 1.0)
        takes_part = tl.load(prediction + PREDICTION_COLUMNS * tensor + PART_COLUMN) > 0
        for FULL in tl.static_range(2):
            if takes_part & (full == FULL):
                along, against, moves_square, square, usual, slope = _products_chunk(
                    addresses, tensor, start, length, row, step, trial,
                    along, against, moves_square, square, usual, slope,
                    CONSTANTS, DENOMINATOR, HISTORY, ROWS, COLUMNS,
                    PARAM_TYPE, STATE, KEPT, PART, CHUNK, FULL,
                )  # fmt: skip
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    own = partials + tl.program_id(0) * (2 * ROWS * COLUMNS + ROWS + 3)
    cells = own + rows[:, None] * COLUMNS + columns[None, :]
    tl.store(cells, along)
    tl.store(cells + ROWS * COLUMNS, against)
    own += 2 * ROWS * COLUMNS
    tl.store(own + rows, moves_square)
    tl.store(own + ROWS, square)
    tl.store(own + ROWS + 1, usual)
    tl.store(own + ROWS + 2, slope)


def products(
    tensors: TensorSet, scalars: Scalars, trial: Tensor, out: Tensor, history: int
) -> None:
    """Adds the inner products of one tensor set, over the tensors that take part. One launch.

    With the moves S, the changes Y, the newest gradient g and the metric D, learning rate over the
    denominator of ``pairs.py``, those are ``[S; D Y]ᵀ [Y, g]`` (``[2, history, history + 1]``, row
    by row), the squared moves sᵀD⁻¹s, gᵀ D g, the squared step of the rule in the metric, mᵀ D m
    with its bias-corrected exp_avg m, and Σ learning rate · weight decay · g · weight.

    A pass reads 8 · history + 16 bytes a parameter in FP32. Sums are FP32 within a block, FP64 over
    blocks, and over programs in the order of their numbers.

    Args:
        tensors: With rows ``weight``, ``last_gradient``, the pairs and those of the denominator.
        scalars: Of these tensors.
        trial: FP64; its slot and its number of pairs are read.
        out: FP64 ``[products_size(history)]``, added to.
        history: Pairs that are kept, all of them finite.
    """
    rule = tensors.rule
    assert rule is not None
    rows, columns = triton.next_power_of_2(history), triton.next_power_of_2(history + 1)
    size = 2 * rows * columns + rows + 3
    partials = torch.empty(tensors.tiling.programs, size, dtype=torch.float64, device=out.device)
    tensors.launch(
        _products_kernel, tensors.group, scalars.hyperparameters, tensors.steps,
        own(scalars.prediction, tensors), trial, partials, every=True,
        CONSTANTS=rule.constants, DENOMINATOR=rule.denominator, HISTORY=history,
        ROWS=rows, COLUMNS=columns, PART=min(PART, tensors.tiling.block),
        options={**LAUNCH, "num_warps": WARPS},
    )  # fmt: skip
    total = partials.sum(0)
    gram = total[: 2 * rows * columns].view(2, rows, columns)[:, :history, : history + 1]
    squares = total[2 * rows * columns : -3][:history]
    out += torch.cat([gram.flatten(), squares, total[-3:]])


@triton.jit
def _move_chunk(
    addresses, tensor, start, length, row, step, trial, solution, history,
    CONSTANTS: tl.constexpr, DENOMINATOR: tl.constexpr,
    PARAM_TYPE: tl.constexpr, STATE: tl.constexpr, MASTER: tl.constexpr, KEPT: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    zero = tl.full((), 0.0, tl.float32)
    slope, square, bad = zero, zero, zero
    lr = tl.load(row + LR)
    gamma = tl.load(solution + 1).to(STATE)
    decay = (lr * tl.load(row + WEIGHT_DECAY) * tl.load(solution + 2)).to(STATE)
    _, a, b, c, d = CONSTANTS(row, step, step, STATE)
    slot, pairs = tl.load(trial).to(tl.int32), tl.load(trial + 1).to(tl.int32)
    for inner in range(0, chunk_length(start, length, CHUNK, FULL), BLOCK):
        begin = start + inner
        w = load_weight(addresses, tensor, begin, length, PARAM_TYPE, STATE, KEPT, BLOCK, FULL)
        g = load_row(addresses, LAST_GRADIENT, tensor, begin, length, STATE, STATE, BLOCK, FULL)
        v = load_row(addresses, EXP_AVG_SQ, tensor, begin, length, STATE, STATE, BLOCK, FULL)
        denominator = DENOMINATOR(addresses, tensor, begin, length, a, b, c, d, STATE, BLOCK, FULL)
        rest, before, squares = g, g, g * g
        along = tl.zeros([BLOCK], STATE)
        for back in range(history):
            pair = newest(slot, back, history)
            alpha = tl.load(solution + 3 + pair).to(STATE)
            delta = tl.load(solution + 3 + history + pair).to(STATE)
            change = load_row(
                addresses, CHANGES + pair, tensor, begin, length, STATE, STATE, BLOCK, FULL
            )
            rest -= alpha * change
            before -= change
            squares += tl.where(back < pairs, before * before, 0.0)
            along += delta * load_row(
                addresses, MOVES + pair, tensor, begin, length, STATE, STATE, BLOCK, FULL
            )
        metric = lr.to(STATE) / remembered(squares, pairs, row, denominator, STATE)
        moved = -gamma * metric * rest - along - decay * w
        # What never had a gradient stays.
        moved = tl.where(v != 0, moved, 0.0)
        w = w + moved
        store_weight(
            addresses, tensor, begin, length, w, PARAM_TYPE, STATE, MASTER, KEPT, BLOCK, FULL
        )
        slope += tl.sum((g * moved).to(tl.float32), axis=0)
        square += tl.sum(tl.where(v != 0, moved * moved / metric, 0.0).to(tl.float32), axis=0)
        seen = narrow(w, PARAM_TYPE).to(tl.float32)
        bad = tl.maximum(bad, tl.max(tl.where(tl.abs(seen) < float("inf"), 0.0, 1.0), axis=0))
    return slope, square, bad


@triton.jit
def _move_kernel(
    addresses, extents, places, n_chunks,
    group, hyperparameters, steps, prediction, trial, solution, history, partials,
    CONSTANTS: tl.constexpr, DENOMINATOR: tl.constexpr,
    PARAM_TYPE: tl.constexpr, STATE: tl.constexpr, MASTER: tl.constexpr, KEPT: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    moving = tl.load(solution) > 0
    for chunk in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        zero = tl.full((), 0.0, tl.float32)
        slope, square, bad = zero, zero, zero
        if moving:
            tensor, start, length, full = chunk_at(chunk, places, extents, BLOCK, CHUNK)
            row = hyperparameters + tl.load(group + tensor) * HYPER_COLUMNS
            step = tl.maximum(tl.load(steps + tensor).to(tl.float64), 1.0)
            takes_part = tl.load(prediction + PREDICTION_COLUMNS * tensor + PART_COLUMN) > 0
            for FULL in tl.static_range(2):
                if takes_part & (full == FULL):
                    slope, square, bad = _move_chunk(
                        addresses, tensor, start, length, row, step, trial, solution, history,
                        CONSTANTS, DENOMINATOR, PARAM_TYPE, STATE, MASTER, KEPT,
                        BLOCK if FULL else BLOCK // TAIL_SHARE, CHUNK, FULL,
                    )  # fmt: skip
        cell = partials + tl.cast(chunk, tl.int64) * 3
        tl.store(cell, slope)
        tl.store(cell + 1, square)
        tl.store(cell + 2, bad)


def move(
    tensors: TensorSet,
    scalars: Scalars,
    trial: Tensor,
    solution: Tensor,
    history: int,
    known: None = None,
) -> None:
    """Moves the weights of the tensors that take part. Two launches.

    Sums, in ``scalars.sums``: slope of ``last_gradient`` along the move, the squared move in the
    metric, chunks with a non-finite result.

    A pass moves 8 · history + 20 bytes a parameter in FP32.

    Args:
        tensors: With rows ``param``, ``weight``, ``last_gradient``, ``exp_avg_sq`` and the pairs.
        scalars: Of these tensors.
        trial: As `products` takes it.
        solution: FP64 ``[3 + 2 · history]`` of `solve`: whether to move, γ, share of the weight
            decay, α and δ by pair; a weight w moves by -γ D (g - Y α) - S δ - share · decay · w.
        history: Pairs that are kept.
        known: What `products` has returned, if nothing has changed since: nothing here.
    """
    rule = tensors.rule
    assert rule is not None
    partials = tensors.room_for(3)
    # Waves of AMD are twice as wide, and 8 elements of a 16-bit row are one access of a thread.
    warps = WARPS // 2 if "waves_per_eu" in LAUNCH else WARPS
    tensors.launch(
        _move_kernel, tensors.group, scalars.hyperparameters, tensors.steps,
        own(scalars.prediction, tensors), trial, solution, history, partials, every=True,
        CONSTANTS=rule.constants, DENOMINATOR=rule.denominator, MASTER=tensors.has_master,
        options={**LAUNCH, "num_warps": warps},
    )  # fmt: skip
    reduce_partials(partials, tensors.chunks(every=True), own(scalars.sums, tensors))
