"""Matrices and filters that `slow_ema` moves along their orthogonalised momentum.

    displacement = -factor · 3 lr · 0.2 √max(m, n) · Newton-Schulz(exp_avg / (√v̂ + ε))

For an m x n matrix, or a filter of m outputs with n elements each: what Muon would do with the
momentum, seen in the metric of the base rule, and with the length that Muon's steps have beside
AdamW's. One orthogonalisation a prediction, where Muon has one a gradient; the base rule, its state
and its learning rate stay what they are. Such a matrix needs no slow EMA: a decay of 0.9 is as good
here as 0.95, and better than 0.99.

Elements whose gradient was never other than zero do not move.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_hybrid.flat_shards import whole_shape
from triton_hybrid.kernels.backend import Backend
from triton_hybrid.kernels.direction import DIRECTION as _DIRECTION
from triton_hybrid.kernels.displacement import Displacement
from triton_hybrid.kernels.matrices import Coefficients, MatrixSet, as_matrix, has_rows
from triton_hybrid.kernels.multi_tensor import TensorSet
from triton_hybrid.kernels.newton_schulz import QUINTIC
from triton_hybrid.kernels.rows import load_row
from triton_hybrid.kernels.scalars import HYPER, LR, Scalars
from triton_hybrid.kernels.update_rule import UpdateRule
from triton_hybrid.predictors.predictor import Rows
from triton_hybrid.rules.muon import rate_scale, scratch_dtype
from triton_hybrid.rules.rule import Rule
from triton_hybrid.rules.whole_matrices import WholeMatrices
from triton_hybrid.shards import is_part
from triton_hybrid.state import DIRECTION, Batch, Member

LENGTH = 3.0
"""Base steps that one predicted step stands for, at every learning rate. The measurements are in
``examples/benchmarks/EXPERIMENTS.md``."""
STEPS: Coefficients = QUINTIC * 3
"""Of Newton and Schulz: five took 0.005 off a loss of 1.53, on two seeds."""
LARGEST_ASPECT = 6
"""A matrix this many times longer than wide is none between layers: GPT-2's embedding has 65,
Llama's 8 to 31; gate and up of a feed-forward layer in one have 5.4. It would be half of the
arithmetic, and gains nothing from it. Of a filter these are outputs and inputs, whatever its size:
those of a first layer, that of colours, and of each channel by itself are left out."""
LARGEST_ON_CPU = 256
"""Shortest side of a matrix that a CPU orthogonalises: for the m of a square one, the products of a
prediction are those of some 2 m tokens. Those of GPT-2 small take ten seconds on 2 cores, where 256
tokens take two."""

_LENGTH = tl.constexpr(LENGTH)


def is_hidden(shape: Sequence[int]) -> bool:
    """Whether a parameter of a shape is taken for a matrix or a filter between layers."""
    if len(shape) < 2 or 0 in shape:
        return False
    least, most = sorted(shape[:2])
    return least > 1 and most < LARGEST_ASPECT * least


@triton.jit
def _factors(row, factor):
    return -factor * (tl.load(row + LR) * _LENGTH)


@triton.jit
def _block(
    addresses, tensor, begin, length, factor, a, b, c, d, coefficients,
    DENOMINATOR: tl.constexpr, ALONG: tl.constexpr, STATE: tl.constexpr,
    BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    along = load_row(addresses, _DIRECTION, tensor, begin, length, STATE, STATE, BLOCK, FULL)
    return factor * along


class _Torch:
    """The displacement in plain torch."""

    def factors(
        self, tensors: TensorSet, scalars: Scalars, factor: Tensor, coefficients: Tensor | None
    ) -> list[Tensor]:
        rates = scalars.hyperparameters[tensors.group.long(), HYPER["lr"]]
        return [-factor * (rates * LENGTH)]

    def block(self, rule: UpdateRule, rows: Rows, factors: Sequence[Any], out: Tensor) -> Tensor:
        return torch.mul(rows["direction"], factors[0], out=out[0])


TURNED = Displacement(_factors, _block, _Torch(), (DIRECTION.name,), again=True)
"""The displacement of such matrices."""


def is_turned(rule: Rule, member: Member) -> bool:
    """Whether a parameter is a matrix that is moved so."""
    shape, param = whole_shape(member.whole), member.param
    if rule.kernels.along is None or not is_hidden(shape):
        return False
    if not is_part(member.whole) and not has_rows(param):
        return False
    return param.device.type != "cpu" or min(as_matrix(shape)) <= LARGEST_ON_CPU


class Turned:
    """The matrices of an engine that are moved so, and what it takes to orthogonalise them."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._matrices: dict[Batch, MatrixSet | WholeMatrices] = {}
        self._scales: dict[Batch, Tensor] = {}
        for batch in batches:
            tensors, count, members = batch.tensors, len(batch.params), batch.members
            grids, schedules = [(1, 1)] * count, [STEPS] * count
            dtype = scratch_dtype(members[0].param, {"ns_dtype": None})
            if is_part(members[0].whole):
                self._matrices[batch] = WholeMatrices(tensors, members, grids, schedules, dtype)
            else:
                matrices = MatrixSet(tensors, grids, schedules, dtype=dtype)
                matrices.scratch()  # memory is allocated at the first step
                self._matrices[batch] = matrices
            scales = [
                rate_scale("match_rms_adamw", *as_matrix(whole_shape(member.whole)))
                for member in members
            ]
            self._scales[batch] = torch.tensor(scales, dtype=torch.float32, device=tensors.device)

    def direct(self, backend: Backend, scalars: Scalars) -> None:
        """Finds the directions anew, of all of them."""
        for batch, matrices in self._matrices.items():
            scales = self._scales[batch]
            if isinstance(matrices, WholeMatrices):
                backend.along(batch.tensors, scalars)
                matrices.orthogonalise_row(scalars, DIRECTION.name)
                backend.lengthen(batch.tensors, scalars, scales)
            else:
                backend.direct(batch.tensors, scalars, matrices, scales)
