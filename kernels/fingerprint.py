"""Fingerprints of parameters: has anybody written them since a prediction left them?

Where a prediction stands in the weights, everything that others do to them between two steps must
be seen: in place, through ``.data``, by other memory, in another process that loads a checkpoint.
No version counter sees all of it. A fingerprint is a weighted sum of a parameter's bits, with odd
weights that depend on the place, in 32-bit integers: no order of summation changes it, one changed
element always does, and several do but once in 2^32. (The sign must not stay the highest bit, of
which a sum keeps but the parity: negated tensors would not show.)
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_hybrid.kernels.launch import LAUNCH, Launch, prepared
from triton_hybrid.kernels.ledger import (
    FINGERPRINT_COLUMN,
    INDEX,
    PART_COLUMN,
    PREDICTION_COLUMNS,
    WRITTEN,
    add,
)
from triton_hybrid.kernels.multi_tensor import (
    TORCH_BLOCK,
    TensorSet,
    chunk_at,
    chunk_length,
)
from triton_hybrid.kernels.repeated import repeated
from triton_hybrid.kernels.rows import PARAM, TAIL_SHARE, load_row
from triton_hybrid.kernels.scalars import Scalars, own

PERIOD = TORCH_BLOCK
"""The weights of places begin anew after so many elements, times another odd number."""
# Odd multipliers, from 32-bit hashing: the golden ratio, and one of MurmurHash3.
_GOLDEN, _MIX = -1640531535, -2048144789
_period, _golden, _mix = tl.constexpr(PERIOD), tl.constexpr(_GOLDEN), tl.constexpr(_MIX)
SHORT = 1 << 13
"""Elements up to which plain torch takes a tensor together with others: 148 tensors of 64 elements
cost a tenth of what they cost one by one."""
INTEGERS = {2: (torch.int16, tl.int16), 4: (torch.int32, tl.int32), 8: (torch.int64, tl.int64)}
"""Those of a parameter's width."""


