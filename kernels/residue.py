"""The weights before a move that can be computed again: nothing is copied.

A displacement of rows that stay as they are until the next base step is the same bits whenever it
is computed. So the weights before a prediction follow from those after it:

* An FP32 master of a 16-bit parameter is not moved: the prediction stands in the parameter alone.
* Weights that are moved in place keep one byte an element: the distance, in units of the last
  place, of what a subtraction of the displacement gives from what was there. An element whose
  weight is less than 1/127 of the displacement, for which a byte might not suffice, is not moved,
  and its byte says so.

What a displacement is made of (its factor, and the rule's four numbers) lies in the table of moves:
what others change between two steps, a learning rate or an ε, changes nothing that is under way.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_hybrid.kernels.fingerprint import INTEGERS
from triton_hybrid.kernels.multi_tensor import TensorSet, assembled, remainder_of
from triton_hybrid.kernels.rows import (
    NONE,
    OWN,
    OWN_WEIGHTS,
    PARAM,
    SPLIT,
    WEIGHT,
    WEIGHTS_ALONE,
    address_row,
    load_row,
    load_weight,
    narrow,
    store_row,
    store_weight,
)
from triton_hybrid.kernels.scalars import MOVE_COLUMNS, Scalars
from triton_hybrid.kernels.together_torch import Part, Together

RESIDUE = address_row("residue", own_dtype=True)
UNMOVED = -128
"""The byte of an element that was not moved."""

_COLUMNS = tl.constexpr(MOVE_COLUMNS)
NOT_MOVED = tl.constexpr(UNMOVED)
FARTHEST = tl.constexpr(127.0)
"""Largest displacement in units of the weight. Rounding moves its end by half a unit in the last
place, which is 64 of the weight's at most. To ask whether the byte does suffice, as is true up to
254 and by chance beyond, let the last bits of a gradient decide what takes part: losses of sharded
training were 2e-4 from those of one process in one run of sixteen."""
_SPLIT = tl.constexpr(SPLIT)


@triton.jit
def move_numbers(moves, tensor, STATE: tl.constexpr):
    """The factor of the displacement that stands, and the rule's four numbers."""
    own = moves + tensor * _COLUMNS
    factor = tl.load(own).to(STATE)
    a, b = tl.load(own + 2).to(STATE), tl.load(own + 3).to(STATE)
    return factor, a, b, tl.load(own + 4).to(STATE), tl.load(own + 5).to(STATE)


