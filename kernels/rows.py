"""How a kernel reaches the tensors of a launch: the rows of the address table.

A role that a tensor has in a launch (parameter, gradient, first moment, ...) is a *row*. Its index
in the address table is given out the first time that somebody asks for its name: a kernel that
reads it, or the declaration that says all else about it (``triton_hybrid.state.StateRow``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton_hybrid.kernels.launch import INTERPRETED

MOST_ROWS = 96
"""Entries of the address table for one tensor."""
ROW: dict[str, int] = {}
"""Index of each row by name."""
OWN_DTYPE = {"param", "grad", "remainder"}
"""Rows that need not have the dtype of the weights."""


def number(names: dict[str, int], name: str) -> tl.constexpr:
    """The place of a name in a table, for kernels; a new name gets the next one."""
    return tl.constexpr(names.setdefault(name, len(names)))


def address_row(name: str, own_dtype: bool = False) -> tl.constexpr:
    """The index of a row in the address table; ``own_dtype``: it may differ from the weights'.

    Raises:
        ValueError: The table is full.
    """
    if own_dtype:
        OWN_DTYPE.add(name)
    if name not in ROW and len(ROW) >= MOST_ROWS:
        raise ValueError(f"row {name!r}: the address table has room for {MOST_ROWS} rows")
    return number(ROW, name)


OWN, SPLIT, NONE = 0, 1, 2
"""How a weight is kept: in a row of its own (or as the FP32 parameter), as a BF16 parameter and the
remainder of its FP32 master, or as the 16-bit parameter alone."""

PARAM = address_row("param")
GRAD = address_row("grad")
WEIGHT = address_row("weight")
"""What the mathematics moves: the FP32 master of a 16-bit parameter, otherwise the parameter."""
REMAINDER = address_row("remainder")
EXP_AVG = address_row("exp_avg")
SNAPSHOT = address_row("snapshot")

TAIL_SHARE = tl.constexpr(4)
"""A chunk with an end in it, or without alignment, is worked on in blocks smaller by this:
masks and narrow accesses cost registers, and short tensors need few of the small blocks."""

TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
"""Floating-point dtypes that the kernels read and write."""

_INTERPRETED = tl.constexpr(INTERPRETED)
_N_ROWS = tl.constexpr(MOST_ROWS)
OWN_WEIGHTS, WEIGHTS_ALONE = tl.constexpr(OWN), tl.constexpr(NONE)
_SPLIT = tl.constexpr(SPLIT)


@triton.jit
def row_pointer(addresses, row, tensor, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The base pointer of one row of one tensor."""
    pointer = tl.load(addresses + tensor * _N_ROWS + row).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def narrow(values, DTYPE: tl.constexpr):
    """Rounds to the nearest number of a dtype, ties to even."""
    if _INTERPRETED and tl.bfloat16 == DTYPE:
        # The interpreter truncates, and loses the sign of zero. The compiler never sees this.
        bits = values.to(tl.float32).to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nearest = tl.where(values == values, nearest, 0x7FC0)
        narrowed = nearest.to(tl.int16).to(DTYPE, bitcast=True)
    else:
        narrowed = values.to(DTYPE)
    return narrowed


