"""What a base rule would do with its momentum, orthogonalised matrix by matrix.

A row ``direction`` takes first the direction that the rule has for exp_avg, then what Newton and
Schulz's steps make of it (``newton_schulz.py``), and that at a length of its own: a displacement
along it needs no other row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_hybrid.kernels.launch import Launch
from triton_hybrid.kernels.matrices import MatrixSet
from triton_hybrid.kernels.multi_tensor import TensorSet, chunk_at, chunk_length
from triton_hybrid.kernels.newton_schulz import orthogonalise_row
from triton_hybrid.kernels.newton_schulz_torch import orthogonalise_row_torch
from triton_hybrid.kernels.repeated import repeated
from triton_hybrid.kernels.rows import EXP_AVG, TAIL_SHARE, address_row, load_row, store_row
from triton_hybrid.kernels.scalars import HYPER_COLUMNS, Scalars
from triton_hybrid.kernels.together_torch import cells_of

DIRECTION = address_row("direction")


@triton.jit
def _along_chunk(
    addresses, tensor, start, length, a, b, c, d,
    DENOMINATOR: tl.constexpr, ALONG: tl.constexpr, STATE: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    for inner in range(0, chunk_length(start, length, CHUNK, FULL), BLOCK):
        begin = start + inner
        denominator = DENOMINATOR(addresses, tensor, begin, length, a, b, c, d, STATE, BLOCK, FULL)
        m = load_row(addresses, EXP_AVG, tensor, begin, length, STATE, STATE, BLOCK, FULL)
        along = ALONG(addresses, tensor, begin, length, m, denominator, STATE, BLOCK, FULL)
        store_row(addresses, DIRECTION, tensor, begin, length, along, STATE, STATE, BLOCK, FULL)


@triton.jit
def _along_kernel(
    addresses, extents, places, n_chunks, group, hyperparameters, steps,
    CONSTANTS: tl.constexpr, DENOMINATOR: tl.constexpr, ALONG: tl.constexpr,
    PARAM_TYPE: tl.constexpr, STATE: tl.constexpr, KEPT: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    for chunk in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        tensor, start, length, full = chunk_at(chunk, places, extents, BLOCK, CHUNK)
        row = hyperparameters + tl.load(group + tensor) * HYPER_COLUMNS
        step = tl.maximum(tl.load(steps + tensor).to(tl.float64), 1.0)
        # The step size is not used, whatever the rate.
        _, a, b, c, d = CONSTANTS(row, step, step, STATE)
        for FULL in tl.static_range(2):
            if full == FULL:
                _along_chunk(
                    addresses, tensor, start, length, a, b, c, d, DENOMINATOR, ALONG, STATE,
                    BLOCK if FULL else BLOCK // TAIL_SHARE, CHUNK, FULL,
                )  # fmt: skip


@repeated
def along(tensors: TensorSet, scalars: Scalars) -> list[Launch]:
    """Writes the direction that the rule has for exp_avg. One launch.

    Args:
        tensors: With rows ``exp_avg``, ``direction`` and those that the rule reads along it.
        scalars: Of these tensors.
    """
    return [_along(tensors, scalars)]


def _along(tensors: TensorSet, scalars: Scalars) -> Launch:
    rule = tensors.rule
    assert rule is not None
    return tensors.prepared(
        _along_kernel, tensors.group, scalars.hyperparameters, tensors.steps, every=True,
        CONSTANTS=rule.constants, DENOMINATOR=rule.denominator, ALONG=rule.along,
    )  # fmt: skip


def along_torch(tensors: TensorSet, scalars: Scalars) -> None:
    """`along` in plain torch."""
    rule = tensors.rule
    assert rule is not None
    rows = scalars.hyperparameters[tensors.group.long()]
    step = tensors.steps.double().clamp(min=1.0)
    table = torch.stack(rule.torch_along.numbers(rows, step), 1).to(tensors.compute_dtype)
    numbers = [*map(tuple, table.tolist() if tensors.device.type == "cpu" else table.unbind())]
    for cells in cells_of(tensors, numbers):
        read = {name: cells.joined(name) for name in ("exp_avg", *rule.reads_along)}
        out = read["exp_avg"].new_empty(2, cells.total)
        its = numbers[cells.first]
        cells.put("direction", rule.torch_along.along(read, read["exp_avg"], its, out))


@triton.jit
def _lengthen_chunk(
    addresses, tensor, start, length, scale,
    STATE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    for inner in range(0, chunk_length(start, length, CHUNK, FULL), BLOCK):
        begin = start + inner
        turned = load_row(addresses, DIRECTION, tensor, begin, length, STATE, STATE, BLOCK, FULL)
        m = load_row(addresses, EXP_AVG, tensor, begin, length, STATE, STATE, BLOCK, FULL)
        turned = tl.where(m != 0, scale * turned, 0.0)
        store_row(addresses, DIRECTION, tensor, begin, length, turned, STATE, STATE, BLOCK, FULL)


@triton.jit
def _lengthen_kernel(
    addresses, extents, places, n_chunks, scales,
    PARAM_TYPE: tl.constexpr, STATE: tl.constexpr, KEPT: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    for chunk in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        tensor, start, length, full = chunk_at(chunk, places, extents, BLOCK, CHUNK)
        scale = tl.load(scales + tensor).to(STATE)
        for FULL in tl.static_range(2):
            if full == FULL:
                _lengthen_chunk(
                    addresses, tensor, start, length, scale, STATE,
                    BLOCK if FULL else BLOCK // TAIL_SHARE, CHUNK, FULL,
                )  # fmt: skip


@repeated
def lengthen(tensors: TensorSet, scalars: Scalars, scales: Tensor) -> list[Launch]:
    """Multiplies ``direction`` with a number of each tensor, and zeroes it where exp_avg is 0.

    So stays what never had a gradient, though its matrix moves. One launch.

    Args:
        tensors: With rows ``exp_avg`` and ``direction``.
        scalars: Of these tensors.
        scales: FP32 ``[tensors]``.
    """
    return [tensors.prepared(_lengthen_kernel, scales, every=True)]


def lengthen_torch(tensors: TensorSet, scalars: Scalars, scales: Tensor) -> None:
    """`lengthen` in plain torch."""
    for cells in cells_of(tensors, [True] * len(tensors)):
        turned = cells.joined("direction") * cells.spread(scales)
        cells.put("direction", turned.masked_fill_(cells.joined("exp_avg") == 0, 0.0))


@repeated
def direct(
    tensors: TensorSet, scalars: Scalars, matrices: MatrixSet, scales: Tensor
) -> list[Launch]:
    """Writes the orthogonalised direction along exp_avg. 4 + 3 · steps launches for one wave.

    Args:
        tensors: With rows ``exp_avg``, ``direction`` and those that the rule reads along it.
        scalars: Of these tensors.
        matrices: All of them, orthogonalised in ``direction``.
        scales: Lengths, FP32 ``[tensors]``.
    """
    turn = orthogonalise_row(matrices, scalars, DIRECTION)
    lengthened = tensors.prepared(_lengthen_kernel, scales, every=True)
    return [_along(tensors, scalars), *turn, lengthened]


def direct_torch(tensors: TensorSet, scalars: Scalars, matrices: MatrixSet, scales: Tensor) -> None:
    """`direct` in plain torch."""
    along_torch(tensors, scalars)
    orthogonalise_row_torch(matrices, scalars, "direction")
    lengthen_torch(tensors, scalars, scales)
