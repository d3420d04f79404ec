"""Orthogonalisation of many matrices at once by Newton-Schulz steps.

    X ← X / ‖X‖,  then in each step  A = X Xᵀ,  B = b A + c A A,  X ← a X + B X

An odd polynomial of the singular values for each step, which the steps together push towards
one (Muon: K. Jordan, 2024; the iteration is in Björck and Bowie, 1971). A and A A are
symmetric: one triangle of tiles is computed and mirrored, which saves 15 to 28% of the
multiplications.

A step is three launches for all matrices of a wave, whatever their shapes. Two more gather the
matrices, with the momentum on the way, and divide them by their norms; the last product writes
them back.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton_hybrid.kernels.launch import INTERPRETED, MATRIX_LAUNCH, on_device
from triton_hybrid.kernels.ledger import HOLD
from triton_hybrid.kernels.matrices import (
    COLUMNS_IN_MEMORY,
    EVEN,
    FIRST_TILE,
    GRAM_PLACE,
    HEIGHT,
    MATRIX_COLUMNS,
    OFFSET,
    PITCH,
    PLACE,
    ROWS_IN_MEMORY,
    TALL,
    TENSOR,
    TILES,
    WIDTH,
    Coefficients,
    MatrixSet,
)
from triton_hybrid.kernels.newton_schulz_torch import SMALLEST_NORM
from triton_hybrid.kernels.rows import (
    EXP_AVG,
    GRAD,
    ROW,
    TRITON_DTYPES,
    narrow,
    row_pointer,
)
from triton_hybrid.kernels.scalars import (
    BETA1,
    EPS,
    HYPER_COLUMNS,
    NESTEROV_MIX,
    SIGN,
    Scalars,
    clip_coefficient,
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

_SMALLEST_NORM = tl.constexpr(SMALLEST_NORM)
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _strip(
    grad, exp_avg, source, scratch, row, column, rows, columns, offset, pitch, place, width, tall,
    clip, beta1, nesterov_mix, square,
    STATE: tl.constexpr, DTYPE: tl.constexpr, MOMENTUM: tl.constexpr,
    TILE: tl.constexpr, STRIP: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Copies a strip of a tile into scratch memory; updates the momentum on the way."""
    r = row + tl.arange(0, STRIP)
    c = column + tl.arange(0, TILE)
    at = offset + r.to(tl.int64)[:, None] * pitch + c[None, :]
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    if MOMENTUM:
        if FULL:
            g = tl.load(grad + at).to(STATE)
            m = tl.load(exp_avg + at)
        else:
            g = tl.load(grad + at, mask=inside, other=0.0).to(STATE)
            m = tl.load(exp_avg + at, mask=inside, other=0.0)
        g = g * clip
        m = m + (1.0 - beta1) * (g - m)
        if FULL:
            tl.store(exp_avg + at, m)
        else:
            tl.store(exp_avg + at, m, mask=inside)
        value = m - (1.0 - nesterov_mix) * (m - g)
    elif FULL:
        value = tl.load(source + at)
    else:
        value = tl.load(source + at, mask=inside, other=0.0)
    value = narrow(value.to(tl.float32), DTYPE)
    wide = value.to(tl.float32)
    square += tl.sum(tl.sum(wide * wide, axis=1), axis=0)
    if tall:
        turned = place + c.to(tl.int64)[:, None] * width + r[None, :]
        tl.store(scratch + turned, tl.trans(value))
    else:
        straight = place + r.to(tl.int64)[:, None] * width + c[None, :]
        tl.store(scratch + straight, value)
    return square


@triton.jit
def _steps(matrix, EVEN_STEPS: tl.constexpr):
    """Where a matrix begins in its tensor, and how far its rows are apart.

    Loaded where they are used: a hint belongs to the load, and so to all who use it.
    """
    offset = tl.load(matrix + OFFSET)
    pitch = tl.load(matrix + PITCH)
    if EVEN_STEPS:
        offset = tl.multiple_of(offset, 8)
        pitch = tl.multiple_of(pitch, 8)
    return offset, pitch