@triton.jit
def add_to_move(
    moves, tensor, row, step, factor,
    CONSTANTS: tl.constexpr, FIRST: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """Factors before and after a prediction, and the rule's numbers.

    Every chunk of a tensor notes the same ones, the factor in a column that nobody reads meanwhile.
    """
    own = moves + tensor * _COLUMNS
    before, a, b, c, d = move_numbers(moves, tensor, STATE)
    if FIRST:
        # The step size is not used, whatever the rate.
        _, a, b, c, d = CONSTANTS(row, step, step, STATE)
        before = before * 0.0
    # In FP64, where the factors of several predictions add up.
    after = (before.to(tl.float64) + factor.to(tl.float64)).to(STATE)
    tl.store(own + 1, after.to(tl.float64))
    if FIRST:
        tl.store(own + 2, a.to(tl.float64))
        tl.store(own + 3, b.to(tl.float64))
        tl.store(own + 4, c.to(tl.float64))
        tl.store(own + 5, d.to(tl.float64))
    return before, after, a, b, c, d


@triton.jit
def _as_kept(weight, PARAM_TYPE: tl.constexpr, STATE: tl.constexpr, KEPT: tl.constexpr):
    """What will be read of a weight once it is kept, and its bits."""
    if KEPT == WEIGHTS_ALONE:
        rounded = narrow(weight, PARAM_TYPE)
        weight = rounded.to(STATE)
        bits = rounded.to(tl.int16, bitcast=True).to(tl.int32)
    elif KEPT == _SPLIT:
        high = narrow(weight, PARAM_TYPE).to(tl.int16, bitcast=True).to(tl.int32)
        low = tl.minimum(weight.to(tl.int32, bitcast=True) - (high << 16), 32767)
        bits = (high << 16) + low
        weight = bits.to(tl.float32, bitcast=True)
    elif tl.float64 == STATE:
        bits = weight.to(tl.int64, bitcast=True)
    else:
        bits = weight.to(tl.int32, bitcast=True)
    return weight, bits


@triton.jit
def _recovered(
    weight, moved, lost, PARAM_TYPE: tl.constexpr, STATE: tl.constexpr, KEPT: tl.constexpr
):
    """The weights before a displacement, from those after it and the bytes."""
    _, near = _as_kept(weight - moved, PARAM_TYPE, STATE, KEPT)
    bits = near + lost.to(near.dtype)
    if KEPT == WEIGHTS_ALONE:
        before = bits.to(tl.int16).to(PARAM_TYPE, bitcast=True).to(STATE)
    else:
        before = bits.to(STATE, bitcast=True)
    return tl.where(lost == NOT_MOVED, weight, before)


@triton.jit
def _same(x, y):
    """Equality, by which a NaN is one."""
    return (x == y) | ((x != x) & (y != y))


@triton.jit
def load_residue(addresses, tensor, begin, length, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """A block of bytes, as int32."""
    return load_row(addresses, RESIDUE, tensor, begin, length, tl.int8, tl.int32, BLOCK, FULL, 0)


@triton.jit
def load_moved(
    addresses, tensor, begin, length, moved, taken_out,
    PARAM_TYPE: tl.constexpr, STATE: tl.constexpr, KEPT: tl.constexpr,
    BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Weights before and after a displacement that stands.

    Of a master, an element that somebody else has written since stands for both; so does one whose
    prediction somebody has undone. ``taken_out``: which of the two it is where that is the same.
    """
    if KEPT == OWN_WEIGHTS and PARAM_TYPE != STATE:
        before = load_row(addresses, WEIGHT, tensor, begin, length, STATE, STATE, BLOCK, FULL)
        seen = load_row(addresses, PARAM, tensor, begin, length, PARAM_TYPE, STATE, BLOCK, FULL)
        weight = before + moved
        stands = _same(narrow(weight, PARAM_TYPE).to(STATE), seen)
        undone = _same(narrow(before, PARAM_TYPE).to(STATE), seen)
        stands = stands & tl.where(undone, taken_out == 0, True)
        weight = tl.where(stands, weight, tl.where(undone, before, seen))
        before = tl.where(stands | undone, before, seen)
    else:
        weight = load_weight(addresses, tensor, begin, length, PARAM_TYPE, STATE, KEPT, BLOCK, FULL)
        lost = load_residue(addresses, tensor, begin, length, BLOCK, FULL)
        before = _recovered(weight, moved, lost, PARAM_TYPE, STATE, KEPT)
    return before, weight


@triton.jit
def add_move(
    addresses, tensor, begin, length, basis, before_factor, factor, after_factor,
    PARAM_TYPE: tl.constexpr, STATE: tl.constexpr, MASTER: tl.constexpr, KEPT: tl.constexpr,
    FIRST: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Moves a block of weights by a further part of a displacement, ``factor · basis``.

    Returns that part, and the weights that would be seen, as 16-bit ones where a model sees those:
    also of an element that stays, or a displacement out of all proportion would pass unseen.
    """
    moved, after = factor * basis, after_factor * basis
    if KEPT == OWN_WEIGHTS and PARAM_TYPE != STATE:
        before = load_row(addresses, WEIGHT, tensor, begin, length, STATE, STATE, BLOCK, FULL)
        param = load_row(addresses, PARAM, tensor, begin, length, PARAM_TYPE, STATE, BLOCK, FULL)
        now = before if FIRST else before + before_factor * basis
        free = _same(narrow(now, PARAM_TYPE).to(STATE), param)  # not written by somebody else
        seen = tl.where(free, narrow(before + after, PARAM_TYPE).to(STATE), param)
        moved = tl.where(free, moved, 0.0)
        store_row(addresses, PARAM, tensor, begin, length, seen, PARAM_TYPE, STATE, BLOCK, FULL)
    else:
        weight = load_weight(addresses, tensor, begin, length, PARAM_TYPE, STATE, KEPT, BLOCK, FULL)
        before = weight
        if not FIRST:
            lost = load_residue(addresses, tensor, begin, length, BLOCK, FULL)
            before = _recovered(weight, before_factor * basis, lost, PARAM_TYPE, STATE, KEPT)
        seen, _ = _as_kept(before + after, PARAM_TYPE, STATE, KEPT)
        # Nothing is lost of a 0. Asked later, it spilled 24 bytes in FP32 with Triton 3.6.
        near = tl.abs(after) <= tl.where(before == 0, float("inf"), tl.abs(before) * FARTHEST)
        _, found = _as_kept(seen - after, PARAM_TYPE, STATE, KEPT)
        _, bits = _as_kept(before, PARAM_TYPE, STATE, KEPT)
        lost = tl.where(near, bits - found, NOT_MOVED)
        fits = (lost > NOT_MOVED) & (lost < 128)
        store_weight(
            addresses, tensor, begin, length, tl.where(fits, seen, before),
            PARAM_TYPE, STATE, MASTER, KEPT, BLOCK, FULL,
        )  # fmt: skip
        lost = tl.where(fits, lost, NOT_MOVED).to(tl.int32)
        store_row(addresses, RESIDUE, tensor, begin, length, lost, tl.int8, tl.int32, BLOCK, FULL)
    return moved, seen


# ------------------------------------------------------------------------------------ plain torch


def stands_in_parameter(tensors: TensorSet) -> bool:
    """Whether predictions are written to 16-bit parameters alone, not to the masters behind."""
    return tensors.kept == OWN and tensors.has_master


def add_to_move_torch(
    tensors: TensorSet, scalars: Scalars, factor: Tensor, moving: Tensor, first: bool
) -> list[Tensor]:
    """`add_to_move` in plain torch, for all tensors of a set.

    Args:
        tensors: The set.
        scalars: Of these tensors; the table of moves is written.
        factor: FP64 ``[tensors]``, of the part to add.
        moving: Bool ``[tensors]``, which of them move.
        first: Whether no displacement stands yet.

    Returns:
        FP64 columns: factors before, of this part, and after; the rule's numbers.
    """
    assert tensors.rule is not None
    table, compute = scalars.moves[tensors.place], tensors.compute_dtype
    numbers = table.clone()
    if first:
        rows = scalars.hyperparameters[tensors.group.long()]
        step = tensors.steps.double().clamp(min=1.0)
        constants = tensors.rule.torch_along.numbers(rows, step)
        numbers = torch.stack([torch.zeros_like(step)] * 2 + constants, dim=1)
        numbers = numbers.to(compute).double()
    part = factor.to(compute).double()
    after = (numbers[:, 0] + part).to(compute).double()
    before, numbers[:, 1] = numbers[:, 0].clone(), after
    numbers[:, 0] = after
    table.copy_(torch.where(moving.unsqueeze(1), numbers, table))
    return [before, part, after, *numbers[:, 2:].unbind(1)]


def _kept_torch(weight: Tensor, kept: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What will be read of weights once they are kept, and its bits."""
    if kept == NONE:
        rounded = weight.to(dtype)
        return rounded.to(weight.dtype), rounded.view(torch.int16).to(torch.int32)
    if kept == SPLIT:
        rounded = weight.to(dtype)
        weight = assembled(rounded, remainder_of(weight, rounded))
    return weight, weight.view(INTEGERS[weight.element_size()][0])


def recovered_torch(
    weight: Tensor, moved: Tensor, residue: Tensor, kept: int, dtype: torch.dtype
) -> Tensor:
    """The weights before a displacement, from those after it and the bytes.

    Args:
        weight: After it; FP32, or FP64.
        moved: The displacement.
        residue: Bytes.
        kept: How the weights are kept, as in `rows`.
        dtype: Of the parameters.
    """
    _, near = _kept_torch(weight - moved, kept, dtype)
    bits = near + residue
    before = bits.to(torch.int16).view(dtype) if kept == NONE else bits.view(weight.dtype)
    return torch.where(residue == UNMOVED, weight, before.to(weight.dtype))


def _same_torch(x: Tensor, y: Tensor) -> Tensor:
    return (x == y) | (x.isnan() & y.isnan())


def load_moved_torch(
    cells: Part | Together, moved: Tensor, taken_out: Any
) -> tuple[Tensor, Tensor]:
    """`load_moved` in plain torch."""
    tensors = cells.tensors
    if not stands_in_parameter(tensors):
        weight, dtype = cells.weight(), tensors.dtype["param"]
        residue = cells.joined("residue")
        return recovered_torch(weight, moved, residue, tensors.kept, dtype), weight
    before, param = cells.joined("weight"), cells.joined("param")
    weight, seen = before + moved, param.to(moved.dtype)
    undone = _same_torch(before.to(param.dtype), param)
    stands = _same_torch(weight.to(param.dtype), param) & ~(undone & taken_out)
    weight = torch.where(stands, weight, torch.where(undone, before, seen))
    return torch.where(stands | undone, before, seen), weight


def add_move_torch(
    cells: Part | Together, basis: Tensor, factors: tuple[Any, Any, Any], first: bool, moves: Any
) -> tuple[Tensor, Tensor]:
    """Moves weights by a further part of a displacement, unless ``moves`` is False.

    Args:
        cells: The weights.
        basis: What the factors multiply.
        factors: Before, of this part, and after.
        first: Whether no displacement stands yet.
        moves: 0-dim bool, or True.

    Returns:
        The displacement of this part, and the weights that would be seen, as 16-bit ones where a
        model sees those.
    """
    tensors = cells.tensors
    dtype = tensors.dtype["param"]
    before_factor, part_factor, after_factor = factors
    moved, after = basis * part_factor, basis * after_factor
    if stands_in_parameter(tensors):
        before, param = cells.joined("weight"), cells.joined("param")
        now = before if first else before + basis * before_factor
        free = _same_torch(now.to(dtype), param) & moves  # not written by somebody else
        seen = (before + after).to(dtype)
        cells.put("param", torch.where(free, seen, param))
        return torch.where(free, moved, torch.zeros_like(moved)), torch.where(free, seen, param)
    weight = cells.weight()
    before = weight
    if not first:
        residue = cells.joined("residue")
        before = recovered_torch(weight, basis * before_factor, residue, tensors.kept, dtype)
    wanted, _ = _kept_torch(before + after, tensors.kept, dtype)
    _, found = _kept_torch(wanted - after, tensors.kept, dtype)
    _, bits = _kept_torch(before, tensors.kept, dtype)
    lost = bits - found
    near = (after.abs() <= before.abs() * FARTHEST.value) | (before == 0)
    fits = (lost > UNMOVED) & (lost < 128) & near
    placed = torch.where(fits, wanted, before)
    bytes_ = torch.where(fits, lost, torch.full_like(lost, UNMOVED)).to(torch.int8)
    if moves is not True:
        placed = torch.where(moves, placed, weight)
        bytes_ = torch.where(moves, bytes_, cells.joined("residue"))
        moved = torch.where(moves, moved, torch.zeros_like(moved))
        wanted = torch.where(moves, wanted, weight)
    cells.put("residue", bytes_)
    cells.put_weight(placed)
    return moved, wanted
