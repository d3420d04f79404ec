"""Verification: what happens to a predicted move before and after the next gradient.

`check_move` looks at a move before any gradient does: a stretch of moves goes back to its snapshot
where the result is not finite, leads further than the usual update allows, or leads uphill.
`slopes` measures the gradient at the predicted point along the displacement, `decide`
(``ledger.py``) decides by it, and `correct` places the weights where the decision says.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_hybrid.kernels.ledger import (
    CAUSE_JUMP,
    CAUSE_NONFINITE,
    DECISION,
    FRACTION_COLUMN,
    INDEX,
    JUMP_SQUARE,
    LOSS_SCALE,
    MOVED,
    PART_COLUMN,
    PREDICTION_COLUMNS,
    SLOPE_COLUMN,
    STRETCH,
    UPDATE_SQUARE,
    add,
    gate,
    reject,
)
from triton_hybrid.kernels.ledger_torch import gate_torch, reject_torch
from triton_hybrid.kernels.multi_tensor import TensorSet, chunk_at, chunk_length
from triton_hybrid.kernels.rows import (
    GRAD,
    SNAPSHOT,
    TAIL_SHARE,
    load_row,
    load_weight,
    store_row,
    store_weight,
)
from triton_hybrid.kernels.scalars import HYPER, HYPER_COLUMNS, SIGN, Scalars, own
from triton_hybrid.kernels.sums import reduce_partials, totals
from triton_hybrid.kernels.together_torch import Together, dots, together

SLOPE_SUMS = 3
"""Sums of a verifying gradient: slope, squared gradient, non-finite gradients."""


@triton.jit
def _slopes_chunk(
    addresses, tensor, start, length,
    PARAM_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, STATE: tl.constexpr,
    KEPT: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    slope = tl.zeros([BLOCK], tl.float32)
    square = tl.zeros([BLOCK], tl.float32)
    bad = tl.zeros([BLOCK], tl.float32)
    for inner in range(0, chunk_length(start, length, CHUNK, FULL), BLOCK):
        begin = start + inner
        g = load_row(addresses, GRAD, tensor, begin, length, GRAD_TYPE, STATE, BLOCK, FULL)
        w = load_weight(addresses, tensor, begin, length, PARAM_TYPE, STATE, KEPT, BLOCK, FULL)
        origin = load_row(addresses, SNAPSHOT, tensor, begin, length, STATE, STATE, BLOCK, FULL)
        slope += (g * (w - origin)).to(tl.float32)
        square += (g * g).to(tl.float32)
        bad = tl.maximum(bad, tl.where(tl.abs(g) < float("inf"), 0.0, 1.0))
    return tl.sum(slope, axis=0), tl.sum(square, axis=0), tl.max(bad, axis=0)


@triton.jit
def _slopes_kernel(
    addresses, extents, places, n_chunks, group, hyperparameters, ledger, partials,
    PARAM_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, STATE: tl.constexpr,
    KEPT: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
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
                    addresses, tensor, start, length,
                    PARAM_TYPE, GRAD_TYPE, STATE, KEPT,
                    BLOCK if FULL else BLOCK // TAIL_SHARE, CHUNK, FULL,
                )  # fmt: skip
        tl.store(cell, sign * unscale * slope)
        tl.store(cell + 1, unscale * unscale * square)
        tl.store(cell + 2, bad)


def slopes(tensors: TensorSet, scalars: Scalars) -> None:
    """Measures a gradient along the displacement ``weight - snapshot``. Two launches.

    Sums, in ``scalars.sums``: slope (descent is negative, also when maximising), squared gradient,
    chunks with a non-finite gradient, without the loss scale; zero for a tensor without a gradient.

    Args:
        tensors: With rows ``grad``, ``weight`` and ``snapshot``.
        scalars: Of these tensors.
    """
    partials = tensors.room_for(SLOPE_SUMS)
    tensors.launch(
        _slopes_kernel, tensors.group, scalars.hyperparameters, scalars.ledger, partials,
        GRAD_TYPE=tensors.dtype_of("grad"),
    )  # fmt: skip
    reduce_partials(partials, tensors.chunks(), own(scalars.sums, tensors))


def slopes_torch(tensors: TensorSet, scalars: Scalars) -> None:
    """`slopes` in plain torch."""
    flat, ledger = tensors.flat, scalars.ledger
    compute = tensors.compute_dtype
    sums = scalars.sums[tensors.place].zero_()
    done: set[int] = set()
    for party in together(tensors, [here or None for here in tensors.present]).values():
        sums[party.indices] = _slopes_together(party)
        done.update(party.indices)
    for index, here in enumerate(tensors.present):
        if index in done:
            continue
        total = sums[index]
        for part in tensors.torch_blocks(index) if here else ():
            g = flat["grad"][index][part].to(compute)
            square = g.dot(g)
            total[0] += g.dot(tensors.weight(index, part) - flat["snapshot"][index][part])
            total[1] += square
            # A finite sum of squares has finite terms; the second look costs only when not.
            if square.device.type != "cpu" or not bool(square.isfinite()):
                total[2] += ~g.isfinite().all()
    unscale = ledger[INDEX["loss_scale"]].reciprocal()
    sums[:, 0] *= scalars.hyperparameters[tensors.group.long(), HYPER["sign"]] * unscale
    sums[:, 1] *= unscale * unscale


def _slopes_together(party: Together) -> Tensor:
    """The sums of short tensors; FP64 ``[tensors, SLOPE_SUMS]``."""
    tensors = party.tensors
    joined, grads = party.joined("grad"), party.rows("grad")
    if joined.dtype != tensors.compute_dtype:
        joined = joined.to(tensors.compute_dtype)
        grads = party.parts(joined)
    squares = dots(grads, grads)
    displaced = party.parts(party.weight().sub_(party.joined("snapshot")))
    total = joined.new_zeros(len(grads), SLOPE_SUMS, dtype=torch.float64)
    total[:, 0] = dots(grads, displaced)
    total[:, 1] = squares
    if not bool(squares.isfinite().all()):
        total[:, 2] = torch.stack([~grad.isfinite().all() for grad in grads])
    return total


@triton.jit
def _place_chunk(
    addresses, tensor, start, length, fraction,
    PARAM_TYPE: tl.constexpr, STATE: tl.constexpr, MASTER: tl.constexpr, KEPT: tl.constexpr,
    WHOLE: tl.constexpr, RESTART: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Places the weights of a chunk at snapshot + fraction · (weight - snapshot).

    ``WHOLE``: the fraction is 0, and the weights are not read.
    """
    for inner in range(0, chunk_length(start, length, CHUNK, FULL), BLOCK):
        begin = start + inner
        placed = load_row(addresses, SNAPSHOT, tensor, begin, length, STATE, STATE, BLOCK, FULL)
        if not WHOLE:
            w = load_weight(addresses, tensor, begin, length, PARAM_TYPE, STATE, KEPT, BLOCK, FULL)
            between = placed + fraction * (w - placed)
            # Exactly 0 and 1 must keep the bits, also where w - snapshot is not finite.
            placed = tl.where(fraction == 0.0, placed, tl.where(fraction == 1.0, w, between))
        store_weight(
            addresses, tensor, begin, length, placed, PARAM_TYPE, STATE, MASTER, KEPT, BLOCK, FULL
        )
        if RESTART:
            store_row(addresses, SNAPSHOT, tensor, begin, length, placed, STATE, STATE, BLOCK, FULL)


