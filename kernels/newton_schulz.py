"""Orthogonalisation of many matrices at once by Newton-Schulz steps.

    X ← X / ‖X‖,  then in each step  A = X Xᵀ,  B = b A + c A A,  X ← a X + B X

An odd polynomial of the singular values for each step, which the steps together push towards
one (Muon: K. Jordan, 2024; the iteration is in Björck and Bowie, 1971). A and A A are
symmetric: one triangle of tiles is computed and mirrored, which saves 15 to 28% of the
multiplications. Iterating on A alone would save more for wide matrices, but diverges in BF16, and
with restarts it no longer rounds as ``torch.optim.Muon`` does (EXPERIMENTS.md, entry 21).

A step is three launches for all matrices of a wave, whatever their shapes. Two more gather the
matrices, with the momentum on the way, and divide them by their norms; the last product writes
them back.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton_hybrid.kernels.launch import INTERPRETED, MATRIX_LAUNCH, Launch, prepared
from triton_hybrid.kernels.ledger import SLOW_COUNT
from triton_hybrid.kernels.matrices import (
    FIRST_TILE,
    TENSOR,
    TILES,
    Coefficients,
    MatrixSet,
    in_memory,
    in_scratch,
    tile_at,
    tile_in_memory,
)
from triton_hybrid.kernels.multi_tensor import TensorSet
from triton_hybrid.kernels.newton_schulz_torch import MIX_GRADIENTS, SMALLEST_NORM
from triton_hybrid.kernels.repeated import repeated
from triton_hybrid.kernels.rows import (
    EXP_AVG,
    GRAD,
    TRITON_DTYPES,
    address_row,
    narrow,
    row_pointer,
)
from triton_hybrid.kernels.scalars import (
    BETA1,
    EPS,
    HYPER_COLUMNS,
    NESTEROV_MIX,
    SIGN,
    SLOW_MIX,
    Scalars,
    gradient_norm,
    precise_div,
    precise_sqrt,
)

QUINTIC: Coefficients = ((3.4445, -4.7750, 2.0315),)
"""K. Jordan's coefficients, the same for every step, and the default of ``torch.optim.Muon``.
Five steps take singular values from 0.01 to 1 into 0.68 to 1.14, those from 0.001 into 0.47 to
1.20."""

POLAR: Coefficients = (
    (8.386465, -24.369654, 17.725120),
    (4.142308, -3.018140, 0.552597),
    (3.928594, -2.872330, 0.536525),
    (3.276250, -2.411782, 0.486008),
    (2.301825, -1.676278, 0.422952),
)
"""Coefficients of each of five steps: in turn, the odd quintic that is nearest to one on the
interval the steps before have left, beginning with singular values from 0.001 to 1 (the
principle of Polar Express, Amsel et al., arXiv 2505.16932; solved as linear programs, with 1% to
spare for rounding). They end in 0.88 to 1.12."""

SLOW_EMA = address_row("slow_ema")
_UPDATE = address_row("update")
_SMALLEST_NORM = tl.constexpr(SMALLEST_NORM)
_MIX_GRADIENTS = tl.constexpr(MIX_GRADIENTS)
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _gather_kernel(
    addresses, extents, matrices, tiles, present, group, hyperparameters,
    partials, ledger, max_norm, scratch, squares,
    GRAD_TYPE: tl.constexpr, STATE: tl.constexpr, DTYPE: tl.constexpr, SLOW: tl.constexpr,
    CLIP: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """Updates the momentum; copies a tile of what is orthogonalised, and sums its square."""
    matrix, i, j = tile_at(matrices, tiles)
    tensor, row, column, tall, whole = tile_in_memory(matrix, i, j, extents, TILE)
    _, _, applied, clip, unscale = gradient_norm(partials, ledger, max_norm, CLIP, COLUMNS)
    wanted = applied & (tl.load(present + tensor) != 0)
    settings = hyperparameters + tl.load(group + tensor) * HYPER_COLUMNS
    clip = (clip * unscale * tl.load(settings + SIGN)).to(STATE)
    rate = (1.0 - tl.load(settings + BETA1)).to(STATE)
    nesterov_mix = tl.load(settings + NESTEROV_MIX).to(STATE)
    part = tl.minimum(tl.load(ledger + SLOW_COUNT) / _MIX_GRADIENTS, 1.0)
    slow_mix = (part * tl.load(settings + SLOW_MIX)).to(STATE)
    for FULL in tl.static_range(2):
        if wanted & (whole == FULL):
            grad = row_pointer(addresses, GRAD, tensor, GRAD_TYPE, FULL)
            exp_avg = row_pointer(addresses, EXP_AVG, tensor, STATE, FULL)
            offset, pitch, rows, columns = in_memory(matrix, FULL)
            c = column + tl.arange(0, TILE)
            square = tl.full((), 0.0, tl.float32)
            for begin in range(0, TILE, STRIP):
                r = row + begin + tl.arange(0, STRIP)
                at = offset + r.to(tl.int64)[:, None] * pitch + c[None, :]
                here = None if FULL else (r < rows)[:, None] & (c < columns)[None, :]
                g = tl.load(grad + at, here, None if FULL else 0.0).to(STATE) * clip
                m = tl.load(exp_avg + at, here, None if FULL else 0.0)
                m = m + rate * (g - m)
                tl.store(exp_avg + at, m, here)
                value = m - (1.0 - nesterov_mix) * (m - g)
                if SLOW:
                    # As the place below: kept, 8 bytes spilled on sm_90 with Triton 3.6.
                    slow_ema = row_pointer(addresses, SLOW_EMA, tensor, STATE, FULL)
                    s = tl.load(slow_ema + at, here, None if FULL else 0.0)
                    value = value + slow_mix * (s - value)
                value = narrow(value.to(tl.float32), DTYPE)
                wide = value.to(tl.float32)
                square += tl.sum(tl.sum(wide * wide, axis=1), axis=0)
                # Looked up for every strip: kept for all of them, 8 bytes spilled on sm_80.
                place, _gram, _height, width = in_scratch(matrix, TILE)
                if tall:
                    turned = place + c.to(tl.int64)[:, None] * width + r[None, :]
                    tl.store(scratch + turned, tl.trans(value))
                else:
                    tl.store(scratch + place + r.to(tl.int64)[:, None] * width + c[None, :], value)
            tl.store(squares + tl.program_id(0), square)


@triton.jit
def _take_kernel(
    addresses, extents, matrices, tiles, scratch, squares,
    ROW: tl.constexpr, STATE: tl.constexpr, DTYPE: tl.constexpr,
    TILE: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """Copies a tile of a row, and sums its square."""
    matrix, i, j = tile_at(matrices, tiles)
    tensor, row, column, tall, whole = tile_in_memory(matrix, i, j, extents, TILE)
    for FULL in tl.static_range(2):
        if whole == FULL:
            source = row_pointer(addresses, ROW, tensor, STATE, FULL)
            # As in `_gather_kernel`: a function that served both took that one 24 registers more on
            # sm_100, and spilled 8 bytes on sm_80.
            offset, pitch, rows, columns = in_memory(matrix, FULL)
            c = column + tl.arange(0, TILE)
            square = tl.full((), 0.0, tl.float32)
            for begin in range(0, TILE, STRIP):
                r = row + begin + tl.arange(0, STRIP)
                at = offset + r.to(tl.int64)[:, None] * pitch + c[None, :]
                here = None if FULL else (r < rows)[:, None] & (c < columns)[None, :]
                value = tl.load(source + at, here, None if FULL else 0.0)
                value = narrow(value.to(tl.float32), DTYPE)
                wide = value.to(tl.float32)
                square += tl.sum(tl.sum(wide * wide, axis=1), axis=0)
                place, _gram, _height, width = in_scratch(matrix, TILE)
                if tall:
                    turned = place + c.to(tl.int64)[:, None] * width + r[None, :]
                    tl.store(scratch + turned, tl.trans(value))
                else:
                    tl.store(scratch + place + r.to(tl.int64)[:, None] * width + c[None, :], value)
            tl.store(squares + tl.program_id(0), square)


@triton.jit
def _normalise_kernel(
    matrices, tiles, group, hyperparameters, squares, scratch,
    DTYPE: tl.constexpr, TILE: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """Divides a matrix by its norm, the sum of its tiles' squares in a fixed order."""
    matrix, i, j = tile_at(matrices, tiles)
    first = tl.load(matrix + FIRST_TILE)
    count = tl.load(matrix + TILES)
    total = tl.zeros([256], tl.float32)
    for begin in range(0, count, 256):
        at = begin + tl.arange(0, 256)
        total += tl.load(squares + first + at, mask=at < count, other=0.0)
    settings = hyperparameters + tl.load(group + tl.load(matrix + TENSOR)) * HYPER_COLUMNS
    least = tl.maximum(tl.load(settings + EPS), _SMALLEST_NORM).to(tl.float32)
    # Rounded as torch.optim.Muon does: later steps blow a difference of 0.2% up to 4%.
    norm = narrow(precise_sqrt(tl.sum(total, axis=0)), DTYPE).to(tl.float32)
    norm = narrow(tl.maximum(norm, least), DTYPE).to(tl.float32)
    place, _, _, width = in_scratch(matrix, TILE)
    columns = j * TILE + tl.arange(0, TILE)
    for begin in range(0, TILE, STRIP):
        rows = i * TILE + begin + tl.arange(0, STRIP)
        at = place + rows.to(tl.int64)[:, None] * width + columns[None, :]
        value = precise_div(tl.load(scratch + at).to(tl.float32), norm)
        tl.store(scratch + at, narrow(value, DTYPE))


