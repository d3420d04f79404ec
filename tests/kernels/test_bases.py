"""Matrices in bases of their own: what is seen there, and the move that comes back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_launches import (
    BACKENDS,
    HISTORY,
    KERNELS,
    PLAIN,
    Checked,
    assert_leaves_alone,
    pairs_of,
    solution,
)  # fmt: skip
from kernel_memory import assert_near, assert_same_bits
from kernel_problems import Make, Problem, problems
from kernel_specs import FP32, FP64, Precision, fewer, plain
from torch import Tensor
from triton_hybrid.kernels.bases import LARGEST_SIDE, Bases, Matrix, sides_of, without_noise
from triton_hybrid.kernels.scalars import HYPER

SHAPES = ((5, 7), (9,), (6, 1), (4, 3))
PAIRS = [f"{kind}_{slot}" for kind in ("move", "change") for slot in range(HISTORY)]
KEPT = ["last_gradient", *PAIRS]


def orthogonal(side: int, seed: int, dtype: torch.dtype) -> Tensor:
    noise = torch.randn(side, side, generator=torch.Generator().manual_seed(seed)).double()
    return torch.linalg.qr(noise)[0].to(dtype)


def bases_of(problem: Problem, seed: int | None) -> Bases:
    """Random ones of every matrix, or identities."""
    found = []
    for index, param in enumerate(problem.rows["param"]):
        if any(sides_of(param.shape)):
            dtype = problem.rows["last_gradient"][index].dtype
            its = [
                torch.eye(side, dtype=dtype)
                if seed is None
                else orthogonal(side, seed + side, dtype)
                for side in param.shape
            ]
            found.append(Matrix(index, param, *(basis.to(param.device) for basis in its)))
    return Bases(problem.tensors, found, HISTORY)


def turn(problem: Problem, bases: Bases) -> None:
    """Brings the pairs into the bases."""
    for matrix in bases.matrices:
        for name in KEPT:
            row = problem.rows[name][matrix.index]
            row.copy_(matrix.seen(row))


def move(backend: Checked, problem: Problem, bases: Bases, seed: int) -> tuple[Tensor, Tensor]:
    """A move in bases; its inner products, and its sums before the weights are shifted."""
    on, trial = backend.backend, pairs_of(problem)
    order = solution(seed).to(problem.ledger.device)
    bases.see(weights=True)
    out = torch.zeros(2 * HISTORY * (HISTORY + 1) + HISTORY + 3, dtype=torch.float64)
    out = out.to(problem.ledger.device)
    on.products(bases.twin, problem.scalars, trial, out, HISTORY)
    bases.clear()
    on.move(bases.twin, problem.scalars, trial, order, HISTORY)
    sums = problem.sums.clone()
    bases.bring_back()
    on.shift(problem.tensors, problem.scalars, order)
    problem.check()
    return out, sums


@BACKENDS
@pytest.mark.parametrize("precision", [FP32, FP64], ids=str)
def test_in_the_bases_that_it_is_in_a_move_is_the_move_without_any(
    backend: Checked, precision: Precision
) -> None:
    problem, twin = (Problem(plain(*SHAPES), precision=precision).confident() for _ in range(2))
    expected = backend.products(twin, HISTORY)
    backend.move(twin, solution(5), HISTORY)
    found, sums = move(backend, problem, bases_of(problem, None), 5)
    assert_near(found, expected, "products", 1e-5, 1e-6)
    problem.assert_near(twin, ["weight"], rtol=1e-5, atol=1e-6)
    decay = 0.4 * found[-1].item()
    slopes = sums[:, 0].sum().item() - decay, twin.sums[:, 0].sum().item()
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-4)


@BACKENDS
def test_the_move_in_bases_is_that_of_its_definition(backend: Checked) -> None:
    """The metric is diagonal there, and of the gradients as they are seen there."""
    problem = Problem(plain((5, 7))).confident()
    row = {name: tensors[0].double() for name, tensors in problem.rows.items()}
    lr, eps, decay = (
        float(problem.scalars.hyperparameters[0, HYPER[name]])
        for name in ("lr", "eps", "weight_decay")
    )
    bases = bases_of(problem, 3)
    left, right = (basis.double() for basis in (bases.matrices[0].left, bases.matrices[0].right))
    gradients = [row["last_gradient"]]
    for back in range(HISTORY):
        gradients.append(gradients[-1] - row[f"change_{(0 - back) % HISTORY}"])
    seen = torch.stack([left.T @ g @ right for g in gradients])
    metric = lr / (seen.square().mean(0).sqrt() + eps)
    _, gamma, share, *rest = solution(4)
    alpha, delta = torch.stack(rest).split(HISTORY)
    changes, moves = (
        torch.stack([row[f"{kind}_{i}"] for i in range(HISTORY)]) for kind in ("change", "move")
    )
    along = row["last_gradient"] - (alpha.view(-1, 1, 1) * changes).sum(0)
    moved = -gamma * (left @ (metric * (left.T @ along @ right)) @ right.T)
    moved -= (delta.view(-1, 1, 1) * moves).sum(0)
    slope = (row["last_gradient"] * moved).sum().item()
    turn(problem, bases)
    products, sums = move(backend, problem, bases, 4)
    expected = row["weight"] + moved - share * lr * decay * row["weight"]
    assert_near(problem.values("weight")[0].double(), expected, "weight", 1e-5, 1e-6)
    assert sums[0, 0].item() == pytest.approx(slope, rel=1e-4)
    inner = (moves * row["last_gradient"]).sum((1, 2))
    found = products[: HISTORY * (HISTORY + 1)].view(HISTORY, -1)[:, -1]
    assert_near(found, inner, "inner products", 1e-5, 1e-5)
    against = lr * decay * (row["last_gradient"] * row["weight"]).sum().item()
    assert products[-1].item() == pytest.approx(against, rel=1e-3)


@pytest.mark.parametrize("precision", [FP32, FP64], ids=str)
def test_renewed_bases_are_the_eigenvectors_of_the_gradients_that_the_pairs_remember(
    precision: Precision,
) -> None:
    problem = Problem(plain(*SHAPES), precision=precision)
    bases, slots = bases_of(problem, 1), [1, 0, 2]
    near: Any = {"rtol": 1e-4, "atol": 1e-5}
    for _ in range(2):
        before = {name: [its.clone() for its in problem.rows[name]] for name in KEPT}
        whole = [
            {name: matrix.back(before[name][matrix.index]) for name in KEPT}
            for matrix in bases.matrices
        ]
        bases.renew(slots)
        for matrix, its in zip(bases.matrices, whole):
            for basis, side in zip((matrix.left, matrix.right), matrix.like.shape):
                assert basis is not None
                torch.testing.assert_close(basis.T @ basis, torch.eye(side).to(basis), **near)
            for name in KEPT:
                back = matrix.back(problem.rows[name][matrix.index])
                torch.testing.assert_close(back, its[name], **near)
            g = problem.rows["last_gradient"][matrix.index]
            gradients = [g]
            for slot in slots:
                gradients.append(gradients[-1] - problem.rows[f"change_{slot}"][matrix.index])
            for gram in (sum(g @ g.T for g in gradients), sum(g.T @ g for g in gradients)):
                assert isinstance(gram, Tensor)
                off = gram - gram.diagonal().diag()
                assert off.abs().max() <= 1e-5 * gram.diagonal().max()
        for index, shape in enumerate(SHAPES):
            if len(shape) == 1 or min(shape) == 1:
                for name in KEPT:
                    assert_same_bits(problem.rows[name][index], before[name][index], name)


def test_gradients_whose_squares_are_not_finite_leave_the_bases_alone() -> None:
    problem = Problem(plain((5, 7)), precision=FP64)
    bases = bases_of(problem, 1)
    problem.rows["last_gradient"][0].fill_(1e200)
    before = [bases.matrices[0].left, bases.matrices[0].right]
    kept = [basis.clone() for basis in before if basis is not None]
    bases.renew([1, 0, 2])
    for basis, old in zip(before, kept):
        torch.testing.assert_close(basis, old)


def test_bases_stay_orthogonal() -> None:
    problem = Problem(plain((6, 8)))
    bases = bases_of(problem, 2)
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        for name in KEPT:
            problem.rows[name][0].copy_(torch.randn(6, 8, generator=generator))
        bases.renew([0, 1, 2])
    for basis in (bases.matrices[0].left, bases.matrices[0].right):
        assert basis is not None
        error = (basis.double().T @ basis.double()).cpu() - torch.eye(len(basis)).double()
        assert error.abs().max() < 1e-6


@BACKENDS
def test_directions_without_a_gradient_stay_without_one(backend: Checked) -> None:
    """Gradients of rank one, turned, are 0 outside of one element: no rounding moves a weight."""
    problem = Problem(plain((12, 10))).confident()
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(12, 1, generator=generator), torch.randn(1, 10, generator=generator)
    for number, name in enumerate(KEPT):
        if not name.startswith("move"):
            problem.rows[name][0].copy_((1.0 + number) * left @ right)
    bases = bases_of(problem, 6)
    turn(problem, bases)
    bases.renew([1, 0, 2])
    for name in KEPT:
        row = problem.rows[name][0]
        assert name.startswith("move") or (row != 0).sum() == 1, name
    for name in PAIRS[:HISTORY]:
        problem.rows[name][0].zero_()
    weight = problem.values("weight")[0].clone()
    order = solution(1)
    order[2] = 0.0
    bases.see(weights=False)
    backend.backend.move(
        bases.twin, problem.scalars, pairs_of(problem), order.to(weight.device), HISTORY
    )
    bases.bring_back()
    backend.backend.shift(problem.tensors, problem.scalars, order.to(weight.device))
    moved = (problem.values("weight")[0] - weight).double()
    singular = torch.linalg.svdvals(moved)
    assert singular[0] > 0
    assert singular[1] <= 1e-4 * singular[0]


def test_what_is_noise() -> None:
    its = torch.tensor([[[1.0, 3e-7], [-3e-7, 1e-6]], [[0.0, 0.0], [0.0, 1e-30]]])
    found = without_noise(its.clone())
    assert found.tolist() == [[[1.0, 0.0], [0.0, its[0, 1, 1]]], [[0.0, 0.0], [0.0, its[1, 1, 1]]]]


def test_which_sides_have_bases() -> None:
    for shape, sides in {
        (3, 4): (True, True), (1, 4): (False, False), (4, 1): (False, False), (4,): (False, False),
        (2, 3, 3): (False, False), (0, 3): (False, False), (): (False, False),
        (LARGEST_SIDE + 1, 3): (False, True), (LARGEST_SIDE, 3): (True, True),
    }.items():  # fmt: skip
        assert sides_of(shape) == sides, shape


@pytest.mark.parametrize("absent", [False, True])
def test_what_was_noted_is_turned(absent: bool) -> None:
    problem = Problem(plain((5, 7), present=not absent) + plain((3,)))
    bases = bases_of(problem, 8)
    turn(problem, bases)
    matrix, rows = bases.matrices[0], problem.rows
    old = matrix.back(rows["last_gradient"][0])
    before = bases.last_gradients()
    w, snapshot = problem.values("weight")[0], rows["snapshot"][0]
    moved, gradient = (w - snapshot).clone(), rows["grad"][0]
    orders = torch.tensor([1.0, 1.0, 1.0, 2.0], dtype=torch.float64)
    PLAIN.settle(problem, orders, HISTORY)
    bases.note(before, 2)
    sign = problem.scalars.hyperparameters[0, HYPER["sign"]].float()
    change, last = rows["change_2"][0], rows["last_gradient"][0]
    if absent:
        for row in (rows["move_2"][0], change, last):
            assert not row.any()
        return
    torch.testing.assert_close(matrix.back(rows["move_2"][0]), moved, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(matrix.back(last), sign * gradient, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(matrix.back(change), sign * gradient - old, rtol=1e-5, atol=1e-5)


@fewer()
@given(make=problems(max_size=3), seed=st.integers(0, 9))
def test_the_shift_matches_the_fp64_oracle(make: Make, seed: int) -> None:
    problem, twin = make().confident(), make().confident()
    oracle, before = problem.promoted(), problem.snapshot()
    PLAIN.shift(oracle, solution(seed))
    for actual, backend in ((problem, KERNELS), (twin, PLAIN)):
        backend.shift(actual, solution(seed))
        actual.assert_near(oracle, ["weight"], rtol=1e-5, atol=2e-6)
        actual.assert_unchanged(before, but=("weight",))
        assert (actual.sums[:, 2] == 1.0).all()


@BACKENDS
def test_the_shift_leaves_alone_what_takes_no_part_and_what_never_had_a_gradient(
    backend: Checked,
) -> None:
    assert_leaves_alone(backend.shift)


@BACKENDS
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_shift_to_what_is_not_finite_is_seen(backend: Checked, value: float) -> None:
    problem = Problem(plain((300,), (70,))).confident()
    problem.rows["displacement"][0][299] = value
    backend.shift(problem, solution(1))
    assert problem.sums[0, 2] > 1
    assert problem.sums[1, 2] == 1