@triton.jit
def _check_move_kernel(
    addresses, extents, places, n_chunks,
    own, sums, prediction, n_tensors, ledger, arrivals, threshold, limit, cooldown,
    PARAM_TYPE: tl.constexpr, STATE: tl.constexpr,
    MASTER: tl.constexpr, KEPT: tl.constexpr, LAST: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, TENSORS: tl.constexpr,
):  # fmt: skip
    if gate(ledger, threshold):
        slope, square, nonfinite = totals(sums, n_tensors, TENSORS)
        distance = tl.sqrt(tl.load(ledger + JUMP_SQUARE)) + tl.sqrt(square)
        usual = tl.sqrt(tl.load(ledger + UPDATE_SQUARE))
        nonfinite = nonfinite | (distance != distance)
        rejected = nonfinite | (distance > limit * usual)
        undone = rejected | (slope > 0)
        if undone:
            for chunk in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
                tensor, start, length, full = chunk_at(chunk, places, extents, BLOCK, CHUNK)
                takes_part = tl.load(own + PREDICTION_COLUMNS * tensor + PART_COLUMN) > 0
                for FULL in tl.static_range(2):
                    if takes_part & (full == FULL):
                        _place_chunk(
                            addresses, tensor, start, length, 0.0,
                            PARAM_TYPE, STATE, MASTER, KEPT, True, False,
                            BLOCK if FULL else BLOCK // TAIL_SHARE, CHUNK, FULL,
                        )  # fmt: skip
        if LAST:
            # The last program writes the ledger: the others decide by the same entries.
            tl.debug_barrier()
            finished = tl.atomic_add(arrivals + 1, 1, sem="acq_rel") + 1
            if finished == tl.num_programs(0):
                tl.store(arrivals + 1, 0)
                for begin in range(0, n_tensors, TENSORS):
                    t = begin + tl.arange(0, TENSORS)
                    cell = prediction + PREDICTION_COLUMNS * t + SLOPE_COLUMN
                    so_far = tl.load(sums + 3 * t, mask=t < n_tensors, other=0.0)
                    so_far += tl.load(cell, mask=t < n_tensors, other=0.0).to(tl.float64)
                    so_far = tl.where(undone, 0.0, so_far)
                    tl.store(cell, so_far.to(tl.float32), mask=t < n_tensors)
                stretch = tl.load(ledger + STRETCH) + 1.0
                tl.store(ledger + STRETCH, tl.where(undone, 0.0, stretch))
                tl.store(ledger + MOVED, tl.where(undone, 0.0, 1.0))
                tl.store(ledger + JUMP_SQUARE, tl.where(undone, 0.0, distance * distance))
                if rejected:
                    reject(ledger, cooldown)
                    add(ledger + CAUSE_NONFINITE, nonfinite.to(tl.float64))
                    add(ledger + CAUSE_JUMP, 1.0 - nonfinite.to(tl.float64))


