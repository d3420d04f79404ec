"""Verification: what happens to a predicted move before and after the next gradient.

`check_move` looks at a move before any gradient does: a stretch of moves is rolled back
where the result is not finite, leads further than the usual update allows, or leads uphill.
`slopes` measures the gradient at the predicted point along the displacement, `decide` (`ledger`)
decides by it, and `correct` places the weights where the decision says.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton_hybrid.kernels.displacement import Displacement, computed_again
from triton_hybrid.kernels.launch import Launch
from triton_hybrid.kernels.ledger import (
    CAUSE_JUMP,
    CAUSE_NONFINITE,
    DECISION,
    FRACTION_COLUMN,
    INDEX,
    JUMP_SQUARE,
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
from triton_hybrid.kernels.ledger_torch import (
    count,
    enter,
    entries_of,
    gate_torch,
    reject_torch,
)
from triton_hybrid.kernels.multi_tensor import TensorSet, chunk_at, chunk_length
from triton_hybrid.kernels.placement import ACCEPTED, Places, at_fraction, placed_by_update
from triton_hybrid.kernels.repeated import repeated
from triton_hybrid.kernels.residue import load_moved, move_numbers, stands_in_parameter
from triton_hybrid.kernels.rows import (
    OWN_WEIGHTS,
    SNAPSHOT,
    TAIL_SHARE,
    load_row,
    load_weight,
    store_row,
    store_weight,
)
from triton_hybrid.kernels.scalar_math import negate, sqrt, total, where, write
from triton_hybrid.kernels.scalars import Scalars, own
from triton_hybrid.kernels.sums import totals
from triton_hybrid.kernels.together_torch import cells_of


@triton.jit
def _place_chunk(
    addresses, tensor, start, length, fraction, moves, written,
    DISPLACEMENT: tl.constexpr, DENOMINATOR: tl.constexpr, ALONG: tl.constexpr,
    PARAM_TYPE: tl.constexpr, STATE: tl.constexpr, MASTER: tl.constexpr, KEPT: tl.constexpr,
    AGAIN: tl.constexpr, WHOLE: tl.constexpr, RESTART: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Places the weights of a chunk at a fraction of the displacement that stands.

    ``WHOLE``: the fraction is 0. ``written``: somebody else has written the tensor since.
    """
    if AGAIN:
        factor, a, b, c, d = move_numbers(moves, tensor, STATE)
    for inner in range(0, chunk_length(start, length, CHUNK, FULL), BLOCK):
        begin = start + inner
        if AGAIN:
            moved = DISPLACEMENT(
                addresses, tensor, begin, length, factor, a, b, c, d, moves,
                DENOMINATOR, ALONG, STATE, BLOCK, FULL,
            )  # fmt: skip
            placed, w = load_moved(
                addresses, tensor, begin, length, moved, written,
                PARAM_TYPE, STATE, KEPT, BLOCK, FULL,
            )  # fmt: skip
        else:
            placed = load_row(addresses, SNAPSHOT, tensor, begin, length, STATE, STATE, BLOCK, FULL)
            if not WHOLE:
                w = load_weight(
                    addresses, tensor, begin, length, PARAM_TYPE, STATE, KEPT, BLOCK, FULL
                )
        if not WHOLE:
            placed = at_fraction(placed, w, fraction)
        store_weight(
            addresses, tensor, begin, length, placed, PARAM_TYPE, STATE, MASTER, KEPT, BLOCK, FULL
        )
        if RESTART:
            store_row(addresses, SNAPSHOT, tensor, begin, length, placed, STATE, STATE, BLOCK, FULL)