@triton.jit
def _offsets(BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets of a block in rows of what a thread moves of a narrow role at a time."""
    return tl.arange(0, BLOCK // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def load_row(
    addresses, row, tensor, begin, length,
    DTYPE: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr, FULL: tl.constexpr, OTHER: tl.constexpr = 0.0,
):  # fmt: skip
    """A block of one row, promoted to ``COMPUTE``; ``OTHER`` beyond the end of the tensor.

    A full chunk takes the branch without a mask: with one, ptxas emits 32-bit loads. There a
    16-bit row is read as a matrix, which Triton gives a layout of its own: 8 elements a
    thread are one 128-bit access (16 of a row of bytes), where an FP32 row takes 4. In one layout
    for both, every FP32 row would go through shared memory on its way back.
    """
    WIDTH: tl.constexpr = 16 if tl.int8 == DTYPE else 8
    pointer = row_pointer(addresses, row, tensor, DTYPE, FULL)
    offsets = begin + tl.arange(0, BLOCK)
    if not FULL:
        values = tl.load(pointer + offsets, mask=offsets < length, other=OTHER)
    elif DTYPE == COMPUTE:
        values = tl.load(pointer + offsets)
    else:
        values = tl.reshape(tl.load(pointer + (begin + _offsets(BLOCK, WIDTH))), (BLOCK,))
    return values.to(COMPUTE)


@triton.jit
def store_row(
    addresses, row, tensor, begin, length, values,
    DTYPE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Writes a block of one row, rounded once to the row's dtype."""
    WIDTH: tl.constexpr = 16 if tl.int8 == DTYPE else 8
    pointer = row_pointer(addresses, row, tensor, DTYPE, FULL)
    offsets = begin + tl.arange(0, BLOCK)
    values = narrow(values, DTYPE)
    if not FULL:
        tl.store(pointer + offsets, values, mask=offsets < length)
    elif DTYPE == COMPUTE:
        tl.store(pointer + offsets, values)
    else:
        values = tl.reshape(values, (BLOCK // WIDTH, WIDTH))
        tl.store(pointer + (begin + _offsets(BLOCK, WIDTH)), values)


@triton.jit
def load_weight(
    addresses, tensor, begin, length,
    PARAM_TYPE: tl.constexpr, STATE: tl.constexpr, KEPT: tl.constexpr,
    BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """A block of weights in ``STATE``, however they are kept.

    A parameter that is not its master, rounded, was written by somebody else, and its value counts.
    """
    if KEPT == OWN_WEIGHTS:
        weight = load_row(addresses, WEIGHT, tensor, begin, length, STATE, STATE, BLOCK, FULL)
        if PARAM_TYPE != STATE:
            seen = load_row(addresses, PARAM, tensor, begin, length, PARAM_TYPE, STATE, BLOCK, FULL)
            weight = tl.where(narrow(weight, PARAM_TYPE).to(STATE) == seen, weight, seen)
    elif KEPT == _SPLIT:
        high = load_row(addresses, PARAM, tensor, begin, length, tl.int16, tl.int32, BLOCK, FULL, 0)
        low = load_row(
            addresses, REMAINDER, tensor, begin, length, tl.int16, tl.int32, BLOCK, FULL, 0
        )
        # Below a zero and above an infinity that somebody else wrote lie the bits of NaNs.
        low = tl.where((high & 0x7FFF) == 0, tl.maximum(low, 0), low)
        low = tl.where((high & 0x7FFF) == 0x7F80, tl.minimum(low, 0), low)
        weight = ((high << 16) + low).to(tl.float32, bitcast=True)
    else:
        weight = load_row(addresses, PARAM, tensor, begin, length, PARAM_TYPE, STATE, BLOCK, FULL)
    return weight


@triton.jit
def store_weight(
    addresses, tensor, begin, length, weight,
    PARAM_TYPE: tl.constexpr, STATE: tl.constexpr, MASTER: tl.constexpr, KEPT: tl.constexpr,
    BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Writes a block of weights, and the parameters that are their rounded values.

    The remainder is the distance of the bits of weight and parameter, -2^15 to 2^15. That one
    value too many, a tie rounded down, becomes 2^15 - 1: such a weight is one bit smaller.
    """
    if KEPT == OWN_WEIGHTS:
        store_row(addresses, WEIGHT, tensor, begin, length, weight, STATE, STATE, BLOCK, FULL)
    if MASTER:
        store_row(addresses, PARAM, tensor, begin, length, weight, PARAM_TYPE, STATE, BLOCK, FULL)
    if KEPT == _SPLIT:
        high = narrow(weight, PARAM_TYPE).to(tl.int16, bitcast=True).to(tl.int32)
        low = tl.minimum(weight.to(tl.int32, bitcast=True) - (high << 16), 32767)
        store_row(addresses, REMAINDER, tensor, begin, length, low, tl.int16, tl.int32, BLOCK, FULL)