@triton.jit
def _gather_kernel(
    addresses, extents, matrices, tiles, present, group, hyperparameters,
    partials, ledger, max_norm, source, scratch, squares,
    GRAD_TYPE: tl.constexpr, STATE: tl.constexpr, DTYPE: tl.constexpr, MOMENTUM: tl.constexpr,
    CLIP: tl.constexpr, COLUMNS: tl.constexpr,
    TILE: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    matrix = matrices + tl.load(tiles + 3 * tile) * MATRIX_COLUMNS
    i = tl.load(tiles + 3 * tile + 1)
    j = tl.load(tiles + 3 * tile + 2)
    tensor = tl.load(matrix + TENSOR)
    wanted = True
    clip = 1.0
    beta1 = 0.0
    nesterov_mix = 0.0
    if MOMENTUM:
        norm, nonfinite, unscale = gradient_norm(partials, ledger, COLUMNS)
        wanted = (nonfinite == 0) & (tl.load(ledger + HOLD) <= 0)
        wanted = wanted & (tl.load(present + tensor) != 0)
        settings = hyperparameters + tl.load(group + tensor) * HYPER_COLUMNS
        clip = clip_coefficient(norm, max_norm, CLIP) * unscale * tl.load(settings + SIGN)
        clip = clip.to(STATE)
        beta1 = tl.load(settings + BETA1).to(STATE)
        nesterov_mix = tl.load(settings + NESTEROV_MIX).to(STATE)
    if wanted:
        tall = tl.load(matrix + TALL) != 0
        rows = tl.load(matrix + ROWS_IN_MEMORY)
        columns = tl.load(matrix + COLUMNS_IN_MEMORY)
        place = tl.multiple_of(tl.load(matrix + PLACE), TILE)
        width = tl.multiple_of(tl.load(matrix + WIDTH), TILE)
        row = tl.where(tall, j, i) * TILE
        column = tl.where(tall, i, j) * TILE
        whole = (row + TILE <= rows) & (column + TILE <= columns)
        whole = whole & (tl.load(matrix + EVEN) != 0) & ((tl.load(extents + tensor) & 1) != 0)
        square = tl.full((), 0.0, tl.float32)
        if whole:
            grad = row_pointer(addresses, GRAD, tensor, GRAD_TYPE, True)
            exp_avg = row_pointer(addresses, EXP_AVG, tensor, STATE, True)
            origin = row_pointer(addresses, source, tensor, STATE, True)
            offset, pitch = _steps(matrix, True)
            for begin in range(0, TILE, STRIP):
                square = _strip(
                    grad, exp_avg, origin, scratch, row + begin, column, rows, columns,
                    offset, pitch, place, width, tall, clip, beta1, nesterov_mix, square,
                    STATE, DTYPE, MOMENTUM, TILE, STRIP, True,
                )  # fmt: skip
        else:
            grad = row_pointer(addresses, GRAD, tensor, GRAD_TYPE, False)
            exp_avg = row_pointer(addresses, EXP_AVG, tensor, STATE, False)
            origin = row_pointer(addresses, source, tensor, STATE, False)
            odd_offset, odd_pitch = _steps(matrix, False)
            for begin in range(0, TILE, STRIP):
                square = _strip(
                    grad, exp_avg, origin, scratch, row + begin, column, rows, columns,
                    odd_offset, odd_pitch, place, width, tall, clip, beta1, nesterov_mix, square,
                    STATE, DTYPE, MOMENTUM, TILE, STRIP, False,
                )  # fmt: skip
        tl.store(squares + tile, square)


@triton.jit
def _normalise_kernel(
    matrices, tiles, group, hyperparameters, squares, scratch,
    DTYPE: tl.constexpr, TILE: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """Divides a matrix by its norm, the sum of its tiles' squares in a fixed order."""
    tile = tl.program_id(0)
    matrix = matrices + tl.load(tiles + 3 * tile) * MATRIX_COLUMNS
    i = tl.load(tiles + 3 * tile + 1)
    j = tl.load(tiles + 3 * tile + 2)
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
    place = tl.multiple_of(tl.load(matrix + PLACE), TILE)
    width = tl.multiple_of(tl.load(matrix + WIDTH), TILE)
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
    DTYPE: tl.constexpr, POLYNOMIAL: tl.constexpr,
    TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """X Xᵀ, or b A + c A A of a symmetric A: the lower triangle of tiles, and its mirror."""
    tile = tl.program_id(0)
    matrix = matrices + tl.load(tiles + 3 * tile) * MATRIX_COLUMNS
    i = tl.load(tiles + 3 * tile + 1)
    j = tl.load(tiles + 3 * tile + 2)
    height = tl.multiple_of(tl.load(matrix + HEIGHT), TILE)
    gram_place = tl.multiple_of(tl.load(matrix + GRAM_PLACE), TILE)
    if POLYNOMIAL:
        length = height
        place = gram_place
    else:
        length = tl.multiple_of(tl.load(matrix + WIDTH), TILE)
        place = tl.multiple_of(tl.load(matrix + PLACE), TILE)
    inner = tl.arange(0, DEPTH)[None, :]
    rows = (i * TILE + tl.arange(0, TILE)).to(tl.int64)
    columns = (j * TILE + tl.arange(0, TILE)).to(tl.int64)
    left = scratch + place + rows[:, None] * length + inner
    right = scratch + place + columns[:, None] * length + inner
    total = tl.zeros([TILE, TILE], tl.float32)
    for begin in range(0, length, DEPTH):
        total = _product(tl.load(left + begin), tl.trans(tl.load(right + begin)), total, DTYPE)
    at = gram_place + rows[:, None] * height + columns[None, :]
    if POLYNOMIAL:
        total = b * tl.load(scratch + at).to(tl.float32) + c * total
    value = narrow(total, DTYPE)
    tl.store(target + at, value)
    if i != j:
        tl.store(target + gram_place + columns[:, None] * height + rows[None, :], tl.trans(value))


@triton.jit
def _polynomial_kernel(
    addresses, extents, matrices, tiles, scratch, factor, target, goal, a,
    DTYPE: tl.constexpr, LAST: tl.constexpr,
    TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The product a X + B X; the last step writes it to the row ``goal`` of its tensor."""
    tile = tl.program_id(0)
    matrix = matrices + tl.load(tiles + 3 * tile) * MATRIX_COLUMNS
    i = tl.load(tiles + 3 * tile + 1)
    j = tl.load(tiles + 3 * tile + 2)
    height = tl.multiple_of(tl.load(matrix + HEIGHT), TILE)
    width = tl.multiple_of(tl.load(matrix + WIDTH), TILE)
    place = tl.multiple_of(tl.load(matrix + PLACE), TILE)
    gram_place = tl.multiple_of(tl.load(matrix + GRAM_PLACE), TILE)
    rows = i * TILE + tl.arange(0, TILE)
    columns = j * TILE + tl.arange(0, TILE)
    inner = tl.arange(0, DEPTH)
    left = factor + gram_place + rows.to(tl.int64)[:, None] * height + inner[None, :]
    right = scratch + place + inner.to(tl.int64)[:, None] * width + columns[None, :]
    total = tl.zeros([TILE, TILE], tl.float32)
    for begin in range(0, height, DEPTH):
        total = _product(tl.load(left + begin), tl.load(right), total, DTYPE)
        right += DEPTH * width
    at = place + rows.to(tl.int64)[:, None] * width + columns[None, :]
    total += a * tl.load(scratch + at).to(tl.float32)
    value = narrow(total, DTYPE)
    if LAST:
        tensor = tl.load(matrix + TENSOR)
        tall = tl.load(matrix + TALL) != 0
        memory_rows = tl.load(matrix + ROWS_IN_MEMORY)
        memory_columns = tl.load(matrix + COLUMNS_IN_MEMORY)
        first_row = tl.where(tall, j, i) * TILE
        first_column = tl.where(tall, i, j) * TILE
        whole = (first_row + TILE <= memory_rows) & (first_column + TILE <= memory_columns)
        whole = whole & (tl.load(matrix + EVEN) != 0) & ((tl.load(extents + tensor) & 1) != 0)
        r = first_row + tl.arange(0, TILE)
        c = first_column + tl.arange(0, TILE)
        if tall:
            value = tl.trans(value)
        if whole:
            offset, pitch = _steps(matrix, True)
            begins = offset + r.to(tl.int64) * pitch
            goal_row = row_pointer(addresses, goal, tensor, DTYPE, True)
            tl.store(goal_row + begins[:, None] + c[None, :], value)
        else:
            odd_offset, odd_pitch = _steps(matrix, False)
            odd_begins = odd_offset + r.to(tl.int64) * odd_pitch
            inside = (r < memory_rows)[:, None] & (c < memory_columns)[None, :]
            odd_row = row_pointer(addresses, goal, tensor, DTYPE, False)
            tl.store(odd_row + odd_begins[:, None] + c[None, :], value, mask=inside)
    else:
        tl.store(target + at, value)


def orthogonalise(
    matrices: MatrixSet,
    scalars: Scalars,
    goal: str,
    *,
    source: str | None = None,
    max_norm: float | None = None,
) -> None:
    """Orthogonalises every matrix of a tensor set. Launches: 2 + 3 · steps for each wave.

    Args:
        matrices: The matrices.
        scalars: Of their tensors. A group's ``eps`` is the least norm that a matrix is divided by,
            ``beta1`` the momentum. For the momentum also squares and flags of the gradient, as
            the statistics left them, and ``hold`` in the ledger, which skips the step.
        goal: The row that is written, ``"update"`` or ``"direction"``.
        source: The row that is read. None for the momentum: ``exp_avg`` is updated with the
            gradient first, unless the step is skipped, and tensors without a gradient are
            left out.
        max_norm: Global-norm clipping threshold, or None; for the momentum.
    """
    tensors, tiling = matrices.tensors, matrices.tiling
    addresses, extents = tensors.tables()
    present = tensors.chunks().present
    first, second, gram, square, squares = matrices.scratch()
    groups = (tensors.group, scalars.hyperparameters)
    dtype = TRITON_DTYPES[matrices.dtype]
    options = {"num_warps": tiling.warps, **MATRIX_LAUNCH}
    cut = {"TILE": tiling.tile, "DEPTH": tiling.depth, "DTYPE": dtype}
    with on_device(tensors.device):
        for wave in matrices.waves:
            where = (wave.table, wave.tiles)
            _gather_kernel[(wave.n_tiles,)](
                addresses, extents, *where, present, *groups,
                scalars.partials, scalars.ledger, max_norm or 0.0,
                ROW[source or "exp_avg"], first, squares,
                GRAD_TYPE=tensors.dtype_of("grad"), STATE=tensors.dtype_of("weight"),
                DTYPE=dtype, MOMENTUM=source is None, CLIP=max_norm is not None,
                COLUMNS=scalars.partials.shape[1],
                TILE=tiling.tile, STRIP=tiling.strip, **options,
            )  # fmt: skip
            _normalise_kernel[(wave.n_tiles,)](
                *where, *groups, squares, first,
                DTYPE=dtype, TILE=tiling.tile, STRIP=tiling.strip, **options,
            )  # fmt: skip
            x, y = first, second
            final = len(wave.coefficients) - 1
            for step, (a, b, c) in enumerate(wave.coefficients):
                half = (wave.table, wave.halves)
                _symmetric_kernel[(wave.n_halves,)](
                    *half, x, gram, 0.0, 0.0, POLYNOMIAL=False, **cut, **options
                )
                _symmetric_kernel[(wave.n_halves,)](
                    *half, gram, square, b, c, POLYNOMIAL=True, **cut, **options
                )
                _polynomial_kernel[(wave.n_tiles,)](
                    addresses, extents, *where, x, square, y, ROW[goal], a,
                    LAST=step == final, **cut, **options,
                )  # fmt: skip
                x, y = y, x
