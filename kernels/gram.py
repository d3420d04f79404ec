"""Per-tensor inner products, in two fixed-order stages.

The bandwidth kernels leave a few partial sums for each chunk; `reduce_partials` adds those of a
tensor up, in FP64. `gram` is the bandwidth kernel of a trajectory: at the end of a cycle it forms
the displacement of that cycle, multiplies it with itself and with the one before, and stores it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_hybrid.kernels.launch import LAUNCH, start
from triton_hybrid.kernels.multi_tensor import ChunkTable, TensorSet, chunk_at, chunk_length
from triton_hybrid.kernels.rows import (
    SNAPSHOT,
    TAIL_SHARE,
    address_row,
    load_row,
    load_weight,
    store_row,
)
from triton_hybrid.kernels.together_torch import dots, together

DISPLACEMENT = address_row("displacement")


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
    count, columns = sums.shape
    start(
        _reduce_kernel, (count,), sums.device,
        partials, chunks.first, sums, BEGIN=begin, N=columns, BLOCK=256, **LAUNCH,
    )  # fmt: skip


@triton.jit
def totals(sums, n_tensors, TENSORS: tl.constexpr):
    """Of a move or a gradient: its slope, its square, and whether it is not finite anywhere."""
    slopes = tl.zeros([TENSORS], tl.float64)
    squares = tl.zeros([TENSORS], tl.float64)
    flags = tl.zeros([TENSORS], tl.float64)
    for begin in range(0, n_tensors, TENSORS):
        t = begin + tl.arange(0, TENSORS)
        slopes += tl.load(sums + 3 * t, mask=t < n_tensors, other=0.0)
        squares += tl.load(sums + 3 * t + 1, mask=t < n_tensors, other=0.0)
        flags += tl.load(sums + 3 * t + 2, mask=t < n_tensors, other=0.0)
    return tl.sum(slopes, axis=0), tl.sum(squares, axis=0), tl.sum(flags, axis=0) > 0


@triton.jit
def _gram_chunk(
    addresses, tensor, start, length,
    PARAM_TYPE: tl.constexpr, STATE: tl.constexpr, KEPT: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Replaces a chunk's displacement; returns the new one's products with itself and the old."""
    square = tl.full((), 0.0, tl.float32)
    cross = tl.full((), 0.0, tl.float32)
    for inner in range(0, chunk_length(start, length, CHUNK, FULL), BLOCK):
        begin = start + inner
        w = load_weight(addresses, tensor, begin, length, PARAM_TYPE, STATE, KEPT, BLOCK, FULL)
        origin = load_row(addresses, SNAPSHOT, tensor, begin, length, STATE, STATE, BLOCK, FULL)
        last = load_row(addresses, DISPLACEMENT, tensor, begin, length, STATE, STATE, BLOCK, FULL)
        newest = w - origin
        store_row(addresses, DISPLACEMENT, tensor, begin, length, newest, STATE, STATE, BLOCK, FULL)
        store_row(addresses, SNAPSHOT, tensor, begin, length, w, STATE, STATE, BLOCK, FULL)
        square += tl.sum((newest * newest).to(tl.float32), axis=0)
        cross += tl.sum((newest * last).to(tl.float32), axis=0)
    return square, cross


@triton.jit
def _gram_kernel(
    addresses, extents, places, n_chunks, partials,
    PARAM_TYPE: tl.constexpr, STATE: tl.constexpr, KEPT: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    for chunk in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        tensor, start, length, full = chunk_at(chunk, places, extents, BLOCK, CHUNK)
        zero = tl.full((), 0.0, tl.float32)
        square, cross = zero, zero
        for FULL in tl.static_range(2):
            if full == FULL:
                square, cross = _gram_chunk(
                    addresses, tensor, start, length,
                    PARAM_TYPE, STATE, KEPT, BLOCK if FULL else BLOCK // TAIL_SHARE, CHUNK, FULL,
                )  # fmt: skip
        cell = partials + tl.cast(chunk, tl.int64) * 2
        tl.store(cell, square)
        tl.store(cell + 1, cross)


def gram(tensors: TensorSet, sums: Tensor) -> None:
    """Ends a cycle: its displacement, and the inner products. Two launches.

    ``newest = weight - snapshot``; ``sums[t] ← <newest, newest>, <newest, displacement>``;
    ``displacement ← newest``; ``snapshot ← weight``.

    Args:
        tensors: With rows ``weight``, ``snapshot`` and ``displacement``.
        sums: FP64 ``[tensors, 2]``, written.
    """
    partials = tensors.room_for(2)
    tensors.launch(_gram_kernel, partials, every=True)
    reduce_partials(partials, tensors.chunks(every=True), sums)


def gram_torch(tensors: TensorSet, sums: Tensor) -> None:
    """`gram` in plain torch."""
    products = torch.zeros_like(sums)
    done: set[int] = set()
    for party in together(tensors, [True] * len(tensors)).values():
        weight, last = party.weight(), party.rows("displacement")
        newest = weight - party.joined("snapshot")
        parts = party.parts(newest)
        products[party.indices] = torch.stack([dots(parts, parts), dots(parts, last)], 1).double()
        party.put("displacement", newest)
        party.put("snapshot", weight)
        done.update(party.indices)
    for index in sorted(set(range(len(tensors))) - done):
        for part in tensors.torch_blocks(index):
            rows = tensors.block_rows(index, part)
            weight = tensors.weight(index, part)
            newest = weight - rows["snapshot"]
            products[index, 0] += newest.dot(newest)
            products[index, 1] += newest.dot(rows["displacement"])
            rows["displacement"].copy_(newest)
            rows["snapshot"].copy_(weight)
    sums.copy_(products)
