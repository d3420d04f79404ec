"""Newton-Schulz: kernels and CPU backend against an FP64 oracle, on matrices of every shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_helpers import (
    PRECISIONS,
    Arena,
    assert_same_bits,
    counted_launches,
    fewer,
    hyper_table,
    set_entries,
)
from torch import Tensor
from triton_hybrid.kernels.adamw import Workspace, adamw_step, adamw_step_reference
from triton_hybrid.kernels.chunks import TensorSet, Tiling
from triton_hybrid.kernels.ledger import new_ledger
from triton_hybrid.kernels.matrices import (
    SCRATCH_DTYPES,
    MatrixSet,
    MatrixTiling,
    blocks_of,
    matrix_tiling,
)
from triton_hybrid.kernels.newton_schulz import POLAR, QUINTIC, orthogonalise
from triton_hybrid.kernels.newton_schulz_reference import (
    momentum_reference,
    newton_schulz_reference,
    orthogonalise_reference,
)

SMALL = MatrixTiling(tile=16, depth=16, strip=16, warps=1)
FLAT = Tiling(block=64, chunk=128, programs=1)
FIVE = QUINTIC * 5
GROUP = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.5, "eps": 1e-7, "look_ahead": 0.9}
SHAPES = ((1, 1), (1, 7), (7, 1), (16, 16), (5, 33), (33, 5), (17, 16), (32, 18))
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
"""Relative distance from plain torch in the same dtype."""


class Matrices:
    """A Muon set in one poisoned buffer; its values follow from shapes and seed alone."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        device: torch.device,
        *,
        precision: tuple[torch.dtype, torch.dtype] = PRECISIONS[0],
        products: torch.dtype = torch.float32,
        grids: Sequence[tuple[int, int]] | None = None,
        orders: Sequence[tuple[int, int]] | None = None,
        shift: int = 0,
        seed: int = 0,
        steps: Any = FIVE,
        groups: Sequence[dict[str, float]] = (GROUP,),
        limit: int = 1 << 28,
        tiling: MatrixTiling = SMALL,
    ) -> None:
        self.arena = Arena(device, 1 << 19)
        wide = torch.float64 if precision[0] == torch.float64 else torch.float32
        names = ["param", "grad", "weight", "exp_avg", "slow_ema", "snapshot"]
        rows: dict[str, list[Tensor]] = {name: [] for name in (*names, "update", "direction")}
        for index, shape in enumerate(shapes):
            generator = torch.Generator().manual_seed(1000 * seed + index)
            order = orders[index] if orders else (0, 1)
            for name in names:
                dtype = {"param": precision[0], "grad": precision[1]}.get(name, wide)
                values = torch.randn(shape, generator=generator, dtype=torch.float64)
                if name == "weight" and precision[0] == wide:
                    rows[name].append(rows["param"][index])
                    continue
                tensor = self.arena.carve(shape, dtype, order, shift)
                rows[name].append(tensor.copy_(values.to(precision[0]).to(dtype)))
            if precision[0] != wide:
                rows["weight"][index].copy_(rows["param"][index])
            for name in ("update", "direction"):
                rows[name].append(self.arena.carve(shape, products, order, shift))
        self.rows = rows
        self.set = TensorSet({k: v for k, v in rows.items() if k != "grad"}, FLAT)
        self.set.set_row("grad", list(rows["grad"]))
        count = len(shapes)
        self.matrices = MatrixSet(
            self.set, grids or [(1, 1)] * count, [steps] * count, [0.5] * count, tiling, limit
        )
        self.group = torch.zeros(count, dtype=torch.int32, device=device)
        self.steps = torch.zeros(count, device=device)
        self.hyper = hyper_table(groups).to(device)
        self.ledger = new_ledger(device)
        self.workspace = Workspace([self.set])

    def orthogonalise(self, source: str = "slow_ema", goal: str = "direction") -> list[Tensor]:
        orthogonalise(self.matrices, self.group, self.hyper, goal, source=source)
        self.arena.check()
        return [tensor.clone() for tensor in self.rows[goal]]

    def step(self, backend: str, **options: Any) -> None:
        """A base step; the momentum is orthogonalised in it."""
        shared = ([self.set], [self.group], [self.steps], self.hyper, self.ledger)
        options = {"max_norm": None, "slow_beta": 0.0, "observed": True, **options}
        if backend == "triton":
            adamw_step(*shared, self.workspace, matrices=[self.matrices], **options)
        else:
            adamw_step_reference(*shared, matrices=[self.matrices], **options)
        self.arena.check()

    def snapshot(self) -> dict[str, list[Tensor]]:
        return {name: [t.clone() for t in tensors] for name, tensors in self.rows.items()}