@triton.jit
def _product(left, right, total, DTYPE: tl.constexpr):
    """Adds ``left @ right`` in FP32."""
    if _INTERPRETED and tl.bfloat16 == DTYPE:
        # The interpreter keeps BF16 as integers, and would multiply those.
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def _symmetric_kernel(
    matrices, tiles, scratch, target, b, c,
    DTYPE: tl.constexpr, POLYNOMIAL: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """X Xᵀ, or b A + c A A of a symmetric A: the lower triangle of tiles, and its mirror."""
    matrix, i, j = tile_at(matrices, tiles)
    place, gram, height, length = in_scratch(matrix, TILE)
    if POLYNOMIAL:
        place = gram
        length = height
    inner = tl.arange(0, DEPTH)[None, :]
    rows = (i * TILE + tl.arange(0, TILE)).to(tl.int64)
    columns = (j * TILE + tl.arange(0, TILE)).to(tl.int64)
    left = scratch + place + rows[:, None] * length + inner
    right = scratch + place + columns[:, None] * length + inner
    total = tl.zeros([TILE, TILE], tl.float32)
    for begin in range(0, length, DEPTH):
        total = _product(tl.load(left + begin), tl.trans(tl.load(right + begin)), total, DTYPE)
    at = gram + rows[:, None] * height + columns[None, :]
    if POLYNOMIAL:
        total = b * tl.load(scratch + at).to(tl.float32) + c * total
    value = narrow(total, DTYPE)
    tl.store(target + at, value)
    if i != j:
        tl.store(target + gram + columns[:, None] * height + rows[None, :], tl.trans(value))


@triton.jit
def _polynomial_kernel(
    addresses, extents, matrices, tiles, scratch, factor, target, a,
    ROW: tl.constexpr, ROW_TYPE: tl.constexpr,
    DTYPE: tl.constexpr, LAST: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The product a X + B X; the last step writes it to a row."""
    matrix, i, j = tile_at(matrices, tiles)
    place, gram, height, width = in_scratch(matrix, TILE)
    rows = i * TILE + tl.arange(0, TILE)
    columns = j * TILE + tl.arange(0, TILE)
    inner = tl.arange(0, DEPTH)
    left = factor + gram + rows.to(tl.int64)[:, None] * height + inner[None, :]
    right = scratch + place + inner.to(tl.int64)[:, None] * width + columns[None, :]
    total = tl.zeros([TILE, TILE], tl.float32)
    for begin in range(0, height, DEPTH):
        total = _product(tl.load(left + begin), tl.load(right), total, DTYPE)
        right += DEPTH * width
    at = place + rows.to(tl.int64)[:, None] * width + columns[None, :]
    total += a * tl.load(scratch + at).to(tl.float32)
    value = narrow(total, DTYPE)
    if LAST:
        tensor, row, column, tall, whole = tile_in_memory(matrix, i, j, extents, TILE)
        r = row + tl.arange(0, TILE)
        c = column + tl.arange(0, TILE)
        if tall:
            value = tl.trans(value)
        for FULL in tl.static_range(2):
            if whole == FULL:
                offset, pitch, n_rows, n_columns = in_memory(matrix, FULL)
                begins = offset + r.to(tl.int64) * pitch
                goal = row_pointer(addresses, ROW, tensor, ROW_TYPE, FULL)
                here = None if FULL else (r < n_rows)[:, None] & (c < n_columns)[None, :]
                tl.store(goal + begins[:, None] + c[None, :], value.to(ROW_TYPE), mask=here)
    else:
        tl.store(target + at, value)


@repeated
def orthogonalise(
    tensors: TensorSet, scalars: Scalars, matrices: MatrixSet, max_norm: float | None
) -> list[Launch]:
    """Updates ``exp_avg`` with the gradient, and ``update`` with the orthogonalised momentum.

    Unless the step is skipped; tensors without a gradient are left out. Where there is a row
    ``slow_ema``, it takes part in the momentum: a group's ``slow_mix`` of it, and less where it has
    seen fewer than `MIX_GRADIENTS` gradients. Launches: 2 + 3 · steps for each wave.

    Args:
        tensors: Those that the matrices are of.
        scalars: Of these tensors. A group's ``eps`` is the least norm that a matrix is divided by,
            ``beta1`` the decay of ``exp_avg``. Squares and flags of the gradient are as the
            statistics left them; ``hold`` in the ledger skips the step.
        matrices: The matrices.
        max_norm: Global-norm clipping threshold, or None.
    """
    present = tensors.chunks().present
    state = (present, tensors.group, scalars.hyperparameters, scalars.partials, scalars.ledger)
    constants = {"GRAD_TYPE": tensors.dtype_of("grad"), "SLOW": tensors.has("slow_ema")}
    constants |= {"CLIP": max_norm is not None, "COLUMNS": scalars.partials.shape[1]}
    return _launches(matrices, scalars, _gather_kernel, (*state, max_norm or 0.0), constants)


def orthogonalise_row(matrices: MatrixSet, scalars: Scalars, row: tl.constexpr) -> list[Launch]:
    """What orthogonalises a row of state, in place: 2 + 3 · steps launches for each wave.

    Args:
        matrices: Of the row, which has the dtype of the weights.
        scalars: Of their tensors; a group's ``eps`` is the least norm.
        row: Its number.
    """
    return _launches(matrices, scalars, _take_kernel, (), {}, row)


def _launches(
    matrices: MatrixSet,
    scalars: Scalars,
    gather: Any,
    own: tuple[Any, ...],
    constants: dict[str, Any],
    row: tl.constexpr = _UPDATE,
) -> list[Launch]:
    """What gathers matrices, orthogonalises them, and writes them to a row.

    ``own`` and ``constants``: arguments of ``gather`` alone.
    """
    tensors, tiling = matrices.tensors, matrices.tiling
    tables, state = tensors.tables(), tensors.dtype_of("weight")
    first, second, gram, square, squares = matrices.scratch()
    groups = (tensors.group, scalars.hyperparameters)
    dtype = TRITON_DTYPES[matrices.dtype]
    common = {"DTYPE": dtype, "TILE": tiling.tile}
    common |= {"num_warps": tiling.warps, **MATRIX_LAUNCH}
    strips, products = {"STRIP": tiling.strip, **common}, {"DEPTH": tiling.depth, **common}
    read = {"ROW": row} if row is not _UPDATE else {}
    written = {"ROW": row, "ROW_TYPE": state if read else dtype}
    found = []
    for wave in matrices.waves:
        where = (wave.table, wave.tiles)
        programs, half = (len(wave.tiles),), (len(wave.halves),)
        every = {**read, **constants, "STATE": state, **strips}
        found.append(prepared(gather, programs, *tables, *where, *own, first, squares, **every))
        its = (*where, *groups, squares, first)
        found.append(prepared(_normalise_kernel, programs, *its, **strips))
        x, y = first, second
        for step, (a, b, c) in enumerate(wave.coefficients, 1):
            lower = (wave.table, wave.halves)
            last = {"LAST": step == len(wave.coefficients), **written, **products}
            for arguments, polynomial in (
                ((x, gram, 0.0, 0.0), False),
                ((gram, square, b, c), True),
            ):
                options = {"POLYNOMIAL": polynomial, **products}
                found.append(prepared(_symmetric_kernel, half, *lower, *arguments, **options))
            operands = (*tables, *where, x, square, y, a)
            found.append(prepared(_polynomial_kernel, programs, *operands, **last))
            x, y = y, x
    return found
