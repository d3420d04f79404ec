"""The predicted move: combine the basis, move the weights, measure the move.

Which vectors make up the displacement is the predictor's (`Displacement`); how weights are kept,
rounding and what is measured is written here once. What the move amounts to is looked at
afterwards (``verify.py``). Neither reads a gradient, and the ledger, not the host, decides
whether anything moves at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_hybrid.kernels.displacement import Displacement, basis_torch
from triton_hybrid.kernels.launch import Launch
from triton_hybrid.kernels.ledger import (
    FACTOR_COLUMN,
    HORIZON,
    INDEX,
    PART_COLUMN,
    PREDICTION_COLUMNS,
    gate,
)
from triton_hybrid.kernels.ledger_torch import entries_of, gate_torch
from triton_hybrid.kernels.multi_tensor import TORCH_BLOCK, TensorSet, chunk_at, chunk_length
from triton_hybrid.kernels.repeated import repeated
from triton_hybrid.kernels.residue import (
    add_move,
    add_move_torch,
    add_to_move,
    add_to_move_torch,
)
from triton_hybrid.kernels.rows import (
    EXP_AVG,
    TAIL_SHARE,
    load_row,
    load_weight,
    narrow,
    store_weight,
)
from triton_hybrid.kernels.scalars import HYPER, HYPER_COLUMNS, LOG_EXP_AVG, Scalars, own
from triton_hybrid.kernels.sums import fold, no_sums, reduction
from triton_hybrid.kernels.together_torch import Cells, cells_of, dots

MOVE_SUMS = 3
"""Sums of a move: slope, squared displacement, non-finite results."""


@triton.jit
def _move_chunk(
    addresses, tensor, start, length, row, step, factor, coefficients, moves,
    DISPLACEMENT: tl.constexpr, CONSTANTS: tl.constexpr, DENOMINATOR: tl.constexpr,
    ALONG: tl.constexpr, PARAM_TYPE: tl.constexpr, STATE: tl.constexpr,
    MASTER: tl.constexpr, KEPT: tl.constexpr, AGAIN: tl.constexpr,
    FIRST: tl.constexpr, SLOPES: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Moves a chunk; returns slope, squared displacement, and 1 where it is not finite."""
    slope = no_sums(BLOCK, FULL)
    square = no_sums(BLOCK, FULL)
    bad = no_sums(BLOCK, FULL)
    # With Triton 3.6 a row held through the move spilled 96 bytes in FP32, and 16 in BF16 where the
    # displacement is not computed again; read last in 16 bits, it took 12 registers more with 3.9.
    LATE: tl.constexpr = (PARAM_TYPE == STATE) or not AGAIN
    inverse_correction1 = (1.0 / (1.0 - tl.exp(step * tl.load(row + LOG_EXP_AVG)))).to(STATE)
    if AGAIN:
        standing, together, a, b, c, d = add_to_move(
            moves, tensor, row, step, factor, CONSTANTS, FIRST, STATE
        )
    else:
        # The step size is not used, whatever the rate.
        _, a, b, c, d = CONSTANTS(row, step, step, STATE)
    for inner in range(0, chunk_length(start, length, CHUNK, FULL), BLOCK):
        begin = start + inner
        displacement = DISPLACEMENT(
            addresses, tensor, begin, length, 1.0 if AGAIN else factor, a, b, c, d, coefficients,
            DENOMINATOR, ALONG, STATE, BLOCK, FULL,
        )  # fmt: skip
        if SLOPES and not LATE:
            m = load_row(addresses, EXP_AVG, tensor, begin, length, STATE, STATE, BLOCK, FULL)
        if AGAIN:
            displacement, w = add_move(
                addresses, tensor, begin, length, displacement, standing, factor, together,
                PARAM_TYPE, STATE, MASTER, KEPT, FIRST, BLOCK, FULL,
            )  # fmt: skip
        else:
            w = load_weight(addresses, tensor, begin, length, PARAM_TYPE, STATE, KEPT, BLOCK, FULL)
            w = w + displacement
            store_weight(
                addresses, tensor, begin, length, w, PARAM_TYPE, STATE, MASTER, KEPT, BLOCK, FULL
            )
        if SLOPES:
            if LATE:
                m = load_row(addresses, EXP_AVG, tensor, begin, length, STATE, STATE, BLOCK, FULL)
            slope += fold(inverse_correction1 * m * displacement, BLOCK, FULL)
        square += fold(displacement * displacement, BLOCK, FULL)
        # What the model will see is the rounded weight: FP16 overflows at 65504.
        seen = narrow(w, PARAM_TYPE).to(tl.float32)
        bad += fold(tl.where(tl.abs(seen) < float("inf"), 0.0, 1.0), BLOCK, FULL)
    return tl.sum(slope, axis=0), tl.sum(square, axis=0), tl.minimum(tl.sum(bad, axis=0), 1.0)


