"""Newton-Schulz: kernels and plain torch against an FP64 oracle, on matrices of every shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_launches import BACKENDS, Checked, counted_launches
from kernel_memory import DEVICE, assert_same_bits
from kernel_problems import Problem
from kernel_specs import FP32, FP64, ON_GPU, Precision, fewer, plain, precisions
from torch import Tensor
from triton_hybrid.kernels.ledger import INDEX
from triton_hybrid.kernels.matrices import MatrixSet, MatrixTiling, blocks_of, matrix_tiling
from triton_hybrid.kernels.newton_schulz import POLAR, QUINTIC, orthogonalise
from triton_hybrid.kernels.newton_schulz_torch import (
    MIX_GRADIENTS,
    newton_schulz_torch,
    orthogonalise_torch,
)
from triton_hybrid.kernels.rows import NONE
from triton_hybrid.kernels.scalars import HYPER

SMALL = MatrixTiling(tile=16, depth=16, strip=16, warps=1)
FIVE = QUINTIC * 5
GROUP = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.5, "eps": 1e-7, "nesterov_mix": 0.9}
SHAPES = ((1, 1), (1, 7), (7, 1), (16, 16), (5, 33), (33, 5), (17, 16), (32, 18))
LARGE = ((512, 768), (515, 1021), (1021, 515))
TOLERANCE = {"bfloat16": 1e-2, "float32": 1e-5}
"""Relative distance from plain torch in the same dtype."""
PRODUCTS = pytest.mark.parametrize("products", list(TOLERANCE))


def matrices(
    shapes: Sequence[tuple[int, int]],
    *,
    turned: Sequence[bool] = (False,),
    shift: int = 0,
    seed: int = 0,
    products: str = "float32",
    tiling: MatrixTiling | None = SMALL,
    limit: int = 1 << 28,
    blocks: Any = (1, 1),
    **options: Any,
) -> Problem:
    """A problem of Muon whose matrices are cut into small tiles (None: the device's own)."""
    orders = [(1, 0) if turn else (0, 1) for turn in turned] * len(shapes)
    specs = [
        replace(spec, seed=seed + index, order=order)
        for index, (spec, order) in enumerate(zip(plain(*shapes, shift=shift), orders))
    ]
    settings = {"groups": (GROUP,), "ns_steps": 5, "ns_dtype": products, "blocks": blocks}
    problem = Problem(specs, rule="muon", **{**settings, **options})
    grids = [blocks] * len(shapes) if isinstance(blocks[0], int) else blocks
    tensors = problem.tensors
    tensors.matrices = MatrixSet(tensors, grids, [FIVE] * len(shapes), tiling, limit)
    return problem


def orthogonalised(problem: Problem, plain: bool = False) -> list[Tensor]:
    """The gradient's matrices, by the kernels or in plain torch: without momentum."""
    for name, value in (("beta1", 0.0), ("nesterov_mix", 0.0)):
        problem.scalars.hyperparameters[:, HYPER[name]] = value
    if plain:
        one = torch.ones((), dtype=torch.float64, device=DEVICE)
        orthogonalise_torch(problem.tensors.matrices, problem.scalars, one, None)
    else:
        orthogonalise(problem.tensors, problem.scalars, problem.tensors.matrices, None)
    problem.arena.check()
    return [tensor.clone() for tensor in problem.rows["update"]]


def distance(actual: Tensor, expected: Tensor) -> float:
    """Relative difference in the Frobenius norm."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))


def oracle(matrix: Tensor, steps: Any = FIVE, eps: float = 1e-7) -> Tensor:
    return newton_schulz_torch(matrix.double().cpu(), steps, eps)


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    seed=st.integers(0, 999),
    steps=st.sampled_from((QUINTIC * 5, POLAR, QUINTIC)),
)
def test_it_is_the_polynomial_of_the_singular_values(
    rows: int, columns: int, seed: int, steps: Any
) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    for a, b, c in steps:
        s = a * s + b * s**3 + c * s**5
    assert distance(newton_schulz_torch(matrix, steps), u @ s.diag() @ vh) < 1e-9


@pytest.mark.parametrize(("steps", "low", "high"), [(FIVE, 0.68, 1.14), (POLAR, 0.87, 1.13)])
def test_singular_values_end_near_one(steps: Any, low: float, high: float) -> None:
    torch.manual_seed(0)
    for rows, columns in ((64, 64), (64, 200), (200, 64)):
        matrix = torch.randn(rows, columns, dtype=torch.float64)
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        matrix = u @ (s.clamp(min=0.1 * float(s.max()))).diag() @ vh
        for dtype in (torch.float64, torch.bfloat16):
            result = newton_schulz_torch(matrix.to(dtype), steps).double()
            values = torch.linalg.svdvals(result)
            slack = 0.03 if dtype == torch.bfloat16 else 0.0
            assert low - slack < float(values.min()) <= float(values.max()) < high + slack


def test_polar_coefficients_are_the_best_in_turn() -> None:
    """Nudging any coefficient makes the worst singular value of its step worse.

    The fit had 1% to spare: it is the polynomial of 1.01 times the singular value that is
    best, and the last step spares nothing.
    """
    low, high = 1e-3, 1.0
    for step, coefficients in enumerate(POLAR):
        spare = 1.0 if step == len(POLAR) - 1 else 1.01
        x = np.linspace(low, high, 20001)

        def worst(given: Sequence[float], y: np.ndarray[Any, Any] = spare * x) -> float:
            a, b, c = given
            return float(np.abs(1 - (a * y + b * y**3 + c * y**5)).max())

        best = worst(coefficients)
        for index in range(3):
            for nudge in (0.99, 1.01):
                moved = [c * (nudge if i == index else 1) for i, c in enumerate(coefficients)]
                assert worst(moved) > best
        a, b, c = coefficients
        y = a * x + b * x**3 + c * x**5
        low, high = float(y.min()), float(y.max())
    assert low > 0.87
    assert high < 1.13


@pytest.mark.parametrize("shape", [*SHAPES, (64, 64), (48, 96), (96, 32)])
def test_rounds_where_torch_muon_rounds(shape: tuple[int, int]) -> None:
    """In BF16 both are percents away from the truth; the same roundings give the same."""
    muon = pytest.importorskip("torch.optim._muon")
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    theirs = muon._zeropower_via_newtonschulz(matrix, QUINTIC[0], 5, 1e-7)
    assert_same_bits(newton_schulz_torch(matrix.bfloat16(), FIVE, 1e-7), theirs, "update")


def test_momentum_without_waiting_for_the_device() -> None:
    """On a GPU plain torch writes a skipped step back as it was."""
    one = torch.ones((), dtype=torch.float64, device=DEVICE)
    for skipped in (False, True):
        problem, other = matrices(((6, 20),)), matrices(((6, 20),))
        before = problem.snapshot()
        skip = torch.tensor(skipped, device=DEVICE)
        orthogonalise_torch(problem.tensors.matrices, problem.scalars, one, skip)
        orthogonalise_torch(other.tensors.matrices, other.scalars, one, None)
        expected = before if skipped else other.rows
        assert_same_bits(problem.rows["exp_avg"][0], expected["exp_avg"][0], "exp_avg")


@PRODUCTS
@given(
    shapes=st.lists(st.sampled_from(SHAPES + LARGE * ON_GPU), min_size=1, max_size=3),
    turned=st.booleans(),
    shift=st.sampled_from((0, 1)),
    seed=st.integers(0, 99),
    precision=st.sampled_from((FP32, FP64)),
    tiling=st.sampled_from((SMALL, None)),
)
@fewer(6)
def test_kernels_match_the_oracle(
    products: str,
    shapes: list[tuple[int, int]],
    turned: bool,
    shift: int,
    seed: int,
    precision: Precision,
    tiling: MatrixTiling | None,
) -> None:
    options = {"products": products, "shift": shift, "seed": seed, "turned": [turned]}
    options |= {"precision": precision, "tiling": tiling}
    problem, twin = matrices(shapes, **options), matrices(shapes, **options)
    before = problem.snapshot()
    results = orthogonalised(problem)
    pairs = zip(before["grad"], orthogonalised(twin, plain=True))
    for shape, result, (source, other) in zip(shapes, results, pairs):
        near = TOLERANCE[products] * (10 if shape in LARGE else 1)
        assert distance(result, other) < near
        # In BF16 torch.optim.Muon itself is that far from FP64.
        assert distance(result, oracle(source)) < (0.05 if products == "bfloat16" else near)
    problem.assert_unchanged(before, but=("update", "exp_avg"))


def test_blocks_are_orthogonalised_each_by_itself() -> None:
    shapes, grids = ((12, 8), (8, 12), (8, 12)), ((3, 1), (1, 3), (2, 2))
    problem = matrices(shapes, blocks=grids, turned=(False, False, True))
    results = orthogonalised(problem)
    for result, source, (down, across) in zip(results, problem.rows["grad"], grids):
        for rows, expected_rows in zip(result.chunk(down, 0), source.chunk(down, 0)):
            for block, expected in zip(rows.chunk(across, 1), expected_rows.chunk(across, 1)):
                assert distance(block, oracle(expected)) < 1e-5


def test_many_in_one_launch_are_the_same_bits_as_one_by_one() -> None:
    shapes = SHAPES + LARGE * ON_GPU
    step = ["_symmetric_kernel", "_symmetric_kernel", "_polynomial_kernel"]
    launches = ["_gather_kernel", "_normalise_kernel", *step * 5]
    with counted_launches() as log:
        together = orthogonalised(matrices(shapes, products="bfloat16"))
    assert log == launches, "whatever the number of matrices"
    waves = matrices(shapes, products="bfloat16", limit=1)
    with counted_launches() as log:
        one_by_one = orthogonalised(waves)
    assert log == launches * len(shapes)
    for shape, one, all_ in zip(shapes, one_by_one, together):
        assert_same_bits(one, all_, f"matrix of {shape}")


@PRODUCTS
def test_zeros_stay_zeros_and_scale_does_not_matter_above_eps(products: str) -> None:
    for eps in (0.0, 1e-7):
        problem = matrices(((5, 9),), products=products, groups=({**GROUP, "eps": eps},))
        (usual,) = orthogonalised(problem)
        problem.rows["grad"][0].mul_(2.0**-16)
        assert_same_bits(orthogonalised(problem)[0], usual, "scaled by a power of two")
        problem.rows["grad"][0].zero_()
        assert orthogonalised(problem)[0].abs().max() == 0.0
        zeros = torch.zeros(5, 9, dtype=getattr(torch, products))
        assert newton_schulz_torch(zeros, FIVE, eps).abs().max() == 0.0


@BACKENDS
@given(
    precision=precisions,
    max_norm=st.sampled_from((None, 0.5)),
    sign=st.sampled_from((1.0, -1.0)),
    nesterov_mix=st.sampled_from((0.9, 1.0)),
    slow_mix=st.sampled_from((0.0, 0.6)),
    gradients=st.sampled_from((0.0, 600.0, 2000.0)),
)
@fewer(4)
def test_base_step_is_muon(
    backend: Checked,
    precision: Precision,
    max_norm: float | None,
    sign: float,
    nesterov_mix: float,
    slow_mix: float,
    gradients: float,
) -> None:
    group = {**GROUP, "nesterov_mix": nesterov_mix, "sign": sign, "weight_decay": 0.1}
    group["slow_mix"] = slow_mix
    shapes = ((6, 20), (17, 3), *LARGE[:ON_GPU])
    problem = matrices(shapes, precision=precision, groups=(group,))
    problem.scalars.ledger[INDEX["slow_count"]] = gradients
    before, slow_beta = problem.snapshot(), 0.9
    backend.step(problem, max_norm=max_norm, slow_beta=slow_beta)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in before["grad"]))
    clip = 1.0 if max_norm is None else min(max_norm / (norm + 1e-6), 1.0)
    near = 4e-6 if precision.kept != NONE else torch.finfo(precision.param).eps
    for index, spec in enumerate(problem.specs):
        old = {n: before[n][index].double() for n in ("grad", "exp_avg", "slow_ema", "weight")}
        g = sign * clip * old["grad"]
        m = old["exp_avg"] + 0.1 * (g - old["exp_avg"])
        mixed = g + nesterov_mix * (m - g)
        mixed += min(gradients / MIX_GRADIENTS, 1.0) * slow_mix * (old["slow_ema"] - mixed)
        momentum = oracle(mixed).to(DEVICE)
        update = 0.2 * math.sqrt(max(spec.shape)) * momentum
        weight = old["weight"] * (1 - 1e-2 * 0.1) - 1e-2 * update
        assert distance(problem.rows["exp_avg"][index], m) < 4e-6
        assert distance(problem.values("weight")[index], weight) < near
        # The first gradient in the slow EMA replaces it: its decay is 0. What is left of the old
        # one is its rounding, and clipping has made the gradient of large problems small beside it.
        left = 2.0**-24 * float(before["slow_ema"][index].double().norm() / g.norm())
        slow = g.lerp(old["slow_ema"], slow_beta if gradients else 0.0)
        assert distance(problem.rows["slow_ema"][index], slow) < 4e-6 + left
        assert problem.tensors.steps[index] == spec.step + 1


def test_blocks_of_what_is_no_matrix_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tensor 3 has shape \(4,\): must be a matrix"):
        blocks_of(3, torch.zeros(4), (1, 1))
    with pytest.raises(ValueError, match=r"tensor 1 has shape \(3, 2, 5\): must be a matrix"):
        blocks_of(1, torch.zeros(2, 3, 5).transpose(0, 1), (1, 1))
    with pytest.raises(ValueError, match=r"cannot be cut into blocks \(3, 1\)"):
        blocks_of(0, torch.zeros(4, 4), (3, 1))
    assert blocks_of(0, torch.zeros(0, 4), (1, 1)) == []


def test_tilings_divide_what_they_cut() -> None:
    with pytest.raises(ValueError, match="tile=24: must be a power of two"):
        MatrixTiling(tile=24, depth=16, strip=16, warps=1)
    with pytest.raises(ValueError, match=r"depth=32, strip=16: must divide tile=16"):
        MatrixTiling(tile=16, depth=32, strip=16, warps=1)
    for dtype, kind in product((torch.bfloat16, torch.float32), ("cpu", "cuda")):
        tiling = matrix_tiling(dtype, torch.device(kind))
        assert tiling.tile % tiling.depth == tiling.tile % tiling.strip == 0


@pytest.mark.parametrize("shape", [(8, 16), (3, 24, 96), (40, 10)], ids=str)
@pytest.mark.parametrize("decay", [0.0, 2.0])
def test_gram_matrices_lead_to_the_same(shape: tuple[int, ...], decay: float) -> None:
    """Also where singular values fall as 1/i²."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    left, values, right = torch.linalg.svd(noise, full_matrices=False)
    falling = torch.arange(1.0, values.shape[-1] + 1, dtype=torch.float64) ** -decay
    matrices = left @ (falling.unsqueeze(-1) * right)
    wanted = newton_schulz_torch(matrices, QUINTIC * 3)
    for dtype, most in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        found = newton_schulz_torch(matrices.to(dtype), QUINTIC * 3, by_gram=True)
        assert found.dtype == dtype
        assert distance(found, wanted) < most
    direct, asked = (
        newton_schulz_torch(matrices.bfloat16(), QUINTIC * 3, by_gram=its) for its in (False, True)
    )
    assert torch.equal(direct, asked), "in BF16 its rounding would build up"