def distance(actual: Tensor, expected: Tensor) -> float:
    """Relative difference in the Frobenius norm."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))


def oracle(matrix: Tensor, steps: Any = FIVE, eps: float = 1e-7) -> Tensor:
    return newton_schulz_reference(matrix.double().cpu(), steps, eps)


# -------------------------------------------------------------------------- the reference


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    seed=st.integers(0, 999),
    steps=st.sampled_from((QUINTIC * 5, POLAR, QUINTIC)),
)
def test_reference_is_the_polynomial_of_the_singular_values(
    rows: int, columns: int, seed: int, steps: Any
) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    for a, b, c in steps:
        s = a * s + b * s**3 + c * s**5
    assert distance(newton_schulz_reference(matrix, steps), u @ s.diag() @ vh) < 1e-9


@pytest.mark.parametrize(("steps", "low", "high"), [(FIVE, 0.68, 1.14), (POLAR, 0.87, 1.13)])
def test_singular_values_end_near_one(steps: Any, low: float, high: float) -> None:
    torch.manual_seed(0)
    for rows, columns in ((64, 64), (64, 200), (200, 64)):
        matrix = torch.randn(rows, columns, dtype=torch.float64)
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        matrix = u @ (s.clamp(min=0.1 * float(s.max()))).diag() @ vh
        for dtype in (torch.float64, torch.bfloat16):
            result = newton_schulz_reference(matrix.to(dtype), steps).double()
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

        def worst(
            given: Sequence[float], x: np.ndarray[Any, Any] = x, spare: float = spare
        ) -> float:
            y = spare * x
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


# ------------------------------------------------------------------------------ the kernels


@pytest.mark.parametrize("products", list(TOLERANCE), ids=str)
@given(
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3),
    turned=st.booleans(),
    shift=st.sampled_from((0, 1)),
    seed=st.integers(0, 99),
    wide=st.booleans(),
)
@fewer(4)
def test_kernels_match_the_oracle(
    device: torch.device,
    products: torch.dtype,
    shapes: list[tuple[int, int]],
    turned: bool,
    shift: int,
    seed: int,
    wide: bool,
) -> None:
    precision = PRECISIONS[4] if wide else PRECISIONS[0]
    options: dict[str, Any] = {"products": products, "shift": shift, "seed": seed}
    options |= {"orders": [(1, 0) if turned else (0, 1)] * len(shapes), "precision": precision}
    problem = Matrices(shapes, device, **options)
    before = problem.snapshot()
    results = problem.orthogonalise()
    reference = Matrices(shapes, device, **options)
    orthogonalise_reference(
        reference.matrices, reference.group, reference.hyper, "slow_ema", "direction"
    )
    for index, result in enumerate(results):
        source = before["slow_ema"][index]
        assert distance(result, reference.rows["direction"][index]) < TOLERANCE[products]
        # In BF16 torch.optim.Muon itself is that far from FP64.
        limit = 0.05 if products == torch.bfloat16 else TOLERANCE[products]
        assert distance(result, oracle(source)) < limit
    for name in ("slow_ema", "exp_avg", "param", "grad"):
        for now, then in zip(problem.rows[name], before[name]):
            assert_same_bits(now, then, name)


@pytest.mark.parametrize("shape", [*SHAPES, (64, 64), (48, 96), (96, 32)])
def test_rounds_where_torch_muon_rounds(shape: tuple[int, int]) -> None:
    """In BF16 both are percents away from the truth; the same roundings give the same."""
    muon = pytest.importorskip("torch.optim._muon")
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    theirs = muon._zeropower_via_newtonschulz(matrix, QUINTIC[0], 5, 1e-7)
    assert_same_bits(newton_schulz_reference(matrix.bfloat16(), FIVE, 1e-7), theirs, "update")


def test_blocks_are_orthogonalised_each_by_itself(device: torch.device) -> None:
    shapes, grids = ((12, 8), (8, 12), (8, 12)), ((3, 1), (1, 3), (2, 2))
    problem = Matrices(shapes, device, grids=grids, orders=((0, 1), (0, 1), (1, 0)))
    results = problem.orthogonalise()
    for result, source, (down, across) in zip(results, problem.rows["slow_ema"], grids):
        for rows, expected_rows in zip(result.chunk(down, 0), source.chunk(down, 0)):
            for block, expected in zip(rows.chunk(across, 1), expected_rows.chunk(across, 1)):
                assert distance(block, oracle(expected)) < 1e-5


def test_many_in_one_launch_are_the_same_bits_as_one_by_one(device: torch.device) -> None:
    together = Matrices(SHAPES, device, products=torch.bfloat16).orthogonalise()
    waves = Matrices(SHAPES, device, products=torch.bfloat16, limit=1)
    assert len(waves.matrices.waves) == len(SHAPES)
    for index, (one, all_) in enumerate(zip(waves.orthogonalise(), together)):
        assert_same_bits(one, all_, f"matrix {index} of {SHAPES[index]}")


def test_launches_do_not_grow_with_matrices(device: torch.device) -> None:
    for shapes in (SHAPES[:1], SHAPES):
        problem = Matrices(shapes, device, steps=QUINTIC * 2)
        from triton_hybrid.kernels import newton_schulz

        with counted_launches(newton_schulz) as log:
            problem.orthogonalise()
        step = ["_symmetric_kernel", "_symmetric_kernel", "_polynomial_kernel"]
        assert log == ["_gather_kernel", "_normalise_kernel", *step, *step]


@pytest.mark.parametrize("products", list(TOLERANCE), ids=str)
def test_zeros_stay_zeros(device: torch.device, products: torch.dtype) -> None:
    for eps in (0.0, 1e-7):
        problem = Matrices(((5, 9),), device, products=products, groups=({**GROUP, "eps": eps},))
        problem.rows["slow_ema"][0].zero_()
        (result,) = problem.orthogonalise()
        assert result.abs().max() == 0.0
        reference = newton_schulz_reference(torch.zeros(5, 9).to(products), FIVE, eps)
        assert reference.abs().max() == 0.0


def test_scale_does_not_matter_above_eps(device: torch.device) -> None:
    plain = Matrices(((5, 9),), device)
    tiny = Matrices(((5, 9),), device)
    tiny.rows["slow_ema"][0].mul_(2.0**-16)
    assert_same_bits(tiny.orthogonalise()[0], plain.orthogonalise()[0], "scaled by a power of two")


# ---------------------------------------------------------------------------- the base step


@pytest.mark.parametrize("backend", ["triton", "torch"])
@given(
    precision=st.sampled_from(PRECISIONS),
    max_norm=st.sampled_from((None, 0.5)),
    slow=st.booleans(),
    sign=st.sampled_from((1.0, -1.0)),
    look_ahead=st.sampled_from((0.9, 1.0)),
)
@fewer(4)
def test_base_step_is_muon(
    device: torch.device,
    backend: str,
    precision: tuple[torch.dtype, torch.dtype],
    max_norm: float | None,
    slow: bool,
    sign: float,
    look_ahead: float,
) -> None:
    shapes = ((6, 20), (17, 3))
    groups = ({**GROUP, "sign": sign, "look_ahead": look_ahead, "weight_decay": 0.1},)
    problem = Matrices(shapes, device, precision=precision, groups=groups)
    before = problem.snapshot()
    problem.step(backend, max_norm=max_norm, slow_beta=0.9 if slow else 0.0)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in before["grad"]))
    clip = 1.0 if max_norm is None else min(max_norm / (norm + 1e-6), 1.0)
    for index in range(len(shapes)):
        g = sign * clip * before["grad"][index].double()
        m = before["exp_avg"][index].double()
        m = m + 0.1 * (g - m)
        update = oracle(g + look_ahead * (m - g))
        weight = before["weight"][index].double() * (1 - 1e-2 * 0.1)
        weight = weight - 1e-2 * 0.5 * update.to(weight.device)
        assert distance(problem.rows["exp_avg"][index], m) < 1e-6
        assert distance(problem.rows["weight"][index], weight) < 1e-6
        rounded = problem.rows["weight"][index].to(precision[0])
        assert_same_bits(problem.rows["param"][index], rounded, "rounded master")
        if slow:
            # The first gradient in the slow EMA replaces it: its decay is 0.
            assert distance(problem.rows["slow_ema"][index], g) < 1e-6
    assert problem.steps.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("cause", ["inf", "nan", "hold"])
def test_skipped_step_moves_nothing(device: torch.device, backend: str, cause: str) -> None:
    problem = Matrices(((6, 20), (17, 3)), device)
    if cause == "hold":
        set_entries(problem.ledger, hold=1.0)
    else:
        problem.rows["grad"][1][0, 0] = float(cause)
    before = problem.snapshot()
    problem.step(backend, slow_beta=0.9)
    for name in ("weight", "exp_avg", "slow_ema", "param"):
        for index, (now, then) in enumerate(zip(problem.rows[name], before[name])):
            assert_same_bits(now, then, f"{name}[{index}]")
    assert problem.steps.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_matrix_without_gradient_stays(device: torch.device, backend: str) -> None:
    problem = Matrices(((6, 20), (17, 3)), device)
    problem.set.set_row("grad", [problem.rows["grad"][0], None])
    before = problem.snapshot()
    problem.step(backend)
    for name in ("weight", "exp_avg"):
        assert_same_bits(problem.rows[name][1], before[name][1], name)
        assert distance(problem.rows[name][0], before[name][0]) > 1e-4
    assert problem.steps.tolist() == [1.0, 0.0]


def test_momentum_without_waiting_for_the_device() -> None:
    """On a GPU the plain-torch backend writes a skipped step back as it was."""
    device = torch.device("cpu")
    for skipped in (False, True):
        problem, other = Matrices(((6, 20),), device), Matrices(((6, 20),), device)
        one = torch.ones((), dtype=torch.float64)
        before = problem.snapshot()
        momentum_reference(
            problem.matrices, problem.group, problem.hyper, one, torch.tensor(skipped)
        )
        momentum_reference(other.matrices, other.group, other.hyper, one, None)
        expected = before if skipped else other.rows
        assert_same_bits(problem.rows["exp_avg"][0], expected["exp_avg"][0], "exp_avg")


# -------------------------------------------------------------------------------- the tables


def test_bad_matrices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tensor 3 has shape \(4,\): must be a matrix"):
        blocks_of(3, torch.zeros(4), (1, 1))
    with pytest.raises(ValueError, match=r"cannot be cut into blocks \(3, 1\)"):
        blocks_of(0, torch.zeros(4, 4), (3, 1))
    with pytest.raises(ValueError, match="tile=24: must be a power of two"):
        MatrixTiling(tile=24, depth=16, strip=16, warps=1)
    with pytest.raises(ValueError, match=r"depth=32, strip=16: must divide tile=16"):
        MatrixTiling(tile=16, depth=32, strip=16, warps=1)
    problem = Matrices(((2, 2),), torch.device("cpu"))
    with pytest.raises(ValueError, match="needs partials and ledger"):
        orthogonalise(problem.matrices, problem.group, problem.hyper, "update")


def test_empty_matrices_have_no_blocks() -> None:
    assert blocks_of(0, torch.zeros(0, 4), (1, 1)) == []


def test_tilings_divide_what_they_cut() -> None:
    for dtype in SCRATCH_DTYPES.values():
        for kind in ("cpu", "cuda"):
            tiling = matrix_tiling(dtype, torch.device(kind))
            assert tiling.tile % tiling.depth == tiling.tile % tiling.strip == 0