@triton.jit
def _predict_kernel(
    addresses, extents, places, n_chunks,
    group, hyperparameters, steps, coefficients, prediction, moves, ledger, partials,
    threshold, share,
    FACTORS: tl.constexpr, DISPLACEMENT: tl.constexpr, CONSTANTS: tl.constexpr,
    DENOMINATOR: tl.constexpr, ALONG: tl.constexpr,
    PARAM_TYPE: tl.constexpr, STATE: tl.constexpr, MASTER: tl.constexpr, KEPT: tl.constexpr,
    AGAIN: tl.constexpr, FIRST: tl.constexpr, SLOPES: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    moving = gate(ledger, threshold)
    horizon = tl.load(ledger + HORIZON) * share
    for chunk in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        zero = tl.full((), 0.0, tl.float32)
        slope, square, bad = zero, zero, zero
        if moving:
            tensor, start, length, full = chunk_at(chunk, places, extents, BLOCK, CHUNK)
            row = hyperparameters + tl.load(group + tensor) * HYPER_COLUMNS
            step = tl.maximum(tl.load(steps + tensor).to(tl.float64), 1.0)
            own = prediction + PREDICTION_COLUMNS * tensor
            factor = FACTORS(row, horizon * tl.load(own + FACTOR_COLUMN).to(tl.float64))
            takes_part = tl.load(own + PART_COLUMN) > 0
            for FULL in tl.static_range(2):
                if takes_part & (full == FULL):
                    slope, square, bad = _move_chunk(
                        addresses, tensor, start, length, row, step,
                        factor.to(STATE), coefficients, moves,
                        DISPLACEMENT, CONSTANTS, DENOMINATOR, ALONG, PARAM_TYPE, STATE,
                        MASTER, KEPT, AGAIN, FIRST, SLOPES,
                        BLOCK if FULL else BLOCK // TAIL_SHARE, CHUNK, FULL,
                    )  # fmt: skip
        cell = partials + tl.cast(chunk, tl.int64) * 3
        tl.store(cell, slope)
        tl.store(cell + 1, square)
        tl.store(cell + 2, bad)


@repeated
def predict(
    tensors: TensorSet,
    scalars: Scalars,
    displacement: Displacement,
    coefficients: Tensor | None = None,
    *,
    threshold: float,
    share: float,
    first: bool,
    with_slopes: bool = True,
) -> list[Launch]:
    """Moves the weights of one tensor set by one predicted step. Two or three launches.

    Sums, in ``scalars.sums``: inner product of the bias-corrected exp_avg with the displacement,
    squared displacement, chunks with a non-finite result.

    Args:
        tensors: With rows ``param``, ``weight``, ``exp_avg`` and those of the displacement; where
            it is computed again and weights are moved in place, ``residue``.
        scalars: Of these tensors. The table of predictions scales each tensor; the table of moves
            takes the displacement in; the ledger decides whether anything moves, unchanged.
        displacement: What the weights are moved by.
        coefficients: FP32 ``[tensors]``, if the displacement takes a number of each tensor.
        threshold: Confidence below which nothing moves.
        share: Part of the whole displacement that this step makes.
        first: Whether no displacement stands in the weights yet.
        with_slopes: False: exp_avg is not read, and the first sum is left as it is.
    """
    rule = tensors.rule
    assert rule is not None
    partials = tensors.room_for(MOVE_SUMS)
    prediction, moves = own(scalars.prediction, tensors), own(scalars.moves, tensors)
    launch = tensors.prepared(
        _predict_kernel, tensors.group, scalars.hyperparameters, tensors.steps,
        prediction if coefficients is None else coefficients, prediction, moves,
        scalars.ledger, partials, float(threshold), float(share), every=True,
        FACTORS=displacement.factors, DISPLACEMENT=displacement.block,
        CONSTANTS=rule.constants, DENOMINATOR=rule.denominator, ALONG=rule.along,
        MASTER=tensors.has_master, AGAIN=displacement.again, FIRST=first, SLOPES=with_slopes,
    )  # fmt: skip
    # All programs have read the factors that stood: those with the new step take their place.
    table = moves if displacement.again else None
    sums, chunks = own(scalars.sums, tensors), tensors.chunks(every=True)
    return [launch, reduction(partials, chunks, sums, 0 if with_slopes else 1, table)]


def predict_torch(
    tensors: TensorSet,
    scalars: Scalars,
    displacement: Displacement,
    coefficients: Tensor | None = None,
    *,
    threshold: float,
    share: float,
    first: bool,
    with_slopes: bool = True,
) -> None:
    """`predict` in plain torch."""
    ledger = scalars.ledger
    moving = gate_torch(entries_of(ledger), threshold)
    takes_part = scalars.prediction[tensors.place, PART_COLUMN.value] > 0
    on_cpu = ledger.device.type == "cpu"
    sums = scalars.sums[tensors.place]
    (sums if with_slopes else sums[:, 1:]).zero_()
    if moving is False:
        return
    compute = tensors.compute_dtype
    decay = scalars.hyperparameters[tensors.group.long(), HYPER["log_exp_avg"]]
    step = tensors.steps.double().clamp(min=1.0)
    inverse_correction1 = 1.0 / (1.0 - (step * decay).exp())
    prediction = scalars.prediction[tensors.place]
    factor = prediction[:, FACTOR_COLUMN.value].double() * ledger[INDEX["horizon"]] * share
    columns = displacement.torch.factors(tensors, scalars, factor, coefficients)
    if displacement.again:
        moved_now = takes_part & moving
        columns = add_to_move_torch(tensors, scalars, columns[0], moved_now, first)
    inverse1, *factors = torch.stack([inverse_correction1, *columns], dim=1).to(compute).unbind(1)
    scratch = torch.empty(2, TORCH_BLOCK, dtype=compute, device=tensors.device)
    keys = [here or None for here in takes_part.tolist()] if on_cpu else [True] * len(tensors)
    for cells in cells_of(tensors, keys):
        moves = True if on_cpu else moving & cells.spread(takes_part)
        its, total = [cells.spread(number) for number in factors], sums[cells.indices]
        moved, seen = _move(cells, displacement, its, scratch, first, moves)
        parts = cells.parts(moved)
        if with_slopes:
            total[:, 0] += dots(cells.rows("exp_avg"), parts) * inverse1[cells.indices]
        total[:, 1] += dots(parts, parts)
        # A finite sum has finite terms; on the CPU the second look costs only when not.
        if not on_cpu or not bool(seen.sum(dtype=compute).isfinite()):
            total[:, 2] += torch.stack([~part.isfinite().all() for part in cells.parts(seen)])
        sums[cells.indices] = total


def _move(
    cells: Cells,
    displacement: Displacement,
    factors: Sequence[Any],
    out: Tensor,
    first: bool,
    moves: Any,
) -> tuple[Tensor, Tensor]:
    """Moves some elements, unless ``moves`` is False; returns the displacement, what is seen."""
    if displacement.again:
        *parts, a, b, c, d = factors
        basis = basis_torch(cells, displacement, (1.0, a, b, c, d), out)
        return add_move_torch(cells, basis, (parts[0], parts[1], parts[2]), first, moves)
    moved = basis_torch(cells, displacement, factors, out)
    weight = cells.weight()
    if moves is not True:
        moved.copy_(torch.where(moves, moved, torch.zeros_like(moved)))
        return moved, cells.put_weight(torch.where(moves, weight + moved, weight))
    return moved, cells.put_weight(weight.add_(moved))