def check_move(
    tensors: TensorSet,
    scalars: Scalars,
    *,
    threshold: float,
    limit: float,
    cooldown: float,
    last: bool,
) -> None:
    """Keeps a predicted step, or rolls the stretch back bit for bit. One launch.

    A step that leads uphill along exp_avg is not made, and nothing is blamed for it.
    Reads what `predict` measured of all tensors; advances their slopes, and changes the ledger in
    the launch of the last set.

    Args:
        tensors: With rows ``param``, ``weight`` and ``snapshot``.
        scalars: Of all tensors of the device.
        threshold: As given to `predict`.
        limit: Largest distance from the snapshot, in usual base updates.
        cooldown: Real steps that a first rejection forces before the next prediction.
        last: Whether this is the last set of the device.
    """
    tensors.launch(
        _check_move_kernel, own(scalars.prediction, tensors), scalars.sums, scalars.prediction,
        scalars.sums.shape[0],
        scalars.ledger, scalars.arrivals, float(threshold), float(limit), float(cooldown),
        every=True, MASTER=tensors.has_master, LAST=last, TENSORS=128,
    )  # fmt: skip


def check_move_torch(
    tensors: TensorSet,
    scalars: Scalars,
    *,
    threshold: float,
    limit: float,
    cooldown: float,
    last: bool,
) -> None:
    """`check_move` in plain torch."""
    ledger, sums, prediction = scalars.ledger, scalars.sums, scalars.prediction
    moving = gate_torch(ledger, threshold)
    entries = dict(zip(INDEX, ledger.unbind()))
    distance = entries["jump_square"].sqrt() + sums[:, 1].sum().sqrt()
    nonfinite = (sums[:, 2].sum() > 0) | distance.isnan()
    too_far = (distance > limit * entries["update_square"].sqrt()) & ~nonfinite
    rejected = moving & (nonfinite | too_far)
    undone = rejected | (moving & (sums[:, 0].sum() > 0))
    if ledger.device.type != "cpu" or bool(undone):
        for index, part in enumerate(prediction[tensors.place, PART_COLUMN.value] > 0):
            whole = slice(0, tensors.lengths[index])
            w, snapshot = tensors.weight(index, whole), tensors.flat["snapshot"][index]
            w.copy_(torch.where(undone & part, snapshot, w))
            tensors.put_weight(index, whole, w)
    if not last:
        return
    slope = prediction[:, SLOPE_COLUMN.value]
    advanced = torch.where(moving, (slope.double() + sums[:, 0]).float(), slope)
    prediction[:, SLOPE_COLUMN.value] = torch.where(undone, torch.zeros_like(slope), advanced)
    zero = torch.zeros_like(distance)
    kept = moving & ~undone
    entries["stretch"] = torch.where(kept, entries["stretch"] + 1.0, entries["stretch"])
    entries["jump_square"] = torch.where(kept, distance * distance, entries["jump_square"])
    entries["moved"] = torch.where(kept, zero + 1.0, entries["moved"])
    for name in ("stretch", "jump_square", "moved"):
        entries[name] = torch.where(undone, zero, entries[name])
    reject_torch(entries, cooldown, rejected)
    entries["cause_nonfinite"] = entries["cause_nonfinite"] + (rejected & nonfinite)
    entries["cause_jump"] = entries["cause_jump"] + (rejected & too_far)
    ledger.copy_(torch.stack(list(entries.values())))


