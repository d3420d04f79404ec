"""Adds a displacement that was found elsewhere to the weights, with their weight decay.

A quasi-Newton move of matrices is found in bases of their own (``bases.py``); weights have none.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_hybrid.kernels.ledger import PART_COLUMN, PREDICTION_COLUMNS
from triton_hybrid.kernels.multi_tensor import TensorSet, chunk_at, chunk_length
from triton_hybrid.kernels.rows import (
    TAIL_SHARE,
    address_row,
    load_row,
    load_weight,
    narrow,
    store_weight,
)
from triton_hybrid.kernels.scalars import HYPER, HYPER_COLUMNS, LR, WEIGHT_DECAY, Scalars, own
from triton_hybrid.kernels.sums import reduce_partials
from triton_hybrid.kernels.together_torch import cells_of

DISPLACEMENT = address_row("displacement")
EXP_AVG_SQ = address_row("exp_avg_sq")


@triton.jit
def _shift_chunk(
    addresses, tensor, start, length, decay,
    PARAM_TYPE: tl.constexpr, STATE: tl.constexpr, MASTER: tl.constexpr, KEPT: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    bad = tl.full((), 0.0, tl.float32)
    for inner in range(0, chunk_length(start, length, CHUNK, FULL), BLOCK):
        begin = start + inner
        w = load_weight(addresses, tensor, begin, length, PARAM_TYPE, STATE, KEPT, BLOCK, FULL)
        v = load_row(addresses, EXP_AVG_SQ, tensor, begin, length, STATE, STATE, BLOCK, FULL)
        moved = load_row(addresses, DISPLACEMENT, tensor, begin, length, STATE, STATE, BLOCK, FULL)
        # What never had a gradient stays.
        w = tl.where(v != 0, w + (moved - decay * w), w)
        store_weight(
            addresses, tensor, begin, length, w, PARAM_TYPE, STATE, MASTER, KEPT, BLOCK, FULL
        )
        seen = narrow(w, PARAM_TYPE).to(tl.float32)
        bad = tl.maximum(bad, tl.max(tl.where(tl.abs(seen) < float("inf"), 0.0, 1.0), axis=0))
    return bad


@triton.jit
def _shift_kernel(
    addresses, extents, places, n_chunks,
    group, hyperparameters, prediction, solution, partials,
    PARAM_TYPE: tl.constexpr, STATE: tl.constexpr, MASTER: tl.constexpr, KEPT: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    moving = tl.load(solution) > 0
    for chunk in range(tl.program_id(0), n_chunks, tl.num_programs(0)):
        bad = tl.full((), 0.0, tl.float32)
        if moving:
            tensor, start, length, full = chunk_at(chunk, places, extents, BLOCK, CHUNK)
            row = hyperparameters + tl.load(group + tensor) * HYPER_COLUMNS
            decay = tl.load(row + LR) * tl.load(row + WEIGHT_DECAY) * tl.load(solution + 2)
            takes_part = tl.load(prediction + PREDICTION_COLUMNS * tensor + PART_COLUMN) > 0
            for FULL in tl.static_range(2):
                if takes_part & (full == FULL):
                    bad = _shift_chunk(
                        addresses, tensor, start, length, decay.to(STATE),
                        PARAM_TYPE, STATE, MASTER, KEPT,
                        BLOCK if FULL else BLOCK // TAIL_SHARE, CHUNK, FULL,
                    )  # fmt: skip
        tl.store(partials + chunk, bad)


def shift(tensors: TensorSet, scalars: Scalars, solution: Tensor) -> None:
    """Moves the weights of the tensors that take part by their displacement. Two launches.

    Adds to the third of ``scalars.sums`` how many chunks have a result that is not finite. A pass
    moves 16 bytes a parameter in FP32.

    Args:
        tensors: With rows ``param``, ``weight``, ``exp_avg_sq`` and ``displacement``.
        scalars: Of these tensors.
        solution: FP64, of `solve`: whether to move, and as its third number the share of the weight
            decay. A weight w moves by displacement - share · learning rate · weight decay · w; one
            that never had a gradient stays.
    """
    partials = tensors.room_for(1)
    tensors.launch(
        _shift_kernel, tensors.group, scalars.hyperparameters, own(scalars.prediction, tensors),
        solution, partials, every=True, MASTER=tensors.has_master,
    )  # fmt: skip
    bad = torch.empty(len(tensors), 1, dtype=torch.float64, device=solution.device)
    reduce_partials(partials, tensors.chunks(every=True), bad)
    own(scalars.sums, tensors)[:, 2:] += bad


def shift_torch(tensors: TensorSet, scalars: Scalars, solution: Tensor) -> None:
    """`shift` in plain torch."""
    row = scalars.hyperparameters[tensors.group.long()]
    decays = row[:, HYPER["lr"]] * row[:, HYPER["weight_decay"]] * solution[2]
    moves = (scalars.prediction[tensors.place, PART_COLUMN.value] > 0) & (solution[0] > 0)
    sums = scalars.sums[tensors.place]
    known = decays.to(tensors.compute_dtype)
    keys: list[object] = [True] * len(tensors)
    if on_cpu := solution.device.type == "cpu":
        keys = [its if here else None for its, here in zip(decays.tolist(), moves.tolist())]
    for cells in cells_of(tensors, keys):
        w = cells.weight()
        shifted = w + (cells.joined("displacement") - known[cells.first] * w)
        here = (cells.joined("exp_avg_sq") != 0) & moves[cells.first]
        seen = cells.put_weight(torch.where(here, shifted, w))
        # A finite sum has finite terms; on the CPU the second look costs only when not.
        if not on_cpu or not bool(seen.sum(dtype=tensors.compute_dtype).isfinite()):
            bad = torch.stack([~part.isfinite().all() for part in cells.parts(seen)])
            sums[cells.indices, 2] += bad
