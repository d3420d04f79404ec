"""Slopes before the verdict, correction after it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_helpers import (
    ONE,
    PRECISIONS,
    THREE,
    FarAway,
    Problem,
    Spec,
    assert_near,
    assert_same_bits,
    counted_launches,
    fewer,
    plain,
    precisions,
    set_entries,
    spec_lists,
)
from triton_hybrid.kernels.correct import correct, correct_reference, slopes, slopes_reference
from triton_hybrid.kernels.divergence import FRACTION_COLUMN

FRACTION = int(FRACTION_COLUMN.value)
MOVED_ROWS = ("weight", "snapshot")

# --------------------------------------------------------------------------------- slopes


def measure(problem: Problem) -> torch.Tensor:
    """The kernel into poisoned scratch and sums."""
    problem.sums.fill_(math.nan)
    before = problem.snapshot()
    partials = problem.partials(every=False)
    slopes(problem.set, problem.group, problem.hyper, problem.ledger, partials, problem.sums)
    problem.check()
    problem.assert_unchanged(before)
    return problem.sums


def measure_reference(problem: Problem) -> torch.Tensor:
    """Plain torch."""
    problem.sums.fill_(math.nan)
    slopes_reference(problem.set, problem.group, problem.hyper, problem.ledger, problem.sums)
    return problem.sums


@given(drawn=spec_lists(groups=3, absent=True), precision=precisions(), programs=st.booleans())
def test_slopes_match_the_fp64_oracle(
    device: torch.device,
    drawn: list[Spec],
    precision: tuple[torch.dtype, torch.dtype],
    programs: bool,
) -> None:
    tiling = THREE if programs else ONE
    problem = Problem(drawn, device, precision=precision, tiling=tiling)
    expected = measure_reference(problem.promoted())
    scale = float(expected[:, :2].abs().max())
    for sums in (measure_reference(problem).clone(), measure(problem)):
        assert_near(sums, expected, "sums", rtol=1e-5, atol=2e-6 * scale)
        for index, spec in enumerate(drawn):
            if not spec.present:
                assert (sums[index] == 0).all()
    for index, spec in enumerate(drawn):
        if spec.present:
            gone = problem.rows["weight"][index] - problem.rows["snapshot"][index]
            slope = (problem.rows["grad"][index].double() * gone.double()).sum()
            sign = -1.0 if spec.group == 1 else 1.0
            assert float(expected[index, 0]) == pytest.approx(sign * float(slope), abs=1e-5)


@pytest.mark.parametrize("measure", [measure, measure_reference], ids=["triton", "torch"])
@fewer()
@given(
    drawn=spec_lists(absent=True).filter(lambda list_: any(s.present and s.numel for s in list_)),
    precision=precisions(),
    value=st.sampled_from((math.nan, math.inf, -math.inf)),
    data=st.data(),
)
def test_nonfinite_gradients_are_counted_where_they_are(
    device: torch.device,
    measure: Callable[[Problem], torch.Tensor],
    drawn: list[Spec],
    precision: tuple[torch.dtype, torch.dtype],
    value: float,
    data: st.DataObject,
) -> None:
    problem = Problem(drawn, device, precision=precision)
    candidates = [i for i, spec in enumerate(drawn) if spec.present and spec.numel]
    index = data.draw(st.sampled_from(candidates), label="tensor")
    problem.rows["grad"][index].select(0, 0).fill_(value) if drawn[index].shape else problem.rows[
        "grad"
    ][index].fill_(value)
    problem.set_gradients()
    counted = measure(problem)[:, 2] > 0
    assert counted.tolist() == [i == index for i in range(len(drawn))]


@pytest.mark.parametrize("measure", [measure, measure_reference], ids=["triton", "torch"])
def test_a_square_that_overflows_is_not_a_nonfinite_gradient(
    device: torch.device, measure: Callable[[Problem], torch.Tensor]
) -> None:
    problem = Problem(plain((130,), (3,)), device)
    problem.rows["grad"][0].fill_(1e25)
    sums = measure(problem)
    assert sums[:, 2].tolist() == [0, 0]
    assert sums[0, 1] == math.inf


# ----------------------------------------------------------------------------- correction


def place(problem: Problem, *, restart: bool = False) -> None:
    """The kernel."""
    memory, ledger = problem.memory.clone(), problem.ledger.clone()
    correct(problem.set, problem.memory, problem.ledger, restart=restart)
    problem.check()
    assert_same_bits(problem.memory, memory, "memory")
    assert_same_bits(problem.ledger, ledger, "ledger")


def place_reference(problem: Problem, *, restart: bool = False) -> None:
    """Plain torch."""
    correct_reference(problem.set, problem.memory, problem.ledger, restart=restart)
    problem.check()


Place = Callable[..., None]
BACKENDS = pytest.mark.parametrize("place", [place, place_reference], ids=["triton", "torch"])


def judged(problem: Problem, *fractions: float, verdict: float = 1.0) -> Problem:
    """A verdict in the ledger, and step fractions in the memory, repeated as needed."""
    set_entries(problem.ledger, verdict=verdict)
    for index in range(len(problem.specs)):
        problem.memory[index, FRACTION] = fractions[index % len(fractions)]
    return problem


@given(
    drawn=spec_lists(),
    precision=precisions(),
    fractions=st.permutations((0.0, 1.0, 0.625, 1.9)),
    restart=st.booleans(),
    verdict=st.sampled_from((1.0, 2.0)),
    programs=st.booleans(),
)
def test_placing_is_its_reference_bit_for_bit(
    device: torch.device,
    drawn: list[Spec],
    precision: tuple[torch.dtype, torch.dtype],
    fractions: list[float],
    restart: bool,
    verdict: float,
    programs: bool,
) -> None:
    tiling = THREE if programs else ONE
    problem, backend = (Problem(drawn, device, precision=precision, tiling=tiling) for _ in "ab")
    for actual in (problem, backend):
        judged(actual, *fractions, verdict=verdict)
    oracle, before = problem.promoted(), problem.snapshot()
    place(problem, restart=restart)
    place_reference(backend, restart=restart)
    place_reference(oracle, restart=restart)
    problem.assert_same(backend, range(len(drawn)), ("param", *MOVED_ROWS))
    problem.assert_near(oracle, MOVED_ROWS, atol=1e-6)
    problem.assert_unchanged(before, but=("param", "weight", "snapshot"))
    for index in range(len(drawn)):
        fraction = fractions[index % len(fractions)]
        weight, snapshot = problem.rows["weight"][index], problem.rows["snapshot"][index]
        if fraction in (0.0, 1.0):
            kept = before["weight" if fraction else "snapshot"][index]
            assert_same_bits(weight, kept, f"weight[{index}] at fraction {fraction}")
        assert_same_bits(snapshot, weight if restart else before["snapshot"][index], "snapshot")


@BACKENDS
@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_a_take_back_restores_every_bit_whatever_the_move_did(
    device: torch.device,
    place: Place,
    restart: bool,
    precision: tuple[torch.dtype, torch.dtype],
) -> None:
    problem = judged(Problem(plain((130,), (5, 7)), device, precision=precision), 0.0, verdict=2.0)
    for index, weight in enumerate(problem.rows["weight"]):
        problem.rows["snapshot"][index].copy_(weight)
    problem.rows["snapshot"][0].flatten()[:2] = torch.tensor([-0.0, 1e-42])
    problem.rows["weight"][0].copy_(problem.rows["snapshot"][0])
    problem.rows["param"][0].copy_(problem.rows["snapshot"][0])
    before = problem.snapshot()
    for weight, param in zip(problem.rows["weight"], problem.rows["param"]):
        weight.add_(torch.randn_like(weight))
        weight.flatten()[-3:] = torch.tensor([math.nan, math.inf, -math.inf])
        param.copy_(weight)
    place(problem, restart=restart)
    problem.assert_unchanged(before)


@BACKENDS
@pytest.mark.parametrize("precision", PRECISIONS[1:3], ids=str)
def test_masters_are_rounded_to_nearest_even(
    device: torch.device, place: Place, precision: tuple[torch.dtype, torch.dtype]
) -> None:
    """Ties up and down, just beside a tie, signed zeros, denormals, the way to infinity."""
    info = torch.finfo(precision[0])
    ulp, largest = info.eps, info.max
    values = [1 + (n + half) * ulp for n in range(4) for half in (0.5, 0.5 - 1e-3, 0.5 + 1e-3)]
    values += [0.0, info.smallest_normal / 3, info.smallest_normal * 0.999, 1e-42]
    values += [largest, largest * (1 + ulp / 8), largest * (1 + ulp / 2), math.inf]
    values = [sign * value for value in values for sign in (1.0, -1.0)] + [math.nan]
    problem = judged(Problem(plain((len(values),)), device, precision=precision), 0.0)
    problem.rows["snapshot"][0].copy_(torch.tensor(values))
    place(problem)
    assert_same_bits(problem.rows["weight"][0], problem.rows["snapshot"][0], "weight")
    expected = torch.tensor(values).to(precision[0])
    assert expected.isinf().sum() == 4, "two infinities, and two that are rounded to one"
    finite = ~expected.isnan()
    assert_same_bits(problem.rows["param"][0].cpu()[finite], expected[finite], "param")
    assert problem.rows["param"][0].cpu().isnan().equal(~finite)


@BACKENDS
@pytest.mark.parametrize("restart", [False, True])
def test_fraction_one_leaves_every_bit_whatever_the_snapshot(
    device: torch.device, place: Place, restart: bool
) -> None:
    problem = judged(Problem(plain((130,)), device, precision=PRECISIONS[2]), 1.0)
    problem.rows["snapshot"][0][:3] = torch.tensor([math.nan, math.inf, 1e38])
    problem.rows["weight"][0][3] = -0.0
    problem.rows["param"][0][3] = -0.0
    before = problem.snapshot()
    place(problem, restart=restart)
    problem.assert_unchanged(before, but=("snapshot",))
    expected = before["weight" if restart else "snapshot"][0]
    assert_same_bits(problem.rows["snapshot"][0], expected, "snapshot")


@BACKENDS
@pytest.mark.parametrize("restart", [False, True])
def test_without_a_verdict_no_byte_changes(
    device: torch.device, place: Place, restart: bool
) -> None:
    problem = judged(Problem(plain((130,), (0,)), device), 0.5, verdict=0.0)
    before = problem.snapshot()
    place(problem, restart=restart)
    problem.assert_unchanged(before)


@fewer()
@given(drawn=spec_lists(min_size=2), precision=precisions(), data=st.data())
def test_many_tensors_in_one_launch_are_each_alone_in_any_order(
    device: torch.device,
    drawn: list[Spec],
    precision: tuple[torch.dtype, torch.dtype],
    data: st.DataObject,
) -> None:
    def placed(specs: list[Spec], **options: object) -> Problem:
        problem = judged(Problem(specs, device, precision=precision, **options), 0.75)  # type: ignore[arg-type]
        measure(problem)
        place(problem, restart=True)
        return problem

    together = placed(drawn, tiling=THREE)
    order = data.draw(st.permutations(range(len(drawn))), label="order")
    shuffled = placed([drawn[i] for i in order])
    shuffled.assert_same(together, order, ("param", *MOVED_ROWS))
    assert_same_bits(shuffled.sums, together.sums[list(order)], "sums")
    for index, spec in enumerate(drawn):
        alone = placed([spec])
        alone.assert_same(together, [index], ("param", *MOVED_ROWS))
        assert_same_bits(alone.sums, together.sums[index : index + 1], "sums")


def test_five_runs_give_the_same_bits(device: torch.device) -> None:
    def once() -> Problem:
        problem = judged(Problem(plain((300,), (7, 9)), device, tiling=THREE), 0.3, 1.4)
        measure(problem)
        place(problem)
        return problem

    first = once()
    for _ in range(4):
        again = once()
        again.assert_same(first, (0, 1), MOVED_ROWS)
        assert_same_bits(again.sums, first.sums, "sums")


def test_offsets_beyond_32_bits(device: torch.device) -> None:
    near, far = (
        judged(Problem(plain((200,), (130,)), device, precision=PRECISIONS[1]), 0.5) for _ in "ab"
    )
    measure(near)
    place(near, restart=True)
    with FarAway(far.set):
        measure(far)
        place(far, restart=True)
    far.assert_same(near, (0, 1), ("param", *MOVED_ROWS))
    assert_same_bits(far.sums, near.sums, "sums")


def test_launch_counts(device: torch.device) -> None:
    problem = judged(Problem(plain((300,), (7, 9)), device), 0.5)
    with counted_launches() as log:
        measure(problem)
        place(problem)
    assert log == ["_slopes_kernel", "_reduce_kernel", "_correct_kernel"]
