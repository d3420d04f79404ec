"""The orthogonalised direction along the momentum: both backends against an FP64 oracle."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_launches import BACKENDS, KERNELS, PLAIN, Checked
from kernel_memory import assert_near, assert_same_bits
from kernel_problems import Make, Problem, problems
from kernel_specs import FP64, ON_GPU, plain
from torch import Tensor
from triton_hybrid.kernels.bases import weights_of
from triton_hybrid.kernels.matrices import MatrixSet, MatrixTiling
from triton_hybrid.kernels.newton_schulz import QUINTIC
from triton_hybrid.kernels.newton_schulz_torch import newton_schulz_torch
from triton_hybrid.kernels.scalars import HYPER

SMALL = MatrixTiling(tile=16, depth=16, strip=16, warps=1)
STEPS = QUINTIC * 3
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}


def oracle(problem: Problem, index: int) -> Tensor:
    """The direction that AdamW has for exp_avg, FP64."""
    row = problem.scalars.hyperparameters[problem.tensors.group[index].long()].cpu()
    first, square = (problem.rows[name][index].double().cpu() for name in ("exp_avg", "exp_avg_sq"))
    step = max(float(problem.tensors.steps[index]), 1.0)
    correction = 1.0 - math.exp(step * float(row[HYPER["log_beta2"]]))
    return first / ((square / correction).sqrt() + float(row[HYPER["eps"]]))


@pytest.mark.parametrize("rule", ["adamw", "lion"])
@given(data=st.data())
def test_both_backends_see_the_momentum_as_the_rule_does(rule: str, data: st.DataObject) -> None:
    make: Make = data.draw(problems(rule, groups=3))
    problem, twin = make(), make()
    before = problem.snapshot()
    KERNELS.along(problem)
    PLAIN.along(twin)
    problem.assert_unchanged(before, but=("direction",))
    twin.assert_unchanged(before, but=("direction",))
    if problem.precision != FP64:  # whose bias corrections differ in the last bit
        problem.assert_same(twin, rows=["direction"])
    for index in range(len(problem.specs)) if rule == "adamw" else ():
        found = problem.rows["direction"][index].double().cpu()
        assert_near(found, oracle(problem, index), f"direction[{index}]", rtol=2e-5, atol=1e-6)


def directed(backend: Checked, dtype: torch.dtype, shapes: Any, shift: int = 0) -> Problem:
    specs = plain(*shapes, shift=shift)
    if shift:  # channels last
        specs = [replace(its, order=(0, *its.order[2:], 1)[: len(its.shape)]) for its in specs]
    problem = Problem(specs)
    count = len(problem.specs)
    grids, schedules = [(1, 1)] * count, [STEPS] * count
    tiling = None if ON_GPU else SMALL
    matrices = MatrixSet(problem.tensors, grids, schedules, tiling, dtype=dtype)
    before = problem.snapshot()
    scales = torch.arange(1.0, count + 1.0, device=problem.tensors.device)
    backend.backend.direct(problem.tensors, problem.scalars, matrices, scales)
    problem.check()
    problem.assert_unchanged(before, but=("direction",))
    return problem


@BACKENDS
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shift", [0, 1])
def test_matrices_are_orthogonalised(backend: Checked, dtype: torch.dtype, shift: int) -> None:
    shapes = ((16, 16), (5, 20), (33, 17), (2, 3), (4, 3, 3, 3), (20, 3, 2))
    problem = directed(backend, dtype, shapes, shift)
    for index in range(len(shapes)):
        along = oracle(problem, index).flatten(1)  # of a filter, a row for each output
        wanted = (index + 1) * newton_schulz_torch(along, STEPS, 1e-8)
        found = problem.rows["direction"][index].double().cpu().flatten(1)
        assert float((found - wanted).norm() / wanted.norm()) < TOLERANCE[dtype]


@BACKENDS
def test_zeros_stay_zeros(backend: Checked) -> None:
    """A matrix without a gradient is divided by no norm; an element without one stays at zero."""
    problem = Problem(plain((16, 20), (8, 8)))
    problem.rows["exp_avg"][0].zero_()
    problem.rows["exp_avg"][1][3, 5] = 0.0
    matrices = MatrixSet(
        problem.tensors, [(1, 1)] * 2, [STEPS] * 2, None if ON_GPU else SMALL, dtype=torch.float32
    )
    scales = torch.ones(2, device=problem.tensors.device)
    backend.backend.direct(problem.tensors, problem.scalars, matrices, scales)
    assert bool((problem.rows["direction"][0] == 0).all())
    still = problem.rows["direction"][1] == 0
    assert still.nonzero().tolist() == [[3, 5]]


@given(make=problems())
def test_both_backends_lengthen_alike(make: Make) -> None:
    problem, twin = make(), make()
    scales = torch.linspace(0.5, 2.0, len(problem.specs), device=problem.tensors.device)
    before = problem.snapshot()
    for one, on in ((problem, KERNELS), (twin, PLAIN)):
        on.backend.lengthen(one.tensors, one.scalars, scales)
        one.check()
        one.assert_unchanged(before, but=("direction",))
    problem.assert_same(twin, rows=["direction"])
    for index, scale in enumerate(scales):
        moved = problem.rows["exp_avg"][index] != 0
        wanted = torch.where(moved, before["direction"][index] * scale, 0.0)
        assert_same_bits(problem.rows["direction"][index], wanted, f"direction[{index}]")


@given(make=problems())
def test_weights_are_those_of_the_mathematics(make: Make) -> None:
    problem = make()
    for index, weight in enumerate(weights_of(problem.tensors)):
        assert_same_bits(weight, problem.tensors.weight(index, slice(None)), f"weight[{index}]")