@triton.jit
def _correct_kernel(
    addresses, extents, places, n_chunks, prediction, ledger,
    PARAM_TYPE: tl.constexpr, STATE: tl.constexpr, MASTER: tl.constexpr, KEPT: tl.constexpr,
    RESTART: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    decided = tl.load(ledger + DECISION) > 0
    for chunk in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        tensor, start, length, full = chunk_at(chunk, places, extents, BLOCK, CHUNK)
        fraction = tl.load(prediction + PREDICTION_COLUMNS * tensor + FRACTION_COLUMN).to(STATE)
        if decided & (RESTART | (fraction != 1.0)):
            for FULL in tl.static_range(2):
                if full == FULL:
                    _place_chunk(
                        addresses, tensor, start, length, fraction,
                        PARAM_TYPE, STATE, MASTER, KEPT, False, RESTART,
                        BLOCK if FULL else BLOCK // TAIL_SHARE, CHUNK, FULL,
                    )  # fmt: skip


def correct(tensors: TensorSet, scalars: Scalars, *, restart: bool) -> None:
    """Places the weights at ``snapshot + fraction · (weight - snapshot)``. One launch.

    Args:
        tensors: With rows ``param``, ``weight`` and ``snapshot``.
        scalars: Of these tensors. The step fraction is 0 to roll the move back bit for bit, 1 to
            leave it; nothing happens without a decision in the ledger.
        restart: Whether ``snapshot`` becomes the placed weights, the start of a new cycle.
    """
    tensors.launch(
        _correct_kernel, own(scalars.prediction, tensors), scalars.ledger,
        every=True, MASTER=tensors.has_master, RESTART=restart,
    )  # fmt: skip


def correct_torch(tensors: TensorSet, scalars: Scalars, *, restart: bool) -> None:
    """`correct` in plain torch."""
    ledger = scalars.ledger
    decided = ledger[INDEX["decision"]] > 0
    on_cpu = ledger.device.type == "cpu"
    if on_cpu and not bool(decided):
        return
    column = scalars.prediction[tensors.place, FRACTION_COLUMN.value]
    fractions = column.to(tensors.compute_dtype)
    known = fractions.tolist() if on_cpu else [None] * len(tensors)
    moving = [None if not on_cpu or (x == 1.0 and not restart) else True for x in known]
    done: set[int] = set()
    for party in together(tensors, moving).values():
        start, w = party.joined("snapshot"), party.weight()
        fraction = party.spread(fractions)
        placed = start + fraction * (w - start)
        placed = torch.where(fraction == 1.0, w, placed)
        placed = torch.where(fraction == 0.0, start, placed)
        party.put_weight(placed)
        if restart:
            party.put("snapshot", placed)
        done.update(party.indices)
    for index, fraction in enumerate(fractions.unbind()):
        if index in done or (known[index] == 1.0 and not restart):
            continue
        for part in tensors.torch_blocks(index):
            w = tensors.weight(index, part)
            start = tensors.flat["snapshot"][index][part]
            placed = start + fraction * (w - start)
            placed = torch.where(fraction == 1.0, w, placed)
            placed = torch.where(fraction == 0.0, start, placed)
            w.copy_(torch.where(decided, placed, w))
            tensors.put_weight(index, part, w)
            if restart:
                start.copy_(torch.where(decided, w, start))