@triton.jit
def _fingerprint_chunk(
    addresses, tensor, start, length,
    BITS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    WORD: tl.constexpr = tl.int64 if tl.int64 == BITS else tl.int32
    total = tl.zeros([BLOCK], tl.int64)
    for inner in range(0, chunk_length(start, length, CHUNK, FULL), BLOCK):
        begin = start + inner
        bits = load_row(addresses, PARAM, tensor, begin, length, BITS, WORD, BLOCK, FULL, 0)
        if tl.int64 == BITS:
            bits = bits ^ (bits >> 32)
        place = ((begin % _period) + tl.arange(0, BLOCK)).to(tl.int32) * _golden
        weight = ((place ^ (place >> 15)) * _mix) | 1
        # Beyond the end of the tensor the bits are 0.
        bits = bits.to(tl.int32)
        total += ((bits ^ (bits >> 15)) * weight).to(tl.int64)
    return tl.sum(total, axis=0) * (((start // _period) * _golden) | 1)


@triton.jit
def _fingerprint_kernel(
    addresses, extents, places, n_chunks, found,
    BITS: tl.constexpr, PARAM_TYPE: tl.constexpr, STATE: tl.constexpr, KEPT: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    for chunk in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        tensor, start, length, full = chunk_at(chunk, places, extents, BLOCK, CHUNK)
        total = tl.full((), 0, tl.int64)
        for FULL in tl.static_range(2):
            if full == FULL:
                total = _fingerprint_chunk(
                    addresses, tensor, start, length,
                    BITS, BLOCK if FULL else BLOCK // TAIL_SHARE, CHUNK, FULL,
                )  # fmt: skip
        # In integers the order of additions changes nothing.
        tl.atomic_add(found + tensor, total)


def fingerprint(tensors: TensorSet, found: Tensor) -> None:
    """The fingerprints of all parameters of a set, as numbers that FP32 can hold.

    Args:
        tensors: With row ``param``.
        found: FP32 ``[tensors, 2]``, written: the low 16 bits, and the high ones plus 2^16, so that
            no fingerprint is 0.
    """
    sums = torch.zeros(len(tensors), dtype=torch.int64, device=tensors.device)
    integers = INTEGERS[tensors.dtype["param"].itemsize][1]
    tensors.launch(_fingerprint_kernel, sums, every=True, BITS=integers)
    _halves(sums, found)


@triton.jit
def _settle_kernel(
    found, prediction, ledger, n_tensors,
    FIND: tl.constexpr, EVERY: tl.constexpr, TENSORS: tl.constexpr,
):  # fmt: skip
    """Compares the sums of `_fingerprint_kernel` with what was noted, or notes them."""
    writes = tl.zeros([TENSORS], tl.int32)
    for begin in range(0, n_tensors, TENSORS):
        t = begin + tl.arange(0, TENSORS)
        here = t < n_tensors
        total = tl.load(found + t, mask=here, other=0)
        tl.store(found + t, tl.zeros([TENSORS], tl.int64), mask=here)
        low = (total & 0xFFFF).to(tl.float32)
        high = (((total >> 16) & 0xFFFF) | 0x10000).to(tl.float32)
        part = prediction + PREDICTION_COLUMNS * t + PART_COLUMN
        noted = prediction + PREDICTION_COLUMNS * t + FINGERPRINT_COLUMN
        if FIND:
            known_low = tl.load(noted, mask=here, other=0.0)
            known_high = tl.load(noted + 1, mask=here, other=0.0)
            written = ((known_low != 0) & (known_low != low)) | (
                (known_high != 0) & (known_high != high)
            )
            zero = tl.zeros([TENSORS], tl.float32)
            tl.store(part, -tl.load(part, mask=here, other=0.0), mask=written)
            tl.store(noted, zero, mask=written)
            tl.store(noted + 1, zero, mask=written)
            writes = tl.maximum(writes, written.to(tl.int32))
        else:
            if not EVERY:
                moved = tl.load(part, mask=here, other=0.0) > 0
                low, high = tl.where(moved, low, 0.0), tl.where(moved, high, 0.0)
            tl.store(noted, low, mask=here)
            tl.store(noted + 1, high, mask=here)
    if FIND:
        add(ledger + WRITTEN, tl.max(writes, axis=0).to(tl.float64))


@repeated
def _settle(
    sets: Sequence[TensorSet], scalars: Scalars, *, find: bool, every: bool
) -> list[Launch]:
    launches = []
    for tensors in sets:
        integers = INTEGERS[tensors.dtype["param"].itemsize][1]
        found = own(scalars.found, tensors)
        launch = tensors.prepared(_fingerprint_kernel, found, every=True, BITS=integers)
        launches.append(launch)
    prediction = scalars.prediction
    settling = prepared(
        _settle_kernel, (1,), scalars.found, prediction, scalars.ledger, prediction.shape[0],
        FIND=find, EVERY=every, TENSORS=128, **LAUNCH,
    )  # fmt: skip
    return [*launches, settling]


def note_weights(sets: Sequence[TensorSet], scalars: Scalars, *, every: bool) -> None:
    """Notes how a step leaves the parameters. A launch for each set, and one more.

    Args:
        sets: All of a device, with row ``param``.
        scalars: Of these sets; the table of predictions is written.
        every: Of all parameters, or of those alone that take part in the prediction.
    """
    _settle(sets, scalars, find=False, every=every)


def find_writes(sets: Sequence[TensorSet], scalars: Scalars) -> None:
    """Finds the parameters that are not as `note_weights` left them. As many launches.

    They take no further part in the prediction, and the ledger says that there are some.
    """
    _settle(sets, scalars, find=True, every=False)


def note_weights_torch(sets: Sequence[TensorSet], scalars: Scalars, *, every: bool) -> None:
    """`note_weights` in plain torch."""
    found, noted = _found_torch(sets, scalars), scalars.prediction[:, FINGERPRINT_COLUMN.value :]
    if every:
        noted.copy_(found)
    else:
        part = scalars.prediction[:, PART_COLUMN.value : FINGERPRINT_COLUMN.value]
        torch.mul(found, part > 0, out=noted)


def find_writes_torch(sets: Sequence[TensorSet], scalars: Scalars) -> None:
    """`find_writes` in plain torch."""
    noted, found = scalars.prediction[:, FINGERPRINT_COLUMN.value :], _found_torch(sets, scalars)
    if found.device.type == "cpu" and torch.equal(noted, found):
        return  # nobody has, mostly: one operation instead of twelve
    written = ((noted != 0) & (noted != found)).any(1)
    part = scalars.prediction[:, PART_COLUMN.value]
    part.copy_(torch.where(written, -part, part))
    noted.masked_fill_(written.unsqueeze(1), 0.0)
    scalars.ledger[INDEX["written"]] += written.any()


def _found_torch(sets: Sequence[TensorSet], scalars: Scalars) -> Tensor:
    found = torch.empty_like(scalars.prediction[:, FINGERPRINT_COLUMN.value :])
    for tensors in sets:
        fingerprint_torch(tensors, own(found, tensors))
    return found


def fingerprint_torch(tensors: TensorSet, found: Tensor) -> None:
    """`fingerprint` in plain torch; all short tensors at once."""
    params = tensors.flat["param"]
    if tensors.short is None:
        tensors.short = _short_tables(params, tensors.device)
    short, places, zero, ends, weights = tensors.short
    row = [zero, *[params[index] for index in short]]
    sums = _mixed(torch.cat(row)).mul_(weights).cumsum(0, dtype=torch.int32)[ends].diff()
    if len(short) < len(params):
        joined, sums = sums, torch.zeros(len(params), dtype=torch.int64, device=tensors.device)
        sums[places] = joined.long()
        for index, param in enumerate(params):
            if len(param) > SHORT:
                sums[index] = _sum_of(param)
    _halves(sums, found)


def _short_tables(params: Sequence[Tensor], device: torch.device) -> tuple[Any, ...]:
    """Which tensors are short, as a list and as numbers, and what is known of them in a row.

    Which is: the zero before the first, where each begins and ends, the weights.
    """
    short = [index for index, param in enumerate(params) if len(param) <= SHORT]
    ends = [0, *itertools.accumulate(len(params[index]) for index in short)]
    places = torch.tensor(short, dtype=torch.int64, device=device)
    weights = [_weights(device)[: len(params[index])] for index in short]
    joined = torch.cat([_weights(device)[:1], *weights])
    zero = torch.zeros(1, dtype=params[0].dtype, device=device)
    return short, places, zero, torch.tensor(ends, dtype=torch.int64, device=device), joined


def fingerprint_of(dense: Tensor) -> Tensor:
    """FP32 ``[2]``, the fingerprint of one parameter, a 1-D tensor in the order of memory."""
    found = torch.empty(2, dtype=torch.float32, device=dense.device)
    _halves(_sum_of(dense), found)
    return found


def _halves(sums: Tensor, found: Tensor) -> None:
    """Writes the low 32 bits of sums, in two halves each, as numbers."""
    shift, mark = _split(sums.device)
    torch.bitwise_or((sums.unsqueeze(-1) >> shift).bitwise_and_(0xFFFF), mark, out=found)


@functools.cache
def _split(device: torch.device) -> tuple[Tensor, ...]:
    """How far each half is shifted, and what tells it from nothing."""
    return torch.tensor([[0, 16], [0, 0x10000]], dtype=torch.int32, device=device).unbind()


def _sum_of(dense: Tensor) -> Tensor:
    """The weighted sum of a 1-D parameter's bits, of which the low 32 count; 0-dim int64."""
    total = torch.zeros((), dtype=torch.int64, device=dense.device)
    weights = _weights(dense.device)
    for number, part in enumerate(dense.split(PERIOD) if len(dense) else ()):
        products = _mixed(part).mul_(weights[: len(part)])
        total += products.sum(dtype=torch.int32) * ((number * _GOLDEN) | 1)
    return total


def _mixed(part: Tensor) -> Tensor:
    """The bits of a 1-D tensor as int32, with those of the sign spread."""
    bits = part.view(INTEGERS[part.element_size()][0])
    if bits.dtype == torch.int64:
        bits = bits ^ (bits >> 32)
    bits = bits.to(torch.int32)
    return (bits >> 15).bitwise_xor_(bits)


@functools.cache
def _weights(device: torch.device) -> Tensor:
    place = torch.arange(PERIOD, dtype=torch.int32, device=device) * _GOLDEN
    return ((place ^ (place >> 15)) * _MIX) | 1
