"""Per-tensor inner products, in two fixed-order stages.

The bandwidth kernels leave a few partial sums for each chunk; `reduce_partials` adds those
of a tensor up, in FP64. `gram` is the bandwidth kernel of the trajectory: at the end of a
cycle it forms the displacement of that cycle, stores it, and multiplies it with every
stored one, which is the row of the Gram matrix that changed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_hybrid.kernels.launch import LAUNCH, on_device
from triton_hybrid.kernels.multi_tensor import ChunkTable, TensorSet, chunk_at
from triton_hybrid.kernels.rows import (
    SNAPSHOT,
    TAIL_SHARE,
    address_row,
    load_row,
    load_weight,
    remaining,
    store_row,
)

MAX_HISTORY = 8
"""Most displacements of a trajectory that the address table has rows for."""
HISTORY = address_row("history_0")
for _j in range(1, MAX_HISTORY):
    address_row(f"history_{_j}")  # the kernels count on from the first


@triton.jit
def _reduce_kernel(
    partials, first, sums, BEGIN: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr
):
    tensor = tl.program_id(0)
    begin = tl.load(first + tensor)
    end = tl.load(first + tensor + 1)
    for column in tl.static_range(BEGIN, N):
        total = tl.zeros([BLOCK], tl.float64)
        for chunk in range(begin, end, BLOCK):
            c = chunk + tl.arange(0, BLOCK)
            values = tl.load(partials + c.to(tl.int64) * N + column, mask=c < end, other=0.0)
            total += values.to(tl.float64)
        tl.store(sums + tensor * N + column, tl.sum(total, axis=0))


def reduce_partials(partials: Tensor, chunks: ChunkTable, sums: Tensor, begin: int = 0) -> None:
    """Adds the chunk sums of each tensor up. One launch.

    Args:
        partials: FP32 ``[chunks, columns]``.
        chunks: The chunk table that the partials were made with.
        sums: FP64 ``[tensors, columns]``, written from column ``begin`` on.
        begin: Columns before it are left as they are.
    """
    with on_device(sums.device):
        _reduce_kernel[(len(sums),)](
            partials, chunks.first, sums, BEGIN=begin, N=sums.shape[1], BLOCK=256, **LAUNCH
        )


@triton.jit
def _gram_chunk(
    addresses, tensor, start, count, length, slot,
    PARAM_TYPE: tl.constexpr, STATE: tl.constexpr, KEPT: tl.constexpr,
    N: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Stores a chunk's newest displacement; returns its inner products with all of them."""
    column = tl.arange(0, COLUMNS)
    partial = tl.zeros([COLUMNS], tl.float32)
    for inner in range(0, count, BLOCK):
        begin = start + inner
        w = load_weight(addresses, tensor, begin, length, PARAM_TYPE, STATE, KEPT, BLOCK, FULL)
        origin = load_row(addresses, SNAPSHOT, tensor, begin, length, STATE, STATE, BLOCK, FULL)
        newest = w - origin
        store_row(
            addresses, HISTORY + slot, tensor, begin, length, newest, STATE, STATE, BLOCK, FULL
        )
        store_row(addresses, SNAPSHOT, tensor, begin, length, w, STATE, STATE, BLOCK, FULL)
        for j in tl.static_range(N):
            other = newest
            if j != slot:
                other = load_row(
                    addresses, HISTORY + j, tensor, begin, length, STATE, STATE, BLOCK, FULL
                )
            product = tl.sum((newest * other).to(tl.float32), axis=0)
            partial = partial + tl.where(column == j, product, 0.0)
    return partial


@triton.jit
def _gram_kernel(
    addresses, extents, places, n_chunks, slot, partials,
    PARAM_TYPE: tl.constexpr, STATE: tl.constexpr, KEPT: tl.constexpr,
    N: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    TAIL: tl.constexpr = BLOCK // TAIL_SHARE
    column = tl.arange(0, COLUMNS)
    for chunk in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        tensor, start, length, full = chunk_at(chunk, places, extents, BLOCK, CHUNK)
        if full:
            partial = _gram_chunk(
                addresses, tensor, start, CHUNK, length, slot,
                PARAM_TYPE, STATE, KEPT, N, COLUMNS, BLOCK, True,
            )  # fmt: skip
        else:
            partial = _gram_chunk(
                addresses, tensor, start, remaining(start, length, CHUNK), length, slot,
                PARAM_TYPE, STATE, KEPT, N, COLUMNS, TAIL, False,
            )  # fmt: skip
        tl.store(partials + tl.cast(chunk, tl.int64) * N + column, partial, mask=column < N)


def gram(tensors: TensorSet, history: int, slot: int, sums: Tensor) -> None:
    """Ends a cycle: newest displacement, and its inner products. Two launches.

    ``history_slot ← weight - snapshot``; ``snapshot ← weight``;
    ``sums[t, j] ← <history_slot[t], history_j[t]>``.

    Args:
        tensors: With rows ``weight``, ``snapshot`` and ``history_0`` to ``history_{n-1}``.
        history: How many displacements are stored, n.
        slot: Which of them the newest one replaces.
        sums: FP64 ``[tensors, history]``, written.
    """
    addresses, extents = tensors.tables()
    chunks = tensors.chunks(every=True)
    partials = tensors.room_for(history)
    with on_device(tensors.device):
        _gram_kernel[(tensors.tiling.programs,)](
            addresses, extents, chunks.places, chunks.count, slot, partials,
            N=history, COLUMNS=triton.next_power_of_2(history), **tensors.layout(), **LAUNCH,
        )  # fmt: skip
    reduce_partials(partials, chunks, sums)


def gram_torch(tensors: TensorSet, history: int, slot: int, sums: Tensor) -> None:
    """`gram` in plain torch."""
    totals = []
    for index in range(len(tensors)):
        total = torch.zeros(history, dtype=torch.float64, device=tensors.device)
        for part in tensors.torch_blocks(index):
            here = tensors.block_rows(index, part)
            rows = [here[f"history_{j}"] for j in range(history)]
            weight = tensors.weight(index, part)
            torch.sub(weight, here["snapshot"], out=rows[slot])
            here["snapshot"].copy_(weight)
            total += torch.stack([rows[slot].dot(row) for row in rows])
        totals.append(total)
    sums.copy_(torch.stack(totals))