@triton.jit
def _check_move_kernel(
    addresses, extents, places, n_chunks,
    own, moves, sums, prediction, n_tensors, ledger, arrivals, threshold, limit, cooldown,
    DISPLACEMENT: tl.constexpr, DENOMINATOR: tl.constexpr, ALONG: tl.constexpr,
    PARAM_TYPE: tl.constexpr, STATE: tl.constexpr,
    MASTER: tl.constexpr, KEPT: tl.constexpr, AGAIN: tl.constexpr, LAST: tl.constexpr,
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
                            addresses, tensor, start, length, 0.0, moves, 0,
                            DISPLACEMENT, DENOMINATOR, ALONG,
                            PARAM_TYPE, STATE, MASTER, KEPT, AGAIN, True, False,
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


@repeated
def check_move(
    tensors: TensorSet,
    scalars: Scalars,
    *,
    threshold: float,
    limit: float,
    cooldown: float,
    last: bool,
    again: Displacement | None = None,
) -> list[Launch]:
    """Keeps a predicted step, or rolls the stretch back bit for bit. One launch.

    A step that leads uphill along exp_avg is not made, and nothing is blamed for it.
    Reads what `predict` measured of all tensors; advances their slopes, and changes the ledger in
    the launch of the last set.

    Args:
        tensors: With rows ``param``, ``weight`` and ``snapshot``, or those of the displacement.
        scalars: Of all tensors of the device.
        threshold: As given to `predict`.
        limit: Largest distance from where the stretch began, in usual base updates.
        cooldown: Real steps that a first rejection forces before the next prediction.
        last: Whether this is the last set of the device.
        again: The displacement, to be computed again; None: there is a snapshot.
    """
    launch = tensors.prepared(
        _check_move_kernel, own(scalars.prediction, tensors), own(scalars.moves, tensors),
        scalars.sums, scalars.prediction, scalars.sums.shape[0],
        scalars.ledger, scalars.arrivals, float(threshold), float(limit), float(cooldown),
        every=True, MASTER=tensors.has_master, LAST=last, TENSORS=128,
        **computed_again(tensors, again),
    )  # fmt: skip
    return [launch]


def check_move_torch(
    tensors: TensorSet,
    scalars: Scalars,
    *,
    threshold: float,
    limit: float,
    cooldown: float,
    last: bool,
    again: Displacement | None = None,
) -> None:
    """`check_move` in plain torch."""
    ledger, sums, prediction = scalars.ledger, scalars.sums, scalars.prediction
    entries = entries_of(ledger)
    moving = gate_torch(entries, threshold)
    distance = sqrt(entries["jump_square"]) + sqrt(total(sums[:, 1]))
    nonfinite = (total(sums[:, 2]) > 0) | (distance != distance)
    too_far = (distance > limit * sqrt(entries["update_square"])) & negate(nonfinite)
    rejected = moving & (nonfinite | too_far)
    undone = rejected | (moving & (total(sums[:, 0]) > 0))
    on_cpu = ledger.device.type == "cpu"
    if undone is not False:
        places = Places(tensors, scalars, again)
        part = prediction[tensors.place, PART_COLUMN.value] > 0
        keys = [here or None for here in part.tolist()] if on_cpu else [True] * len(tensors)
        for cells in cells_of(tensors, keys):
            places.place(cells, True if on_cpu else undone & cells.spread(part), 0.0)
    if not last:
        return
    slopes = prediction[:, SLOPE_COLUMN.value]
    advanced = where(moving, (slopes.double() + sums[:, 0]).float(), slopes)
    slopes.copy_(where(undone, torch.zeros_like(slopes), advanced))
    kept, further = moving & negate(undone), entries["stretch"] + 1.0
    enter(entries, kept, stretch=further, jump_square=distance * distance, moved=1.0)
    enter(entries, undone, stretch=0.0, jump_square=0.0, moved=0.0)
    reject_torch(entries, cooldown, rejected)
    count(entries, cause_nonfinite=rejected & nonfinite, cause_jump=rejected & too_far)
    write(ledger, entries)


@triton.jit
def _correct_kernel(
    addresses, extents, places, n_chunks, prediction, moves, present, ledger,
    DISPLACEMENT: tl.constexpr, DENOMINATOR: tl.constexpr, ALONG: tl.constexpr,
    PARAM_TYPE: tl.constexpr, STATE: tl.constexpr, MASTER: tl.constexpr, KEPT: tl.constexpr,
    AGAIN: tl.constexpr, RESTART: tl.constexpr, DEFERRED: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    decision = tl.load(ledger + DECISION)
    decided = decision > 0
    for chunk in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        tensor, start, length, full = chunk_at(chunk, places, extents, BLOCK, CHUNK)
        own = prediction + PREDICTION_COLUMNS * tensor
        fraction = tl.load(own + FRACTION_COLUMN).to(STATE)
        part = tl.load(own + PART_COLUMN)
        if AGAIN and (
            KEPT == OWN_WEIGHTS and PARAM_TYPE != STATE
        ):  # Triton 3.2 takes two at a time
            # The masters behind have not moved yet.
            here = decided & (part != 0)
            if DEFERRED:
                here = here & ((decision != ACCEPTED) | (tl.load(present + tensor) == 0))
        elif RESTART:
            here = decided
        else:
            here = decided & (fraction != 1.0)
        if here:
            for FULL in tl.static_range(2):
                if full == FULL:
                    _place_chunk(
                        addresses, tensor, start, length, fraction, moves, part < 0.0,
                        DISPLACEMENT, DENOMINATOR, ALONG,
                        PARAM_TYPE, STATE, MASTER, KEPT, AGAIN, False, RESTART,
                        BLOCK if FULL else BLOCK // TAIL_SHARE, CHUNK, FULL,
                    )  # fmt: skip


@repeated
def correct(
    tensors: TensorSet,
    scalars: Scalars,
    *,
    restart: bool,
    again: Displacement | None = None,
    deferred: bool = False,
) -> list[Launch]:
    """Places the weights at a fraction of the displacement that stands. One launch.

    Args:
        tensors: With rows ``param``, ``weight`` and ``snapshot``, or those of the displacement.
        scalars: Of these tensors. The table of predictions has the fractions; one of exactly 0 or 1
            keeps every bit. Without a decision in the ledger nothing happens.
        restart: Whether the weights become the new snapshot.
        again: The displacement, to be computed again; None: there is a snapshot.
        deferred: Whether the base update of this step, given ``again`` too, places the masters of
            an accepted prediction (`placed_by_update`). Those of tensors that it leaves out,
            without a gradient, are placed here, and so is what was rolled back.
    """
    launch = tensors.prepared(
        _correct_kernel, own(scalars.prediction, tensors), own(scalars.moves, tensors),
        tensors.chunks().present, scalars.ledger, every=True,
        MASTER=tensors.has_master, RESTART=restart, DEFERRED=deferred and placed_by_update(tensors),
        **computed_again(tensors, again),
    )  # fmt: skip
    return [launch]


def correct_torch(
    tensors: TensorSet,
    scalars: Scalars,
    *,
    restart: bool,
    again: Displacement | None = None,
    deferred: bool = False,
) -> None:
    """`correct` in plain torch."""
    ledger = scalars.ledger
    decided = ledger[INDEX["decision"]] > 0
    on_cpu = ledger.device.type == "cpu"
    if on_cpu and not bool(decided):
        return
    prediction = scalars.prediction[tensors.place]
    if again and stands_in_parameter(tensors):
        # The masters behind have not moved yet, whatever the fraction.
        still = prediction[:, PART_COLUMN.value] == 0
    else:
        still = prediction[:, FRACTION_COLUMN.value] == 1.0
    if deferred and placed_by_update(tensors):
        still = still | (tensors.has_gradient() & (ledger[INDEX["decision"]] == ACCEPTED.value))
    still = still & (not restart)
    places = Places(tensors, scalars, again)
    keys = [None if here else True for here in still.tolist()] if on_cpu else [True] * len(tensors)
    for cells in cells_of(tensors, keys):
        where = True if on_cpu else decided & ~cells.spread(still)
        placed = places.place(cells, where)
        if restart:
            old = cells.joined("snapshot")
            cells.put("snapshot", placed if on_cpu else torch.where(decided, placed, old))
