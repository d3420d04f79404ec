"""The displacement of a cycle, and its inner products with itself and with the one before."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_hybrid.kernels.ledger import INDEX, NONFINITE
from triton_hybrid.kernels.multi_tensor import TensorSet, chunk_at, chunk_length
from triton_hybrid.kernels.rows import (
    SNAPSHOT,
    TAIL_SHARE,
    address_row,
    load_row,
    load_weight,
    store_row,
)
from triton_hybrid.kernels.sums import fold, no_sums, reduce_partials
from triton_hybrid.kernels.together_torch import cells_of, dots

DISPLACEMENT = address_row("displacement")


@triton.jit
def _gram_chunk(
    addresses, tensor, start, length, applied,
    PARAM_TYPE: tl.constexpr, STATE: tl.constexpr, KEPT: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Replaces a chunk's displacement; returns the new one's products with itself and the old."""
    square = no_sums(BLOCK, FULL)
    cross = no_sums(BLOCK, FULL)
    for inner in range(0, chunk_length(start, length, CHUNK, FULL), BLOCK):
        begin = start + inner
        w = load_weight(addresses, tensor, begin, length, PARAM_TYPE, STATE, KEPT, BLOCK, FULL)
        origin = load_row(addresses, SNAPSHOT, tensor, begin, length, STATE, STATE, BLOCK, FULL)
        last = load_row(addresses, DISPLACEMENT, tensor, begin, length, STATE, STATE, BLOCK, FULL)
        newest = tl.where(applied, w - origin, last)
        # The displacement must have come before it is overwritten: a store to a line that is
        # still being loaded took 3 times as long (H200).
        tl.debug_barrier()
        store_row(addresses, DISPLACEMENT, tensor, begin, length, newest, STATE, STATE, BLOCK, FULL)
        w = tl.where(applied, w, origin)
        store_row(addresses, SNAPSHOT, tensor, begin, length, w, STATE, STATE, BLOCK, FULL)
        square += fold(newest * newest, BLOCK, FULL)
        cross += fold(newest * last, BLOCK, FULL)
    return tl.sum(square, axis=0), tl.sum(cross, axis=0)


@triton.jit
def _gram_kernel(
    addresses, extents, places, n_chunks, ledger, partials,
    PARAM_TYPE: tl.constexpr, STATE: tl.constexpr, KEPT: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    applied = tl.load(ledger + NONFINITE) == 0
    for chunk in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        tensor, start, length, full = chunk_at(chunk, places, extents, BLOCK, CHUNK)
        zero = tl.full((), 0.0, tl.float32)
        square, cross = zero, zero
        for FULL in tl.static_range(2):
            if full == FULL:
                square, cross = _gram_chunk(
                    addresses, tensor, start, length, applied,
                    PARAM_TYPE, STATE, KEPT, BLOCK if FULL else BLOCK // TAIL_SHARE, CHUNK, FULL,
                )  # fmt: skip
        cell = partials + tl.cast(chunk, tl.int64) * 2
        tl.store(cell, square)
        tl.store(cell + 1, cross)


def gram(tensors: TensorSet, ledger: Tensor, sums: Tensor) -> None:
    """Ends a cycle: its displacement, and the inner products. Two launches.

    ``newest = weight - snapshot``; ``sums[t] ← <newest, newest>, <newest, displacement>``;
    ``displacement ← newest``; ``snapshot ← weight``. Where the last gradient was not finite, the
    cycle goes on: both stay as they are, and the sums say nothing.

    Args:
        tensors: With rows ``weight``, ``snapshot`` and ``displacement``.
        ledger: FP64; its ``nonfinite`` is read.
        sums: FP64 ``[tensors, 2]``, written.
    """
    partials = tensors.room_for(2)
    tensors.launch(_gram_kernel, ledger, partials, every=True)
    reduce_partials(partials, tensors.chunks(every=True), sums)


def gram_torch(tensors: TensorSet, ledger: Tensor, sums: Tensor) -> None:
    """`gram` in plain torch."""
    applied = ledger[INDEX["nonfinite"]] == 0
    sums.zero_()
    for cells in cells_of(tensors, [True] * len(tensors)):
        weight, last = cells.weight(), cells.rows("displacement")
        origin = cells.joined("snapshot")
        newest = weight - origin
        parts = cells.parts(newest)
        sums[cells.indices] += torch.stack([dots(parts, parts), dots(parts, last)], dim=1)
        cells.put("displacement", torch.where(applied, newest, cells.joined("displacement")))
        cells.put("snapshot", torch.where(applied, weight, origin))
