"""Sums in a fixed order: of what a thread holds, of a tensor's chunks, of a launch's programs.

The kernels leave a few partial sums in FP32 for each chunk, or for each program; a second stage
adds them up in FP64. Nothing is added atomically, so the same inputs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton_hybrid.kernels.launch import LAUNCH, Launch, prepared, start
from triton_hybrid.kernels.multi_tensor import ChunkTable


@triton.jit
def no_sums(BLOCK: tl.constexpr, FULL: tl.constexpr):
    """What sums by `fold` begin with; the same for a full block and for one a quarter as large."""
    return tl.zeros([BLOCK // 16 if FULL else BLOCK // 4], tl.float32)


@triton.jit
def fold(values, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """Sums of what a thread holds of a block, in FP32: of a full block one number a thread.

    A sum over a whole block is a barrier of its program: in the loop over a chunk's blocks these
    are added up instead, and their sum is taken once.
    """
    GROUPS: tl.constexpr = 4 if FULL else 1
    groups = tl.reshape(values.to(tl.float32), (GROUPS, BLOCK // GROUPS // 4, 4))
    return tl.sum(tl.sum(groups, axis=2), axis=0)


@triton.jit
def column_total(partials, row, COLUMNS: tl.constexpr):
    """One first-stage sum over all programs, added up in FP64."""
    WIDTH: tl.constexpr = COLUMNS if COLUMNS < 1024 else 1024
    total = tl.zeros([WIDTH], tl.float64)
    for begin in range(0, COLUMNS, WIDTH):
        columns = row * COLUMNS + begin + tl.arange(0, WIDTH)
        total += tl.load(partials + columns, cache_modifier=".cg").to(tl.float64)
    return tl.sum(total, axis=0)


@triton.jit
def _reduce_kernel(
    partials, first, sums, table,
    BEGIN: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor = tl.program_id(0)
    if WIDTH > 0:
        tl.store(table + tensor * WIDTH, tl.load(table + tensor * WIDTH + 1))
    begin = tl.load(first + tensor)
    end = tl.load(first + tensor + 1)
    for column in tl.static_range(BEGIN, N):
        total = tl.zeros([BLOCK], tl.float64)
        for chunk in range(begin, end, BLOCK):
            c = chunk + tl.arange(0, BLOCK)
            values = tl.load(partials + c.to(tl.int64) * N + column, mask=c < end, other=0.0)
            total += values.to(tl.float64)
        tl.store(sums + tensor * N + column, tl.sum(total, axis=0))


def reduction(
    partials: Tensor,
    chunks: ChunkTable,
    sums: Tensor,
    begin: int = 0,
    table: Tensor | None = None,
) -> Launch:
    """What adds the chunk sums of each tensor up.

    Args:
        partials: FP32 ``[chunks, columns]``.
        chunks: The chunk table that the partials were made with.
        sums: FP64 ``[tensors, columns]``, written from column ``begin`` on.
        begin: Columns before it are left as they are.
        table: FP64 ``[tensors, columns]``, whose second column is copied into the first by the way.
    """
    count, columns = sums.shape
    width = 0 if table is None else table.shape[1]
    return prepared(
        _reduce_kernel, (count,),
        partials, chunks.first, sums, sums if table is None else table,
        BEGIN=begin, N=columns, WIDTH=width, BLOCK=256, **LAUNCH,
    )  # fmt: skip


def reduce_partials(partials: Tensor, chunks: ChunkTable, sums: Tensor, begin: int = 0) -> None:
    """Adds the chunk sums of each tensor up, as `reduction` says. One launch."""
    start([reduction(partials, chunks, sums, begin)], sums.device)


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
