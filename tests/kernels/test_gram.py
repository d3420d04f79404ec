"""Inner products of the trajectory, and the two-stage sums behind every kernel."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_launches import BACKENDS, KERNELS, PLAIN, Checked
from kernel_memory import DEVICE, Arena, assert_near, assert_same_bits
from kernel_problems import Make, Problem, problems
from kernel_specs import ON_GPU, THREE, Spec, fewer, plain, spec_lists
from triton_hybrid.kernels.ledger import INDEX
from triton_hybrid.kernels.multi_tensor import ChunkTable
from triton_hybrid.kernels.sums import reduce_partials


@given(make=problems())
def test_both_backends_match_the_fp64_oracle(make: Make) -> None:
    problem, twin = make(), make()
    oracle, before = problem.promoted(), problem.snapshot()
    expected = PLAIN.gram(oracle)
    for actual, backend in ((problem, KERNELS), (twin, PLAIN)):
        sums = backend.gram(actual)
        assert_near(sums, expected, "sums", rtol=1e-5, atol=2e-6 * float(expected.abs().max()))
        actual.assert_near(oracle, ["displacement"], atol=1e-6)
        actual.assert_unchanged(before, but=("snapshot", "displacement"))
        for index, weight in enumerate(before["weight"]):
            assert_same_bits(actual.rows["snapshot"][index], weight, f"snapshot[{index}]")
            gone = weight - before["snapshot"][index]
            assert_same_bits(actual.rows["displacement"][index], gone, f"displacement[{index}]")


@BACKENDS
@fewer(4)
@given(drawn=spec_lists(max_size=3))
def test_a_cycle_goes_on_where_the_gradient_was_not_finite(
    backend: Checked, drawn: list[Spec]
) -> None:
    problem = Problem(drawn, tiling=THREE)
    problem.scalars.ledger[INDEX["nonfinite"]] = 1.0
    before = problem.snapshot()
    backend.gram(problem)
    problem.assert_unchanged(before)


@BACKENDS
@fewer()
@given(drawn=spec_lists(max_size=3))
def test_products_of_whole_numbers_are_exact(backend: Checked, drawn: list[Spec]) -> None:
    """Cycle by cycle: each displacement with itself, and with the one of the cycle before."""
    problem = Problem(drawn, tiling=THREE)
    last = [tensor.mul_(10).round_().clone() for tensor in problem.rows["displacement"]]
    for number in range(3):
        newest = [(3 * (number + 1) * m).round() for m in problem.rows["exp_avg"]]
        for index, moved in enumerate(newest):
            problem.rows["snapshot"][index].fill_(7.0)
            problem.rows["weight"][index].copy_(7.0 + moved)
        sums = backend.gram(problem)
        for index, (moved, before) in enumerate(zip(newest, last)):
            assert_same_bits(problem.rows["displacement"][index], moved + 0.0, "displacement")
            moved, before = moved.double(), before.double()
            products = [float((moved * moved).sum()), float((moved * before).sum())]
            assert sums[index].tolist() == products
        last = newest


@given(
    lengths=st.lists(st.integers(0, 90_000 if ON_GPU else 900), min_size=1, max_size=5),
    columns=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_chunk_sums_are_added_up_in_fp64(lengths: list[int], columns: int, seed: int) -> None:
    """Up to several hundred chunks a tensor, more than the kernel takes at a time."""
    arena = Arena()
    chunks = ChunkTable([64 * length for length in lengths], [True] * len(lengths), 64, DEVICE)
    generator = torch.Generator().manual_seed(seed)
    partials = arena.put(torch.randn(chunks.count, columns, generator=generator))
    sums = arena.carve((len(lengths), columns), torch.float64)
    kept = seed % columns
    reduce_partials(partials, chunks, sums, begin=kept)
    arena.check()
    expected = torch.stack([part.double().sum(0) for part in partials.cpu().split(lengths)])
    assert_near(sums[:, kept:], expected[:, kept:], "sums", 1e-13, 1e-15 * max(lengths))
    assert bool(sums[:, :kept].isnan().all()), "columns before the first stay as they are"


@BACKENDS
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nonfinite_product_stays_with_its_tensor(backend: Checked, value: float) -> None:
    problem = Problem(plain((300,), (70,)))
    problem.rows["weight"][0][299] = value
    sums = backend.gram(problem)
    assert not sums[0].isfinite().any()
    assert sums[1].isfinite().all()
