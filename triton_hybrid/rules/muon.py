"""Muon (K. Jordan, 2024), for hidden matrices.

    exp_avg ← momentum · exp_avg + (1 - momentum) · gradient
    update  = Newton-Schulz(gradient + momentum · (exp_avg - gradient))
    weight  ← (1 - lr · weight_decay) · weight - lr · scale · update

With a predicted gradient (``predictor="slow_ema"`` or ``"auto"``) that is done with a momentum that
forgets three times as fast, and what is orthogonalised is mixed with the slow EMA as the step finds
it, more of it the more gradients it has seen:

    fast    = momentum³
    exp_avg ← fast · exp_avg + (1 - fast) · gradient
    mixed   = gradient + fast · (exp_avg - gradient)
    part    = SLOW_MIX · min(gradients / MIX_GRADIENTS, 1)
    update  = Newton-Schulz(mixed + part · (slow_ema - mixed))

The momenta of all matrices are orthogonalised together (``kernels/newton_schulz.py``), between the
two parts of the base step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_hybrid.checks import is_flag, is_int, is_list, is_number
from triton_hybrid.flat_shards import whole_shape
from triton_hybrid.kernels.matrices import SCRATCH_DTYPES, Coefficients, MatrixSet
from triton_hybrid.kernels.multi_tensor import TensorSet
from triton_hybrid.kernels.newton_schulz import QUINTIC, orthogonalise
from triton_hybrid.kernels.newton_schulz_torch import orthogonalise_torch
from triton_hybrid.kernels.rows import address_row, load_row
from triton_hybrid.kernels.scalar_math import negate
from triton_hybrid.kernels.scalars import Scalars
from triton_hybrid.kernels.step_torch import Gradient
from triton_hybrid.kernels.update_rule import Block, UpdateRule
from triton_hybrid.rules.adamw import FIRST_MOMENT
from triton_hybrid.rules.rule import Betas, Group, Option, Rule, no_denominator
from triton_hybrid.rules.whole_matrices import WholeMatrices
from triton_hybrid.shards import is_part
from triton_hybrid.state import Member, StateRow

SCALES = ("match_rms_adamw", "original")
"""Values of ``adjust_lr_fn``; None is ``"original"``, as in ``torch.optim.Muon``."""
DTYPES = tuple(SCRATCH_DTYPES)
"""Values of ``ns_dtype``."""
ADAMW_RMS = 0.2
"""Root mean square of AdamW's updates in units of the learning rate (Liu et al., arXiv
2502.16982)."""
FASTER, SLOW_MIX = 3, 0.6
"""How much faster than ``momentum`` the momentum beside the slow EMA forgets, and the slow EMA's
weight. The measurements are in ``examples/benchmarks/EXPERIMENTS.md``."""
LEAST_MOMENTUM = 0.5
"""Who sets a momentum no larger says that memory hurts, and gets no more of it."""


def scratch_dtype(param: Tensor, group: Group) -> torch.dtype:
    """What a matrix is multiplied in: by default BF16, but not on CPUs, which are slow at it.

    One matrix of 768 x 3072 took 24.8 s in BF16 and 0.69 s in FP32 on 2 cores.
    """
    by_device = "float32" if param.device.type == "cpu" else "bfloat16"
    return SCRATCH_DTYPES[group["ns_dtype"] or by_device]


MOMENTUM_UPDATE = StateRow("update", scratch_dtype, saved=False)
"""The orthogonalised momentum."""
ORTHOGONAL = address_row("update")


def rate_scale(adjust_lr_fn: str | None, rows: int, columns: int) -> float:
    """What the learning rate of a matrix with so many outputs and inputs is multiplied with.

    With ``"match_rms_adamw"`` its update gets the root mean square of AdamW's, so that one learning
    rate serves both; with ``"original"`` that of a matrix that preserves the norm of what it maps.
    """
    if adjust_lr_fn == "match_rms_adamw":
        return ADAMW_RMS * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def schedule(group: Group) -> Coefficients:
    """Coefficients of each step of a group; the last ones given serve all further steps."""
    given = group["ns_coefficients"]
    every = given if isinstance(given[0], (tuple, list)) else [given]
    steps = [every[min(step, len(every) - 1)] for step in range(int(group["ns_steps"]))]
    return tuple((float(a), float(b), float(c)) for a, b, c in steps)


def grid_of(group: Group, index: int) -> tuple[int, int]:
    """Equal blocks along the two dimensions of a parameter of a group."""
    blocks = group["blocks"]
    down, across = blocks if isinstance(blocks[0], int) else blocks[index]
    return int(down), int(across)


def _scale(member: Member, grid: tuple[int, int]) -> float:
    transposed = member.group["transposed"]
    outputs, inputs = (size // parts for size, parts in zip(whole_shape(member.whole), grid))
    if transposed if isinstance(transposed, bool) else transposed[member.place]:
        outputs, inputs = inputs, outputs
    return rate_scale(member.group["adjust_lr_fn"], outputs, max(inputs, 1))


def _bind(tensors: TensorSet, members: Sequence[Member]) -> None:
    grids = [grid_of(member.group, member.place) for member in members]
    schedules = [schedule(member.group) for member in members]
    if is_part(members[0].whole):
        dtype = scratch_dtype(members[0].param, members[0].group)
        tensors.whole = WholeMatrices(tensors, members, grids, schedules, dtype)
    else:
        tensors.matrices = MatrixSet(tensors, grids, schedules)
    scales = [_scale(member, grid) for member, grid in zip(members, grids)]
    tensors.rate_factors = torch.tensor(scales, dtype=torch.float64, device=tensors.device)


def _follow_schedulers(group: dict[str, Any]) -> None:
    """OneCycleLR and CyclicLR cycle ``betas[0]`` where there is one, and mean the momentum."""
    if "max_momentum" in group:
        group["momentum"] = group["betas"][0]


def _betas(group: Group, mixes: bool) -> Betas:
    momentum, slow_mix = group["momentum"], 0.0
    if mixes and momentum > LEAST_MOMENTUM:
        momentum, slow_mix = momentum**FASTER, SLOW_MIX
    mix = momentum if group["nesterov"] else 1.0
    return Betas((momentum, group["betas"][1]), momentum, nesterov_mix=mix, slow_mix=slow_mix)


_is_triple = partial(is_list, suits=is_number, count=3)
_is_pair = partial(is_list, suits=partial(is_int, least=1), count=2)

OPTIONS = {
    "momentum": Option(0.95, "a number in [0, 1)", lambda x, _: is_number(x) and 0 <= x < 1),
    "nesterov": Option(True, "True or False", lambda x, _: is_flag(x)),
    "ns_coefficients": Option(
        QUINTIC[0],
        "three finite numbers, or three for each step",
        lambda x, _: _is_triple(x) or (is_list(x, _is_triple) and len(x) > 0),
    ),
    "ns_steps": Option(5, "a whole number from 1 to 99", lambda x, _: is_int(x, 1, 99)),
    "adjust_lr_fn": Option(
        SCALES[0], f"one of {SCALES} or None", lambda x, _: x in (None, *SCALES)
    ),
    "ns_dtype": Option(None, f"one of {DTYPES} or None", lambda x, _: x in (None, *DTYPES)),
    "blocks": Option(
        (1, 1),
        "two whole numbers >= 1 (blocks along rows and columns), or such a pair for every "
        "parameter of the group",
        lambda x, count: _is_pair(x) or is_list(x, _is_pair, count),
    ),
    "transposed": Option(
        False,
        "True or False, or one of them for every parameter of the group",
        lambda x, count: is_flag(x) or is_list(x, is_flag, count),
    ),
}
"""The first five have the names and meanings of ``torch.optim.Muon``, whose ``adjust_lr_fn`` is
``"original"`` by default."""


def _check_parameter(group: Group, index: int, param: Tensor) -> None:
    shape = tuple(whole_shape(param))
    if len(shape) != 2:
        raise ValueError(
            f"params: parameter {index} of a group with base='muon' has shape {shape}, must be a "
            "matrix; split_param_groups(model) makes the groups"
        )
    grid = grid_of(group, index)
    if any(size % parts for size, parts in zip(shape, grid)):
        raise ValueError(f"blocks={grid}: must divide the shape {shape} of parameter {index}")


@triton.jit
def _constants(row, step, rate, STATE: tl.constexpr):
    size = rate.to(STATE)
    return size, size, size, size, size


@triton.jit
def _direction(
    addresses, tensor, begin, length, g, a, b, c, d,
    STATE: tl.constexpr, UPDATE_TYPE: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    update = load_row(addresses, ORTHOGONAL, tensor, begin, length, UPDATE_TYPE, STATE, BLOCK, FULL)
    return update, update


class _Torch:
    """Muon in plain torch, after `prepare_torch`."""

    takes_lists = False

    def update(self, block: Block) -> None:
        update = block.rows["update"].to(block.w.dtype)
        block.w.mul_(block.numbers.decay)
        if isinstance(block.numbers.lr, float):
            block.w.sub_(update, alpha=block.numbers.lr)
        else:
            block.w.sub_(block.numbers.lr * update)


def _prepare(tensors: TensorSet, scalars: Scalars, max_norm: float | None) -> None:
    if tensors.whole is not None:
        gradient = Gradient.of(scalars, max_norm)
        clip = gradient.coefficient * gradient.unscale
        skip = torch.as_tensor(negate(gradient.applied), device=tensors.device)
        tensors.whole.orthogonalise(
            scalars, torch.as_tensor(clip, dtype=torch.float64, device=tensors.device), skip
        )
        return
    assert tensors.matrices is not None
    orthogonalise(tensors, scalars, tensors.matrices, max_norm)


def _prepare_torch(tensors: TensorSet, scalars: Scalars, clip: Tensor, skip: Tensor | None) -> None:
    if tensors.whole is not None:
        tensors.whole.orthogonalise(scalars, clip, skip)
        return
    assert tensors.matrices is not None
    orthogonalise_torch(tensors.matrices, scalars, clip, skip)


MUON = Rule(
    name="muon",
    kernels=UpdateRule(
        constants=_constants,
        direction=_direction,
        denominator=no_denominator,
        along=None,
        torch=_Torch(),
        reads=("update",),
        writes=(),
        uses_gradient=False,
        prepare=_prepare,
        prepare_torch=_prepare_torch,
    ),
    rows=(FIRST_MOMENT, MOMENTUM_UPDATE),
    options=OPTIONS,
    check_parameter=_check_parameter,
    betas=_betas,
    bind=_bind,
    follow_schedulers=_follow_schedulers,
    batch_key=lambda group: str(group["ns_dtype"]),
    settings=lambda group: tuple(group[n] for n in OPTIONS if n not in ("momentum", "nesterov")),
    checkpoint_names={"momentum_buffer": "exp_avg"},
)
