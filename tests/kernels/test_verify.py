"""Verification: moves that are rolled back at once, slopes, and where a decision puts the weights.

Whatever was done in between, a rollback restores every bit.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from kernel_launches import ALONG, BACKENDS, KERNELS, LEFT, LINEAR, PLAIN, Checked
from kernel_memory import DEVICE, assert_near, assert_same_bits
from kernel_problems import Make, Problem, assert_ledgers_near, problems
from kernel_specs import BF16, FP16, FP64, PRECISIONS, THREE, Precision, fewer, more, plain
from triton_hybrid.kernels.displacement import Displacement
from triton_hybrid.kernels.ledger import (
    FACTOR_COLUMN,
    FRACTION_COLUMN,
    PART_COLUMN,
    SLOPE_COLUMN,
    read_ledger,
    write_ledger,
)
from triton_hybrid.kernels.rows import NONE, OWN

FACTOR, SLOPE, FRACTION, PART = (
    column.value for column in (FACTOR_COLUMN, SLOPE_COLUMN, FRACTION_COLUMN, PART_COLUMN)
)


@BACKENDS
@ALONG
@fewer(4)
@given(make=problems(groups=3, filled=True), stretch=st.integers(1, 3))
def test_what_is_too_far_is_rolled_back_bit_for_bit(
    backend: Checked, along: Displacement, make: Make, stretch: int
) -> None:
    problem = make().confident()
    problem.keep_snapshot()
    problem.prediction[:, FRACTION] = 0.5
    before = problem.snapshot()
    for number in range(stretch):
        backend.predict(problem, along, first=number == 0)
        assume(float(problem.sums[:, 1].sum()) > 0)
        assert read_ledger(problem.ledger)["stretch"] == number
        last = number == stretch - 1
        backend.check_move(problem, limit=0.0 if last else 1e9, cooldown=7.0)
    problem.assert_unchanged(before, but=LEFT)
    entries = read_ledger(problem.ledger)
    assert entries["cause_jump"] == entries["rejected"] == entries["rejections"] == 1
    assert (entries["cause_nonfinite"], entries["cooldown"], entries["horizon"]) == (0, 7, 0.75 / 2)
    assert (entries["moved"], entries["stretch"], entries["jump_square"]) == (0, 0, 0)

    # The gate stays closed through the cooldown, and so within the same stretch.
    backend.predict(problem, along, first=False)
    backend.check_move(problem)
    problem.assert_unchanged(before, but=LEFT)


@BACKENDS
@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_rolled_back_bit_for_bit(
    backend: Checked, index: int, value: float
) -> None:
    problem = Problem(plain((130,), (3,), (300,)), precision=BF16).confident()
    element = problem.specs[index].numel - 1
    problem.rows["slow_ema"][index][element] = value
    before = problem.snapshot()
    backend.predict(problem)
    assert (problem.sums[:, 2] > 0).tolist() == [i == index for i in range(3)]
    assert torch.isnan(problem.values("point")[index][element]) == math.isnan(value)
    backend.check_move(problem)
    problem.assert_unchanged(before, but=LEFT)
    entries = read_ledger(problem.ledger)
    assert (entries["cause_nonfinite"], entries["cause_jump"], entries["moved"]) == (1, 0, 0)


@BACKENDS
@pytest.mark.parametrize(("precision", "largest"), [(FP16, 65504.0), (BF16, 3.3895e38)], ids=str)
def test_an_overflow_of_the_16_bit_weight_alone_is_not_finite(
    backend: Checked, precision: Precision, largest: float
) -> None:
    """The master is fine; the parameter the model would see is infinite."""
    problem = Problem(plain((130,)), precision=precision).confident()
    problem.rows["weight"][0].fill_(largest)
    problem.rows["param"][0].fill_(largest)
    assert problem.rows["param"][0].isfinite().all()
    problem.rows["displacement"][0].zero_()[77] = largest * 0.003
    problem.keep_snapshot()
    before = problem.snapshot()
    backend.predict(problem, LINEAR, torch.ones(1, device=DEVICE))
    assert problem.rows["weight"][0].isfinite().all()
    assert problem.rows["param"][0].isinf().nonzero().tolist() == [[77]]
    backend.check_move(problem, limit=math.inf)
    problem.assert_unchanged(before, but=LEFT)
    assert read_ledger(problem.ledger)["cause_nonfinite"] == 1


@BACKENDS
def test_every_rejection_in_a_row_doubles_the_wait(backend: Checked) -> None:
    problem = Problem(plain((70,))).confident(horizon=1.0)
    waits = []
    for _ in range(13):
        problem.note(cooldown=0.0)
        backend.predict(problem)
        backend.check_move(problem, limit=0.0, cooldown=3.0)
        waits.append(read_ledger(problem.ledger)["cooldown"])
    assert waits == [3.0 * 2**n for n in range(11)] + [3.0 * 2**10] * 2
    assert read_ledger(problem.ledger)["horizon"] == 2.0**-13


ENTRIES = {
    "stretch": (0.0, 0.0, 2.0), "moved": (0.0, 1.0), "cooldown": (0.0, 0.0, 4.0),
    "nonfinite": (0.0, 0.0, 1.0), "confidence": (0.75, 0.25), "jump_square": (0.0, 4.0),
    "update_square": (0.0, 1.0, 9.0), "horizon": (1.0, 0.5), "rejections": (0.0, 1.0, 12.0),
    "rejected": (0.0, 3.0), "losses": (0.0, 500.0), "loss_late": (0.0, 1.0),
    "loss_noise": (0.0, 1.0),
}  # fmt: skip


@more(25)
@given(
    make=problems(max_size=2),
    entries=st.fixed_dictionaries({n: st.sampled_from(v) for n, v in ENTRIES.items()}),
    square=st.sampled_from((0.0, 1.0, 25.0, math.inf, math.nan)),
    bad=st.sampled_from((0.0, 0.0, 2.0)),
    limit=st.sampled_from((0.0, 1.5, 4.0, math.inf)),
    rest=st.sampled_from((0, 1, 200)),
)
def test_checking_a_move_is_its_torch_twin(
    make: Make, entries: dict[str, float], square: float, bad: float, limit: float, rest: int
) -> None:
    """Over any ledger and sums; ``rest`` tensors belong to other sets of the device."""
    both = make(), make()
    count = len(both[0].specs) + rest
    generator = torch.Generator().manual_seed(rest)
    sums = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    sums[:, 1:] = 0.0
    sums[-1, 1:] = torch.tensor([square, bad])
    prediction = torch.randn(count, 6, generator=generator)
    prediction[:, 3] = (prediction[:, 3] > -1.0).float()
    for problem, backend in zip(both, (KERNELS, PLAIN)):
        problem.ledger.copy_(write_ledger(entries, DEVICE))
        problem.scalars.sums = problem.arena.put(sums)
        problem.scalars.prediction = problem.arena.put(prediction)
        backend.check_move(problem, limit=limit)
    both[0].assert_same(both[1], rows=["weight", "param", "snapshot"])
    assert_near(both[0].scalars.prediction, both[1].scalars.prediction, "prediction")
    assert_ledgers_near(both[0].ledger, both[1].ledger, rtol=1e-12)


@BACKENDS
@pytest.mark.parametrize("limit", [0.0, 1e9], ids=["rolled back", "kept"])
def test_two_sets_are_checked_together(backend: Checked, limit: float) -> None:
    half = Problem(plain((130,), (3,)), precision=FP16, tiling=THREE).confident()
    single = Problem(plain((70,)), tiling=THREE)
    half.share(single)
    problems, before = (half, single), (half.snapshot(), single.snapshot())
    for problem in problems:
        backend.predict(problem)
    moved = [problem.snapshot() for problem in problems]
    for problem, last in zip(problems, (False, True)):
        backend.check_move(problem, limit=limit, last=last)
        assert (read_ledger(half.ledger)["rejected"] == 1) == (last and limit == 0.0)
    for problem, then in zip(problems, moved if limit else before):
        problem.assert_unchanged(then, but=(*LEFT, "prediction"))
    expected = half.scalars.sums[:, 0] if limit else torch.zeros(3, device=DEVICE)
    assert_near(half.scalars.prediction[:, SLOPE], expected, "slopes")


# --------------------------------------------------------------------------------- slopes


@given(make=problems(groups=3, absent=True), scale=st.sampled_from((1.0, 8.0)))
def test_slopes_match_the_fp64_oracle(make: Make, scale: float) -> None:
    problem = make()
    problem.note(loss_scale=scale)
    oracle = problem.promoted()
    expected = PLAIN.slopes(oracle)
    near = 2e-6 * float(expected[:, :2].abs().max())
    for backend in (PLAIN, KERNELS):
        sums = backend.slopes(problem)
        assert_near(sums, expected, "sums", rtol=1e-5, atol=near)
        for index, spec in enumerate(problem.specs):
            if not spec.present:
                assert (sums[index] == 0).all()
    for index, spec in enumerate(problem.specs):
        if spec.present:
            gone = oracle.rows["weight"][index] - oracle.rows["snapshot"][index]
            slope = float((problem.rows["grad"][index].double() * gone).sum())
            sign = -1.0 if spec.group == 1 else 1.0
            assert float(expected[index, 0]) == pytest.approx(sign * slope / scale, abs=1e-5)


@BACKENDS
@fewer()
@given(
    make=problems(absent=True, filled=True),
    value=st.sampled_from((math.nan, math.inf, -math.inf)),
    data=st.data(),
)
def test_nonfinite_gradients_are_counted_where_they_are(
    backend: Checked, make: Make, value: float, data: st.DataObject
) -> None:
    problem = make()
    candidates = [i for i, spec in enumerate(problem.specs) if spec.present and spec.numel]
    index = data.draw(st.sampled_from(candidates), label="tensor")
    grad = problem.rows["grad"][index]
    (grad.select(0, 0) if grad.ndim else grad).fill_(value)
    problem.set_gradients()
    counted = backend.slopes(problem)[:, 2] > 0
    assert counted.tolist() == [i == index for i in range(len(problem.specs))]


@fewer(10)
@given(make=problems(groups=3, absent=True), scale=st.sampled_from((1.0, 8.0)))
def test_slopes_along_a_displacement_computed_again(make: Make, scale: float) -> None:
    """The gradient times what the prediction changed; 0 for tensors that take no part."""
    for backend in (PLAIN, KERNELS):
        problem = make().confident(loss_scale=scale)
        problem.prediction[::2, PART] = 0.0
        before = [weight.clone() for weight in problem.values("weight")]
        backend.predict(problem)
        gone = [b.double() - a.double() for a, b in zip(before, problem.values("point"))]
        floor = 0.0 if problem.precision.kept == NONE else 1e-7
        problem.prediction[1::4, PART] = -1.0
        sums = backend.slopes(problem)
        for index, spec in enumerate(problem.specs):
            slope, size = 0.0, 0.0
            if spec.present and index % 4 == 3:
                products = problem.rows["grad"][index].double() * gone[index]
                rounded = (problem.rows["grad"][index].double() * before[index]).abs().sum()
                slope, size = float(products.sum()), float(products.abs().sum())
                size += 1e5 * floor * float(rounded)
            sign = -1.0 if spec.group == 1 else 1.0
            assert float(sums[index, 0]) == pytest.approx(sign * slope / scale, abs=1e-5 * size)


@BACKENDS
def test_a_square_that_overflows_is_not_a_nonfinite_gradient(backend: Checked) -> None:
    problem = Problem(plain((130,), (3,)))
    problem.rows["grad"][0].fill_(1e25)
    sums = backend.slopes(problem)
    assert sums[:, 2].tolist() == [0, 0]
    assert sums[0, 1] == math.inf


# ----------------------------------------------------------------------------- correction


@given(
    make=problems(),
    fractions=st.permutations((0.0, 1.0, 0.625, 1.9)),
    restart=st.booleans(),
    decision=st.sampled_from((1.0, 2.0)),
)
def test_placing_is_its_torch_twin_bit_for_bit(
    make: Make, fractions: list[float], restart: bool, decision: float
) -> None:
    problem, twin = make(), make()
    for actual in (problem, twin):
        actual.decided(*fractions, decision=decision)
    oracle, before = problem.promoted(), problem.snapshot()
    for actual, backend in ((problem, KERNELS), (twin, PLAIN), (oracle, PLAIN)):
        backend.correct(actual, restart=restart)
    problem.assert_same(twin, rows=["param", "weight", "snapshot"])
    problem.assert_near(oracle, ("weight", "snapshot"), atol=1e-6)
    problem.assert_unchanged(before, but=("weight", "snapshot"))
    exact = problem.precision.kept == OWN
    for index, weight in enumerate(problem.values("weight")):
        fraction, snapshot = fractions[index % len(fractions)], problem.rows["snapshot"][index]
        if fraction == 1.0 or (fraction == 0.0 and exact):
            kept = before["weight" if fraction else "snapshot"][index]
            assert_same_bits(weight, kept, f"weight[{index}] at fraction {fraction}")
        if exact or not restart:
            assert_same_bits(snapshot, weight if restart else before["snapshot"][index], "snapshot")


@BACKENDS
@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_a_rollback_restores_every_bit_whatever_the_move_did(
    backend: Checked, restart: bool, precision: Precision
) -> None:
    problem = Problem(plain((130,), (5, 7)), precision=precision)
    problem.decided(0.0, decision=2.0)
    for index, snapshot in enumerate(problem.rows["snapshot"]):
        weight = problem.tensors.weight(index, slice(None))
        if not index:
            weight[:2] = torch.tensor([-0.0, 1e-42])
        problem.tensors.put_weight(index, slice(None), weight)
        snapshot.copy_(problem.values("weight")[index])
    before = problem.snapshot()
    for index in range(2):
        weight = problem.tensors.weight(index, slice(None))
        weight.add_(torch.randn_like(weight))
        weight[-3:] = torch.tensor([math.nan, math.inf, -math.inf])
        problem.tensors.put_weight(index, slice(None), weight)
    backend.correct(problem, restart=restart)
    problem.assert_unchanged(before)


@fewer(15)
@given(
    make=problems(groups=3, max_size=3, filled=True),
    fractions=st.permutations((0.0, 1.0, 0.625, 1.9)),
    stretch=st.integers(1, 3),
    data=st.data(),
)
def test_placing_along_a_displacement_computed_again(
    make: Make, fractions: list[float], stretch: int, data: st.DataObject
) -> None:
    """What nobody copied comes back bit for bit, and both backends agree on every bit.

    A tensor that somebody else has written meanwhile has what they wrote.
    """
    written = data.draw(st.sampled_from((None, *range(len(make().specs)))), label="written")
    both = make(), make()
    for problem, backend in zip(both, (KERNELS, PLAIN)):
        problem.confident()
        before = problem.snapshot()["weight"]
        for number in range(stretch):
            problem.prediction[:, FACTOR] = 0.5 + number
            backend.predict(problem, first=number == 0, share=0.4)
            backend.check_move(problem)
        point = [weight.clone() for weight in problem.values("point")]
        problem.decided(*fractions)
        if written is not None:
            problem.prediction[written, PART], problem.prediction[written, FRACTION] = -1.0, 1.0
            param = problem.rows["param"][written]
            if param.numel():
                param[(0,) * param.ndim] = 7.0
        backend.correct(problem)
        problem.again = None
        problem.check()
        for index, weight in enumerate(problem.values("weight")):
            fraction = fractions[index % len(fractions)]
            if index == written:
                continue
            if fraction in (0.0, 1.0):
                exact = (point if fraction else before)[index]
                assert_same_bits(weight, exact, f"weight[{index}] at fraction {fraction}")
            elif problem.precision.kept != NONE:
                start, end = before[index].double(), point[index].double()
                expected = start + fraction * (end - start)
                assert_near(weight, expected, f"weight[{index}]", 3e-6, 1e-6)
        if written is not None:
            assert (problem.rows["param"][written].flatten()[:1] == 7.0).all()
    if make().precision != FP64:  # whose bias corrections differ in the last bit
        both[0].assert_same(both[1], rows=["weight", "param"])


@BACKENDS
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_what_cannot_be_found_again_does_not_move(backend: Checked, precision: Precision) -> None:
    """Weights far smaller than their displacement, zeros, denormals, infinities."""
    values = [0.0, -0.0, 1e-42, -1e-30, 1e-6, 1e-3, 2.0, math.inf, -3e38, 5e-5, -1e-4]
    problem = Problem(plain((len(values),), (40,)), precision=precision).confident()
    weight = torch.tensor(values)
    for name in ("weight", "param") if precision.kept == OWN else ("param",):
        problem.rows[name][0].copy_(weight)
    if "remainder" in problem.rows:
        problem.rows["remainder"][0].zero_()
    before = problem.snapshot()
    backend.predict(problem)
    moved = problem.rows["param"][0].clone()
    if precision.kept != NONE:
        assert not torch.equal(moved[:1], before["param"][0][:1]), "a weight of zero moves"
    problem.decided(0.0, decision=2.0)
    backend.correct(problem)
    problem.assert_unchanged(before, but=(*LEFT, "prediction"))


@BACKENDS
@pytest.mark.parametrize("precision", [FP16, BF16], ids=str)
def test_masters_are_rounded_to_nearest_even(backend: Checked, precision: Precision) -> None:
    """Ties up and down, just beside a tie, signed zeros, denormals, the way to infinity."""
    info = torch.finfo(precision.param)
    ulp, largest = info.eps, info.max
    values = [1 + (n + half) * ulp for n in range(4) for half in (0.5, 0.5 - 1e-3, 0.5 + 1e-3)]
    values += [0.0, info.smallest_normal / 3, info.smallest_normal * 0.999, 1e-42]
    values += [largest, largest * (1 + ulp / 8), largest * (1 + ulp / 2), math.inf]
    values = [sign * value for value in values for sign in (1.0, -1.0)] + [math.nan]
    problem = Problem(plain((len(values),)), precision=precision).decided(0.0)
    problem.rows["snapshot"][0].copy_(torch.tensor(values))
    backend.correct(problem)
    assert_same_bits(problem.rows["weight"][0], problem.rows["snapshot"][0], "weight")
    expected = torch.tensor(values).to(precision.param)
    assert expected.isinf().sum() == 4, "two infinities, and two that are rounded to one"
    finite = ~expected.isnan()
    assert_same_bits(problem.rows["param"][0].cpu()[finite], expected[finite], "param")
    assert problem.rows["param"][0].cpu().isnan().equal(~finite)


@BACKENDS
@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize(("fraction", "decision"), [(1.0, 1.0), (0.5, 0.0)])
def test_weights_that_stay_keep_every_bit_whatever_the_snapshot(
    backend: Checked, restart: bool, fraction: float, decision: float
) -> None:
    """With fraction one; without a decision the snapshot stays as well."""
    problem = Problem(plain((130,), (0,)), precision=BF16)
    problem.decided(fraction, decision=decision)
    problem.rows["snapshot"][0][:3] = torch.tensor([math.nan, math.inf, 1e38])
    problem.rows["weight"][0][3] = problem.rows["param"][0][3] = -0.0
    before = problem.snapshot()
    backend.correct(problem, restart=restart)
    problem.assert_unchanged(before, but=("snapshot",))
    expected = before["weight" if restart and decision else "snapshot"][0]
    assert_same_bits(problem.rows["snapshot"][0], expected, "snapshot")
