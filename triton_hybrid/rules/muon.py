"""Muon (K. Jordan, 2024), for hidden matrices.

    exp_avg ← momentum · exp_avg + (1 - momentum) · gradient
    update  = Newton-Schulz(gradient + momentum · (exp_avg - gradient))
    weight  ← (1 - lr · weight_decay) · weight - lr · scale · update

The momenta of all matrices are orthogonalised together (``kernels/newton_schulz.py``), between the
two parts of the base step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_hybrid.kernels.matrices import SCRATCH_DTYPES, Coefficients, MatrixSet
from triton_hybrid.kernels.multi_tensor import TensorSet
from triton_hybrid.kernels.newton_schulz import QUINTIC, orthogonalise
from triton_hybrid.kernels.newton_schulz_torch import momentum_torch, orthogonalise_torch
from triton_hybrid.kernels.rows import address_row, load_row
from triton_hybrid.kernels.scalars import Scalars
from triton_hybrid.kernels.update_rule import Block, UpdateRule
from triton_hybrid.rules.adamw import FIRST_MOMENT
from triton_hybrid.rules.rule import Betas, Rule, check_number
from triton_hybrid.state import Home, Member, StateRow, StepPlan

SCALES = ("match_rms_adamw", "original")
"""Values of ``adjust_lr_fn``; None is ``"original"``, as in ``torch.optim.Muon``."""

ADAMW_RMS = 0.2
"""Root mean square of AdamW's updates in units of the learning rate (Liu et al., arXiv
2502.16982)."""


def _products(param: Tensor, group: Mapping[str, Any]) -> torch.dtype:
    return SCRATCH_DTYPES[group["ns_dtype"]]


def _when(plan: StepPlan) -> bool:
    return plan.measured or plan.edge if plan.gradient else not plan.trajectory


MOMENTUM_UPDATE = StateRow("update", _products, saved=False)
"""The orthogonalised momentum."""
SLOW_DIRECTION = StateRow("direction", _products, home=Home.SCRATCH, when=_when, saved=False)
"""The orthogonalised slow EMA."""
ORTHOGONAL = address_row("update")
DIRECTION = address_row("direction")


# ------------------------------------------------------------------------------- settings


def rate_scale(adjust_lr_fn: str | None, rows: int, columns: int) -> float:
    """What a matrix's learning rate is multiplied with.

    Args:
        adjust_lr_fn: ``"match_rms_adamw"``: the update gets the root mean square of AdamW's,
            so that one learning rate serves both. ``"original"``: that of a matrix that
            preserves the norm of what it maps.
        rows: Outputs of the matrix.
        columns: Inputs of the matrix.
    """
    if adjust_lr_fn == "match_rms_adamw":
        return ADAMW_RMS * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def schedule(group: Mapping[str, Any]) -> Coefficients:
    """Coefficients of each step of a group; the last ones given serve all further steps."""
    given = group["ns_coefficients"]
    every = [given] if not isinstance(given[0], (tuple, list)) else list(given)
    last = len(every) - 1
    steps = [every[min(step, last)] for step in range(int(group["ns_steps"]))]
    return tuple((float(a), float(b), float(c)) for a, b, c in steps)


def grid_of(group: Mapping[str, Any], index: int) -> tuple[int, int]:
    """Equal blocks along the two dimensions of a parameter of a group."""
    blocks = group["blocks"]
    if not isinstance(blocks[0], int):
        blocks = blocks[index]
    return int(blocks[0]), int(blocks[1])


def _scale(member: Member) -> float:
    grid, transposed = grid_of(member.group, member.place), member.group["transposed"]
    if not isinstance(transposed, bool):
        transposed = transposed[member.place]
    rows, columns = (size // parts for size, parts in zip(member.param.shape, grid))
    outputs, inputs = (columns, rows) if transposed else (rows, columns)
    return rate_scale(member.group["adjust_lr_fn"], outputs, max(inputs, 1))


def _bind(tensors: TensorSet, members: Sequence[Member]) -> None:
    grids = [grid_of(member.group, member.place) for member in members]
    coefficients = [schedule(member.group) for member in members]
    tensors.matrices = MatrixSet(tensors, grids, coefficients)
    scales = torch.tensor([_scale(member) for member in members], dtype=torch.float64)
    tensors.rate_factors = scales.to(tensors.device)


def _betas(group: Mapping[str, Any]) -> Betas:
    momentum = group["momentum"]
    mix = momentum if group["nesterov"] else 1.0
    return Betas(momentum, group["betas"][1], exp_avg=momentum, nesterov_mix=mix)


def _batch_key(group: Mapping[str, Any]) -> Hashable:
    return str(group["ns_dtype"])


def _settings(group: Mapping[str, Any]) -> Hashable:
    names = ("ns_coefficients", "ns_steps", "adjust_lr_fn", "ns_dtype", "blocks", "transposed")
    return tuple(group[name] for name in names)


# --------------------------------------------------------------------------------- checks


def _check(group: Mapping[str, Any]) -> None:
    check_number("momentum", group["momentum"], "a number in [0, 1)", 0.0, 1.0)
    if not isinstance(group["nesterov"], bool):
        raise ValueError(f"nesterov={group['nesterov']!r}: must be True or False")
    steps = group["ns_steps"]
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps < 100:
        raise ValueError(f"ns_steps={steps!r}: must be a whole number from 1 to 99")
    given = group["ns_coefficients"]
    every = given if isinstance(given, (tuple, list)) else ()
    nested = [c for c in every if isinstance(c, (tuple, list))]
    triples = nested if nested else [every]
    if len(nested) not in (0, len(every)) or any(
        len(triple) != 3 or not all(_is_finite(c) for c in triple) for triple in triples
    ):
        raise ValueError(
            f"ns_coefficients={given!r}: must be three finite numbers, or three for each step"
        )
    if group["adjust_lr_fn"] not in (None, *SCALES):
        raise ValueError(f"adjust_lr_fn={group['adjust_lr_fn']!r}: must be one of {SCALES} or None")
    if group["ns_dtype"] not in SCRATCH_DTYPES:
        raise ValueError(f"ns_dtype={group['ns_dtype']!r}: must be one of {tuple(SCRATCH_DTYPES)}")
    count = len(group["params"]) if "params" in group else None
    blocks = group["blocks"]
    pairs = blocks if _is_list(blocks, count, _is_pair) else [blocks]
    if not all(_is_pair(pair) for pair in pairs):
        raise ValueError(
            f"blocks={blocks!r}: must be two whole numbers >= 1 (blocks along rows and columns), "
            "or such a pair for every parameter of the group"
        )
    transposed = group["transposed"]
    if not isinstance(transposed, bool) and not _is_list(
        transposed, count, lambda value: isinstance(value, bool)
    ):
        raise ValueError(
            f"transposed={transposed!r}: must be True or False, or one of them for every "
            "parameter of the group"
        )


def _is_finite(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in value)
    )


def _is_list(value: Any, count: int | None, suits: Callable[[Any], bool]) -> bool:
    """Whether a value holds something that suits for every parameter."""
    listed = isinstance(value, (tuple, list)) and all(suits(entry) for entry in value)
    return listed and count in (None, len(value))


def _check_parameter(group: Mapping[str, Any], index: int, param: Tensor) -> None:
    if param.ndim != 2:
        raise ValueError(
            f"params: parameter {index} of a group with base='muon' has shape "
            f"{tuple(param.shape)}, must be a matrix; split_param_groups(model) makes the groups"
        )
    grid = grid_of(group, index)
    if any(size % parts for size, parts in zip(param.shape, grid)):
        raise ValueError(
            f"blocks={grid}: must divide the shape {tuple(param.shape)} of parameter {index}"
        )


# -------------------------------------------------------------------------------- kernels


@triton.jit
def _constants(row, step, rate, STATE: tl.constexpr):
    size = rate.to(STATE)
    return size, size, size, size, size


@triton.jit
def _direction(
    addresses, tensor, begin, length, g, a, b, c, d,
    STATE: tl.constexpr, UPDATE_TYPE: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    orthogonal = load_row(
        addresses, ORTHOGONAL, tensor, begin, length, UPDATE_TYPE, STATE, BLOCK, FULL
    )
    return orthogonal, orthogonal


@triton.jit
def _denominator(
    addresses, tensor, begin, length, a, b, c, d,
    STATE: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    return a


@triton.jit
def _along(
    addresses, tensor, begin, length, x, denominator,
    STATE: tl.constexpr, UPDATE_TYPE: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    return load_row(addresses, DIRECTION, tensor, begin, length, UPDATE_TYPE, STATE, BLOCK, FULL)


class _Torch:
    """Muon in plain torch, after `_prepare_torch`."""

    def update(self, block: Block) -> None:
        update = block.rows["update"].to(block.w.dtype)
        block.w.mul_(block.numbers.decay)
        if isinstance(block.numbers.lr, float):
            block.w.sub_(update, alpha=block.numbers.lr)
        else:
            block.w.sub_(block.numbers.lr * update)

    def compare(self, block: Block) -> tuple[Tensor, Tensor, Any]:
        update, ahead = (block.rows[n].to(block.w.dtype) for n in ("update", "direction"))
        return update, ahead, block.numbers.lr**2

    def along(self, rows: Mapping[str, Tensor], x: Tensor, eps: Any, out: Tensor) -> Tensor:
        return out[0].copy_(rows["direction"])

    def unit(self, root_correction2: Tensor) -> Tensor:
        return torch.ones_like(root_correction2)


def _matrices(tensors: TensorSet) -> MatrixSet:
    assert tensors.matrices is not None
    return tensors.matrices


def _prepare(tensors: TensorSet, scalars: Scalars, compare: bool, max_norm: float | None) -> None:
    matrices = _matrices(tensors)
    if compare:
        orthogonalise(matrices, scalars, "direction", source="slow_ema")
    orthogonalise(matrices, scalars, "update", max_norm=max_norm)
    matrices.direction_known = False


def _prepare_torch(
    tensors: TensorSet, scalars: Scalars, compare: bool, clip: Tensor, skip: Tensor | None
) -> None:
    matrices = _matrices(tensors)
    if compare:
        orthogonalise_torch(matrices, scalars, "direction", "slow_ema")
    momentum_torch(matrices, scalars, clip, skip)
    matrices.direction_known = False


def _prepare_along(tensors: TensorSet, scalars: Scalars) -> None:
    matrices = _matrices(tensors)
    if not matrices.direction_known:
        orthogonalise(matrices, scalars, "direction", source="slow_ema")
        matrices.direction_known = True


def _prepare_along_torch(tensors: TensorSet, scalars: Scalars) -> None:
    matrices = _matrices(tensors)
    if not matrices.direction_known:
        orthogonalise_torch(matrices, scalars, "direction", "slow_ema")
        matrices.direction_known = True


MUON = Rule(
    name="muon",
    kernels=UpdateRule(
        constants=_constants,
        direction=_direction,
        denominator=_denominator,
        along=_along,
        torch=_Torch(),
        reads=("update",),
        writes=(),
        reads_along=("direction",),
        uses_gradient=False,
        prepare=_prepare,
        prepare_torch=_prepare_torch,
        prepare_along=_prepare_along,
        prepare_along_torch=_prepare_along_torch,
    ),
    rows=(FIRST_MOMENT, MOMENTUM_UPDATE),
    along_rows=(SLOW_DIRECTION,),
    defaults={
        "momentum": 0.95,
        "nesterov": True,
        "ns_coefficients": QUINTIC[0],
        "ns_steps": 5,
        "adjust_lr_fn": "match_rms_adamw",
        "ns_dtype": "bfloat16",
        "blocks": (1, 1),
        "transposed": False,
    },
    check=_check,
    check_parameter=_check_parameter,
    betas=_betas,
    bind=_bind,
    batch_key=_batch_key,
    settings=_settings,
    checkpoint_names={"momentum_buffer": "exp_avg"},
)
"""The first five of its options have the names and meanings of ``torch.optim.Muon``, whose
``adjust_lr_fn`` is ``"original"`` by default."""
