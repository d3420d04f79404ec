"""The slope of a gradient along the displacement that stands in the weights."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_hybrid.kernels.displacement import Displacement, again_torch, computed_again
from triton_hybrid.kernels.launch import Launch
from triton_hybrid.kernels.ledger import INDEX, LOSS_SCALE, PART_COLUMN, PREDICTION_COLUMNS
from triton_hybrid.kernels.multi_tensor import TORCH_BLOCK, TensorSet, chunk_at, chunk_length
from triton_hybrid.kernels.repeated import repeated
from triton_hybrid.kernels.residue import (
    NOT_MOVED,
    UNMOVED,
    load_moved,
    load_moved_torch,
    load_residue,
    move_numbers,
    stands_in_parameter,
)
from triton_hybrid.kernels.rows import (
    GRAD,
    NONE,
    OWN_WEIGHTS,
    SNAPSHOT,
    TAIL_SHARE,
    WEIGHTS_ALONE,
    load_row,
    load_weight,
)
from triton_hybrid.kernels.scalars import HYPER, HYPER_COLUMNS, SIGN, Scalars, own
from triton_hybrid.kernels.sums import fold, no_sums, reduction
from triton_hybrid.kernels.together_torch import Cells, cells_of, dots, gradients

SLOPE_SUMS = 3
"""Sums of a verifying gradient: slope, squared gradient, non-finite gradients."""


@triton.jit
def _slopes_chunk(
    addresses, tensor, start, length, moves,
    DISPLACEMENT: tl.constexpr, DENOMINATOR: tl.constexpr, ALONG: tl.constexpr,
    PARAM_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, STATE: tl.constexpr,
    KEPT: tl.constexpr, AGAIN: tl.constexpr, SLOPES: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    slope = no_sums(BLOCK, FULL) if AGAIN else tl.zeros([BLOCK], tl.float32)
    square = tl.zeros([BLOCK], tl.float32)
    bad = tl.zeros([BLOCK], tl.float32)
    if AGAIN:
        factor, a, b, c, d = move_numbers(moves, tensor, STATE)
    for inner in range(0, chunk_length(start, length, CHUNK, FULL), BLOCK):
        begin = start + inner
        g = load_row(addresses, GRAD, tensor, begin, length, GRAD_TYPE, STATE, BLOCK, FULL)
        if AGAIN:
            gone = DISPLACEMENT(
                addresses, tensor, begin, length, factor, a, b, c, d, moves,
                DENOMINATOR, ALONG, STATE, BLOCK, FULL,
            )  # fmt: skip
            if KEPT == WEIGHTS_ALONE:
                # Rounded to 16 bits, the move is another.
                origin, w = load_moved(
                    addresses, tensor, begin, length, gone, 0, PARAM_TYPE, STATE, KEPT, BLOCK, FULL
                )
                gone = w - origin
            elif KEPT != OWN_WEIGHTS or PARAM_TYPE == STATE:
                lost = load_residue(addresses, tensor, begin, length, BLOCK, FULL)
                gone = tl.where(lost == NOT_MOVED, 0.0, gone)
            slope += fold(g * gone, BLOCK, FULL)
        elif SLOPES:
            w = load_weight(addresses, tensor, begin, length, PARAM_TYPE, STATE, KEPT, BLOCK, FULL)
            origin = load_row(addresses, SNAPSHOT, tensor, begin, length, STATE, STATE, BLOCK, FULL)
            slope += (g * (w - origin)).to(tl.float32)
        square += (g * g).to(tl.float32)
        bad = tl.maximum(bad, tl.where(tl.abs(g) < float("inf"), 0.0, 1.0))
    return tl.sum(slope, axis=0), tl.sum(square, axis=0), tl.max(bad, axis=0)


@triton.jit
def _slopes_kernel(
    addresses, extents, places, n_chunks,
    group, hyperparameters, prediction, moves, ledger, partials,
    DISPLACEMENT: tl.constexpr, DENOMINATOR: tl.constexpr, ALONG: tl.constexpr,
    PARAM_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, STATE: tl.constexpr,
    KEPT: tl.constexpr, AGAIN: tl.constexpr, SLOPES: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    unscale = (1.0 / tl.load(ledger + LOSS_SCALE)).to(tl.float32)
    for chunk in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        tensor, start, length, full = chunk_at(chunk, places, extents, BLOCK, CHUNK)
        row = hyperparameters + tl.load(group + tensor) * HYPER_COLUMNS
        sign = tl.load(row + SIGN).to(tl.float32)
        cell = partials + tl.cast(chunk, tl.int64) * 3
        zero = tl.full((), 0.0, tl.float32)
        slope, square, bad = zero, zero, zero
        for FULL in tl.static_range(2):
            if full == FULL:
                slope, square, bad = _slopes_chunk(
                    addresses, tensor, start, length, moves, DISPLACEMENT, DENOMINATOR, ALONG,
                    PARAM_TYPE, GRAD_TYPE, STATE, KEPT, AGAIN, SLOPES,
                    BLOCK if FULL else BLOCK // TAIL_SHARE, CHUNK, FULL,
                )  # fmt: skip
        if AGAIN:
            takes_part = tl.load(prediction + PREDICTION_COLUMNS * tensor + PART_COLUMN) > 0
            slope = tl.where(takes_part, slope, 0.0)
        tl.store(cell, sign * unscale * slope)
        tl.store(cell + 1, unscale * unscale * square)
        tl.store(cell + 2, bad)


@repeated
def slopes(
    tensors: TensorSet, scalars: Scalars, again: Displacement | None = None, moved: bool = True
) -> list[Launch]:
    """Measures a gradient along the displacement that stands. Two launches.

    Sums, in ``scalars.sums``: slope (descent is negative, also when maximising), squared gradient,
    chunks with a non-finite gradient, without the loss scale; zero for a tensor without a gradient.

    Args:
        tensors: With rows ``grad``, ``weight`` and ``snapshot``, or those of the displacement.
        scalars: Of these tensors.
        again: The displacement, to be computed again; None: ``weight - snapshot``.
        moved: Whether one may stand in these tensors.
    """
    partials = tensors.room_for(SLOPE_SUMS)
    launch = tensors.prepared(
        _slopes_kernel, tensors.group, scalars.hyperparameters,
        own(scalars.prediction, tensors), own(scalars.moves, tensors), scalars.ledger, partials,
        GRAD_TYPE=tensors.dtype_of("grad"), SLOPES=moved, **computed_again(tensors, again, moved),
    )  # fmt: skip
    return [launch, reduction(partials, tensors.chunks(), own(scalars.sums, tensors))]


def slopes_torch(
    tensors: TensorSet, scalars: Scalars, again: Displacement | None = None, moved: bool = True
) -> None:
    """`slopes` in plain torch."""
    ledger, compute = scalars.ledger, tensors.compute_dtype
    sums = own(scalars.sums, tensors).zero_()
    if again is not None:
        moves = own(scalars.moves, tensors).to(compute)
        out = torch.empty(2, TORCH_BLOCK, dtype=compute, device=tensors.device)

    def gone(cells: Cells) -> Tensor:
        if again is None:
            return cells.weight() - cells.joined("snapshot")
        found = again_torch(cells, again, moves, out)
        if tensors.kept == NONE:  # rounded to 16 bits, the move is another
            before, weight = load_moved_torch(cells, found, False)
            return weight - before
        if not stands_in_parameter(tensors):
            found.masked_fill_(cells.joined("residue") == UNMOVED, 0.0)
        return found

    for cells in cells_of(tensors, [here or None for here in tensors.present]):
        grads, total = gradients(cells), sums[cells.indices]
        squares = dots(grads, grads)
        slope, square, bad = total.unbind(1)
        if moved:
            slope.add_(dots(grads, cells.parts(gone(cells))))
        square.add_(squares)
        # A finite sum of squares has finite terms; the second look costs only when not.
        if squares.device.type != "cpu" or not math.isfinite(float(squares.sum())):
            bad.add_(torch.stack([~g.isfinite().all() for g in grads]))
        sums[cells.indices] = total
    slope, square, _ = sums.unbind(1)
    if again is not None:
        takes_part = own(scalars.prediction, tensors)[:, PART_COLUMN.value] > 0
        slope.copy_(torch.where(takes_part, slope, 0.0))
    unscale = ledger[INDEX["loss_scale"]].reciprocal()
    slope.mul_(scalars.hyperparameters[tensors.group.long(), HYPER["sign"]] * unscale)
    square.mul_(unscale * unscale)
