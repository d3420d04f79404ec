"""After a predicted move: it is booked, or taken back bit for bit.

A stretch of moves goes back to its snapshot where the result is not finite, or where it leads
further than the usual update allows. No gradient is read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_hybrid.kernels.chunks import (
    LAUNCH,
    SNAPSHOT,
    TAIL_SHARE,
    TensorSet,
    load_row,
    on_device,
    remaining,
    store_weight,
)
from triton_hybrid.kernels.divergence import (
    MEMORY_COLUMNS,
    SLOPE_COLUMN,
    take_back,
    take_back_reference,
)
from triton_hybrid.kernels.ledger import (
    CAUSE_JUMP,
    CAUSE_NONFINITE,
    INDEX,
    JUMP_SQUARE,
    MOVED,
    STRETCH,
    UPDATE_SQUARE,
)
from triton_hybrid.kernels.predict import gate, gate_reference


@triton.jit
def _restore_block(
    addresses, tensor, begin, length,
    PARAM_TYPE: tl.constexpr, STATE: tl.constexpr, MASTER: tl.constexpr, KEPT: tl.constexpr,
    BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    w = load_row(addresses, SNAPSHOT, tensor, begin, length, STATE, STATE, BLOCK, FULL)
    store_weight(addresses, tensor, begin, length, w, PARAM_TYPE, STATE, MASTER, KEPT, BLOCK, FULL)


@triton.jit
def _settle_kernel(
    addresses, lengths, aligned,
    chunk_tensor, chunk_start, n_chunks,
    sums, n_sums, memory, n_memory, ledger, arrivals, threshold, limit, cooldown,
    PARAM_TYPE: tl.constexpr, STATE: tl.constexpr,
    MASTER: tl.constexpr, KEPT: tl.constexpr, LAST: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, TENSORS: tl.constexpr,
):  # fmt: skip
    TAIL: tl.constexpr = BLOCK // TAIL_SHARE
    program = tl.program_id(0)
    moving = gate(ledger, threshold)
    if moving:
        squares = tl.zeros([TENSORS], tl.float64)
        flags = tl.zeros([TENSORS], tl.float64)
        for begin in range(0, n_sums, TENSORS):
            t = begin + tl.arange(0, TENSORS)
            squares += tl.load(sums + 3 * t + 1, mask=t < n_sums, other=0.0)
            flags += tl.load(sums + 3 * t + 2, mask=t < n_sums, other=0.0)
        distance = tl.sqrt(tl.load(ledger + JUMP_SQUARE)) + tl.sqrt(tl.sum(squares, axis=0))
        usual = tl.sqrt(tl.load(ledger + UPDATE_SQUARE))
        nonfinite = (tl.sum(flags, axis=0) > 0) | (distance != distance)
        too_far = (distance > limit * usual) & (nonfinite == 0)
        rejected = nonfinite | too_far
        if rejected:
            for chunk in range(program, n_chunks, tl.num_programs(0)):
                tensor = tl.load(chunk_tensor + chunk)
                start = tl.multiple_of(tl.load(chunk_start + chunk), BLOCK)
                length = tl.load(lengths + tensor)
                full = (start + CHUNK <= length) & (tl.load(aligned + tensor) != 0)
                if full:
                    for inner in range(0, CHUNK, BLOCK):
                        _restore_block(
                            addresses, tensor, start + inner, length,
                            PARAM_TYPE, STATE, MASTER, KEPT, BLOCK, True,
                        )  # fmt: skip
                else:
                    for inner in range(0, remaining(start, length, CHUNK), TAIL):
                        _restore_block(
                            addresses, tensor, start + inner, length,
                            PARAM_TYPE, STATE, MASTER, KEPT, TAIL, False,
                        )  # fmt: skip
        if LAST:
            # The last program keeps the books: the others decide by the same entries.
            tl.debug_barrier()
            finished = tl.atomic_add(arrivals + 1, 1, sem="acq_rel") + 1
            if finished == tl.num_programs(0):
                tl.store(arrivals + 1, 0)
                for begin in range(0, n_memory, TENSORS):
                    t = begin + tl.arange(0, TENSORS)
                    cell = memory + MEMORY_COLUMNS * t + SLOPE_COLUMN
                    slope = tl.load(sums + 3 * t, mask=t < n_memory, other=0.0)
                    slope += tl.load(cell, mask=t < n_memory, other=0.0).to(tl.float64)
                    slope = tl.where(rejected, 0.0, slope)
                    tl.store(cell, slope.to(tl.float32), mask=t < n_memory)
                stretch = tl.load(ledger + STRETCH) + 1.0
                tl.store(ledger + STRETCH, tl.where(rejected, 0.0, stretch))
                tl.store(ledger + MOVED, tl.where(rejected, 0.0, 1.0))
                tl.store(ledger + JUMP_SQUARE, tl.where(rejected, 0.0, distance * distance))
                if rejected:
                    take_back(ledger, cooldown)
                    if nonfinite:
                        tl.store(ledger + CAUSE_NONFINITE, tl.load(ledger + CAUSE_NONFINITE) + 1.0)
                    else:
                        tl.store(ledger + CAUSE_JUMP, tl.load(ledger + CAUSE_JUMP) + 1.0)


def settle(
    tensors: TensorSet,
    sums: Tensor,
    memory: Tensor,
    ledger: Tensor,
    arrivals: Tensor,
    *,
    threshold: float,
    limit: float,
    cooldown: float,
    last: bool,
) -> None:
    """Books a predicted step, or takes the stretch back bit for bit. One launch.

    Args:
        tensors: With rows ``param``, ``weight`` and ``snapshot``.
        sums: FP64 ``[all tensors, 3]`` of `predict`, over every tensor set.
        memory: FP32 ``[all tensors, MEMORY_COLUMNS]``; its slope is advanced.
        ledger: FP64 ledger, changed in place by the last set's launch.
        arrivals: int32 ``[2]``, zero; left zero.
        threshold: As given to `predict`.
        limit: Largest distance from the snapshot, in usual base updates.
        cooldown: Real steps that a first rejection forces before the next prediction.
        last: Whether this is the last set of the device.
    """
    addresses, lengths, aligned = tensors.tables()
    chunks = tensors.chunks(every=True)
    with on_device(tensors.device):
        _settle_kernel[(tensors.tiling.programs,)](
            addresses, lengths, aligned,
            chunks.tensor, chunks.start, chunks.count,
            sums, len(sums), memory, len(memory), ledger, arrivals,
            float(threshold), float(limit), float(cooldown),
            PARAM_TYPE=tensors.dtype_of("param"), STATE=tensors.dtype_of("weight"),
            MASTER=tensors.has_master, KEPT=tensors.kept, LAST=last,
            BLOCK=tensors.tiling.block, CHUNK=tensors.tiling.chunk, TENSORS=128, **LAUNCH,
        )  # fmt: skip


def settle_reference(
    tensors: TensorSet,
    sums: Tensor,
    memory: Tensor,
    ledger: Tensor,
    *,
    threshold: float,
    limit: float,
    cooldown: float,
    last: bool,
) -> None:
    """`settle` in plain torch."""
    moving = gate_reference(ledger, threshold)
    entries = dict(zip(INDEX, ledger.unbind()))
    distance = entries["jump_square"].sqrt() + sums[:, 1].sum().sqrt()
    nonfinite = (sums[:, 2].sum() > 0) | distance.isnan()
    too_far = (distance > limit * entries["update_square"].sqrt()) & ~nonfinite
    rejected = moving & (nonfinite | too_far)
    on_cpu = ledger.device.type == "cpu"
    if not on_cpu or bool(rejected):
        flat = tensors.flat
        for index in range(len(tensors)):
            whole = slice(0, tensors.lengths[index])
            w, snapshot = tensors.weight(index, whole), flat["snapshot"][index]
            w.copy_(torch.where(rejected, snapshot, w))
            tensors.put_weight(index, whole, w)
    if not last:
        return
    slope = memory[:, SLOPE_COLUMN.value]
    advanced = torch.where(moving, (slope.double() + sums[:, 0]).float(), slope)
    memory[:, SLOPE_COLUMN.value] = torch.where(rejected, torch.zeros_like(slope), advanced)
    zero = torch.zeros_like(distance)
    kept = moving & ~rejected
    entries["stretch"] = torch.where(kept, entries["stretch"] + 1.0, entries["stretch"])
    entries["jump_square"] = torch.where(kept, distance * distance, entries["jump_square"])
    entries["moved"] = torch.where(kept, zero + 1.0, entries["moved"])
    for name in ("stretch", "jump_square", "moved"):
        entries[name] = torch.where(rejected, zero, entries[name])
    take_back_reference(entries, cooldown, rejected)
    entries["cause_nonfinite"] = entries["cause_nonfinite"] + (rejected & nonfinite)
    entries["cause_jump"] = entries["cause_jump"] + (rejected & too_far)
    ledger.copy_(torch.stack(list(entries.values())))
