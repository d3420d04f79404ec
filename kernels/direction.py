"""What a base rule would do with the slow EMA, orthogonalised matrix by matrix.

A row ``direction`` takes first the direction that the rule has for the slow EMA, and then what
Newton and Schulz's steps make of it (``newton_schulz.py``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_hybrid.kernels.matrices import MatrixSet
from triton_hybrid.kernels.multi_tensor import TensorSet, chunk_at, chunk_length
from triton_hybrid.kernels.newton_schulz import orthogonalise_row
from triton_hybrid.kernels.newton_schulz_torch import orthogonalise_row_torch
from triton_hybrid.kernels.rows import TAIL_SHARE, address_row, load_row, store_row
from triton_hybrid.kernels.scalars import HYPER_COLUMNS, Scalars
from triton_hybrid.kernels.together_torch import cells_of

DIRECTION = address_row("direction")
SLOW_EMA = address_row("slow_ema")


@triton.jit
def _along_chunk(
    addresses, tensor, start, length, a, b, c, d,
    DENOMINATOR: tl.constexpr, ALONG: tl.constexpr, STATE: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    for inner in range(0, chunk_length(start, length, CHUNK, FULL), BLOCK):
        begin = start + inner
        denominator = DENOMINATOR(addresses, tensor, begin, length, a, b, c, d, STATE, BLOCK, FULL)
        s = load_row(addresses, SLOW_EMA, tensor, begin, length, STATE, STATE, BLOCK, FULL)
        along = ALONG(addresses, tensor, begin, length, s, denominator, STATE, BLOCK, FULL)
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


def along(tensors: TensorSet, scalars: Scalars) -> None:
    """Writes the direction that the rule has for the slow EMA. One launch.

    Args:
        tensors: With rows ``slow_ema``, ``direction`` and those that the rule reads along it.
        scalars: Of these tensors.
    """
    rule = tensors.rule
    assert rule is not None
    tensors.launch(
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
        read = {name: cells.joined(name) for name in ("slow_ema", *rule.reads_along)}
        out = read["slow_ema"].new_empty(2, cells.total)
        its = numbers[cells.first]
        cells.put("direction", rule.torch_along.along(read, read["slow_ema"], its, out))


def direct(tensors: TensorSet, matrices: MatrixSet, scalars: Scalars) -> None:
    """Writes the orthogonalised direction along the slow EMA. 3 + 3 · steps launches for a wave.

    Args:
        tensors: With rows ``slow_ema``, ``direction`` and those that the rule reads along it.
        matrices: All of them, orthogonalised in ``direction``.
        scalars: Of these tensors.
    """
    along(tensors, scalars)
    orthogonalise_row(matrices, scalars, DIRECTION)


def direct_torch(tensors: TensorSet, matrices: MatrixSet, scalars: Scalars) -> None:
    """`direct` in plain torch."""
    along_torch(tensors, scalars)
    orthogonalise_row_torch(matrices, scalars, "direction")


def weights_of(tensors: TensorSet) -> list[Tensor]:
    """The weights of all tensors in the dtype of the mathematics, 1-D; views where that can be."""
    kept = tensors.flat.get("weight", ())
    if kept and not tensors.has_master:
        return [*kept]
    return [tensors.weight(index, slice(None)) for index in range(len(tensors))]
