"""The verdict's two bandwidth kernels: slopes before it, correction after it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_hybrid.kernels.chunks import (
    GRAD,
    LAUNCH,
    SNAPSHOT,
    TAIL_SHARE,
    TensorSet,
    load_row,
    load_weight,
    on_device,
    remaining,
    store_row,
    store_weight,
)
from triton_hybrid.kernels.divergence import FRACTION_COLUMN, MEMORY_COLUMNS
from triton_hybrid.kernels.gram import reduce_partials
from triton_hybrid.kernels.hyper import HYPER, HYPER_COLUMNS, SIGN
from triton_hybrid.kernels.ledger import INDEX, LOSS_SCALE, VERDICT

SLOPE_SUMS = 3
"""Sums of a judging gradient: slope, squared gradient, non-finite gradients."""


@triton.jit
def _chunk_slopes(
    addresses, tensor, start, count, length,
    PARAM_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, STATE: tl.constexpr,
    KEPT: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    slope = tl.zeros([BLOCK], tl.float32)
    square = tl.zeros([BLOCK], tl.float32)
    bad = tl.zeros([BLOCK], tl.float32)
    for inner in range(0, count, BLOCK):
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
    addresses, lengths, aligned,
    chunk_tensor, chunk_start, n_chunks, group, hyper, ledger, partials,
    PARAM_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, STATE: tl.constexpr,
    KEPT: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    TAIL: tl.constexpr = BLOCK // TAIL_SHARE
    unscale = (1.0 / tl.load(ledger + LOSS_SCALE)).to(tl.float32)
    for chunk in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        tensor = tl.load(chunk_tensor + chunk)
        start = tl.multiple_of(tl.load(chunk_start + chunk), BLOCK)
        length = tl.load(lengths + tensor)
        full = (start + CHUNK <= length) & (tl.load(aligned + tensor) != 0)
        sign = tl.load(hyper + tl.load(group + tensor) * HYPER_COLUMNS + SIGN).to(tl.float32)
        if full:
            slope, square, bad = _chunk_slopes(
                addresses,
                tensor,
                start,
                CHUNK,
                length,
                PARAM_TYPE,
                GRAD_TYPE,
                STATE,
                KEPT,
                BLOCK,
                True,
            )
        else:
            slope, square, bad = _chunk_slopes(
                addresses, tensor, start, remaining(start, length, CHUNK), length,
                PARAM_TYPE, GRAD_TYPE, STATE, KEPT, TAIL, False,
            )  # fmt: skip
        cell = partials + tl.cast(chunk, tl.int64) * 3
        tl.store(cell, sign * unscale * slope)
        tl.store(cell + 1, unscale * unscale * square)
        tl.store(cell + 2, bad)


def slopes(
    tensors: TensorSet,
    group: Tensor,
    hyper: Tensor,
    ledger: Tensor,
    partials: Tensor,
    sums: Tensor,
) -> None:
    """Measures a gradient along the displacement ``weight - snapshot``. Two launches.

    Args:
        tensors: With rows ``grad``, ``weight`` and ``snapshot``.
        group: int32 ``[tensors]``, row of ``hyper``.
        hyper: FP64 ``[groups, HYPER_FIELDS]``; its ``sign`` turns ascent into descent.
        ledger: FP64 ledger; its ``loss_scale`` is undone.
        partials: FP32 ``[chunks, 3]``, scratch.
        sums: FP64 ``[tensors, 3]``, written: slope, squared gradient, chunks with a
            non-finite gradient. Zero for a tensor without a gradient.
    """
    addresses, lengths, aligned = tensors.tables()
    chunks = tensors.chunks()
    with on_device(tensors.device):
        _slopes_kernel[(tensors.tiling.programs,)](
            addresses, lengths, aligned,
            chunks.tensor, chunks.start, chunks.count, group, hyper, ledger, partials,
            PARAM_TYPE=tensors.dtype_of("param"), GRAD_TYPE=tensors.dtype_of("grad"),
            STATE=tensors.dtype_of("weight"), KEPT=tensors.kept,
            BLOCK=tensors.tiling.block, CHUNK=tensors.tiling.chunk, **LAUNCH,
        )  # fmt: skip
    reduce_partials(partials, chunks, sums)


def slopes_reference(
    tensors: TensorSet,
    group: Tensor,
    hyper: Tensor,
    ledger: Tensor,
    sums: Tensor,
    with_slopes: bool = True,
) -> None:
    """`slopes` in plain torch.

    Without ``with_slopes`` the first sum stays zero, and weights are not read.
    """
    flat = tensors.flat
    compute = tensors.compute_dtype
    totals = []
    for index, here in enumerate(tensors.present):
        total = torch.zeros(SLOPE_SUMS, dtype=torch.float64, device=tensors.device)
        for part in tensors.reference_blocks(index) if here else ():
            g = flat["grad"][index][part].to(compute)
            square = g.dot(g)
            if with_slopes:
                start = flat["snapshot"][index][part]
                total[0] += g.dot(tensors.weight(index, part) - start)
            total[1] += square
            # A finite sum of squares has finite terms; the second look costs only when not.
            if square.device.type != "cpu" or not bool(square.isfinite()):
                total[2] += ~g.isfinite().all()
        totals.append(total)
    sums.copy_(torch.stack(totals))
    unscale = ledger[INDEX["loss_scale"]].reciprocal()
    sums[:, 0] *= hyper[group.long(), HYPER["sign"]] * unscale
    sums[:, 1] *= unscale * unscale


@triton.jit
def _correct_block(
    addresses, tensor, begin, length, fraction,
    PARAM_TYPE: tl.constexpr, STATE: tl.constexpr, MASTER: tl.constexpr, KEPT: tl.constexpr,
    RESTART: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    w = load_weight(addresses, tensor, begin, length, PARAM_TYPE, STATE, KEPT, BLOCK, FULL)
    start = load_row(addresses, SNAPSHOT, tensor, begin, length, STATE, STATE, BLOCK, FULL)
    placed = start + fraction * (w - start)
    # Exactly 0 and 1 must keep the bits, also where w - start is not finite.
    placed = tl.where(fraction == 0.0, start, tl.where(fraction == 1.0, w, placed))
    store_weight(
        addresses, tensor, begin, length, placed, PARAM_TYPE, STATE, MASTER, KEPT, BLOCK, FULL
    )
    if RESTART:
        store_row(addresses, SNAPSHOT, tensor, begin, length, placed, STATE, STATE, BLOCK, FULL)


@triton.jit
def _correct_kernel(
    addresses, lengths, aligned,
    chunk_tensor, chunk_start, n_chunks, memory, ledger,
    PARAM_TYPE: tl.constexpr, STATE: tl.constexpr, MASTER: tl.constexpr, KEPT: tl.constexpr,
    RESTART: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    TAIL: tl.constexpr = BLOCK // TAIL_SHARE
    judged = tl.load(ledger + VERDICT) > 0
    for chunk in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        tensor = tl.load(chunk_tensor + chunk)
        fraction = tl.load(memory + MEMORY_COLUMNS * tensor + FRACTION_COLUMN).to(STATE)
        wanted = judged
        if not RESTART:
            wanted = judged & (fraction != 1.0)
        if wanted:
            start = tl.multiple_of(tl.load(chunk_start + chunk), BLOCK)
            length = tl.load(lengths + tensor)
            full = (start + CHUNK <= length) & (tl.load(aligned + tensor) != 0)
            if full:
                for inner in range(0, CHUNK, BLOCK):
                    _correct_block(
                        addresses, tensor, start + inner, length, fraction,
                        PARAM_TYPE, STATE, MASTER, KEPT, RESTART, BLOCK, True,
                    )  # fmt: skip
            else:
                for inner in range(0, remaining(start, length, CHUNK), TAIL):
                    _correct_block(
                        addresses, tensor, start + inner, length, fraction,
                        PARAM_TYPE, STATE, MASTER, KEPT, RESTART, TAIL, False,
                    )  # fmt: skip


def correct(tensors: TensorSet, memory: Tensor, ledger: Tensor, *, restart: bool) -> None:
    """Places the weights at ``snapshot + fraction · (weight - snapshot)``. One launch.

    Args:
        tensors: With rows ``param``, ``weight`` and ``snapshot``.
        memory: FP32 ``[tensors, MEMORY_COLUMNS]``; its step fraction is 0 to take the move
            back bit for bit, 1 to leave it.
        ledger: FP64 ledger; nothing happens without a verdict in it.
        restart: Whether ``snapshot`` becomes the placed weights, the start of a new cycle.
    """
    addresses, lengths, aligned = tensors.tables()
    chunks = tensors.chunks(every=True)
    with on_device(tensors.device):
        _correct_kernel[(tensors.tiling.programs,)](
            addresses, lengths, aligned,
            chunks.tensor, chunks.start, chunks.count, memory, ledger,
            PARAM_TYPE=tensors.dtype_of("param"), STATE=tensors.dtype_of("weight"),
            MASTER=tensors.has_master, KEPT=tensors.kept, RESTART=restart,
            BLOCK=tensors.tiling.block, CHUNK=tensors.tiling.chunk, **LAUNCH,
        )  # fmt: skip


def correct_reference(tensors: TensorSet, memory: Tensor, ledger: Tensor, *, restart: bool) -> None:
    """`correct` in plain torch."""
    judged = ledger[INDEX["verdict"]] > 0
    on_cpu = ledger.device.type == "cpu"
    if on_cpu and not bool(judged):
        return
    fractions = memory[:, FRACTION_COLUMN.value].to(tensors.compute_dtype)
    known = fractions.tolist() if on_cpu else [None] * len(tensors)
    for index, fraction in enumerate(fractions.unbind()):
        if known[index] == 1.0 and not restart:
            continue
        for part in tensors.reference_blocks(index):
            w = tensors.weight(index, part)
            start = tensors.flat["snapshot"][index][part]
            placed = start + fraction * (w - start)
            placed = torch.where(fraction == 1.0, w, placed)
            placed = torch.where(fraction == 0.0, start, placed)
            w.copy_(torch.where(judged, placed, w))
            tensors.put_weight(index, part, w)
            if restart:
                start.copy_(torch.where(judged, w, start))
