"""Inner products of the trajectory, and the two-stage sums behind every kernel."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_helpers import (
    ONE,
    PRECISIONS,
    THREE,
    Arena,
    FarAway,
    Problem,
    Spec,
    assert_near,
    assert_same_bits,
    counted_launches,
    fewer,
    plain,
    precisions,
    spec_lists,
)
from torch import Tensor
from triton_hybrid.kernels.chunks import ChunkTable
from triton_hybrid.kernels.gram import gram, gram_reference, reduce_partials


def end_cycle(problem: Problem, slot: int) -> Tensor:
    """The kernel into poisoned scratch and sums; returns the sums."""
    history = problem.history
    sums = problem.arena.carve((len(problem.specs), history), torch.float64)
    gram(problem.set, history, slot, problem.partials(history), sums)
    problem.check()
    return sums


def end_cycle_reference(problem: Problem, slot: int) -> Tensor:
    """Plain torch; returns the sums."""
    sums = problem.arena.carve((len(problem.specs), problem.history), torch.float64)
    gram_reference(problem.set, problem.history, slot, sums)
    problem.check()
    return sums


@given(
    drawn=spec_lists(),
    precision=precisions(),
    history=st.integers(1, 8),
    data=st.data(),
    programs=st.booleans(),
)
def test_kernel_and_cpu_backend_match_the_fp64_oracle(
    device: torch.device,
    drawn: list[Spec],
    precision: tuple[torch.dtype, torch.dtype],
    history: int,
    data: st.DataObject,
    programs: bool,
) -> None:
    slot = data.draw(st.integers(0, history - 1), label="slot")
    tiling = THREE if programs else ONE
    problem = Problem(drawn, device, precision=precision, tiling=tiling, history=history)
    backend = Problem(drawn, device, precision=precision, history=history)
    oracle, before = problem.promoted(), problem.snapshot()
    newest = f"history_{slot}"

    expected = end_cycle_reference(oracle, slot)
    for actual, step in ((problem, end_cycle), (backend, end_cycle_reference)):
        sums = step(actual, slot)
        scale = float(expected.abs().max())
        assert_near(sums, expected, "sums", rtol=1e-5, atol=2e-6 * scale)
        actual.assert_near(oracle, [newest], atol=1e-6)
        actual.assert_unchanged(before, but=("snapshot", newest))
        for index, weight in enumerate(before["weight"]):
            assert_same_bits(actual.rows["snapshot"][index], weight, f"snapshot[{index}]")
            gone = weight - before["snapshot"][index]
            assert_same_bits(actual.rows[newest][index], gone, f"{newest}[{index}]")


@fewer()
@given(drawn=spec_lists(max_size=3), history=st.integers(1, 5))
def test_rebuilding_every_row_gives_a_symmetric_matrix(
    device: torch.device, drawn: list[Spec], history: int
) -> None:
    """With small whole numbers every sum is exact, and so is the symmetry."""
    problem = Problem(drawn, device, tiling=THREE, history=history)
    rows = [f"history_{slot}" for slot in range(history)]
    stored = {name: [(30 * t).round() for t in problem.rows[name]] for name in rows}
    for name in rows:
        for mine, values in zip(problem.rows[name], stored[name]):
            mine.copy_(values)
    matrix = torch.full((len(drawn), history, history), math.nan, dtype=torch.float64)
    for slot, name in enumerate(rows):
        for index, values in enumerate(stored[name]):
            problem.rows["snapshot"][index].fill_(7.0)
            problem.rows["weight"][index].copy_(7.0 + values)
        matrix[:, slot] = end_cycle(problem, slot).cpu()
        for index, values in enumerate(stored[name]):
            assert_same_bits(problem.rows[name][index], values + 0.0, f"{name}[{index}]")
    assert torch.equal(matrix, matrix.mT)
    for index in range(len(drawn)):
        basis = torch.stack([stored[name][index].double().flatten().cpu() for name in rows])
        assert torch.equal(matrix[index], basis @ basis.T)


@fewer()
@given(drawn=spec_lists(min_size=2), precision=precisions(), data=st.data())
def test_many_tensors_in_one_launch_are_each_alone_in_any_order(
    device: torch.device,
    drawn: list[Spec],
    precision: tuple[torch.dtype, torch.dtype],
    data: st.DataObject,
) -> None:
    together = Problem(drawn, device, precision=precision, tiling=THREE, history=3)
    sums = end_cycle(together, 1)
    order = data.draw(st.permutations(range(len(drawn))), label="order")
    shuffled = Problem([drawn[i] for i in order], device, precision=precision, history=3)
    assert_same_bits(end_cycle(shuffled, 1), sums[list(order)], "sums")
    shuffled.assert_same(together, order, ("snapshot", "history_1"))
    for index, spec in enumerate(drawn):
        alone = Problem([spec], device, precision=precision, history=3)
        assert_same_bits(end_cycle(alone, 1), sums[index : index + 1], "sums")
        alone.assert_same(together, [index], ("snapshot", "history_1"))


def test_five_runs_give_the_same_bits(device: torch.device) -> None:
    def once() -> Tensor:
        return end_cycle(Problem(plain((300,), (7, 9)), device, tiling=THREE, history=4), 2)

    first = once()
    for _ in range(4):
        assert_same_bits(once(), first, "sums")


def test_offsets_beyond_32_bits(device: torch.device) -> None:
    near, far = (
        Problem(plain((200,), (130,)), device, precision=PRECISIONS[1], history=2) for _ in "ab"
    )
    expected = end_cycle(near, 1)
    with FarAway(far.set):
        assert_same_bits(end_cycle(far, 1), expected, "sums")
    far.assert_same(near, (0, 1), ("snapshot", "history_1"))


def test_launch_counts(device: torch.device) -> None:
    problem = Problem(plain((300,), (7, 9)), device, history=2)
    with counted_launches() as log:
        end_cycle(problem, 0)
    assert log == ["_gram_kernel", "_reduce_kernel"]


@given(
    lengths=st.lists(st.integers(0, 900), min_size=1, max_size=5),
    columns=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_chunk_sums_are_added_up_in_fp64(
    device: torch.device, lengths: list[int], columns: int, seed: int
) -> None:
    """Up to several hundred chunks a tensor, more than the kernel takes at a time."""
    arena = Arena(device)
    chunks = ChunkTable([64 * length for length in lengths], [True] * len(lengths), 64, device)
    generator = torch.Generator().manual_seed(seed)
    partials = arena.put(torch.randn(chunks.count, columns, generator=generator))
    sums = arena.carve((len(lengths), columns), torch.float64)
    reduce_partials(partials, chunks, sums)
    arena.check()
    expected = torch.stack([part.double().sum(0) for part in partials.cpu().split(lengths)])
    assert_near(sums, expected, "sums", rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nonfinite_product_stays_with_its_tensor(device: torch.device, value: float) -> None:
    problem = Problem(plain((300,), (70,)), device, history=2)
    problem.rows["weight"][0][299] = value
    sums = end_cycle(problem, 0)
    assert not sums[0].isfinite().any()
    assert sums[1].isfinite().all()
